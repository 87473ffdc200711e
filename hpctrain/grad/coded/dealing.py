"""Who computes which data block of a round: own ones first, then those that would come too late.

Pure bookkeeping of the root; time is passed in. A worker computes its own data blocks in order. One
that has finished them, or is about to, is asked for the data block that is expected last, if it
would have it before the one who is at it, by a margin: without stragglers, nothing is
computed twice.

What is known of a worker's pace is what it showed in earlier rounds, and how long it has been
silent in this one. One that takes longer than expected is expected to take longer still.
"""

from __future__ import annotations

import statistics
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import inf

from hpctrain.grad.coded.assignment import Assignment, with_owners

MARGIN = 0.25
"""A backup is asked only if it would be faster by this part of the time that it needs."""
OVERDUE = 2.0
"""A data block that takes longer than expected is expected to take this much of the excess more."""
AHEAD_S = 1.5e-2
"""How long before it would have nothing to do a worker is asked for more: it hears late, and what
is not known yet may change whom to help."""
AHEAD = 0.5
"""The same at most, as a part of the time of a data block."""
REMEMBERED = 8
"""Rounds over whose median a worker's pace is taken: one slow round does not make a slow worker."""
GAIN = 0.1
"""By which part of a round a new deal must be faster, ..."""
PATIENCE = 4
"""... in so many rounds one after another, before data blocks get other owners."""


class Act(Enum):
    """What the root asks of a worker."""

    HELP = "help"
    """Compute the data block as well."""
    TAKEN = "taken"
    """Another worker computes it as well, ahead of this one or not: go on with it."""
    LEAVE = "leave"
    """Another worker computes it: do not begin it."""
    DROP = "drop"
    """It is there: give it up."""


@dataclass(frozen=True)
class Order:
    """What a worker is told about a data block."""

    act: Act
    worker: int
    block: int


@dataclass
class _Progress:
    """How far a worker is in the round."""

    own: list[int]
    """Its own data blocks that it has not finished, in the order in which it computes them."""
    since_s: float
    """When it began the data block that it is at."""
    joined: bool = False
    helps: list[int] = field(default_factory=list)
    """Data blocks that it was asked for and has not finished."""
    finished: list[int] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)
    at_least_s: float = 0.0
    """How long it had been at a data block that it was told to give up."""

    @property
    def waiting(self) -> list[int]:
        """What it will compute, the one that it is at first."""
        return self.own + self.helps


