"""Ranks die, and the others go on without them: as a run that was resumed on so many."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from dying import KEYS, MODULE, PLACES
from left_behind import losses, parameters

from hpctrain.world import join

if TYPE_CHECKING:
    from conftest import Ended, Launch

pytestmark = [pytest.mark.launch, pytest.mark.any_mpi]

LET_LIVE = ("--with-ft", "ulfm")
RUN = ("-m", "hpctrain", "run", "job.toml", "--run-dir", "run")
STEPS = 12


@pytest.fixture(autouse=True)
def survivors_live() -> None:
    if "Open MPI" not in join().library:
        pytest.skip("MPICH's launcher ends all ranks when one is killed")


def suffer(launch: Launch, ranks: int, deaths: str, *sets: str, module: str = MODULE) -> Ended:
    """Run the job and have ranks die; the others must end well and with the same model."""
    launch.job(module, KEYS, name="job")
    options = [word for each in sets for word in ("--set", each)]
    ended = launch(ranks, *RUN, *options, options=LET_LIVE, DIE=deaths, OMP_NUM_THREADS="1")
    assert ended.status == 0, ended.err
    assert "Traceback" not in ended.err
    died = {int(death.split()[1]) for death in deaths.split(",")}
    ends = {int(p.name[4:]): p.read_text() for p in launch.folder.glob("end-*")}
    assert {*ends} == {*range(ranks)} - died, ended.err
    assert len({*ends.values()}) == 1
    assert sorted(losses(launch.folder / "run")) == [*range(1, STEPS + 1)]
    facts = json.loads((launch.folder / "run" / "run.json").read_text())
    assert facts["finished"] and facts["ranks"] == ranks - len(died)
    return ended


def resumed(
    launch: Launch, ranks: int, step: int, left: int, *sets: str, module: str = MODULE
) -> Path:
    """The run folder of a run that stopped after so many steps, and went on with those left."""
    launch.job(module, KEYS, name="job")
    options = [word for each in sets for word in ("--set", each)]
    # Fewer steps are another job, whose schedule is constant: it may be continued all the same.
    for size, steps in ((ranks, step), (left, STEPS)):
        ended = launch(
            *(size, *RUN, *options, "--set", f"train.steps={steps}"), OMP_NUM_THREADS="1"
        )
        assert ended.status == 0, ended.err
    return launch.folder / "run"


CI = [("save", 1)]
ALL = [(place, rank) for place in PLACES for rank in range(3)]


def step_of(place: str) -> int:
    return {"evaluation": 8, "save": 9}.get(place, 6)


@pytest.mark.parametrize(
    ("place", "rank"),
    [*CI, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in CI)],
)
def test_any_rank_dies_anywhere(launch: Launch, place: str, rank: int) -> None:
    ended = suffer(launch, 3, f"{place} {rank} {step_of(place)}")
    told = re.findall(r"warning: rank (\d) \(.*\) died in step (\d+); (.*)", ended.err)
    assert len(told) == 1
    assert (int(told[0][0]), int(told[0][1])) == (rank, step_of(place))
    lines = (launch.folder / "run" / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    (recovery,) = [entry["recovery"] for entry in entries if "recovery" in entry]
    assert recovery["ranks"] == 2 and recovery["recovery_s"] > 0
    assert [e["step"] for e in entries if "validation" in e] == [4, 8, 12]


BUFFERS = MODULE.replace("torch.nn.Tanh()", "torch.nn.BatchNorm1d(8)")
WHOLE = "validation_data = train_data"
STREAM = """
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter(self.once())
    def once(self):
        for sample in validation_data():
            yield sample + torch.rand(())
