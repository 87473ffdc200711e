"""One rank's desk: hands messages to whom they are for, and knows whether the roots live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hpctrain.grad.coded.aggregator import Aggregator
from hpctrain.grad.coded.cells import HEADER_BYTES, Buffer, Kind, Pool, content
from hpctrain.grad.coded.coordinator import Coordinator
from hpctrain.grad.coded.lending import Lending
from hpctrain.grad.coded.worker import Worker
from hpctrain.trace import now_s

BEAT_S = 0.25
"""How often a rank says that it lives, if it has nothing else to say."""
ROOT_LOST_S = 10.0
"""A root that is silent for so long is dead, where the MPI library does not say."""
SLOWEST_BYTES_PER_S = 1e6
"""A rank whose message is on its way is not silent, unless it takes longer than at this rate."""

_FOR_THE_FIRST_ROOT = frozenset(
    (Kind.JOIN, Kind.DONE, Kind.ORDER, Kind.BEAT, Kind.BEHIND, Kind.STOP)
)


class Outbox(Protocol):
    """What sends; see comm.mailbox.Mailbox."""

    sent_s: dict[int, float]
    """When this rank last sent something to each rank."""
    dead: set[int]
    """Ranks that are known to be dead."""

    def send(self, rank: int, letter: Any) -> None:
        """Send, also to oneself."""


class Desk:
    """A postman; see comm.mailbox.Postman. Pure but for what it is opened with.

    Args:
        rank: this rank.
        ranks: number of all ranks.
        roots: the ranks that add up; the first also decides.
        pool: of buffers.
        now: the clock, in seconds.
        beat_s: how often a rank says that it lives, if it has nothing else to say.
        root_lost_s: a root that is silent for so long is dead.

    Attributes:
        layout: the order of parameters on which all agreed, once it has come.
        is_closed: whether this rank says no more that it lives.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        roots: Sequence[int],
        pool: Pool,
        now: Callable[[], float] = now_s,
        beat_s: float = BEAT_S,
        root_lost_s: float = ROOT_LOST_S,
    ) -> None:
        self._rank, self._ranks = rank, ranks
        self._roots = tuple(roots)
        self._pool = pool
        self._now = now
        self._beat_s = beat_s
        self._root_lost_s = root_lost_s
        self._beating: set[int] = set()
        """Ranks to which a beat is on its way."""
        self.layout: bytes | None = None
        self.is_closed = False
        self._dead_root: int | None = None
        self._quiet_ticks = 0
        """How often there was a tick since a message came."""
        self._heard_s = dict.fromkeys(range(ranks), now())
        self._beaten_s = 0.0
        self._ticked_s = now()

    def open(
        self,
        outbox: Outbox,
        worker: Worker,
        aggregator: Aggregator | None,
        coordinator: Coordinator | None,
        lending: Lending | None = None,
        look: Callable[[], object] = lambda: None,
    ) -> None:
        """Have these to hand messages to, before the first one comes; `look` at each tick."""
        self._outbox = outbox
        self._lending = lending
        self._look = look
        self._worker, self._aggregator, self._coordinator = worker, aggregator, coordinator

    def lost_root(self) -> str | None:
        """What is wrong with a root other than this rank."""
        # What a dead root has sent may lie there still: a whole poll must have found nothing.
        if self._dead_root is not None and self._quiet_ticks > 1:
            return f"rank {self._dead_root}, which adds up gradients, is dead"
        for root in self._roots:
            if root != self._rank and self._now() - self._heard_s[root] > self._root_lost_s:
                return f"rank {root}, which adds up gradients, is silent"
        return None

    def gone(self, silent_s: float) -> set[int]:
        """On a root: ranks that are dead, or have said nothing for so long."""
        now = self._now()
        silent = {rank for rank, heard_s in self._heard_s.items() if now - heard_s > silent_s}
        return (silent | self._outbox.dead) - {self._rank}

    # ------------------------------------------------------------------ inside the engine

    def room(self, source: int, nbytes: int) -> Buffer:
        """A buffer for a message, which may take a while."""
        until_s = self._now() + nbytes / SLOWEST_BYTES_PER_S
        self._heard_s[source] = max(self._heard_s[source], until_s)
        if self._coordinator:
            self._coordinator.hears(source, until_s)
        return self._pool.take(nbytes - HEADER_BYTES)

    def came(self, source: int, letter: Any) -> None:
        """A message is there."""
        kind = letter.kind
        self._quiet_ticks = 0
        self._heard_s[source] = self._now()
        if kind is Kind.LENT:
            assert self._lending
            letter = self._lending.fetch(source, letter)
            kind = letter.kind
        if kind is Kind.CELL:
            assert self._aggregator
            self._aggregator.receive(source, letter)
        elif kind in _FOR_THE_FIRST_ROOT:
            if kind is Kind.JOIN and letter.hi and self._aggregator:
                self._aggregator.joined(source, letter.round, self._now())
            if self._coordinator:
                self._coordinator.receive(source, letter)
            else:
                self._pool.drop(letter)
        elif kind is Kind.BACK:
            assert self._lending
            self._lending.came_back(source, letter)
        elif kind is Kind.LAYOUT:
            self.layout = self.layout or content(letter)
            self._pool.drop(letter)
        else:
            self._worker.receive(letter)

    def sent(self, letter: Any) -> None:
        """A message has left."""
        if letter.kind is Kind.BEAT:
            self._beating.discard(letter.lo)
        self._pool.drop(letter)

    def died(self, rank: int) -> None:
        """A rank is dead."""
        if self._lending and rank not in self._roots:  # which may have lent it on
            self._lending.died(rank)
        if self._coordinator:
            self._coordinator.died(rank)
        elif rank in self._roots and not self.is_closed:
            self._dead_root = rank

    def tick(self, now: float) -> None:
        """Look at the clock: say that this rank lives, and see whether others need help."""
        self._quiet_ticks += 1
        if self._coordinator:
            self._coordinator.tick(now)
        if self._aggregator:
            self._aggregator.tick(now)
        self._look()
        deaf_s, self._ticked_s = now - self._ticked_s, now
        if deaf_s > self._beat_s:  # it is not the others that were silent
            self._heard_s = {rank: s + deaf_s for rank, s in self._heard_s.items()}
        if now - self._beaten_s > self._beat_s and not self.is_closed:
            self._beaten_s = now
            self._beat(now)

    def _beat(self, now: float) -> None:
        """Say that this rank lives, to whom it has said nothing for a while."""
        outbox = self._outbox
        for other in range(self._ranks) if self._rank in self._roots else self._roots:
            is_due = now - outbox.sent_s.get(other, 0.0) > self._beat_s
            # One at a time, or they would pile up to a rank that stands still.
            if is_due and other not in {self._rank, *self._beating, *outbox.dead}:
                self._beating.add(other)
                outbox.send(other, self._pool.message(Kind.BEAT, self._worker.round, other))
