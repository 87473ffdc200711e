"""A device without a GPU: queues whose work happens late, after its end was asked for often.

Whoever reads too early sees old values, and whoever forgets to wait sees them in the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from hpctrain.comm.device import Work

_lock = threading.RLock()
"""The engine's thread asks too."""


class LateEvent:
    """The end of one piece of work, which is done at the `asked`-th question, and not before."""

    def __init__(self, work: Work, after: Sequence[LateEvent], asked: int) -> None:
        self._work: Work | None = work
        self._after = after
        self._left = asked

    def query(self) -> bool:
        with _lock:
            self._left -= 1
            if self._left <= 0:
                self.complete()
            return self._work is None

    def complete(self) -> None:
        """Do the work, after everything before it."""
        with _lock:
            if self._work:
                for event in self._after:
                    event.complete()
                work, self._work, self._after = self._work, None, ()
                work()


class LateDevice:
    """Work of a queue happens in order; that of different queues as events say, and late.

    Args:
        asked: how often the end of a piece of work is asked for before it is done.
        program_waits: whether the program itself is no queue: it writes at once, and stands still
            where its queue would wait.
    """

    def __init__(self, asked: int = 3, program_waits: bool = False) -> None:
        self._asked = asked
        self._program_waits = program_waits
        self._last: dict[str, LateEvent] = {}
        self.pinned_bytes = 0
        self.entered: list[str] = []
        """Threads whose device it is."""

    def mark(self) -> LateEvent:
        return self._queue("program", lambda: None, ())

    def run(self, work: Work, queue: str, after: Sequence[LateEvent] = ()) -> LateEvent:
        assert queue in ("out", "in", "sum")
        return self._queue(queue, work, after)

    def wait(self, event: LateEvent) -> None:
        self._queue("program", lambda: None, (event,))
        if self._program_waits:
            event.complete()

    def enter(self) -> None:
        self.entered.append(threading.current_thread().name)

    def adopt(self, tensor: torch.Tensor) -> None:
        pass

    def host_memory(self, nbytes: int) -> torch.Tensor:
        self.pinned_bytes += nbytes
        return torch.zeros(nbytes, dtype=torch.uint8)

    def pin(self, address: int, nbytes: int, owner: object) -> None:
        self.pinned_bytes += nbytes

    def program(self, work: Callable[[], object]) -> None:
        """Queue what a training program would, such as a backward's kernels."""
        self._queue("program", work, ())

    def synchronize(self) -> None:
        """Wait for the program's own queue."""
        if "program" in self._last:
            self._last["program"].complete()

    def _queue(self, queue: str, work: Work, after: Sequence[LateEvent]) -> LateEvent:
        before = [self._last[queue]] if queue in self._last else []
        event = LateEvent(work, [*before, *after], self._asked)
        self._last[queue] = event
        return event