def train_data(): return Stream()
"""


@pytest.mark.parametrize(
    ("place", "rank", "options"),
    [
        pytest.param("compute", 0, ("exchange.progress='thread'",), marks=pytest.mark.slow),
        ("exchange", 1, ("exchange.next_forward=true",)),
        *(
            pytest.param(place, rank, options, marks=pytest.mark.slow)
            for place, rank in (("compute", 2), ("exchange", 0))
            for options in (
                ("exchange.way='direct'",),
                ("exchange.next_forward=true", "exchange.way='direct'"),
                ("exchange.buffers='average'",),
                ("exchange.progress='hooks'",),
            )
        ),
    ],
)
def test_the_bits_are_those_of_a_run_resumed_on_so_many(
    launch: Launch,
    tmp_path_factory: pytest.TempPathFactory,
    place: str,
    rank: int,
    options: tuple[str, ...],
) -> None:
    """With buffers that the step which does not count has changed, and data that is read once."""
    module = BUFFERS.replace(
        "validation_data = train_data", "validation_data = train_data" + STREAM
    )
    ended = suffer(launch, 3, f"{place} {rank} 6", *options, module=module)
    step = int(re.findall(r"from step (\d+), after", ended.err)[0])
    assert step in (5, 6)
    other = type(launch)(tmp_path_factory.mktemp("resumed"))
    run = resumed(other, 3, step, 2, *options, module=module)
    mine = parameters(launch.folder / "run")
    for name, value in parameters(run).items():
        assert torch.equal(value, mine[name]), name
    for number, loss in losses(run).items():
        if number != step:  # whose loss on the dead rank may not be known
            assert losses(launch.folder / "run")[number] == pytest.approx(loss, rel=1e-6)


@pytest.mark.slow
def test_one_dies_after_another_until_one_is_left(launch: Launch) -> None:
    ended = suffer(launch, 3, "compute 2 3,save 0 10")  # its third step is taken twice
    assert len(re.findall(r"warning: rank \d .* died in step", ended.err)) == 2
    log = (launch.folder / "run" / "logs" / "rank-00000.log").read_text()
    assert "ranks 1 go on as 1 rank(s)" in log


@pytest.mark.slow
def test_two_die_at_once(launch: Launch) -> None:
    suffer(launch, 4, "compute 0 6,exchange 2 6")


def test_too_few_are_left(launch: Launch) -> None:
    """The run ends as without recovery, and may be continued by another launch."""
    launch.job(MODULE, KEYS, name="job")
    ended = launch(*(2, *RUN, "--set", "run.min_ranks=2"), options=LET_LIVE, DIE="exchange 0 6")
    assert ended.status not in (0, 75)
    assert "fewer are left than the run is to go on with: got 1" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.slow
def test_a_death_before_training_is_told_once(launch: Launch) -> None:
    launch.job(MODULE, KEYS, name="job")
    ended = launch(3, *RUN, options=LET_LIVE, DIE="setup 0 0")
    assert ended.status not in (0, 75)
    assert len(re.findall(r"hpctrain: rank 0 \(.*\) has died", ended.err)) == 1, ended.err
    assert "Traceback" not in ended.err


@pytest.mark.slow
def test_one_that_stands_still_is_seen_by_its_deadline(launch: Launch) -> None:
    module = MODULE.replace("signal.SIGKILL", "signal.SIGSTOP")
    launch.job(module, KEYS, name="job")
    ended = launch(
        *(2, *RUN, "--set", "exchange.deadline_s=10"), options=LET_LIVE, DIE="compute 1 6"
    )
    assert ended.status != 0
    assert "no answer: rank 1" in ended.err


TELLS = "open(f'pid-{RANK}', 'w').write(str(os.getpid()))\n"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_any_time(launch: Launch, seed: int) -> None:
    """By another process, also while nobody is in a step, or while another death is dealt with."""
    chance = random.Random(seed)
    module = MODULE.replace(
        "def model():", "open(f'pid-{RANK}', 'w').write(str(os.getpid()))\ndef model():"
    )
    launch.job(module, KEYS, name="job")
    sets = ["train.steps=3000", "run.log_every=7", "train.eval_every=0", "checkpoint.every=100"]
    if chance.random() < 0.5:
        sets.append("exchange.next_forward=true")
    options = [word for each in sets for word in ("--set", each)]
    process = launch.start(4, *RUN, *options, options=LET_LIVE, OMP_NUM_THREADS="1")
    metrics = launch.folder / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.05)
    victims = chance.sample(range(4), 2)
    for victim in victims:
        time.sleep(chance.choice((0.0, 0.01, 0.5, 2.0)) * chance.random())
        os.kill(int((launch.folder / f"pid-{victim}").read_text()), signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert sorted(losses(launch.folder / "run")) == [*range(1, 3001)]
    ends = [p.read_text() for p in launch.folder.glob("end-*")]
    assert len(ends) == 2 and len({*ends}) == 1
