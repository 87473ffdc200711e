"""One rank's desk: hands messages to whom they are for, and knows whether the roots live."""

from __future__ import annotations

from typing import Any

from hpctrain.comm.engine import Engine
from hpctrain.comm.mailbox import Mailbox
from hpctrain.grad.coded.aggregator import Aggregator
from hpctrain.grad.coded.cells import HEADER_BYTES, Buffer, Kind, Pool, content
from hpctrain.grad.coded.config import Hands
from hpctrain.grad.coded.coordinator import Coordinator
from hpctrain.grad.coded.worker import Worker
from hpctrain.trace import now_s

BEAT_S = 0.25
"""How often a rank says that it lives, if it has nothing else to say."""
ROOT_LOST_S = 10.0
"""A root that is silent for so long is dead, where the MPI library does not say."""
LISTEN_S = 2e-2
"""How late a rank that computes may hear that a data block is not needed any more. Shorter, and
listening costs all ranks more than what is computed in vain costs a few."""

_FOR_THE_FIRST_ROOT = frozenset((Kind.JOIN, Kind.DONE, Kind.ORDER, Kind.BEAT, Kind.BEHIND))


class Desk:
    """See comm.mailbox.Postman. Construction is collective.

    Attributes:
        mailbox: sends and receives.
        layout: the order of parameters on which all agreed, once it has come.
        is_closed: whether this rank says no more that it lives.
    """

    def __init__(self, engine: Engine, pool: Pool, hands: Hands) -> None:
        self._pool = pool
        self._roots = hands.roots
        self._rank, self._size = engine.world.rank, engine.world.size
        self.layout: bytes | None = None
        self.is_closed = False
        self._dead_root: int | None = None
        self._heard_s = dict.fromkeys(hands.roots, now_s())
        self._beaten_s = 0.0
        self._ticked_s = now_s()
        self.mailbox = Mailbox(engine, self, LISTEN_S)

    def open(
        self, worker: Worker, aggregator: Aggregator | None, coordinator: Coordinator | None
    ) -> None:
        """Hand messages to these from now on."""
        self._worker, self._aggregator, self._coordinator = worker, aggregator, coordinator
        self.mailbox.open()

    def lost_root(self) -> str | None:
        """What is wrong with a root, if this rank is none itself."""
        if self._dead_root is not None:
            return f"rank {self._dead_root}, which adds up gradients, is dead"
        if self._rank in self._roots:
            return None
        for root, heard_s in self._heard_s.items():
            if now_s() - heard_s > ROOT_LOST_S:
                return f"rank {root}, which adds up gradients, is silent"
        return None

    # ------------------------------------------------------------------ inside the engine

    def room(self, nbytes: int) -> Buffer:
        """A buffer for a message."""
        return self._pool.take(nbytes - HEADER_BYTES)

    def came(self, source: int, letter: Any) -> None:
        """A message is there."""
        kind = letter.kind
        if source in self._heard_s:
            self._heard_s[source] = now_s()
        if kind is Kind.CELL:
            assert self._aggregator
            self._aggregator.receive(source, letter)
        elif kind in _FOR_THE_FIRST_ROOT:
            if kind is Kind.JOIN and letter.hi and self._aggregator:
                self._aggregator.joined(source, letter.round, now_s())
            if self._coordinator:
                self._coordinator.receive(source, letter)
            else:
                self._pool.drop(letter)
        elif kind is Kind.LAYOUT:
            self.layout = self.layout or content(letter)
            self._pool.drop(letter)
        else:
            self._worker.receive(letter)

    def sent(self, letter: Any) -> None:
        """A message has left."""
        self._pool.drop(letter)

    def died(self, rank: int) -> None:
        """A rank is dead."""
        if self._coordinator:
            self._coordinator.died(rank)
        elif rank in self._roots and not self.is_closed:
            self._dead_root = rank

    def tick(self, now: float) -> None:
        """Look at the clock: say that this rank lives, and see whether others need help."""
        if self._coordinator:
            self._coordinator.tick(now)
        if self._aggregator:
            self._aggregator.tick(now)
        deaf_s, self._ticked_s = now - self._ticked_s, now
        if deaf_s > BEAT_S:  # it is not the others that were silent
            self._heard_s = {root: s + deaf_s for root, s in self._heard_s.items()}
        if now - self._beaten_s > BEAT_S and not self.is_closed:
            self._beaten_s = now
            self._beat(now)

    def _beat(self, now: float) -> None:
        """Say that this rank lives, to whom it has said nothing for a while."""
        for other in range(self._size) if self._rank in self._roots else self._roots[:1]:
            silent_s = now - self.mailbox.sent_s.get(other, 0.0)
            if other != self._rank and other not in self.mailbox.dead and silent_s > BEAT_S:
                self.mailbox.send(other, self._pool.message(Kind.BEAT, self._worker.round))
