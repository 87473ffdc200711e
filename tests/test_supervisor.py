"""Ranks that end with a failure are started again, as long as that may help, and none is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from dying import KEYS, MODULE, PLACES
from left_behind import losses, parameters

from hpctrain import supervisor
from hpctrain.errors import JobError
from hpctrain.supervisor import End, why_not_again

if TYPE_CHECKING:
    from conftest import Launch

# ------------------------------------------------------------------ whether to start again


def test_as_often_as_allowed() -> None:
    ends = [End(137, saved=n, step=n) for n in range(4)]
    assert [why_not_again(ends[:n], restarts=3) for n in (1, 2, 3)] == [None] * 3
    assert why_not_again(ends, restarts=3) == "3 restarts were allowed"
    assert why_not_again(ends[:1], restarts=0) == ""


@pytest.mark.parametrize(
    ("last", "goes_on"),
    [
        (End(1, saved=10, step=12), False),
        (End(1, saved=10, step=11), True),
        (End(137, saved=12, step=12), True),
        (End(137, saved=10, step=12), False),
    ],
    ids=["same place", "another step", "saved meanwhile", "another status"],
)
def test_a_fault_that_comes_again_at_the_same_place(last: End, goes_on: bool) -> None:
    ends = [End(1, saved=10, step=12)] * 2 + [last]
    assert (why_not_again(ends, restarts=9) is None) == goes_on


def test_an_end_says_what_is_known() -> None:
    assert str(End(137, 5, 7)) == "ended with status 137 (a rank was killed) in step 7"
    assert str(End(1, 0, None, "rank 1 failed at step 3: no")) == (
        "ended with status 1 (crashed): rank 1 failed at step 3: no"
    )


@pytest.mark.parametrize("launcher", ["mpirun 'x", " "])
def test_words_of_a_launcher(launcher: str) -> None:
    assert supervisor.words_of("mpirun -n 4 -x 'A=b c'") == ["mpirun", "-n", "4", "-x", "A=b c"]
    with pytest.raises(JobError, match="--launcher"):
        supervisor.words_of(launcher)


def test_default_launcher_is_the_library_s_own() -> None:
    path, option, ranks = supervisor.default_launcher({})
    assert Path(path).parent == Path(sys.executable).parent
    assert (option, int(ranks)) == ("-n", len(os.sched_getaffinity(0)))
    assert supervisor.default_launcher({"SLURM_NTASKS": "8"})[2] == "8"


# ------------------------------------------------------------------ with a launcher of shell


class Pretended:
    """A supervisor of a launcher that is a shell script, which finds its arguments in $@."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"

    def run(self, script: str, restarts: int = 3, chosen: Path | None = None) -> int:
        text = f'cd "{self.folder}"; echo "$@" >>calls; n=$(wc -l <calls); {script}'
        return supervisor.run(
            lambda folder, name, is_first: [name, str(folder), str(is_first)],
            launcher=["/bin/sh", "-c", text, "sh"],
            restarts=restarts,
            parent=self.folder / "runs",
            chosen=chosen,
            environment={},
        )

    @property
    def given(self) -> list[list[str]]:
        return [line.split()[1:] for line in self.calls.read_text().splitlines()]


@pytest.fixture
def pretended(tmp_path: Path) -> Pretended:
    (tmp_path / "runs").mkdir()
    return Pretended(tmp_path)


MAKES_RUN = """
mkdir -p runs/007/logs runs/007/checkpoints/step-00000000$n; touch \
runs/007/checkpoints/step-00000000$n/manifest.json;
echo "{\\"launch\\": \\"$1\\"}" >runs/007/run.json; echo "         $n$n" >runs/007/step;
echo "2026 rank 1 step $n$n ERROR failed at step $n$n: ValueError: no" \
>>runs/007/logs/rank-00001.log;
"""


@pytest.mark.parametrize("status", [0, 2, 3, 75])
def test_some_statuses_are_final(pretended: Pretended, status: int) -> None:
    assert pretended.run(f"exit {status}") == status
    assert len(pretended.given) == 1


def test_starts_again_in_the_same_folder(
    pretended: Pretended, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretended.run(MAKES_RUN + "[ $n = 3 ] || exit 137") == 0
    folder = str(pretended.folder / "runs" / "007")
    assert pretended.given == [["None", "True"], [folder, "False"], [folder, "False"]]
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        "hpctrain: launch 1 of 4 ended with status 137 (a rank was killed) in step 11: rank 1 "
        "failed at step 11: ValueError: no; the next one goes on from the checkpoint of step 1, "
        f"in {folder}"
    )
    assert "launch 2 of 4" in second and "failed at step 22" in second


