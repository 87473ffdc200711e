"""What workers send and what roots make of it: partial sums, a coded vector, or copies to vote on.

A scheme gives each worker, for each model block, what adds up before it sends (`Parts`), and each
root what adds up what comes (`Whole`). With partial sums every data block is computed by whoever is
first; the other two have every holder compute and send, and no worker is asked for more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from hpctrain.errors import ExchangeError
from hpctrain.grad.coded.assignment import Assignment, certify_sufficient, lost, place
from hpctrain.grad.coded.collecting import (
    Column,
    Combination,
    Decoded,
    Drop,
    Parts,
    Vote,
    Whole,
    WholeSum,
    majority,
)
from hpctrain.grad.coded.dealing import FixedRound, Paces, Round
from hpctrain.grad.coded.mds import cyclic_code, worst_amplification
from hpctrain.grad.coded.sums import Node, Sum, Tree

SCHEMES = ("sums", "mds", "vote")
FEWEST_VOTES = 3
BLOCKS_A_WORKER = 4


class Scheme:
    """Partial sums: every data block counts once, whoever computed it."""

    def __init__(self, assignment: Assignment, title: str) -> None:
        self.assignment = assignment
        self.title = title
        self.wrong: Callable[[int, int, Node], object] = lambda worker, column, node: None
        """Told which worker differs from most, for which model block and data blocks."""

    relearns = True
    """Whether data blocks may get other owners."""

    def own(self, worker: int) -> tuple[int, ...]:
        """Data blocks that the worker computes unless told otherwise."""
        return self.assignment.owned(worker)

    @property
    def fewest(self) -> int:
        """How many workers suffice, whichever they are, as far as is known by construction."""
        return self.assignment.workers - self.assignment.copies + 1

    def certificate(self, enough: int) -> str:
        """Why so many workers suffice.

        Raises:
            ExchangeError: they do not.
        """
        return str(certify_sufficient(self.assignment, enough))

    def parts(self, column: Column, tree: Tree, worker: int, drop: Drop) -> Parts:
        """What a worker begins a round with."""
        del worker
        return Sum(tree, column.add, drop)

    def whole(self, number: int, column: Column, tree: Tree, drop: Drop) -> Whole:
        """What a root begins a round with, for the model block of that number."""
        del number
        return WholeSum(column, tree, drop)

    def round(
        self, assignment: Assignment, paces: Paces, begun_s: float, out: Sequence[int]
    ) -> Round:
        """Who computes what in a round of training."""
        return Round(assignment, paces, begun_s, out)

    def lost(self, assignment: Assignment, gone: Collection[int]) -> tuple[int, ...]:
        """Data blocks without which the sum cannot be had when those workers are gone."""
        return lost(assignment, gone)


class Combined(Scheme):
    """Cyclic MDS code: one linear combination from each worker; any n - s of n give the sum.

    For slow networks: a worker sends one vector a step however many data blocks it holds, and no
    word goes back and forth about who computes what. The sum is exact up to rounding only, and
    depends on who was late. Buffers of the model travel as partial sums.
    """

    relearns = False

    def __init__(self, workers: int, copies: int) -> None:
        super().__init__(place("cyclic", workers, workers, copies), "cyclic MDS code")
        self.code = cyclic_code(workers, copies - 1)

    def own(self, worker: int) -> tuple[int, ...]:
        """All that the worker holds."""
        stragglers, workers = self.code.stragglers, self.code.workers
        return tuple(sorted((worker + i) % workers for i in range(stragglers + 1)))

    def certificate(self, enough: int) -> str:
        """As for `Scheme`."""
        sufficient = self.code.workers - self.code.stragglers
        if enough < sufficient:
            raise ExchangeError(
                "too few workers to decode from",
                value=enough,
                allowed=f"at least {sufficient} of {self.code.workers}",
                fix="raise coded.copies",
                everywhere=True,
            )
        return (
            f"any {sufficient} workers' vectors give the sum, by construction; rounding errors "
            f"grow by at most {worst_amplification(self.code).amplification:.3g}"
        )

    def parts(self, column: Column, tree: Tree, worker: int, drop: Drop) -> Parts:
        """As for `Scheme`."""
        if not column.is_linear:
            return super().parts(column, tree, worker, drop)
        return Combination(column, self.code, worker, drop)

    def whole(self, number: int, column: Column, tree: Tree, drop: Drop) -> Whole:
        """As for `Scheme`."""
        if not column.is_linear:
            return super().whole(number, column, tree, drop)
        return Decoded(column, self.code, drop)

    def round(
        self, assignment: Assignment, paces: Paces, begun_s: float, out: Sequence[int]
    ) -> Round:
        """As for `Scheme`."""
        workers = range(self.code.workers)
        return FixedRound(assignment, paces, begun_s, out, [self.own(w) for w in workers])

    def lost(self, assignment: Assignment, gone: Collection[int]) -> tuple[int, ...]:
        """As for `Scheme`."""
        del assignment
        if len(gone) <= self.code.stragglers:
            return ()
        return tuple(sorted({block for worker in gone for block in self.own(worker)}))


class Voted(Scheme):
    """Majority vote over copies: every holder sends, and what most sent counts (DRACO, 2018).

    Groups of workers hold the same data blocks, so that what they send has the same bits unless one
    of them is wrong. Late ones are compared too, until the next round begins.
    """

    relearns = False

    def __init__(self, blocks: int, workers: int, copies: int) -> None:
        super().__init__(place("fractional", blocks, workers, copies), "vote of groups")
        if self.assignment.copies < FEWEST_VOTES:
            raise ExchangeError(
                "too few copies to vote",
                value=f"{copies} copies on {workers} workers",
                allowed=f"at least {FEWEST_VOTES}",
                everywhere=True,
            )

    @property
    def fewest(self) -> int:
        """As for `Scheme`."""
        spare = min(len(holders) - majority(holders) for holders in self.assignment.holders)
        return self.assignment.workers - spare

    def own(self, worker: int) -> tuple[int, ...]:
        """All that the worker holds."""
        return self.assignment.held(worker)

    def certificate(self, enough: int) -> str:
        """As for `Scheme`."""
        if enough < self.fewest:
            raise ExchangeError(
                "too few workers to vote",
                value=enough,
                allowed=f"at least {self.fewest}",
                fix="raise coded.copies",
                everywhere=True,
            )
        return (
            f"any {self.fewest} of {self.assignment.workers} workers hold majorities of all copies"
        )

    def whole(self, number: int, column: Column, tree: Tree, drop: Drop) -> Whole:
        """As for `Scheme`."""
        return Vote(
            WholeSum(column, tree, drop),
            self.assignment.holders.__getitem__,
            lambda worker, node: self.wrong(worker, number, node),
            drop,
        )

    def round(
        self, assignment: Assignment, paces: Paces, begun_s: float, out: Sequence[int]
    ) -> Round:
        """As for `Scheme`."""
        workers = range(assignment.workers)
        return FixedRound(assignment, paces, begun_s, out, [self.own(w) for w in workers])

    def lost(self, assignment: Assignment, gone: Collection[int]) -> tuple[int, ...]:
        """As for `Scheme`."""
        return tuple(
            block
            for block, holders in enumerate(assignment.holders)
            if len({*holders} - {*gone}) < majority(holders)
        )


def scheme_of(
    sends: str, placement: str, blocks: int, workers: int, copies: int, given: Assignment | None
) -> Scheme:
    """The scheme that a job asks for.

    Args:
        sends: its name.
        placement: of partial sums.
        blocks: data blocks; 0 for as many as suit.
        workers: ranks that compute.
        copies: of each data block.
        given: an assignment made by hand, for partial sums.

    Raises:
        ExchangeError: what is asked for does not fit together.
    """
    if sends == "mds":
        if blocks not in (0, workers) or given:
            raise ExchangeError(
                "bad number of data blocks for coded sends",
                value=blocks or "an assignment of its own",
                allowed=f"one for each worker: {workers}, or 0",
                everywhere=True,
            )
        return Combined(workers, copies)
    if given and (sends != "sums" or given.workers != workers or blocks not in (0, given.blocks)):
        raise ExchangeError(
            "the assignment made by hand does not fit",
            value=f"{given.blocks} data blocks on {given.workers} workers",
            allowed=f"{blocks or 'any number of'} data blocks on {workers} workers, sends = 'sums'",
            everywhere=True,
        )
    blocks = blocks or BLOCKS_A_WORKER * workers
    if sends == "vote":
        return Voted(blocks, workers, copies)
    return Scheme(given or place(placement, blocks, workers, copies), placement)
