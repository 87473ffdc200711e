"""Some of the ranks as a world of their own, moved by the same engine.

MPI is still called by one thread of a process at a time: what a part posts stands beside what the
whole world posts. Nobody watches a part for stalls, since one that hangs need not end the others;
who makes it says when to give it up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mpi4py import MPI

from hpctrain.comm.channel import IN_FLIGHT_BYTES, Channel, Ticket
from hpctrain.comm.engine import POLL_S, Engine, Listener, engine_of, register
from hpctrain.errors import ExchangeError
from hpctrain.world import World, of_part


def split(world: World, part: int, lost: Callable[[], str | None]) -> World:
    """The part of the ranks that gave the same number, in their order. Collective over all.

    The world's `engine_of` is a `PartEngine`.

    Args:
        world: all ranks.
        part: which part this rank belongs to, from 0.
        lost: asked while an operation of the part is waited for: why it will never end, if so.
    """
    whole = engine_of(world)
    made = of_part(world, whole.split(part))
    register(made, PartEngine(whole, made, lost))
    return made


class PartEngine(Engine):
    """What an engine is for all ranks, for a part of them.

    Raises:
        ExchangeError: from `wait`, when the part is lost.
    """

    def __init__(self, whole: Engine, world: World, lost: Callable[[], str | None]) -> None:
        self.whole = whole
        self.world = world
        self._lost = lost
        self._own: list[Channel] = []
        self.control = self.channel("control")

    @property
    def progress(self) -> str:
        """Who drives operations: the same for all."""
        return self.whole.progress

    @progress.setter
    def progress(self, mode: str) -> None:
        self.whole.progress = mode

    @property
    def deadline_s(self) -> float:
        """After which a stall of the whole world is an error."""
        return self.whole.deadline_s

    @deadline_s.setter
    def deadline_s(self, value: float) -> None:
        self.whole.deadline_s = value

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """MPI to oneself."""
        with self.whole.exclusive():
            yield

    def channel(self, name: str, in_flight_bytes: int = IN_FLIGHT_BYTES) -> Channel:
        """Make a channel over the part. Collective over it; it stays until the program ends."""
        with self.exclusive():
            comm = self.world.comm.Dup()
        return self._added(comm, name, in_flight_bytes)

    def alone(self, name: str) -> Channel:
        """Make a channel of this rank only."""
        with self.exclusive():
            comm = MPI.COMM_SELF.Dup()
        return self._added(comm, name, IN_FLIGHT_BYTES)

    def _added(self, comm: MPI.Intracomm, name: str, in_flight_bytes: int) -> Channel:
        channel = Channel(self, comm, f"{name} of a part", in_flight_bytes, number=-1)
        self.whole.add(channel)
        self._own.append(channel)
        return channel

    def wait(self, ticket: Ticket) -> Any:
        """Drive all operations until `ticket` is done; returns its result."""
        reason: str | None = None

        def is_over() -> bool:
            nonlocal reason
            if not ticket.done:
                reason = self._lost()
            return ticket.done or reason is not None

        if not ticket.done:
            self.whole.drive(is_over)
        if isinstance(ticket.error, MPI.Exception):
            reason = self._lost() or str(ticket.error)
        if reason is not None:
            self.whole.forget(self._own)
            raise ExchangeError(
                f"{ticket.label}: {reason}", where=self.world.name_of(self.world.rank)
            ) from ticket.error
        if ticket.error is not None:
            raise ticket.error
        return ticket.result

    def drive(self, until: Callable[[], bool], longest_s: float = POLL_S) -> None:
        """Drive all operations and listeners until `until` says so."""
        self.whole.drive(until, longest_s)

    def attend(self, channel: Channel) -> None:
        """An operation was queued."""
        self.whole.attend(channel)

    @property
    def busy(self) -> bool:
        """Whether an operation of any channel is queued or in flight."""
        return self.whole.busy

    def poll(self) -> None:
        """Move what can be moved, in passing."""
        self.whole.poll()

    def enter(self, device: Callable[[], object]) -> None:
        """Have the engine's thread call this before it calls MPI again."""
        self.whole.enter(device)

    def listen(self, listener: Listener) -> None:
        """Listeners are of all ranks."""
        self.whole.listen(listener)

    def push(self, start: Callable[[], object]) -> None:
        """Start sends now, if nobody else is inside MPI."""
        self.whole.push(start)

    def close(self) -> None:
        """The whole world's engine is closed, and this with it."""
