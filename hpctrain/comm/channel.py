"""Operations, and the channels on which they run in order.

An *operation* is a generator: it starts MPI requests, yields them, and is resumed once they are
complete; between two yields it may compute. One that waits for something else, such as counters
in shared memory, yields a function that says whether it has come. A *channel* is a communicator of
its own on which operations begin in the order in which they were posted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from mpi4py import MPI

from hpctrain.trace import WIRE, now_s

if TYPE_CHECKING:
    from hpctrain.comm.engine import Engine

Steps = Generator[Sequence[MPI.Request] | Callable[[], bool], None, Any]
Operation = Callable[[MPI.Intracomm, int], Steps]
"""Called with the channel's communicator and the first of `TAGS_PER_OPERATION` free tags."""

TAGS_PER_OPERATION = 4
FIRST_FIXED_TAG = 16_384
"""Smaller tags go round among operations; from here on they belong to planned ones."""
LANES = 8_191
"""Pairs of fixed tags below 32,767, the largest tag that MPI guarantees."""

IN_FLIGHT_BYTES = 8 << 20
"""Scratch of a channel's operations that may be in flight, unless a single one needs more."""
IN_FLIGHT = 64
"""Operations of a channel that may be in flight."""
LOOK_AHEAD = 4
"""Unfinished operations that a poll asks for. Asking for one moves all, and they finish nearly in
order: asking for more costs time and finds little."""


class Ticket:
    """An operation that was posted: when it began and ended, and what it gave."""

    __slots__ = (
        *("begun_s", "bytes", "done", "error", "finished_s"),
        *("held_bytes", "label", "number", "result"),
    )

    def __init__(self, label: str, number: int, nbytes: int, held_bytes: int) -> None:
        self.label = label
        self.number = number
        self.bytes = nbytes
        self.held_bytes = held_bytes
        self.begun_s = 0.0
        self.finished_s = 0.0
        self.done = False
        self.error: BaseException | None = None
        self.result: Any = None


class _Running:
    """An operation that has begun: its generator and what it waits for."""

    __slots__ = ("awaited", "steps", "ticket")

    def __init__(self, ticket: Ticket, steps: Steps) -> None:
        self.ticket = ticket
        self.steps = steps
        self.awaited = next(steps)

    def has_come(self) -> bool:
        """Whether the operation can be resumed."""
        if callable(self.awaited):
            return self.awaited()
        return MPI.Request.Testall(self.awaited)


class Channel:
    """A communicator of its own, whose operations begin in the order in which they were posted.

    All ranks must post the same operations in the same order; channels are independent of each
    other. From the oldest unfinished operation on, those that have begun hold at most
    `in_flight_bytes` of scratch together, unless a single one needs more.
    """

    def __init__(
        self,
        engine: Engine,
        comm: MPI.Intracomm,
        name: str,
        in_flight_bytes: int,
        number: int = 0,
    ) -> None:
        self.number = number
        self.abandoned = False
        self.engine = engine
        self.comm = comm
        self.name = name
        self.in_flight_bytes = in_flight_bytes
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.posted = 0
        self.finished = 0
        self._queue: deque[tuple[Ticket, Operation]] = deque()
        self._running: list[_Running] = []
        self._window: deque[Ticket] = deque()
        self._window_bytes = 0
        self._resumed = 0

    def post(
        self, operation: Operation, label: str, nbytes: int = 0, held_bytes: int | None = None
    ) -> Ticket:
        """Queue an operation and begin it if the engine is free. Returns at once.

        Args:
            operation: makes the generator; see the module's text.
            label: what messages and traces call it, for example "block 3".
            nbytes: payload on this rank, for traces.
            held_bytes: what counts against the channel's `in_flight_bytes`; by default `nbytes`.
        """
        ticket = Ticket(label, self.posted, nbytes, nbytes if held_bytes is None else held_bytes)
        self.posted += 1
        self._queue.append((ticket, operation))
        self.engine.attend(self)
        return ticket

    def run(self, operation: Operation, label: str) -> Any:
        """Post an operation, wait for it and return its result. Collective."""
        return self.engine.wait(self.post(operation, label))

    def abandon(self) -> None:
        """This rank will post nothing more. Not collective; freed when all ranks have said so."""
        self.abandoned = True

    @property
    def busy(self) -> bool:
        """Whether an operation is queued or in flight."""
        return self.finished != self.posted

    def oldest(self) -> Ticket | None:
        """The operation that has been in flight for longest."""
        return self._running[0].ticket if self._running else None

    def begin(self) -> None:
        """Begin what may begin. The engine calls it, locked."""
        while self._queue and self._has_room(self._queue[0][0]):
            self._begin(*self._queue.popleft())

    def advance(self) -> bool:
        """Resume what can be resumed, and begin what may begin. The engine calls it, locked.

        Returns:
            Whether anything was resumed.
        """
        before, waiting = self._resumed, 0
        for running in self._running:
            if not self._step(running):
                waiting += 1
                if waiting == LOOK_AHEAD:
                    break
        if self._running:
            self._running = [r for r in self._running if not r.ticket.done]
        self.begin()
        return self._resumed > before

    def _has_room(self, ticket: Ticket) -> bool:
        """Whether the operation may begin, after forgetting finished ones at the window's start."""
        window = self._window
        while window and window[0].done:
            self._window_bytes -= window.popleft().held_bytes
        if not window:
            return True
        room = self._window_bytes + ticket.held_bytes <= self.in_flight_bytes
        return room and len(window) < IN_FLIGHT

    def excuse(self, pause_s: float) -> None:
        """Do not hold `pause_s`, during which this process stood still, against its operations."""
        for running in self._running:
            running.ticket.begun_s += pause_s

    def _begin(self, ticket: Ticket, operation: Operation) -> None:
        ticket.begun_s = now_s()
        self._window.append(ticket)
        self._window_bytes += ticket.held_bytes
        tag = ticket.number * TAGS_PER_OPERATION % FIRST_FIXED_TAG
        try:
            self._running.append(_Running(ticket, operation(self.comm, tag)))
        except StopIteration as end:
            self._finish(ticket, end.value)
        except BaseException as error:
            self._finish(ticket, None, error)

    def _step(self, running: _Running) -> bool:
        """Resume the operation as far as it goes; whether it is finished."""
        try:
            while running.has_come():
                self._resumed += 1
                running.awaited = running.steps.send(None)
            return False
        except StopIteration as end:
            self._finish(running.ticket, end.value)
        except BaseException as error:
            self._finish(running.ticket, None, error)
        return True

    def _finish(self, ticket: Ticket, result: Any, error: BaseException | None = None) -> None:
        ticket.finished_s = now_s()
        ticket.result = result
        ticket.error = error
        ticket.done = True
        self.finished += 1
        trace = self.engine.world.trace
        if trace.active:
            trace.add(
                WIRE,
                ticket.label,
                ticket.begun_s,
                ticket.finished_s,
                channel=self.name,
                bytes=ticket.bytes,
            )


def barrier(comm: MPI.Intracomm, tag: int) -> Steps:
    """Operation: return once all ranks have begun it."""
    yield [comm.Ibarrier()]
