"""What users see when a rank fails, hangs, stops or leaves: its name, its place, and an end."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpctrain.world import join

if TYPE_CHECKING:
    from conftest import Launch

pytestmark = pytest.mark.launch

OTHERS = [
    pytest.param(1, marks=[pytest.mark.any_mpi, pytest.mark.slow]),
    pytest.param(2, marks=pytest.mark.any_mpi),
]
"""Which rank it is matters to hpctrain's own watch; with a second MPI library, one is enough."""

TRAIN = """
import os, signal, sys, time
import torch, hpctrain
world = hpctrain.join()
open(f"pid-{world.rank}", "w").write(str(os.getpid()))
model = hpctrain.DataParallel(
    torch.nn.Linear(4, 4), hpctrain.ExchangeConfig(deadline_s=DEADLINE, progress="PROGRESS")
)
def fail_at_step_3():
    FAULT
for step in range(1, 6):
    world.position.step = step
    if world.rank == 1 and step == 3:
        fail_at_step_3()
    model(torch.ones(2, 4)).sum().backward()
# One write: where Python's output is unbuffered, print makes several, which the ranks mix.
sys.stdout.write(f"rank {world.rank} done\\n")
"""


def training(fault: str, deadline_s: float = 60.0, progress: str = "thread") -> str:
    text = TRAIN.replace("FAULT", fault).replace("DEADLINE", str(deadline_s))
    return text.replace("PROGRESS", progress)


def assert_all_ended(folder: Path, ranks: int) -> None:
    """MPICH's launcher returns a moment before the last rank is gone."""
    pids = [int((folder / f"pid-{rank}").read_text()) for rank in range(ranks)]
    limit_s = time.monotonic() + 5
    while any(map(runs, pids)) and time.monotonic() < limit_s:
        time.sleep(0.05)
    assert not [rank for rank, pid in enumerate(pids) if runs(pid)]


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_exception_in_one_rank_ends_all_and_is_shown_first(launch: Launch) -> None:
    script = launch.script(training('raise ValueError("broken on purpose")'))
    ended = launch(3, script, limit_s=60)
    assert ended.status == 1
    first = ended.err.splitlines()
    assert first[0].startswith("hpctrain: rank 1 (")
    assert first[0].endswith("of 3 failed at step 3, setting up")
    assert first[1].startswith("Traceback")
    assert "ValueError: broken on purpose" in ended.err
    assert ended.err.count("Traceback") == 1
    assert "done" not in ended.out
    assert_all_ended(launch.folder, 3)


@pytest.mark.parametrize("progress", ["thread", pytest.param("hooks", marks=pytest.mark.slow)])
def test_rank_that_hangs_is_named_with_its_place(launch: Launch, progress: str) -> None:
    script = launch.script(training("while True: pass", deadline_s=2.0, progress=progress))
    ended = launch(3, script, limit_s=60)
    assert ended.status == 1
    assert ended.err.startswith("hpctrain: block 0 has not finished for 1 s")
    assert "block 0 has not finished for" in ended.err
    assert "missing: rank 1" in ended.err
    assert "step 3" in ended.err
    assert re.search(r"script\.py:\d+ in fail_at_step_3", ended.err)
    assert "waiting in it: rank 0" in ended.err
    assert "ending the run" in ended.err
    assert_all_ended(launch.folder, 3)


@pytest.mark.parametrize("stopped", [0, *OTHERS])
def test_stopped_rank_is_named_whichever_it_is(launch: Launch, stopped: int) -> None:
    text = training("os.kill(os.getpid(), signal.SIGSTOP)", deadline_s=2.0)
    script = launch.script(text.replace("world.rank == 1", f"world.rank == {stopped}"))
    ended = launch(3, script, limit_s=60)
    assert ended.status != 0
    assert f"no answer: rank {stopped}" in ended.err
    assert "stopped, dead or cut off" in ended.err
    assert_all_ended(launch.folder, 3)


@pytest.mark.parametrize("leaver", [pytest.param(0, marks=pytest.mark.slow), *OTHERS])
def test_rank_that_leaves_early_does_not_keep_the_others_waiting(
    launch: Launch, leaver: int
) -> None:
    """Long before the deadline: what a rank that left has not posted will never finish."""
    text = training("sys.exit(0)", deadline_s=300.0)
    script = launch.script(text.replace("world.rank == 1", f"world.rank == {leaver}"))
    ended = launch(3, script, limit_s=60)
    assert ended.status != 0
    assert f"gone: rank {leaver}" in ended.err
    assert "has left the program" in ended.err
    assert "the same number of steps?" in ended.err
    assert_all_ended(launch.folder, 3)


def test_closed_output_does_not_keep_a_failing_rank_alive(launch: Launch) -> None:
    fault = 'sys.stdout.close(); raise ValueError("broken")'
    ended = launch(3, launch.script(training(fault)), limit_s=60)
    assert ended.status == 1
    assert_all_ended(launch.folder, 3)