def test_gives_up_where_it_does_not_help(
    pretended: Pretended, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretended.run("kill -9 $$", restarts=9) == 137
    assert len(pretended.given) == supervisor.SAME_ENDS
    assert "no other follows: 3 launches ended at the same place" in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["runs/007", "runs/007/checkpoints"])
@pytest.mark.parametrize("in_launch", [1, 2])
def test_a_run_whose_checkpoints_vanish_does_not_begin_anew(
    pretended: Pretended, capsys: pytest.CaptureFixture[str], lost: str, in_launch: int
) -> None:
    vanishes = f"[ $n != {in_launch} ] || {{ sleep {2.5 * supervisor.POLL_S * 10}; rm -r {lost}; }}"
    assert pretended.run(f"{MAKES_RUN}{vanishes}; exit 1") == 1
    assert len(pretended.given) == in_launch
    told = capsys.readouterr().err
    assert f"the checkpoint of step {in_launch} is gone" in told and "no other follows" in told


def test_a_run_that_has_gone_back_to_an_older_checkpoint_goes_on(pretended: Pretended) -> None:
    """As where the newest one was damaged: those that were passed over are removed."""
    first, later = (f"runs/007/checkpoints/step-0000000{step}" for step in ("01", "50"))
    goes_back = f"[ $n != 1 ] || cp -r {first} {later}; [ $n != 2 ] || rm -r {later}"
    assert pretended.run(f"{MAKES_RUN}{goes_back}; [ $n = 3 ] || exit 1") == 0
    assert len(pretended.given) == 3


def test_logs_and_locks_that_are_none_do_no_harm(pretended: Pretended) -> None:
    odd = "mkdir -p runs/007/logs/rank-00002.log; ln -sf nowhere runs/007/run.lock;"
    assert pretended.run(f"{MAKES_RUN}{odd} [ $n = 2 ] || exit 1") == 0


def test_a_launcher_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot be started"):
        supervisor.run(
            lambda *_: [],
            launcher=["/no/such/mpirun"],
            restarts=1,
            parent=tmp_path,
            chosen=None,
            environment={},
        )


def test_a_rank_does_not_start_ranks(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="itself started by a launcher"):
        supervisor.run(
            lambda *_: [],
            launcher=["true"],
            restarts=1,
            parent=tmp_path,
            chosen=None,
            environment={"PMI_SIZE": "2", "PMI_RANK": "0"},
        )


def test_ranks_that_outlive_their_launcher_are_ended(pretended: Pretended) -> None:
    """Also those that do not listen, and those in a session of their own."""
    script = "for each in 1 2; do setsid sh -c 'trap \"\" TERM; echo $$ >>left; sleep 99' & done; "
    script += 'while [ "$(wc -l <left)" != 2 ]; do sleep 0.01; done; kill -9 $$'
    assert pretended.run(f"touch left; {script}", restarts=0) == 137
    left = [int(line) for line in (pretended.folder / "left").read_text().split()]
    assert len(left) == 2
    assert not any(Path(f"/proc/{process}").exists() for process in left)


SUPERVISE = """
import sys
from pathlib import Path
from hpctrain import supervisor
sys.exit(supervisor.run(
    lambda *_: [], launcher=["/bin/sh", "-c", sys.argv[1]], restarts=5, parent=Path("runs"),
    chosen=None, environment=dict([sys.argv[2].split("=")])
))
"""


@pytest.mark.parametrize(
    ("number", "environment", "came"),
    [
        (signal.SIGUSR1, "A=b", "USR1"),
        (signal.SIGTERM, "A=b", "TERM"),
        (signal.SIGINT, "A=b", "INT"),
        (signal.SIGTERM, "SLURM_JOB_ID=7", "USR1"),
    ],
)
def test_what_it_is_told_it_passes_on_and_starts_nothing_more(
    tmp_path: Path, number: signal.Signals, environment: str, came: str
) -> None:
    """The status then is 1, which would be a reason to start again."""
    script = 'for s in USR1 TERM INT; do trap "echo $s >came; exit 1" $s; done; echo >ready; '
    script += "while :; do sleep 0.02; done"
    process = subprocess.Popen([sys.executable, "-c", SUPERVISE, script, environment], cwd=tmp_path)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(20) == 1
    assert (tmp_path / "came").read_text().strip() == came


