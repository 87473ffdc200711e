"""The root's side of sums: takes cells as they come, and sends each sum out as soon as it is whole.

Sums are kept for one round after theirs, for a rank that comes late; a rank that comes later still
is given a state instead, by the first root. So a root holds buffers of two rounds, and those that
are on their way.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from hpctrain.grad.coded.cells import Buffer, Kind, Pool
from hpctrain.grad.coded.collecting import Column, Vote, Whole, WholeSum
from hpctrain.grad.coded.schemes import Scheme
from hpctrain.grad.coded.sums import Node, tree_of
from hpctrain.grad.coded.worker import Post

KEPT = 64
"""Rounds whose tally is kept until somebody takes it out."""


@dataclass
class Tally:
    """What came to a root in a round."""

    nbytes: int = 0
    sources: dict[int, int] = field(default_factory=dict)
    """The rank whose cell of a data block was used, by data block, in the first of its columns."""


@dataclass
class _RoundSums:
    round: int
    sums: dict[int, Whole]
    tally: Tally
    totals: dict[int, Buffer] = field(default_factory=dict)


class Aggregator:
    """Sums up the model blocks that are this rank's. Pure but for `post`.

    Args:
        rank: this rank.
        workers: ranks that compute, in the order of the scheme's workers.
        post: sends.
        pool: of buffers.
        scheme: what is sent.
        samples: of each data block of a round.
        deadline_s: after it, a sum is estimated from what is there; 0 for never.
        first_root: the rank that hears of ranks whose results are gone.
    """

    def __init__(
        self,
        rank: int,
        workers: Sequence[int],
        post: Post,
        pool: Pool,
        scheme: Scheme,
        samples: Sequence[int],
        deadline_s: float = 0.0,
        first_root: int = 0,
    ) -> None:
        self._rank = rank
        self._index = {rank: index for index, rank in enumerate(workers)}
        self._first_root = first_root
        self._post = post
        self._pool = pool
        self._scheme = scheme
        self._samples = tuple(samples)
        self._deadline_s = deadline_s
        self._begun_s: tuple[int, float] = (-1, 0.0)
        """The round that any rank has begun last, and when the first did."""
        self._columns: Sequence[Column] = ()
        self._mine: list[int] = []
        self._now: _RoundSums | None = None
        self._before: _RoundSums | None = None
        self._joined: dict[int, int] = {}
        """The round that each rank has begun last."""
        self._waiting: list[tuple[int, Buffer]] = []
        self.tallies: dict[int, Tally] = {}
        """By round; who reads one takes it out."""

    def lay_out(self, columns: Sequence[Column]) -> None:
        """Learn the columns. Cells that came before are taken in now."""
        self._columns = columns
        self._mine = [n for n, column in enumerate(columns) if column.root == self._rank]
        waiting, self._waiting = self._waiting, []
        for source, buffer in waiting:
            self.receive(source, buffer)

    def receive(self, source: int, buffer: Buffer) -> None:
        """Take in a cell."""
        if not self._columns:
            self._waiting.append((source, buffer))
            return
        sums = self._sums_of(buffer.round)
        if sums is None:
            self._pool.drop(buffer)
            return
        column, node = buffer.column, Node(buffer.lo, buffer.hi)
        sums.tally.nbytes += buffer.payload.numel()
        sum_ = sums.sums[column]
        if column in sums.totals and not isinstance(sum_, Vote):  # which compares late ones too
            self._pool.drop(buffer)
            return
        is_new = sum_.put(self._index[source], node, buffer)
        if is_new and column == self._mine[0]:
            for block in range(*node):
                sums.tally.sources.setdefault(block, source)
        total = sum_.take_total()
        if total is not None:
            sums.totals[column] = total
            self._announce(sums, column)

    def tick(self, now: float) -> None:
        """Look at the clock: estimate sums that are not whole in time."""
        round_, begun_s = self._begun_s
        if not self._deadline_s or now - begun_s < self._deadline_s or not self._now:
            return
        if self._now.round == round_:
            for number in self._mine:
                if number not in self._now.totals:
                    self._estimate(self._now, number)

    def _estimate(self, sums: _RoundSums, column: int) -> None:
        whole = sums.sums[column]
        assert isinstance(whole, WholeSum)
        estimate = whole.take_estimate(self._samples)
        if estimate is not None:
            total = estimate.total
            total.write(Kind.RESULT, sums.round, column, loss=total.loss)
            total.estimates(estimate.covered, estimate.variance)
            sums.totals[column] = total
            self._announce(sums, column)

    def undecided(self, dead: Collection[int]) -> list[tuple[int, Node]]:
        """Model blocks and data blocks of which copies differ, without hope of a majority."""
        gone = {self._index[rank] for rank in dead if rank in self._index}
        return [
            (column, node)
            for column, whole in (self._now.sums if self._now else {}).items()
            if isinstance(whole, Vote)
            for node in whole.undecided(gone)
        ]

    def joined(self, rank: int, round_: int, now: float = 0.0) -> None:
        """A rank has begun a training round: it takes results of that round from now on."""
        if round_ <= self._joined.get(rank, -1):
            return  # overtaken by the next one
        if round_ > self._begun_s[0]:
            self._begun_s = round_, now
        self._joined[rank] = round_
        for sums in (self._now, self._before):
            if sums and sums.round == round_:
                for column in sums.totals:
                    if rank == self._rank:  # the others have waited for this rank
                        self._announce(sums, column)
                    elif self._has_begun(round_):
                        self._send(rank, sums, column)
                return
        if self._now and round_ < self._now.round:
            self._post(self._first_root, self._pool.message(Kind.BEHIND, round_, rank))

    def _sums_of(self, round_: int) -> _RoundSums | None:
        """The sums of a round that is not over; None if it is."""
        if self._now is None or round_ > self._now.round:
            if self._before:
                for total in self._before.totals.values():
                    self._pool.drop(total)
            if self._now:
                for sum_ in self._now.sums.values():
                    sum_.clear()
            self._before = self._now
            tree = tree_of(len(self._samples))
            drop = self._pool.drop
            self._now = _RoundSums(
                round_,
                {n: self._scheme.whole(n, self._columns[n], tree, drop) for n in self._mine},
                Tally(),
            )
            self.tallies[round_] = self._now.tally
            for old in [number for number in self.tallies if number <= round_ - KEPT]:
                del self.tallies[old]
        return self._now if round_ == self._now.round else None

    def _announce(self, sums: _RoundSums, column: int) -> None:
        """Send a sum to all that have begun its round, once this rank has begun it too.

        So no rank can be two rounds ahead of a root, which could not keep up with what it holds.
        """
        if self._has_begun(sums.round):
            ready = [rank for rank, round_ in self._joined.items() if round_ == sums.round]
            for rank in sorted(ready, key=self._rank.__eq__):  # its own is a copy: last
                self._send(rank, sums, column)

    def _has_begun(self, round_: int) -> bool:
        return self._joined.get(self._rank, -1) >= round_

    def _send(self, rank: int, sums: _RoundSums, column: int) -> None:
        total = sums.totals[column]
        if total.kind is not Kind.RESULT:
            total.write(Kind.RESULT, sums.round, column, loss=total.loss)
        if rank == self._rank:  # which may change its gradients while others still read theirs
            copy = self._pool.take(total.payload.numel())
            copy.whole.copy_(total.whole)
            self._post(rank, copy)
            return
        self._pool.hold(total)
        self._post(rank, total)


class Figures:
    """Figures of an evaluation, one set a data block, added up in the order of data blocks."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._of: dict[int, bytes] = {}

    def put(self, block: int, figures: bytes) -> None:
        """Take in what a data block gave."""
        self._of.setdefault(block, figures)

    def whole(self) -> list[bytes] | None:
        """Those of all data blocks, once they are there."""
        if len(self._of) < self._blocks:
            return None
        return [self._of[block] for block in range(self._blocks)]
