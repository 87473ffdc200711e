"""A run that is told to end saves, asks to be started again, and goes on with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from left_behind import Undisturbed, assert_same_parameters

from hpctrain.world import World

if TYPE_CHECKING:
    from conftest import Ended, Launch

pytestmark = pytest.mark.launch

# One rank tells itself, as a batch system would, at some batch in training or evaluation. One may
# die, and the others wait for that.
MODULE = """
import os, signal, time
import torch
from hpctrain.world import launched_rank
count = {True: 0, False: 0}
def model():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(), torch.nn.Linear(4, 1))
def train_data(): return list(torch.rand(64, 3, generator=torch.Generator().manual_seed(0)))
validation_data = train_data
def loss(model, batch):
    count[model.training] += 1
    when, who, number, nth = os.environ.get("TELL", "- 0 - 0").split()
    here = "training" if model.training else "evaluation"
    is_me = (when, int(who)) == (here, launched_rank(os.environ))
    if is_me and count[model.training] == int(nth):
        os.kill(os.getpid(), int(number))
    if os.environ.get("DIE") == str(launched_rank(os.environ)):
        open("died", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    while "DIE" in os.environ and not os.path.exists("died"):
        time.sleep(0.01)
    if os.path.exists("slow"):
        time.sleep(0.02)
    return model(batch).square().mean()
"""
KEYS = """
train = { steps = 12, batch = 4, micro_batch = 1, eval_every = 5 }
optimizer = { name = "adamw", lr = 0.01 }
checkpoint = { every = 0 }
run = { report = false }
"""
RUN = ("-m", "hpctrain", "run", "job.toml")
MODES = {"allreduce": (), "coded": ("--set", "exchange.mode=coded", "--set", "coded.blocks=6")}
REQUEUE = 75


def undisturbed_of(mode: str, undisturbed: Undisturbed, launch: Launch) -> dict[str, torch.Tensor]:
    """Parameters at the end of a run that nobody tells anything."""

    def run(folder: Path) -> None:
        ended = launch(2, *RUN, *MODES[mode], "--run-dir", folder)
        assert ended.status == 0, ended.err

    return undisturbed.of(mode, run)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


def assert_saved(launch: Launch, ended: Ended) -> int:
    """That it asks to be started again; the step that is saved."""
    assert ended.status == REQUEUE, ended.err
    assert ended.err.count("told to end: saved at step") == 1
    assert "Traceback" not in ended.err
    facts = json.loads((launch.folder / "told" / "run.json").read_text())
    assert facts["finished"] is False
    (saved,) = (launch.folder / "told" / "checkpoints").glob("step-*")
    return int(saved.name.removeprefix("step-"))


@pytest.mark.any_mpi
@pytest.mark.parametrize(
    ("mode", "when", "who"),
    [
        ("allreduce", "training", 1),
        pytest.param("allreduce", "evaluation", 0, marks=pytest.mark.slow),
        pytest.param("coded", "training", 1, marks=pytest.mark.slow),
        pytest.param("coded", "evaluation", 0, marks=pytest.mark.slow),
        pytest.param("allreduce", "training", 0, marks=pytest.mark.slow),
        pytest.param("allreduce", "evaluation", 1, marks=pytest.mark.slow),
        pytest.param("coded", "training", 0, marks=pytest.mark.slow),
        pytest.param("coded", "evaluation", 1, marks=pytest.mark.slow),
    ],
)
def test_whoever_is_told_all_save_and_go_on(
    launch: Launch, undisturbed: Undisturbed, mode: str, when: str, who: int
) -> None:
    launch.job(MODULE, KEYS, name="job")
    options = (*MODES[mode], "--run-dir", "told")
    # In the coded mode a rank that is late computes less, or nothing.
    tell = f"{when} {who} {int(signal.SIGUSR1)} {1 if mode == 'coded' else 5}"
    step = assert_saved(launch, launch(2, *RUN, *options, TELL=tell))
    if mode == "coded" and who:  # the root may be some steps further when it hears of it
        assert 1 <= step <= 10
    else:
        assert step in (5, 10) if when == "evaluation" else 1 <= step <= 5
    again = launch(2, *RUN, *options)
    assert again.status == 0, again.err
    assert f"resumed at step {step}" in again.err + again.out
    expected = undisturbed_of(mode, undisturbed, launch)
    assert_same_parameters(launch.folder / "told", expected)


@pytest.mark.any_mpi
def test_sigterm_in_a_batch_job(launch: Launch) -> None:
    launch.job(MODULE, KEYS, name="job")
    tell = f"training 0 {int(signal.SIGTERM)} 5"
    ended = launch(1, *RUN, "--run-dir", "told", TELL=tell, SLURM_JOB_ID="17")
    assert_saved(launch, ended)
    ended = launch(1, *RUN, "--run-dir", "told", TELL=tell)
    assert ended.status == 128 + signal.SIGTERM


@pytest.mark.any_mpi
def test_a_step_that_is_saved_is_not_saved_again(launch: Launch) -> None:
    launch.job(MODULE, KEYS, name="job")
    options = ("--run-dir", "told", "--set", "checkpoint.every=1", "--set", "checkpoint.keep=1")
    tell = f"training 0 {int(signal.SIGUSR1)} 5"
    step = assert_saved(launch, launch(1, *RUN, *options, TELL=tell))
    assert step == 2  # four micro-batches a step: the fifth is in the second
    spans = (launch.folder / "told" / "trace" / "rank-00000.jsonl").read_text().splitlines()
    saves = [span for span in map(json.loads, spans) if span.get("name") == "save"]
    assert len(saves) == 2


@pytest.mark.slow
@pytest.mark.any_mpi
def test_a_run_that_lost_a_rank_is_told(
    launch: Launch, undisturbed: Undisturbed, world: World
) -> None:
    """Ranks that leave without the dead one all count as told."""
    if "Open MPI" not in world.library:
        pytest.skip("MPICH's launcher ends all ranks when one is killed")
    launch.job(MODULE, KEYS, name="job")
    options = (*MODES["coded"], "--set", "coded.copies=3", "--run-dir", "told")
    tell = f"evaluation 1 {int(signal.SIGUSR1)} 1"
    ended = launch(4, *RUN, *options, options=("--with-ft", "ulfm"), TELL=tell, DIE="3")
    assert "rank 3 is dead" in ended.err
    step = assert_saved(launch, ended)
    again = launch(2, *RUN, *options)
    assert again.status == 0, again.err
    assert f"resumed at step {step}" in again.err + again.out
    expected = undisturbed_of("coded", undisturbed, launch)
    assert_same_parameters(launch.folder / "told", expected)


@pytest.mark.slow
def test_the_launcher_passes_the_word_on(launch: Launch) -> None:
    """As the batch script asks it to."""
    launch.job(MODULE, KEYS, name="job")
    (launch.folder / "slow").touch()
    process = launch.start(2, *RUN, "--run-dir", "told", "--set", "train.steps=5000")
    try:
        metrics = launch.folder / "told" / "metrics.jsonl"
        for _ in range(1200):
            if metrics.exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGUSR1)
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, err = process.communicate()
        pytest.fail(err)
    assert process.returncode == REQUEUE, err
    assert "told to end: saved at step" in err
