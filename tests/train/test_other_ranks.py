"""What 2 ranks wrote goes on on 1, 2 or 3: each sample once an epoch, and the same loss curve."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from left_behind import losses

from hpctrain.data.batches import Batches

if TYPE_CHECKING:
    from conftest import Launch

pytestmark = [pytest.mark.launch, pytest.mark.any_mpi]

SAMPLES, BATCH, SEED = 23, 10, 4
STEPS = 23
"""So that all samples are computed equally often; the run is cut inside an epoch."""
CUT = 5

MODULE = """
import os
import torch
from torch import nn

def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()

class Points:
    def __init__(self):
        self.x = torch.randn(23, 3, generator=torch.Generator().manual_seed(0)).double()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.x[index].sum().sin()[None], index

train_data = Points

def loss(model, batch):
    x, y, indices = batch
    if "RECORD" in os.environ:
        with open(f"{os.environ['RECORD']}-{os.getpid()}", "a") as file:
            file.writelines(f"{index}\\n" for index in indices.tolist())
    return (model(x) - y).square().mean()
"""
KEYS = f"""
seed = {SEED}
train = {{ steps = {STEPS}, batch = {BATCH} }}
optimizer = {{ name = "adamw", lr = 0.01 }}
run = {{ report = false }}
"""
RUN = ("-m", "hpctrain", "run", "job.toml", "--run-dir")


def plain_losses() -> list[float]:
    """What one process computes with a loop of its own."""
    job: dict[str, Any] = {}
    exec(MODULE, job)
    model = job["model"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batches = Batches(job["train_data"](), batch=BATCH, seed=SEED)
    found = []
    for step in range(STEPS):
        (batch,) = batches.share(step).subsets
        optimizer.zero_grad()
        value = job["loss"](model, batch)
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found


def computed(folder: Path, *names: str) -> Counter[int]:
    """How often each sample was computed in launches."""
    files = [path for name in names for path in folder.glob(f"{name}-*")]
    return Counter(int(line) for file in files for line in file.read_text().split())


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of 2 ranks."""
    from conftest import Launch

    launch = Launch(tmp_path_factory.mktemp("cut"))
    launch.job(MODULE, KEYS, name="job")
    ended = launch(2, *RUN, "cut", "--set", f"train.steps={CUT}", RECORD="first")
    assert ended.status == 0, ended.err
    return launch.folder


@pytest.mark.parametrize("ranks", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 3])
def test_goes_on_on_other_ranks(launch: Launch, cut: Path, ranks: int) -> None:
    shutil.copytree(cut, launch.folder, dirs_exist_ok=True)
    ended = launch(ranks, *RUN, "cut", RECORD="second")
    assert ended.status == 0, ended.err
    assert f"resumed at step {CUT}" in ended.err
    assert ("checkpoint is of 2 ranks" in ended.err) == (ranks != 2)
    found = list(losses(launch.folder / "cut").values())
    assert found == pytest.approx(plain_losses(), rel=1e-10)
    whole, left = divmod(CUT * BATCH, SAMPLES)
    first = computed(launch.folder, "first")
    assert sorted(first.values()) == [whole] * (SAMPLES - left) + [whole + 1] * left
    assert computed(launch.folder, "first", "second") == dict.fromkeys(range(SAMPLES), BATCH)
