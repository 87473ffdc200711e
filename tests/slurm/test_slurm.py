"""The main job on a real Slurm: it ends with the bits of a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from left_behind import Undisturbed, assert_same_parameters

from hpctrain.submit.launcher import family_of
from hpctrain.world import library_name, load_mpi

if TYPE_CHECKING:
    from conftest import Launch
    from slurm_box import SlurmBox

    from .conftest import Job, Submitter

pytestmark = [pytest.mark.launch, pytest.mark.alone]

MAIN_JOB = Path(__file__).parents[2] / "jobs" / "stdlib_lm.toml"
VALUES = (
    *("model.width=16", "model.heads=2", "model.layers=1", "train.batch=8", "train.steps=150"),
    *("schedule.warmup=10", "run.report=false", "run.line_s=0.2", "checkpoint.every=0"),
)
SET = tuple(word for value in VALUES for word in ("--set", value))
SLOW = ("inject.kind=persistent", "inject.ranks=[0, 1]", "inject.factor=10")
LONG = (*SET, *(word for value in SLOW for word in ("--set", value)))
"""The same, long enough for something to happen meanwhile."""
TWO_RANKS = ("--nodes", "1", "--ntasks-per-node", "2")
IN_TRAINING = "samples/s"
"""What the log says only while it trains."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY")


def undisturbed_of(undisturbed: Undisturbed, launch: Launch, seed: int = 1) -> dict[str, Any]:
    """Parameters at the end of a run without Slurm."""

    def run(folder: Path) -> None:
        seeded = ("--set", f"seed={seed}", "--run-dir", folder)
        ended = launch(2, "-m", "hpctrain", "run", MAIN_JOB, *SET, *seeded)
        assert ended.status == 0, ended.err

    return undisturbed.of(seed, run)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


def assert_completed(slurm: SlurmBox, job: Job, expected: dict[str, Any]) -> dict[str, str]:
    facts = slurm.wait(job.number, *ENDED)
    assert facts["JobState"] == "COMPLETED", job.told
    assert_same_parameters(job.run, expected)
    return facts


def test_by_srun_on_one_node(
    slurm: SlurmBox, submitted: Submitter, launch: Launch, undisturbed: Undisturbed
) -> None:
    """With the type that belongs to the MPI library."""
    family = family_of(library_name(load_mpi().Get_library_version()))
    kind = "pmix" if family == "Open MPI" else "pmi2"
    told = slurm("sh", "-c", f"srun --mpi={kind} --test-only true 2>&1", check=False)
    if "Invalid MPI type" in told:
        pytest.skip(f"srun's {kind} does not load here: apt-get install libpmix-dev")
    expected = undisturbed_of(undisturbed, launch)
    job = submitted(MAIN_JOB, *TWO_RANKS, *SET)
    facts = assert_completed(slurm, job, expected)
    assert facts["Restarts"] == "0"
    script = slurm("scontrol", "write", "batch_script", job.number, "-")
    assert f"srun --mpi={kind} " in script


def test_on_two_nodes(
    slurm: SlurmBox, submitted: Submitter, launch: Launch, undisturbed: Undisturbed
) -> None:
    """By mpirun with Open MPI: two nodes on one machine are one too many for srun's pmix."""
    expected = undisturbed_of(undisturbed, launch)
    library = library_name(load_mpi().Get_library_version())
    launcher = "mpirun" if family_of(library) == "Open MPI" else "srun"
    options = ("--nodes", "2", "--ntasks-per-node", "1", "--set", f"submit.launcher={launcher}")
    job = submitted(MAIN_JOB, *options, *SET)
    facts = assert_completed(slurm, job, expected)
    assert facts["NumNodes"] == "2"
    assert json.loads((job.run / "run.json").read_text())["ranks"] == 2