@pytest.mark.parametrize("alone", [pytest.param(0, marks=pytest.mark.slow), OTHERS[-1]])
def test_an_error_that_all_should_meet_is_told_by_the_rank_that_met_it(
    launch: Launch, alone: int
) -> None:
    script = launch.script(
        "import torch, hpctrain\n"
        "world = hpctrain.join()\n"
        f"layer = torch.nn.Embedding(4, 4, sparse=world.rank == {alone})\n"
        "hpctrain.DataParallel(layer)\n"
    )
    ended = launch(3, script, limit_s=60)
    assert ended.status == 1
    assert ended.err.count("produces sparse gradients") == 1


def test_a_program_may_finalize_mpi_itself(launch: Launch) -> None:
    text = training("pass") + "from mpi4py import MPI\nMPI.Finalize()\n"
    assert launch(2, launch.script(text), limit_s=60).status == 0


def test_a_foreign_launcher_ends_a_script_with_its_own_status(launch: Launch) -> None:
    script = launch.script("import hpctrain\nhpctrain.join()\n")
    ended = launch(0, script, PMI_SIZE="2", PMI_RANK="0")
    assert ended.status == 3
    assert ended.err.startswith("hpctrain: ")
    assert "Traceback" not in ended.err


@pytest.mark.any_mpi
def test_data_that_hangs_on_one_rank_is_told(launch: Launch) -> None:
    job = launch.job(
        "import torch, hpctrain\n"
        "def model(): return torch.nn.Linear(1, 1)\n"
        "def train_data():\n"
        "    while hpctrain.join().rank == 1: pass\n"
        "    return [torch.ones(1)] * 8\n"
        "def loss(model, batch): return model(batch).sum()\n",
        "train = { steps = 2, batch = 4 }\nexchange = { deadline_s = 10 }",
    )
    ended = launch(3, "-m", "hpctrain", "run", job, limit_s=60)
    assert ended.status == 1
    assert "making of the job's model and data has not finished" in ended.err
    assert re.search(r"missing: rank 1 .*odd\.py:4 in train_data", ended.err)


def test_undisturbed_run_ends_well(launch: Launch) -> None:
    slow = 'assert "torch._dynamo" not in sys.modules  # a second to import\n'
    ended = launch(3, launch.script(training("pass", deadline_s=5.0) + slow))
    assert ended.status == 0
    assert sorted(ended.out.splitlines()) == [f"rank {rank} done" for rank in range(3)]
    assert "hpctrain" not in ended.err


def test_mismatch_is_told_once(launch: Launch) -> None:
    script = launch.script(
        "import torch, hpctrain\n"
        "world = hpctrain.join()\n"
        "hpctrain.DataParallel(torch.nn.Linear(4, 4 + (world.rank == 1)))\n"
    )
    ended = launch(3, script, limit_s=60)
    assert ended.status == 1
    assert ended.err.count("the model is not the same on all ranks") == 1
    assert "rank 1" in ended.err
    assert "weight is (5, 4)" in ended.err


def test_launcher_of_another_mpi_is_refused(launch: Launch) -> None:
    """Each process would be rank 0 of 1, and train alone."""
    mine = "Open MPI" in join().library
    foreign = (
        {"PMI_SIZE": "4", "PMI_RANK": "0"}
        if mine
        else {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}
    )
    ended = launch(0, "-m", "hpctrain", "doctor", limit_s=60, **foreign)
    assert ended.status == 3
    assert "hpctrain: " in ended.err
    assert "fix: " in ended.err
    assert "Traceback" not in ended.err


def test_srun_without_its_mpi_plugin_is_refused(launch: Launch) -> None:
    """srun --mpi=none starts processes that know nothing of each other."""
    ended = launch(
        0, "-m", "hpctrain", "doctor", limit_s=60, SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="0"
    )
    assert ended.status == 3
    assert "srun started 4 processes" in ended.err
    assert "srun --mpi=list" in ended.err


def test_rank_that_never_joins_is_named(launch: Launch) -> None:
    """The others are inside MPI_Init, which keeps the interpreter's lock."""
    script = launch.script(
        "import os, time\n"
        "from hpctrain.launched import launched_rank\n"
        "open(f'pid-{launched_rank(os.environ)}', 'w').write(str(os.getpid()))\n"
        "if launched_rank(os.environ) == 1:\n"
        "    time.sleep(600)\n"
        "import hpctrain\n"
        "hpctrain.join(deadline_s=10)\n"
    )
    ended = launch(3, script, limit_s=60)
    # MPICH's launcher gives the status of a rank that it killed now and then.
    assert ended.status in (3, 9), ended.err
    # Once, unless the launcher is too busy to end the other one before its own time is over.
    assert ended.err.count("MPI_Init has not finished for 10 s") in (1, 2)
    assert "started 3 processes" in ended.err
    pid = (launch.folder / "pid-1").read_text()
    assert re.search(rf"missing: rank 1 \(.*\), process {pid}, has not come", ended.err)
    assert "waiting in it: rank 0, rank 2" in ended.err
    assert_all_ended(launch.folder, 3)
