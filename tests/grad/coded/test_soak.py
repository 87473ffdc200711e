"""Ranks that are late, stand still and die at random: no hang, and every step is compared."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpctrain.world import World

if TYPE_CHECKING:
    from conftest import Launch

pytestmark = [pytest.mark.launch, pytest.mark.any_mpi]

PROGRAM = Path(__file__).with_name("lossy.py")
RANKS = 5
CODED = {"blocks": 8, "copies": 3, "root": "dedicated"}
POLL_S = 0.01
STOPPED_S = 2.0
"""Longest time for which a worker is stopped."""
ROOT_STOPPED_S = 0.5
STARTED_S = ENDED_S = 60.0
"""A program that takes longer to start, or to end after it was asked to, hangs."""


def wait(until: Callable[[], bool], limit_s: float, what: str) -> None:
    """Poll for a condition.

    Raises:
        TimeoutError: it did not come true.
    """
    given_up_s = time.monotonic() + limit_s
    while not until():
        if time.monotonic() > given_up_s:
            raise TimeoutError(what)
        time.sleep(POLL_S)


class Tormentor:
    """Stops and continues ranks at random, and kills one.

    Args:
        process: the launcher.
        folder: where the ranks have left word.
        dies: the worker that is killed, half way.
    """

    def __init__(
        self, process: subprocess.Popen[str], folder: Path, draw: random.Random, dies: int
    ) -> None:
        self._process, self._folder, self._draw, self._dies = process, folder, draw, dies
        files = [folder / f"pid-{rank}" for rank in range(RANKS)]
        wait(lambda: all(f.exists() and f.read_text() for f in files), STARTED_S, "start")
        self._pids = [int(file.read_text()) for file in files]

    def torment(self, seconds: float) -> None:
        """For so long."""
        draw = self._draw
        begun_s = time.monotonic()
        alive = list(range(RANKS))
        while (gone_s := time.monotonic() - begun_s) < seconds:
            assert self._process.poll() is None, "the run is over"
            if gone_s > seconds / 2 and self._dies in alive:
                alive.remove(self._dies)
                os.kill(self._pids[self._dies], signal.SIGKILL)
            rank = draw.choice(alive)
            longest_s = STOPPED_S if rank else ROOT_STOPPED_S
            with stopped(self._pids[rank]):
                time.sleep(draw.choice((0.001, 0.05, longest_s)) * draw.random())
            time.sleep(draw.random() * 0.3)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("seconds", "seed", "over"),
    [
        pytest.param(5, 1, "sm,self", id="shortly"),
        pytest.param(50, 2, "sm,self", id="shared memory", marks=pytest.mark.slow),
        pytest.param(50, 3, "tcp,self", id="TCP", marks=pytest.mark.slow),
        pytest.param(50, 4, "sm,self", id="again", marks=pytest.mark.slow),
        pytest.param(50, 5, "tcp,self", id="TCP again", marks=pytest.mark.slow),
        pytest.param(50, 6, "sm,self", id="a third time", marks=pytest.mark.slow),
        pytest.param(50, 7, "tcp,self", id="TCP a third time", marks=pytest.mark.slow),
    ],
)
def test_whatever_happens_every_step_has_the_bits_of_one_process(
    launch: Launch, world: World, seconds: float, seed: int, over: str
) -> None:
    """The slow ones take 300 s in all."""
    if "Open MPI" not in world.library:
        pytest.skip("MPICH's launcher ends all ranks when one is killed")
    draw = random.Random(seed)
    dies = draw.randrange(1, RANKS)
    folder = launch.folder
    process = launch.start(
        *(RANKS, PROGRAM, json.dumps({"faults": [], "coded": CODED, "seed": seed}), folder),
        options=("--with-ft", "ulfm", "--mca", "pml", "ob1", "--mca", "btl", over),
        OMP_NUM_THREADS="1",
    )
    told: list[tuple[str, str]] = []
    reader = threading.Thread(target=lambda: told.append(process.communicate()))
    reader.start()
    try:
        tormentor = Tormentor(process, folder, draw, dies)
        tormentor.torment(seconds)
        (folder / "enough").touch()
        wait(lambda: process.poll() is not None, ENDED_S, "end")
    finally:
        if process.poll() is None:
            for file in folder.glob("pid-*"):
                with suppress(ProcessLookupError):
                    os.kill(int(file.read_text()), signal.SIGKILL)
            os.killpg(process.pid, signal.SIGKILL)
        reader.join()
    assert process.returncode == 0, told
    assert "Traceback" not in told[0][1]
    ends = [json.loads(path.read_text()) for path in folder.glob("end-*")]
    assert {end["rank"] for end in ends} == {*range(RANKS)} - {dies}
    (root,) = (end for end in ends if end["rank"] == 0)
    assert root["steps"] == root["checked"] >= 10
