"""Ranks that are threads of one process: channels for what only meets, and moves little."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from hpctrain.comm.channel import Channel, Operation

MEET_S = 60.0
"""Longest wait for the other ranks."""


class _Meeting:
    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=MEET_S)
        self.given: list[Any] = [None] * size


class _Comm:
    """The few collectives that hpctrain.comm.collect uses."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self._meeting, self._rank = meeting, rank

    def Get_rank(self) -> int:  # noqa: N802
        return self._rank

    def Get_size(self) -> int:  # noqa: N802
        return self._meeting.size

    def _everyones(self, value: np.ndarray) -> list[np.ndarray]:
        meeting = self._meeting
        meeting.given[self._rank] = np.array(value)
        meeting.barrier.wait()
        everyone = list(meeting.given)
        meeting.barrier.wait()
        return everyone

    def Ibcast(self, buffer: Any, root: int) -> None:  # noqa: N802
        array = buffer[0] if isinstance(buffer, list) else buffer
        found = self._everyones(array)[root]
        if self._rank != root:
            array[...] = found

    def Iallgather(self, mine: np.ndarray, everyones: np.ndarray) -> None:  # noqa: N802
        everyones[...] = np.concatenate(self._everyones(mine))

    def Iallgatherv(self, mine: np.ndarray, everyones: list[Any]) -> None:  # noqa: N802
        everyones[0][...] = np.concatenate(self._everyones(mine))


class _Channel:
    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self.rank, self.size = rank, meeting.size
        self._comm = _Comm(meeting, rank)

    def run(self, operation: Operation, label: str) -> Any:
        steps = operation(cast(Any, self._comm), 0)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value


def alone() -> Channel:
    """The channel of a single rank, without MPI."""
    return cast(Channel, _Channel(_Meeting(1), 0))


def on_ranks(size: int, body: Callable[[Channel], Any]) -> list[Any]:
    """Run `body` on ranks that are threads; what each returned, or the first error."""
    meeting = _Meeting(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = body(cast(Channel, _Channel(meeting, rank)))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), None)
    if first or errors:
        raise first or errors[0]
    return results
