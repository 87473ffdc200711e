"""Messages that nobody has announced: sent when there is something to say, received as they come.

For modes in which no rank waits for another. Every message is received as soon as it comes,
wanted or not, so that no send is left without its receive and none has to be cancelled. Who gets it
finds out what it is. Messages of one sender may be handed over in another order than they were sent
in when they differ in size.

Where the MPI library tells that a rank has died (ULFM), the mailbox passes it on and goes on with
the others; without, a dead rank is one that is silent.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

from mpi4py import MPI

from hpctrain.comm.engine import Engine
from hpctrain.comm.watch import FAILED, failed_ranks
from hpctrain.trace import now_s

AT_ONCE = 32
"""Messages that are taken in by one poll, so that sends do not wait behind a flood."""
LONGEST_LISTEN_S = 8e-3
CLOSING_POLL_S = 1e-4
"""Sleep between two polls at the end, when messages that nobody needs are still on their way."""


class Letter(Protocol):
    """A message in host memory."""

    mpi: MPI.buffer


class Postman(Protocol):
    """What a mailbox asks of who uses it. Called by one thread at a time, inside the engine."""

    def room(self, source: int, nbytes: int) -> Letter:
        """Memory for a message that begins to come."""

    def came(self, source: int, letter: Letter) -> None:
        """A message is there."""

    def sent(self, letter: Letter) -> None:
        """A message has left: its memory is not needed for it any more."""

    def died(self, rank: int) -> None:
        """The MPI library says that a rank is dead."""

    def tick(self, now: float) -> None:
        """Called at each poll."""


_Entry = tuple[MPI.Request, int, Letter]


class Mailbox:
    """Sends and receives messages of any size, on a communicator of its own.

    Construction is collective; everything else but `close` is this rank's own. Once every rank has
    abandoned it, the engine closes it.

    Args:
        engine: polls it.
        postman: receives.
        longest_listen_s: longest time that a message lies there while this rank computes.
    """

    def __init__(
        self, engine: Engine, postman: Postman, longest_listen_s: float = LONGEST_LISTEN_S
    ) -> None:
        self._engine = engine
        self._postman = postman
        self.longest_listen_s = longest_listen_s
        self._comm, self.number = engine.duplicate("mailbox")
        self.rank = engine.world.rank
        self.abandoned = False
        self._is_closing = False
        self._counts_to = [0] * engine.world.size
        self._counts_from = [0] * engine.world.size
        """Messages to and from each other rank."""
        self._outbox: deque[tuple[int, Letter]] = deque()
        self._to_self: deque[Letter] = deque()
        self._sending: list[_Entry] = []
        self._receiving: list[_Entry] = []
        self._lost: list[_Entry] = []
        """To and from ranks that died meanwhile: MPI may still touch their memory."""
        self._status = MPI.Status()
        self.dead: set[int] = set()
        self.sent_s: dict[int, float] = {}
        """When this rank last sent something to each rank."""

    def open(self) -> None:
        """Send and receive from now on."""
        self._engine.listen(self)

    def send(self, rank: int, letter: Letter) -> None:
        """Send, also to oneself, where the very same memory arrives. Any thread; returns at once.

        The memory must not change until the postman hears that it was sent; to oneself it belongs
        to the receiver.
        """
        if rank == self.rank:
            self._to_self.append(letter)
        else:
            self._outbox.append((rank, letter))
        self._engine.push(self._start_sends)

    @property
    def in_flight(self) -> bool:
        """Whether messages are under way that this rank knows of."""
        return bool(self._outbox or self._to_self or self._sending or self._receiving)

    @property
    def leaving(self) -> bool:
        """Whether messages of this rank have not left yet, but for those to dead ranks."""
        return bool(self._outbox or self._sending)

    def abandon(self) -> None:
        """This rank needs it no more, but others may still need what this rank answers."""
        self.abandoned = True

    def close(self) -> None:
        """Receive, for nobody, what is on its way, and end. Collective; the engine calls it."""
        self._is_closing = True
        self._to_self.clear()
        self._start_sends()
        expected = self._comm.alltoall(self._counts_to)
        while self._sending or self._counts_from != expected:
            if not self._move():
                time.sleep(CLOSING_POLL_S)
        self._comm.Free()

    def advance(self) -> bool:
        """Send, receive and hand over what can be; whether anything moved. For the engine."""
        self._postman.tick(now_s())
        moved = self._start_sends()
        moved |= self._move()
        while self._to_self:
            self._postman.came(self.rank, self._to_self.popleft())
            moved = True
        return moved

    def _move(self) -> bool:
        moved = self._take_in()
        moved |= self._finish_receives()
        moved |= self._finish_sends()
        return moved

    def _start_sends(self) -> bool:
        moved = False
        while self._outbox:
            rank, letter = self._outbox.popleft()
            moved = True
            if rank in self.dead:
                self._postman.sent(letter)
                continue
            self.sent_s[rank] = now_s()
            try:
                request = self._comm.Isend([letter.mpi, MPI.BYTE], rank)
            except MPI.Exception as error:
                self._failed(error)
                self._postman.sent(letter)
                continue
            self._counts_to[rank] += 1
            has_left = self._test(request, rank)
            if has_left:  # as most small ones do: they need no further poll
                self._postman.sent(letter)
            else:
                under_way = self._lost if has_left is None else self._sending
                under_way.append((request, rank, letter))
        return moved

    def _take_in(self) -> bool:
        taken = 0
        while taken < AT_ONCE:
            try:
                message = self._comm.Improbe(MPI.ANY_SOURCE, MPI.ANY_TAG, self._status)
            except MPI.Exception as error:
                self._failed(error)
                continue
            if message is None:
                break
            taken += 1
            source = self._status.Get_source()
            letter = self._postman.room(source, self._status.Get_count(MPI.BYTE))
            self._receiving.append((message.Irecv([letter.mpi, MPI.BYTE]), source, letter))
        return taken > 0

    def _finish_receives(self) -> bool:
        if not self._receiving:
            return False
        came: list[_Entry] = []
        under_way: list[_Entry] = []
        for entry in self._receiving:
            done = self._test(entry[0], entry[1])
            (self._lost if done is None else came if done else under_way).append(entry)
        self._receiving = under_way
        for _, source, letter in came:
            self._counts_from[source] += 1
            if not self._is_closing:
                self._postman.came(source, letter)
        return bool(came)

    def _finish_sends(self) -> bool:
        if not self._sending:
            return False
        left: list[_Entry] = []
        under_way: list[_Entry] = []
        for entry in self._sending:
            done = self._test(entry[0], entry[1])
            (self._lost if done is None else left if done else under_way).append(entry)
        self._sending = under_way
        for _, _, letter in left:
            self._postman.sent(letter)
        return bool(left)

    def _test(self, request: MPI.Request, rank: int) -> bool | None:
        """Whether a request is complete; None if it never will be."""
        try:
            if request.Test():
                return True
        except MPI.Exception as error:
            self._failed(error)
            return None
        return None if rank in self.dead else False

    def _failed(self, error: MPI.Exception) -> None:
        """A rank has died: find out which.

        Raises:
            MPI.Exception: the error is another one.
        """
        if error.Get_error_class() not in FAILED:
            raise error
        for rank in failed_ranks(self._comm):
            if rank not in self.dead:
                self.dead.add(rank)
                self._postman.died(rank)
