"""A process that is killed while it saves leaves a checkpoint that loads, wherever it is killed.

Children, forked so that each costs little, save and kill themselves at the n-th of all operations
of the system that saving takes. They call no MPI.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train.checkpoint.common import begin, loaded_step, save, saver
from train.checkpoint.stand_in import alone, on_ranks

from hpctrain.train.checkpoint import format
from hpctrain.train.checkpoint.loading import load_newest
from hpctrain.train.checkpoint.store import LATEST, name_of

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir")
"""Told by Python before they happen. Writes and syncs are not, and are wrapped."""
MOST = 1000


@pytest.fixture(autouse=True)
def no_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost most of the time, and a process that is killed loses nothing of what it wrote."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(operation: int, folder: Path) -> None:
    """Have this process kill itself before that operation in the folder, of those to come."""
    count = 0

    def tick() -> None:
        nonlocal count
        if count == operation:
            die()
        count += 1

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        place = str(arguments[0])
        # What is removed as a whole is removed by names relative to it.
        if event in OPERATIONS and (place.startswith(str(folder)) or "/" not in place):
            tick()

    def ticking(call: Callable[..., Any]) -> Callable[..., Any]:
        def ticked(*args: Any) -> Any:
            tick()
            return call(*args)

        return ticked

    os.fsync = ticking(os.fsync)  # type: ignore[assignment]
    format.HashedFile.write = ticking(format.HashedFile.write)  # type: ignore[method-assign]
    sys.addaudithook(listen)


def in_child(operation: int, folder: Path, body: Callable[[], None]) -> bool:
    """Run in a child that kills itself at the operation; whether it came to its end instead."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            die_at(operation, folder)
            body()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == 0


def sweep(folder: Path, prepare: Callable[[], None], body: Callable[[], None]) -> list[int | None]:
    """The step that is loaded after a kill at each operation; each time another save succeeds."""
    found = []
    for operation in range(MOST):
        prepare()
        is_over = in_child(operation, folder, body)
        found.append(loaded_step(alone(), folder))
        assert not list(folder.glob(".step*"))  # reading has cleared away what the kill left
        save(alone(), folder, 9, keep=1)
        assert loaded_step(alone(), folder) == 9
        if is_over:
            return found
    raise AssertionError("saving does not end")


def cleared(folder: Path) -> None:
    for path in folder.glob("*"):
        if path.name == LATEST:
            path.unlink()
        else:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.slow), True])
def test_kill_at_every_operation_leaves_a_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    """With one to keep: the old one goes only when the new one is there."""

    def prepare() -> None:
        cleared(tmp_path)
        save(alone(), tmp_path, 1)

    def body() -> None:
        made = saver(alone(), tmp_path, keep=1, asynchronous=asynchronous, resumed_at=1)
        begin(made, 2)
        made.finish()

    found = sweep(tmp_path, prepare, body)
    assert len(found) > 30
    assert found == sorted(found, key=int) and set(found) == {1, 2}


def test_kill_while_the_only_one_is_replaced(tmp_path: Path) -> None:
    def prepare() -> None:
        cleared(tmp_path)
        save(alone(), tmp_path, 2)

    def body() -> None:
        begin(saver(alone(), tmp_path, keep=1, resumed_at=2), 2)

    found = sweep(tmp_path, prepare, body)
    assert set(found) == {2}


def test_kill_before_there_is_one(tmp_path: Path) -> None:
    def body() -> None:
        begin(saver(alone(), tmp_path), 2)

    found = sweep(tmp_path, lambda: cleared(tmp_path), body)
    assert found[0] is None and found[-1] == 2
    assert sorted(found, key=lambda step: step or 0) == found


@pytest.mark.slow
def test_kill_of_two_ranks(tmp_path: Path) -> None:
    """Threads of one process, so that they die together."""

    def two(step: int, asynchronous: bool) -> None:
        def rank(channel: Any) -> None:
            made = saver(channel, tmp_path, keep=1, asynchronous=asynchronous, resumed_at=step)
            begin(made, step)
            made.finish()

        on_ranks(2, rank)

    for operation in range(MOST):
        cleared(tmp_path)
        two(1, False)
        is_over = in_child(operation, tmp_path, lambda: two(2, True))
        steps = set(on_ranks(2, lambda channel: loaded_step(channel, tmp_path)))
        assert steps in ({1}, {2})
        if is_over:
            assert steps == {2}
            return
    raise AssertionError("saving does not end")


def test_kill_while_old_ones_are_cleared_away(tmp_path: Path) -> None:
    """A run that goes on after a kill may be killed while it tidies up."""
    for step in (1, 2):
        save(alone(), tmp_path, step)

    def prepare() -> None:
        (tmp_path / f".{name_of(3)}.abc-1.partial").mkdir(exist_ok=True)
        (tmp_path / f".{name_of(3)}.abc-1.partial" / "file").touch()
        if (tmp_path / name_of(1)).exists():
            (tmp_path / name_of(1)).rename(tmp_path / f".{name_of(1)}.replaced")

    for operation in range(MOST):
        prepare()
        is_over = in_child(operation, tmp_path, lambda: load_newest(alone(), tmp_path) and None)
        assert loaded_step(alone(), tmp_path) == 2
        assert (tmp_path / name_of(1)).exists()
        if is_over:
            return
    raise AssertionError("tidying up does not end")
