"""The first root: says who computes what, knows who lives, and who has fallen behind.

It is driven by messages and by the clock alone, inside the engine, so that it answers while the
main thread computes or writes a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpctrain.grad.coded.aggregator import Figures
from hpctrain.grad.coded.assignment import Assignment, lost, place
from hpctrain.grad.coded.cells import Buffer, Kind, Pool, content
from hpctrain.grad.coded.dealing import Act, Order, Owners, Paces, Round
from hpctrain.grad.coded.schemes import Scheme
from hpctrain.grad.coded.worker import Post, as_blocks, as_bytes

DECIDE_S = 1e-3
"""Shortest time between two looks for workers that should be helped."""

_KIND = {
    Act.HELP: Kind.HELP,
    Act.TAKEN: Kind.TAKEN,
    Act.LEAVE: Kind.LEAVE,
    Act.DROP: Kind.DROP,
}
_log = logging.getLogger("hpctrain")


@dataclass(frozen=True)
class Silence:
    """How long a rank may say nothing."""

    out_s: float = 1.0
    """Then nothing is expected of it in this round."""
    lost_s: float = 4.0
    """Then it counts as dead, where the MPI library does not say."""


@dataclass
class Ended:
    """What is known of a round that is over."""

    number: int
    begun_s: float
    assignment: Assignment
    done_by: dict[int, int]
    redundant: list[tuple[int, int]]


class Coordinator:
    """Decides for all ranks. Pure but for `post` and `now`.

    Args:
        post: sends.
        pool: of buffers.
        workers: the ranks that compute, in the order of the assignment's workers.
        ranks: number of all ranks.
        scheme: what is sent, and who holds which data blocks of a training round.
        now: the clock, in seconds.
        silence: how long ranks may say nothing.
        roots: ranks without which the run cannot go on.
        relearn: whether owners change with measured speed.
        has_all: whether this rank has all that a round gives.
    """

    def __init__(
        self,
        post: Post,
        pool: Pool,
        workers: Sequence[int],
        ranks: int,
        scheme: Scheme,
        now: Callable[[], float],
        silence: Silence,
        roots: Sequence[int],
        relearn: bool = True,
        has_all: Callable[[int], bool] = lambda round_: False,
    ) -> None:
        self._post = post
        self._pool = pool
        self._workers = tuple(workers)
        self._index = {rank: index for index, rank in enumerate(workers)}
        self._ranks = ranks
        self._now = now
        self._silence = silence
        self._roots = tuple(roots)
        self._scheme = scheme
        self._relearn = relearn and scheme.relearns
        self._has_all = has_all
        self._owners = Owners(scheme.assignment)
        self._paces = {True: Paces(len(workers)), False: Paces(len(workers))}
        self._round: Round | None = None
        self._number = -1
        self._trains = True
        self._figures: Figures | None = None
        self._over: tuple[int, bytes] | None = None
        self._joined: dict[int, int] = {}
        """The round that each rank has begun last."""
        self._early: list[tuple[int, Buffer]] = []
        """Messages that overtook the word that their round has begun."""
        self._orders = 0
        self._heard_s = dict.fromkeys(range(ranks), now())
        self._decided_s = 0.0
        self._ticked_s = now()
        self._order: bytes | None = None
        self.dead: set[int] = set()
        self.behind: set[int] = set()
        """Ranks that began a round whose results are gone, and wait for a state to go on from."""
        self.failure: str | None = None
        """Why the run cannot go on."""
        self.is_told_to_stop = False
        """Whether a rank has asked that the run end soon."""
        self.ended: list[Ended] = []
        """Training rounds that are over, for whoever takes them out."""
        self._end: bytes | None = None
        self._last = -1
        """The last round, once the run is over."""
        self._continues = False
        """Whether the run that is over is to be continued."""

    # ------------------------------------------------------------------ messages

    def receive(self, source: int, buffer: Buffer) -> None:
        """Handle a message of any rank."""
        now = self._now()
        kind = buffer.kind
        if source in self.dead:  # what it computed may not have come with its last words
            self._pool.drop(buffer)
            return
        self._heard_s[source] = now
        index = self._index.get(source)
        if self._round and index in self._round.out:
            self._tell(self._round.came_back(index, now))
        if kind is Kind.JOIN:
            self._join(source, buffer, now)
        elif kind is Kind.BEHIND and self._joined.get(buffer.lo, -1) <= buffer.round:
            self.behind.add(buffer.lo)
        elif kind is Kind.DONE and buffer.round > self._number:
            self._early.append((source, buffer))
            return
        elif kind is Kind.DONE and buffer.round < self._number:
            for ended in self.ended:
                if ended.number == buffer.round:
                    ended.redundant.append((buffer.lo, self._index[source]))
        elif kind is Kind.DONE:
            assert self._round is not None
            if self._figures:
                self._figures.put(buffer.lo, content(buffer))
                self._conclude()
            self._tell(self._round.done(self._index[source], buffer.lo, now))
            self._decide(now)
        elif kind is Kind.STOP:
            self.is_told_to_stop = True
        elif kind is Kind.ORDER and self._order is None:
            self._order = content(buffer)
            for rank in range(self._ranks):
                self._say(Kind.LAYOUT, rank, data=self._order)
        self._pool.drop(buffer)

    def hears(self, rank: int, until_s: float) -> None:
        """A message of the rank is on its way, and may take until then."""
        self._heard_s[rank] = max(self._heard_s[rank], until_s)

    def died(self, rank: int) -> None:
        """The MPI library says that a rank is dead."""
        if rank in self.dead or self._end is not None:
            return
        self.dead.add(rank)
        _log.warning("rank %d is dead", rank)
        if rank in self._roots:
            self.failure = f"rank {rank}, which adds up gradients, is dead"
        if rank in self._index and self._round:
            self._round.went_out(self._index[rank])
            self._decide(self._now())
        self._look_for_lost()

    def tick(self, now: float) -> None:
        """Look at the clock."""
        deaf_s, self._ticked_s = now - self._ticked_s, now
        if deaf_s > self._silence.out_s / 4:  # it is not the others that were silent
            self._heard_s = {rank: s + deaf_s for rank, s in self._heard_s.items()}
        self._heard_s[self._roots[0]] = now
        is_over = self._end is not None
        if now - self._decided_s < DECIDE_S or self._round is None or is_over:
            return
        for index, rank in enumerate(self._workers):
            silent_s = now - self._heard_s[rank]
            if silent_s > self._silence.out_s and index not in self._round.out:
                _log.warning("rank %d has said nothing for %.1f s", rank, silent_s)
                self._round.went_out(index)
        self._decide(now)
        self._look_for_lost()

    # ------------------------------------------------------------------ the main thread

    @property
    def knows_who_is_left(self) -> bool:
        """Whether each rank has either been heard of lately, or counts as dead."""
        silence, now = self._silence, self._now()
        silent_s = [now - s for rank, s in self._heard_s.items() if rank not in self.dead]
        return not any(silence.out_s < s <= silence.lost_s for s in silent_s)

    def end(self, has_failed: bool, continues: bool = False) -> bytes:
        """The run is over: tell all ranks. Returns the ranks that nobody need wait for.

        Args:
            has_failed: there will be no results of the present round.
            continues: it is to be continued.
        """
        self._continues = continues
        self._last = self._joined.get(self._roots[0], -1) - has_failed
        now = self._now()
        # One that was told to end does not wait for ranks that stand still.
        silence_s = self._silence.out_s if continues else self._silence.lost_s
        silent = {r for r, s in self._heard_s.items() if now - s > silence_s}
        gone = as_bytes(sorted(self.dead | (silent & {*self._workers})))
        self._end = gone
        for rank in range(self._ranks):
            if rank not in self.dead:
                self._say_end(rank)
        return gone

    def take_behind(self) -> list[int]:
        """Ranks that wait for a state to go on from; they are about to be sent one."""
        behind = sorted(self.behind - self.dead)
        self.behind.clear()
        return behind

    # ------------------------------------------------------------------ rounds

    def _join(self, rank: int, buffer: Buffer, now: float) -> None:
        round_, trains = buffer.round, buffer.hi > 0
        if round_ <= self._joined.get(rank, -1):
            return
        is_told = self._over is not None and self._over[0] == round_
        if self._over and is_told:
            self._post(rank, self._pool.message(Kind.OVER, round_, data=self._over[1]))
        if self._end is not None:
            self._say_end(rank)
            return
        if round_ > self._number:
            self._begin(round_, buffer.lo, trains, now)
        self._joined[rank] = round_
        if round_ < self._number - 1 or (round_ < self._number and not trains and not is_told):
            self.behind.add(rank)
        assert self._round is not None
        here = self._round.assignment.blocks, self._trains
        if round_ == self._number and here != (buffer.lo, trains):
            self.failure = (
                f"rank {rank} is in {_told(buffer.lo, trains)} where others are in {_told(*here)}; "
                "what a loop does must follow from `step_number` and `moved`"
            )
        elif round_ == self._number and rank in self._index:
            own = as_blocks(content(buffer))
            self._tell(self._round.joined(self._index[rank], own, now))
        if self._figures:
            self._conclude()

    def _begin(self, round_: int, blocks: int, trains: bool, now: float) -> None:
        out = sorted(self._index[r] for r in self._workers if self._is_out(r, now))
        if self._round:
            self._round.end(now)
            if self._trains:
                self.ended.append(
                    Ended(
                        self._number,
                        self._round.begun_s,
                        self._round.assignment,
                        self._round.done_by,
                        self._round.redundant,
                    )
                )
                if self._relearn and self._owners.learn(self._paces[True], out):
                    self._tell_owners()
        self._number, self._trains = round_, trains
        workers = len(self._workers)
        self._figures = None if trains else Figures(blocks)
        if trains:
            dealt = self._owners.assignment
            self._round = self._scheme.round(dealt, self._paces[True], now, out)
        else:
            dealt = evaluation_assignment(blocks, workers)
            self._round = Round(dealt, self._paces[False], now, out)
        early, self._early = self._early, []
        for source, buffer in early:
            self.receive(source, buffer)

    def _tell_owners(self) -> None:
        owners = self._owners.assignment
        counts = [len(owners.owned(index)) for index in range(len(self._workers))]
        _log.info("data blocks of each worker from now on: %s", " ".join(map(str, counts)))
        for index, rank in enumerate(self._workers):
            self._say(Kind.OWN, rank, data=as_bytes(owners.owned(index)))

    def _conclude(self) -> None:
        """Send an evaluation's figures to all who wait for them, once they are complete.

        And once all roots wait for them, so that no rank is two rounds ahead of a root.
        """
        assert self._figures is not None
        parts = self._figures.whole()
        all_wait = all(self._joined.get(root) == self._number for root in self._roots)
        if parts is not None and all_wait and (not self._over or self._over[0] != self._number):
            data = b"".join(parts)
            self._over = self._number, data
            for rank, round_ in self._joined.items():
                if round_ == self._number:
                    self._say(Kind.OVER, rank, data=data)

    def _is_out(self, rank: int, now: float) -> bool:
        return rank in self.dead or now - self._heard_s[rank] > self._silence.out_s

    def _look_for_lost(self) -> None:
        if self._round is None or self.failure or self._end is not None:
            return
        now = self._now()
        gone = {
            index
            for index, rank in enumerate(self._workers)
            if rank in self.dead or now - self._heard_s[rank] > self._silence.lost_s
        }
        if not gone:
            return
        find = self._scheme.lost if self._trains else lost
        missing = find(self._round.assignment, gone)
        if missing and not self._has_all(self._number):
            shown = ", ".join(map(str, missing[:8])) + (" ..." if missing[8:] else "")
            who = ", ".join(str(self._workers[index]) for index in sorted(gone))
            self.failure = (
                f"the workers that are left hold no complete set: data blocks {shown} were held "
                f"by dead ranks alone; dead or silent: rank {who}"
            )

    def _decide(self, now: float) -> None:
        self._decided_s = now
        if self._round:
            self._tell(self._round.decide(now))

    def _tell(self, orders: Sequence[Order]) -> None:
        for order in orders:
            self._orders += 1  # by which a worker knows which of two was given last
            rank, kind = self._workers[order.worker], _KIND[order.act]
            self._say(kind, rank, order.block, column=self._orders)

    def _say_end(self, rank: int) -> None:
        """With the last round of this rank, although others may have begun one more."""
        assert self._end is not None
        if rank not in self.dead:
            self._post(
                rank, self._pool.message(Kind.END, self._last, int(self._continues), data=self._end)
            )

    def _say(self, kind: Kind, rank: int, lo: int = 0, column: int = 0, data: bytes = b"") -> None:
        if rank not in self.dead:
            self._post(rank, self._pool.message(kind, self._number, lo, column=column, data=data))


def _told(blocks: int, trains: bool) -> str:
    return f"{'a step' if trains else 'an evaluation'} of {blocks} data blocks"


def evaluation_assignment(blocks: int, workers: int) -> Assignment:
    """Everyone can evaluate everything."""
    return place("cyclic", blocks, workers, workers)
