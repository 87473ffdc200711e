"""Launches that meet, are interrupted, or come after the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Launch

pytestmark = [pytest.mark.launch, pytest.mark.any_mpi]

MODULE = """
import os, time
import torch
def model(): return torch.nn.Linear(2, 1)
def train_data(): return [torch.ones(2)] * 8
def loss(model, batch):
    if os.path.exists("go"): return model(batch).square().mean()
    time.sleep(0.02)
    return model(batch).square().mean()
"""
KEYS = """
train = { steps = 2000, batch = 4 }
optimizer = { name = "sgd", lr = 0.01 }
checkpoint = { every = 5 }
run = { report = false }
"""
RUN = ("-m", "hpctrain", "run", "slow.toml")


@pytest.fixture
def runs(launch: Launch) -> Path:
    """Where runs of the job `slow` go."""
    launch.job(MODULE, KEYS, name="slow")
    return launch.folder / "runs" / "slow"


@contextmanager
def training(launch: Launch, ranks: int, run: Path) -> Iterator[subprocess.Popen[str]]:
    """A launch that has written its first checkpoint."""
    process = launch.start(ranks, *RUN)
    try:
        for _ in range(1200):
            if any(run.glob("checkpoints/step-*/manifest.json")) or process.poll() is not None:
                break
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_two_launches_of_a_job_do_not_meet(launch: Launch, runs: Path) -> None:
    with training(launch, 2, runs / "001"):
        second = launch(0, *RUN, "--set", "run.log_every=1", "--run-dir", runs / "001")
        assert second.status == 2
        assert "is being trained by pid" in second.err
        assert "Traceback" not in second.err
        with training(launch, 0, runs / "002") as third:
            os.kill(third.pid, signal.SIGKILL)
            _, err = third.communicate()
        assert "001 is being trained by pid" in err
        assert "this run goes to 002" in err


def test_end_of_a_run_and_what_comes_after(launch: Launch, runs: Path) -> None:
    ended = launch(0, *RUN, "--set", "train.steps=4")
    assert ended.status == 0, ended.err
    before = {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()}
    again = launch(2, *RUN, "--set", "train.steps=4", "--run-dir", runs / "001")
    assert again.status == 0
    assert again.err.count("is already finished at step 4, nothing to do") == 1
    assert {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_interrupted_run_says_how_to_go_on(launch: Launch, runs: Path, ranks: int) -> None:
    with training(launch, ranks, runs / "001") as process:
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    log = (runs / "001" / "logs" / "rank-00000.log").read_text()
    text = "start the same command again to continue"
    assert text in log and "newest checkpoint is step" in log
    if ranks == 0:
        assert process.returncode == 130
        assert err.count(text) == 1
        assert "Traceback" not in err
    (launch.folder / "go").touch()
    resumed = launch(ranks, *RUN, "--set", "checkpoint.every=0")
    assert resumed.status == 0, resumed.err
    assert "resumed at step" in resumed.err
    facts = json.loads((runs / "001" / "run.json").read_text())
    assert facts["finished"] and len(facts["history"]) == 1


def test_folder_of_the_user_is_not_overwritten(launch: Launch, runs: Path) -> None:
    (launch.folder / "mine").mkdir()
    (launch.folder / "mine" / "metrics.jsonl").write_text("precious")
    ended = launch(2, *RUN, "--run-dir", "mine")
    assert ended.status == 2
    assert ended.err.count("no run.json of hpctrain") == 1
    assert [p.name for p in (launch.folder / "mine").iterdir()] == ["metrics.jsonl"]
    assert (launch.folder / "mine" / "metrics.jsonl").read_text() == "precious"
