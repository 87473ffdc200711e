"""What Slurm is given, and what is told of its answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpctrain.errors import JobError, UnfitError
from hpctrain.submit import queue
from hpctrain.submit.config import SubmitConfig

if TYPE_CHECKING:
    from conftest import Launch

pytestmark = [pytest.mark.launch, pytest.mark.any_mpi]

MODULE = """
import torch
def model(width=2): return torch.nn.Linear(2, width)
def train_data(): return [torch.ones(2)] * 8
def loss(model, batch): return model(batch).square().mean()
"""
KEYS = """
train = { steps = 2, batch = 4 }
optimizer = { name = "sgd", lr = 0.01 }
submit = { nodes = 2, time = "1:00:00", launcher = "mpirun" }
"""
SUBMIT = ("-m", "hpctrain", "submit", "digits.toml")


@pytest.fixture
def cluster(launch: Launch) -> Launch:
    """A login node whose sbatch writes down what it is given."""
    tools = launch.folder / "tools"
    tools.mkdir()
    sbatch = (
        '#!/bin/sh\necho "$@" >given\ncase $REFUSE in 1) echo no such account >&2; exit 1; esac\n'
    )
    (tools / "sbatch").write_text(sbatch + "echo '42;main'\n")
    (tools / "sbatch").chmod(0o755)
    launch.environment["PATH"] = f"{tools}:{os.environ['PATH']}"
    launch.job(MODULE, KEYS, name="digits")
    return launch


def test_dry_run_shows_what_would_be_submitted(cluster: Launch) -> None:
    options = ("--time", "30", "--array", "0-3", "--set", "model.width=3", "--dry-run")
    ended = cluster(0, *SUBMIT, *options)
    assert ended.status == 0, ended.err
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --time=30",
        "#SBATCH --array=0-3",
        f'#SBATCH --chdir="{cluster.folder}"',
        "# Launcher: as asked for",
    ):
        assert line in ended.out.splitlines()
    assert '--set model.width=3 --set "seed=$SLURM_ARRAY_TASK_ID"' in ended.out
    assert not (cluster.folder / "given").exists()
    assert not (cluster.folder / "runs").exists()


def test_features_and_types_of_gpus(cluster: Launch) -> None:
    ended = cluster(0, *SUBMIT, "-C", "a100|h100", "--gpus-per-node", "a100:4", "--dry-run")
    assert ended.status == 0, ended.err
    assert '#SBATCH --constraint="a100|h100"' in ended.out.splitlines()
    assert "#SBATCH --gpus-per-node=a100:4" in ended.out.splitlines()


def test_packages_that_change_while_they_are_packed(
    cluster: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an archive of others than its name says stays for ever."""
    monkeypatch.chdir(cluster.folder)
    monkeypatch.setenv("PATH", cluster.environment["PATH"])
    deps = cluster.folder / "deps"
    deps.mkdir()
    config = SubmitConfig(launcher="mpirun", deps="deps")
    made = queue.prepare("job", Path("digits.toml"), Path("runs"), (), config, "Open MPI")
    (deps / "new.py").touch()
    with pytest.raises(JobError, match="changed while it was packed"):
        queue.submit(made)
    assert not (cluster.folder / "given").exists()
    (deps / "new.py").unlink()
    assert queue.submit(made).number == "42"


def test_key_of_an_array_must_be_one(cluster: Launch) -> None:
    """Not when each of its tasks has waited in the queue."""
    options = ("--array", "0-3", "--dry-run", "--set")
    ended = cluster(0, *SUBMIT, *options, "submit.array_key=train.stepz")
    assert ended.status == 2
    assert "train.stepz: unknown key; did you mean 'steps'? (--set train.stepz=0)" in ended.err
    assert "at least 1" in cluster(0, *SUBMIT, *options, "submit.array_key=train.steps").err


def test_submitted_job_is_told(cluster: Launch) -> None:
    ended = cluster(0, *SUBMIT)
    assert ended.status == 0, ended.err
    *options, script = (cluster.folder / "given").read_text().split()
    assert options == ["--parsable"]
    assert (cluster.folder / script).read_text().startswith("#!/bin/bash\n#SBATCH")
    assert (cluster.folder / script).stat().st_mode & 0o777 == 0o600
    assert "job 42 is queued" in ended.out
    assert "scancel 42" in ended.out
    assert "runs/digits/slurm-42.log" in ended.out


def test_what_slurm_refuses_and_mistakes_of_the_job(cluster: Launch) -> None:
    refused = cluster(0, *SUBMIT, REFUSE="1")
    assert refused.status == 1
    assert "Slurm does not take the job" in refused.err and "no such account" in refused.err
    (cluster.folder / "given").unlink()
    mistake = cluster(0, *SUBMIT, "--partition", "a b", "--nodes", "0", "--set", "train.step=3")
    assert mistake.status == 2
    for text in ("submit.partition", "submit.nodes", "train.step"):
        assert text in mistake.err
    assert "Traceback" not in refused.err + mistake.err
    assert not (cluster.folder / "given").exists()


def test_without_slurm(launch: Launch) -> None:
    launch.job(MODULE, KEYS, name="digits")
    ended = launch(0, *SUBMIT, PATH=str(launch.folder))
    assert ended.status == 3
    assert "there is no sbatch here" in ended.err


@pytest.mark.slow
def test_submit_has_no_part_in_what_is_trained(launch: Launch) -> None:
    """The same run goes on when other nodes are asked for."""
    launch.job(MODULE, KEYS, name="digits")
    run = ("-m", "hpctrain", "run", "digits.toml", "--run-dir", "run")
    assert launch(0, *run, "--set", "run.report=false").status == 0
    again = launch(0, *run, "--set", "submit.nodes=7")
    assert again.status == 0
    assert "already finished" in again.err
    assert json.loads((launch.folder / "run" / "run.json").read_text())["finished"]


@pytest.mark.parametrize("case", ["link", "file", "no folder"])
def test_script_is_made_by_nobody_else(
    cluster: Launch, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Where others may write, one of them may have made a script of that name before."""
    monkeypatch.chdir(cluster.folder)
    monkeypatch.setenv("PATH", cluster.environment["PATH"])
    monkeypatch.setattr("time.strftime", lambda _: "now")
    runs = cluster.folder / "runs"
    script, other = runs / f"submit-now-{os.getpid()}.sh", cluster.folder / "precious"
    if case == "no folder":
        runs.touch()
    else:
        runs.mkdir()
        other.write_text("kept")
        script.symlink_to(other) if case == "link" else script.write_text("theirs")
    submission = queue.prepare(
        "job", Path("digits.toml"), runs, (), SubmitConfig(launcher="mpirun"), "Open MPI"
    )
    with pytest.raises(UnfitError, match="the batch script, or the packages, cannot be written"):
        queue.submit(submission)
    assert not (cluster.folder / "given").exists()
    if case == "link":
        assert other.read_text() == "kept"


def test_working_directory_that_is_gone(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = launch.folder / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UnfitError, match="the working directory cannot be used"):
        queue.prepare("job", Path("x"), Path("runs"), (), SubmitConfig(launcher="mpirun"), "MPICH")