@pytest.mark.any_mpi
def test_preempted_job_goes_on_where_it_was(
    slurm: SlurmBox, submitted: Submitter, launch: Launch, undisturbed: Undisturbed
) -> None:
    expected = undisturbed_of(undisturbed, launch)
    job = submitted(MAIN_JOB, *TWO_RANKS, "--partition", "scavenge", *LONG)
    job.wait_for(IN_TRAINING)
    wants_all = ("--nodes=4", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=true")
    slurm("sbatch", *wants_all)
    job.wait_for("told to end: saved at step")
    facts = assert_completed(slurm, job, expected)
    assert facts["Restarts"] == "1"
    assert "restart 1, on n" in job.told
    assert "resumed at step" in job.told


@pytest.mark.slow
@pytest.mark.any_mpi
@pytest.mark.parametrize("by_slurm", [False, True])
def test_job_that_is_warned_of_its_time_limit_goes_on(
    slurm: SlurmBox,
    submitted: Submitter,
    launch: Launch,
    undisturbed: Undisturbed,
    by_slurm: bool,
) -> None:
    """Slurm warns up to a minute too early: here, in the first minute. Else it is told to."""
    expected = undisturbed_of(undisturbed, launch)
    slower = ("--time", "2", "--set", "submit.warning_s=110", "--set", "inject.factor=60")
    job = submitted(MAIN_JOB, *TWO_RANKS, *LONG, *(slower if by_slurm else ()))
    if not by_slurm:
        job.wait_for(IN_TRAINING)
        slurm("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_for("told to end: saved at step")
    job.wait_for("restart 1, on n")
    slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    assert_completed(slurm, job, expected)


@pytest.mark.any_mpi
def test_cancelled_job_is_saved_and_over(slurm: SlurmBox, submitted: Submitter) -> None:
    job = submitted(MAIN_JOB, *TWO_RANKS, *LONG, "--set", "train.steps=5000")
    job.wait_for(IN_TRAINING)
    slurm("scancel", job.number)
    facts = slurm.wait(job.number, *ENDED, "PENDING")
    assert facts["JobState"] == "CANCELLED"
    assert "told to end: saved at step" in job.told
    assert list(job.run.glob("checkpoints/step-*/manifest.json"))


@pytest.mark.slow
@pytest.mark.any_mpi
def test_tasks_of_an_array_keep_apart(
    slurm: SlurmBox, submitted: Submitter, launch: Launch, undisturbed: Undisturbed
) -> None:
    expected = {seed: undisturbed_of(undisturbed, launch, seed) for seed in (1, 2)}
    job = submitted(MAIN_JOB, *TWO_RANKS, "--array", "1-2", *SET)
    for task in expected:
        facts = slurm.wait(f"{job.number}_{task}", *ENDED)
        assert facts["JobState"] == "COMPLETED"
        assert_same_parameters(job.run.with_name(f"{job.run.name}_{task}"), expected[task])
        assert job.log.with_name(f"slurm-{job.number}_{task}.log").exists()


@pytest.mark.any_mpi
def test_rank_that_is_killed_ends_the_job(slurm: SlurmBox, submitted: Submitter) -> None:
    """It is not queued again: it might fail for ever."""
    job = submitted(MAIN_JOB, *TWO_RANKS, *LONG, "--set", "train.steps=5000")
    job.wait_for(IN_TRAINING)
    os.kill(_a_rank_of(job), signal.SIGKILL)
    facts = slurm.wait(job.number, *ENDED, limit_s=30)
    assert facts["JobState"] == "FAILED"
    assert facts["Restarts"] == "0"


@pytest.mark.any_mpi
def test_rank_that_is_killed_is_started_again(
    slurm: SlurmBox, submitted: Submitter, launch: Launch, undisturbed: Undisturbed
) -> None:
    """If the job asks for it, by the same launcher within the same allocation."""
    expected = undisturbed_of(undisturbed, launch)
    again = ("--set", "submit.restarts=1", "--set", "checkpoint.every=20")
    job = submitted(MAIN_JOB, *TWO_RANKS, *LONG, *again)
    job.wait_for(IN_TRAINING)
    os.kill(_a_rank_of(job), signal.SIGKILL)
    facts = assert_completed(slurm, job, expected)
    assert facts["Restarts"] == "0"
    assert "launch 1 of 2 ended with status" in job.told


USES_PACKAGES = """
import torch, flavour
def model(): return torch.nn.Linear(2, flavour.WIDTH)
def train_data(): return [torch.ones(2)] * 8
def loss(model, batch): return model(batch).square().mean()
"""


@pytest.mark.any_mpi
def test_packages_are_sent_to_nodes_once(
    slurm: SlurmBox, submitted: Submitter, launch: Launch
) -> None:
    job = launch.job(USES_PACKAGES, "train = { steps = 1, batch = 4 }\nrun.report = false\n")
    (launch.folder / "deps" / "flavour").mkdir(parents=True)
    (launch.folder / "deps" / "flavour" / "__init__.py").write_text("WIDTH = 3\n")
    cache = slurm.disk / "cache"
    options = ("--nodes", "2", "--ntasks-per-node", "1", "--set", "submit.deps=deps")
    options += ("--set", f"submit.cache={cache}", "--set", "submit.launcher=mpirun")

    def submit() -> str:
        made = submitted(job, *options)
        assert slurm.wait(made.number, *ENDED)["JobState"] == "COMPLETED", made.told
        return made.told

    first = submit()
    assert first.count("unpacked") == 2, first
    second = submit()
    assert second.count("here already") == 2 and "unpacked" not in second
    # Damage on one node: both are sent it, and one has it already.
    damage = f"cd {cache}/*/files/flavour && echo WIDTH=4 >__init__.py"
    slurm("srun", "--nodes=1", "--nodelist=n1", "sh", "-c", damage)
    third = submit()
    assert third.count("n1: packages") == third.count("unpacked") == 1, third


def _a_rank_of(job: Job) -> int:
    """Process of a rank, by what its environment says."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        is_ours = f"SLURM_JOB_ID={job.number}".encode() in environment
        if is_ours and b"SLURM_PROCID=1" in environment and b"hpctrain\0run" in command:
            return int(process.name)
    raise AssertionError(f"job {job.number} has no rank 1")