@pytest.mark.parametrize(
    ("environment", "end", "status"),
    [
        ("SLURM_JOB_ID=7", "kill -USR1 $$", 75),
        ("SLURM_JOB_ID=7", "exit 143", 75),
        ("SLURM_JOB_ID=7", "exit 10", 75),
        ("SLURM_JOB_ID=7", "exit 137", 137),
        ("A=b", "kill -USR1 $$", 138),
    ],
)
def test_told_before_ranks_listen(tmp_path: Path, environment: str, end: str, status: int) -> None:
    """Ranks that the signal ended have nothing to save: a batch job is queued again."""
    script = f"trap 'trap - USR1; {end}' USR1; echo >ready; while :; do sleep 0.02; done"
    process = subprocess.Popen([sys.executable, "-c", SUPERVISE, script, environment], cwd=tmp_path)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == status


def test_the_launcher_ends_with_its_supervisor(tmp_path: Path) -> None:
    script = "trap 'echo >came; exit 1' TERM; echo $$ >ready; while :; do sleep 0.02; done"
    process = subprocess.Popen([sys.executable, "-c", SUPERVISE, script, "A=b"], cwd=tmp_path)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    given_up_s = time.monotonic() + 20
    while not (tmp_path / "came").exists():
        assert time.monotonic() < given_up_s
        time.sleep(0.01)


def test_it_loads_neither_torch_nor_mpi() -> None:
    code = "import sys, hpctrain.supervisor; sys.exit(bool({'torch', 'mpi4py'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------ with real ranks

RUN = ("-m", "hpctrain", "run", "job.toml", "--run-dir", "run")
CI = [(2, "exchange", 0)]
ALL = [(3, place, rank) for place in PLACES for rank in range(3)]


def supervised(launch: Launch, ranks: int) -> tuple[str, ...]:
    launcher = Path(sys.executable).with_name("mpiexec")
    return (*RUN, "--restarts", "2", "--launcher", f"{launcher} -n {ranks}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    del tmp_path_factory
    return {}


@pytest.mark.launch
@pytest.mark.parametrize(
    ("ranks", "place", "rank"),
    [*CI, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in CI)],
)
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(
    launch: Launch,
    undisturbed: dict[int, Path],
    tmp_path_factory: pytest.TempPathFactory,
    ranks: int,
    place: str,
    rank: int,
) -> None:
    # At once, so that it is known which checkpoint there is.
    keys = KEYS.replace("every = 3", "every = 3, asynchronous = false")
    launch.job(MODULE, keys, name="job")
    step = 8 if place == "evaluation" else 9 if place == "save" else 5
    ended = launch(0, *supervised(launch, ranks), DIE=f"{place} {rank} {step}")
    assert ended.status == 0, ended.err
    assert (launch.folder / f"died-{place}-{rank}-{step}").exists()
    assert ended.err.count("hpctrain: launch 1 of 3 ended with status") == 1
    saved = 3 * ((step - 1) // 3)
    assert f"goes on from the checkpoint of step {saved}" in ended.err
    if ranks not in undisturbed:
        other = type(launch)(tmp_path_factory.mktemp("undisturbed"))
        other.job(MODULE, KEYS, name="job")
        assert other(ranks, *RUN).status == 0
        undisturbed[ranks] = other.folder / "run"
    run = launch.folder / "run"
    for name, value in parameters(undisturbed[ranks]).items():
        assert torch.equal(value, parameters(run)[name]), name
    assert losses(run) == losses(undisturbed[ranks])


@pytest.mark.launch
@pytest.mark.any_mpi
def test_a_bad_job_is_not_started_again(launch: Launch) -> None:
    launch.job(MODULE, KEYS + "\nmistake = 1", name="job")
    ended = launch(0, *supervised(launch, 2))
    assert ended.status == 2
    assert ended.err.count("unknown key") == 1


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.any_mpi
def test_a_fault_of_the_job_is_told_with_its_place_each_time(launch: Launch) -> None:
    broken = MODULE.replace("def train_data", "def other_data").replace(
        "validation_data = train_data",
        "class Short(list):\n"
        "    def __getitem__(self, index):\n"
        "        if RANK == 1 and count[True] == 4: raise EOFError('the file ends here')\n"
        "        return super().__getitem__(index)\n"
        "def train_data(): return Short(other_data())\n",
    )
    launch.job(broken, KEYS, name="job")
    ended = launch(0, *supervised(launch, 2), "--restarts", "1")
    assert ended.status == 1
    lines = [line for line in ended.err.splitlines() if "hpctrain: launch" in line]
    assert len(lines) == 2, ended.err
    assert "in step 5: rank 1 failed at step 5, data: " in lines[0]
    assert "EOFError: the file ends here" in lines[0]
    assert "no other follows: 1 restart was allowed" in lines[1]
    facts = json.loads((launch.folder / "run" / "run.json").read_text())
    assert facts["finished"] is False
