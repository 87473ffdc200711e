"""Workers that die or stand still: every step that follows has the bits of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hpctrain.world import World

if TYPE_CHECKING:
    from conftest import Launch

pytestmark = [pytest.mark.launch, pytest.mark.any_mpi]

PROGRAM = Path(__file__).with_name("lossy.py")
LET_LIVE = ("--with-ft", "ulfm")
OVER = {"shared memory": (), "TCP": ("--mca", "pml", "ob1", "--mca", "btl", "tcp,self")}
CODED = {"blocks": 8, "copies": 3}


@pytest.fixture(autouse=True)
def survivors_live(world: World) -> None:
    if "Open MPI" not in world.library:
        pytest.skip("MPICH's launcher ends all ranks when one is killed")


def suffer(
    launch: Launch,
    faults: list[dict[str, Any]],
    over: str = "shared memory",
    ranks: int = 4,
    **coded: Any,
) -> dict[int, dict[str, int]]:
    """Run the program with these faults; what the survivors told at their end, by rank."""
    scenario = {"faults": faults, "coded": CODED | coded}
    ended = launch(
        *(ranks, PROGRAM, json.dumps(scenario), launch.folder),
        options=(*LET_LIVE, *OVER[over]),
        limit_s=75,
        OMP_NUM_THREADS="1",
    )
    assert ended.status == 0, ended.err
    assert "Traceback" not in ended.err
    told = [json.loads(path.read_text()) for path in launch.folder.glob("end-*")]
    dead = {fault["rank"] for fault in faults if fault["when"] != "stop"}
    assert {each["rank"] for each in told} == {*range(ranks)} - dead
    assert all(each["checked"] for each in told)
    first = min(told, key=lambda each: each["rank"])
    assert first["checked"] == first["steps"]
    return {each["rank"]: each for each in told}


Fault = tuple[int, int, str]
"""Rank, step and in what of it."""


def deaths(*faults: Fault) -> list[dict[str, Any]]:
    return [dict(zip(("rank", "step", "when"), fault, strict=True)) for fault in faults]


@pytest.mark.parametrize(
    ("first", "second", "over"),
    [
        ((1, 1, "compute"), (2, 12, "backward"), "TCP"),
        pytest.param((2, 4, "done"), (3, 1, "backward"), "shared memory", marks=pytest.mark.slow),
        pytest.param((3, 8, "compute"), (1, 8, "done"), "shared memory", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_any_two_of_four_die_but_the_root(
    launch: Launch, first: Fault, second: Fault, over: str
) -> None:
    """Each alone, and each pair of them; in the first step or later, one by one or together."""
    suffer(launch, deaths(first, second), over)


@pytest.mark.slow
@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((1, 1, "compute"), (2, 12, "backward")),
        ((3, 4, "done"), (4, 9, "compute")),
        ((2, 1, "backward"), (3, 6, "done")),
        ((4, 5, "backward"), (1, 5, "done")),
        ((3, 8, "compute"), (1, 8, "compute")),
        ((2, 1, "done"), (4, 1, "compute")),
    ],
    ids=str,
)
def test_any_two_of_four_workers_die(
    launch: Launch, first: Fault, second: Fault, over: str
) -> None:
    suffer(launch, deaths(first, second), over, ranks=5, root="dedicated")


@pytest.mark.slow
@pytest.mark.parametrize("over", ["shared memory", "TCP"])
def test_worker_that_stood_still_goes_on_where_the_others_are(launch: Launch, over: str) -> None:
    told = suffer(
        *(launch, [{"rank": 1, "step": 6, "when": "stop"}], over),
        ranks=3,
        copies=2,
        root="dedicated",
    )
    assert told[1]["jumps"] >= 1


@pytest.mark.slow
def test_copies_that_differ_while_the_third_is_silent_end_the_run(launch: Launch) -> None:
    """Nobody is known to be dead here; a vote of one against one is not waited for for ever."""
    faults = deaths((2, 3, "lie"), (3, 3, "stop"))
    coded = CODED | {"root": "dedicated", "sends": "vote", "silent_s": 0.5, "lost_s": 1.0}
    ended = launch(
        *(4, PROGRAM, json.dumps({"faults": faults, "coded": coded}), launch.folder),
        limit_s=60,
        OMP_NUM_THREADS="1",
    )
    assert ended.status != 0
    assert "no majority agrees" in ended.err
