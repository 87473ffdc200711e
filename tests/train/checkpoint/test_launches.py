"""A run whose last checkpoint fails does not end as if all were well."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Launch

pytestmark = [pytest.mark.launch, pytest.mark.any_mpi]

# Before the end a file takes the place of the folder of checkpoints.
MODULE = """
import pathlib, shutil
import torch

count = 0

def model():
    return torch.nn.Linear(3, 1)

def train_data():
    return list(torch.rand(64, 3, generator=torch.Generator().manual_seed(0)))

def loss(model, batch):
    global count
    count += 1
    folder = pathlib.Path("run/checkpoints")
    if count == 40:  # both ranks come to that, one of them first
        shutil.rmtree(folder, ignore_errors=True)
        folder.touch()
    return model(batch).square().mean()
"""
KEYS = """
train = { steps = 20, batch = 8, micro_batch = 1 }
optimizer = { name = "sgd", lr = 0.01 }
checkpoint = { every = 0 }
run = { report = false }
"""


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param((), id="allreduce", marks=pytest.mark.slow),
        pytest.param(("exchange.mode=coded", "coded.blocks=2"), id="coded"),
        pytest.param(("checkpoint.asynchronous=false",), id="sync", marks=pytest.mark.slow),
    ],
)
def test_last_checkpoint_fails(launch: Launch, keys: tuple[str, ...]) -> None:
    launch.job(MODULE, KEYS, name="job")
    sets = [word for key in keys for word in ("--set", key)]
    ended = launch(2, "-m", "hpctrain", "run", "job.toml", "--run-dir", "run", *sets)
    assert ended.status == 1, ended.err
    assert ended.err.count("step 20 could not be written; there is no other one: got") == 1
    assert "Traceback" not in ended.err
    facts = json.loads((launch.folder / "run" / "run.json").read_text())
    assert facts["finished"] is False