class Paces:
    """How long each worker takes for a data block, as it showed in the last rounds."""

    def __init__(self, workers: int) -> None:
        self._seen: list[deque[float]] = [deque(maxlen=REMEMBERED) for _ in range(workers)]

    def record(self, worker: int, took_s: Sequence[float], at_least_s: float) -> None:
        """Remember a round.

        Args:
            worker: who.
            took_s: time of each data block that it finished.
            at_least_s: how long it had been at one that it did not finish; 0 if there is none.
        """
        if took_s:
            self._seen[worker].append(statistics.fmean(took_s))
        elif at_least_s > self.of(worker):
            self._seen[worker].append(at_least_s)

    def of(self, worker: int) -> float:
        """Seconds a data block; those of the usual worker if this one has not shown any yet."""
        seen = self._seen[worker]
        if seen:
            return statistics.median_low(seen)
        others = [statistics.median_low(s) for s in self._seen if s]
        return statistics.median_low(others) if others else 0.0

    def last(self, worker: int) -> float:
        """The same, as the worker showed it last."""
        return self._seen[worker][-1] if self._seen[worker] else self.of(worker)

    @property
    def known(self) -> bool:
        """Whether any worker has finished a data block so far."""
        return any(self._seen)

    @property
    def settled(self) -> bool:
        """Whether most workers have shown their pace often enough to go by it."""
        shown = sum(len(seen) >= REMEMBERED // 2 for seen in self._seen)
        return 2 * shown > len(self._seen)


class Round:
    """The data blocks of one round: who has which, who is at which.

    Args:
        assignment: who may compute which, and who does at first.
        paces: of the workers.
        begun_s: when the round began.
        dead: workers that will not come.
    """

    def __init__(
        self, assignment: Assignment, paces: Paces, begun_s: float, dead: Sequence[int] = ()
    ) -> None:
        self.assignment = assignment
        self.begun_s = begun_s
        self._paces = paces
        self.done_by: dict[int, int] = {}
        """Who was the first to have computed each data block that is there."""
        self.redundant: list[tuple[int, int]] = []
        """Data blocks that were computed once more, and by whom."""
        self._progress = [
            _Progress(list(assignment.owned(worker)), begun_s)
            for worker in range(assignment.workers)
        ]
        self.out = set(dead)
        """Workers that are dead, or silent for so long that nothing is expected of them."""

    def joined(self, worker: int, own: Sequence[int], now: float) -> list[Order]:
        """A worker begins with data blocks that it takes for its own; what it need not compute."""
        progress = self._progress[worker]
        progress.joined, progress.since_s = True, now
        self.out.discard(worker)
        others = {
            block
            for other, helper in enumerate(self._progress)
            if other != worker and other not in self.out
            for block in helper.helps
        }
        progress.own = [b for b in own if b not in self.done_by and b not in others]
        return [
            Order(Act.DROP if block in self.done_by else Act.LEAVE, worker, block)
            for block in own
            if block not in progress.own
        ]

    def done(self, worker: int, block: int, now: float) -> list[Order]:
        """A worker has computed a data block. Returns who may give it up."""
        progress = self._progress[worker]
        if block in progress.waiting:  # else it had been told to give it up in the meantime
            progress.took_s.append(now - progress.since_s)
        progress.since_s = now
        progress.finished.append(block)
        for waiting in (progress.own, progress.helps):
            if block in waiting:
                waiting.remove(block)
        if block in self.done_by:
            self.redundant.append((block, worker))
            return []
        return self._is_there(block, worker, now)

    def went_out(self, worker: int) -> None:
        """Nothing is expected of a worker any more; what it computed may have gone with it."""
        self.out.add(worker)
        for block in [b for b, w in self.done_by.items() if w == worker]:
            others = (
                other
                for other, progress in enumerate(self._progress)
                if other not in self.out and block in progress.finished
            )
            # Whoever has computed it as well has sent it, and would not say so again.
            self.done_by[block] = next(others, worker)
            if self.done_by[block] == worker:
                del self.done_by[block]

    def came_back(self, worker: int, now: float) -> list[Order]:
        """A worker that was out was only silent, so that what it computed comes after all."""
        self.out.discard(worker)
        missing = [b for b in self._progress[worker].finished if b not in self.done_by]
        return [order for block in missing for order in self._is_there(block, worker, now)]

    def decide(self, now: float) -> list[Order]:
        """Ask workers that are free, or will be soon, for data blocks that would come too late."""
        orders: list[Order] = []
        free_s = {
            worker: free_s
            for worker, progress in enumerate(self._progress)
            if progress.joined and worker not in self.out
            if (free_s := self._free_s(worker, now)) is not None
        }
        if not free_s:
            return orders
        first_s = self._first_s(now)
        for worker, from_s in sorted(free_s.items(), key=lambda each: each[1]):
            block = self._choice(worker, first_s, from_s)
            if block is not None:
                orders += self._ask(worker, block, now)
                first_s = self._first_s(now)
        return orders

    def expected_s(self, worker: int, now: float) -> list[tuple[int, float]]:
        """When a worker will have each data block that it is to compute, as far as one can tell."""
        progress = self._progress[worker]
        if worker in self.out:
            return [(block, inf) for block in progress.waiting]
        at_it_s = now - progress.since_s
        pace_s = self._pace(worker)
        left_s = pace_s - at_it_s if at_it_s <= pace_s else OVERDUE * (at_it_s - pace_s)
        pace_s = max(pace_s, at_it_s)
        return [
            (block, now + left_s + place * pace_s) for place, block in enumerate(progress.waiting)
        ]

    def end(self, now: float) -> None:
        """The round is over: remember how fast workers were."""
        for worker, progress in enumerate(self._progress):
            if progress.waiting and worker not in self.out:
                progress.at_least_s = max(progress.at_least_s, now - progress.since_s)
            self._paces.record(worker, progress.took_s, progress.at_least_s)

    def _free_s(self, worker: int, now: float) -> float | None:
        """When a worker will have nothing to do, if that is now or soon."""
        if not self._progress[worker].waiting:
            return now
        *others, (_, last_s) = self.expected_s(worker, now)
        is_soon = last_s - now <= min(AHEAD_S, AHEAD * self._pace(worker))
        return last_s if is_soon and not others else None

    def _pace(self, worker: int) -> float:
        """Seconds a data block: what the worker showed in this round, or else before."""
        took_s = self._progress[worker].took_s
        return statistics.fmean(took_s) if took_s else self._paces.of(worker)

    def _first_s(self, now: float) -> dict[int, float]:
        """When the first has each data block that is not there yet."""
        blocks = range(self.assignment.blocks)
        first_s = {block: inf for block in blocks if block not in self.done_by}
        for worker in range(self.assignment.workers):
            for block, expected_s in self.expected_s(worker, now):
                if block in first_s:
                    first_s[block] = min(expected_s, first_s[block])
        return first_s

    def _choice(self, worker: int, first_s: Mapping[int, float], from_s: float) -> int | None:
        """The data block that the worker should compute as well: the one that would come last.

        While nobody knows how long a data block takes, one that nobody else will compute.
        """
        is_known = self._paces.known or bool(self.done_by)
        mine_s = from_s + self._pace(worker) * (1 + MARGIN) if is_known else sys.float_info.max
        holders = self.assignment.holders
        late = [
            (expected_s, -block)
            for block, expected_s in first_s.items()
            if expected_s > mine_s and worker in holders[block]
        ]
        return -max(late)[1] if late else None

    def _ask(self, worker: int, block: int, now: float) -> list[Order]:
        at_it = [w for w, progress in enumerate(self._progress) if block in progress.waiting]
        progress = self._progress[worker]
        if not progress.waiting:
            progress.since_s = now
        progress.helps.append(block)
        orders = [Order(Act.HELP, worker, block)]
        for other in at_it:
            theirs = self._progress[other]
            act = Act.TAKEN
            if block in theirs.own and theirs.own[0] != block:  # it has not begun it
                theirs.own.remove(block)
                act = Act.LEAVE
            if theirs.joined:
                orders.append(Order(act, other, block))
        return orders

    def _is_there(self, block: int, worker: int, now: float) -> list[Order]:
        self.done_by[block] = worker
        at_it = [w for w, other in enumerate(self._progress) if block in other.waiting]
        return [self._stop(other, block, now) for other in at_it if self._progress[other].joined]

    def _stop(self, worker: int, block: int, now: float) -> Order:
        progress = self._progress[worker]
        if progress.waiting[0] == block:
            progress.at_least_s = max(progress.at_least_s, now - progress.since_s)
            progress.since_s = now
        for waiting in (progress.own, progress.helps):
            if block in waiting:
                waiting.remove(block)
        return Order(Act.DROP, worker, block)


class FixedRound(Round):
    """A round in which everyone computes what it has, whoever else does: nobody is asked for more.

    Args:
        own: data blocks of each worker.
    """

    def __init__(
        self,
        assignment: Assignment,
        paces: Paces,
        begun_s: float,
        dead: Sequence[int],
        own: Sequence[Sequence[int]],
    ) -> None:
        super().__init__(assignment, paces, begun_s, dead)
        for progress, blocks in zip(self._progress, own, strict=True):
            progress.own = list(blocks)

    def joined(self, worker: int, own: Sequence[int], now: float) -> list[Order]:
        """A worker begins."""
        progress = self._progress[worker]
        progress.joined, progress.since_s, progress.own = True, now, list(own)
        self.out.discard(worker)
        return []

    def decide(self, now: float) -> list[Order]:
        """Nothing."""
        del now
        return []

    def _is_there(self, block: int, worker: int, now: float) -> list[Order]:
        del now
        self.done_by[block] = worker
        return []


class Owners:
    """Learns who should own which data blocks.

    A new deal is made when it would have made each of the last rounds faster, which chance alone
    seldom brings about; at once when a worker dies or comes back.
    """

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self._out: frozenset[int] = frozenset()
        self._better = 0

    def learn(self, paces: Paces, out: Sequence[int]) -> bool:
        """After a round: deal anew if that is worth it. Whether owners have changed."""
        workers = range(self.assignment.workers)
        changed, self._out = frozenset(out) != self._out, frozenset(out)
        if not (changed or paces.settled) or any(paces.of(w) <= 0 for w in workers):
            return False
        speeds = [0.0 if w in self._out else 1 / paces.of(w) for w in workers]
        if not any(speeds):
            return False
        other = with_owners(self.assignment, speeds)
        gains = self._slowest_s(other, paces) < (1 - GAIN) * self._slowest_s(self.assignment, paces)
        self._better = self._better + 1 if gains else 0
        if other == self.assignment or not (changed or self._better >= PATIENCE):
            return False
        self._better = 0
        self.assignment = other
        return True

    def _slowest_s(self, assignment: Assignment, paces: Paces) -> float:
        """How long the slowest worker would have taken for its own in the last round."""
        return max(
            len(assignment.owned(w)) * paces.last(w)
            for w in range(assignment.workers)
            if w not in self._out
        )
