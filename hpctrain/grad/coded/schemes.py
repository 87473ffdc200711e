"""What workers send and what roots make of it: partial sums, a coded vector, or copies to vote on.

A scheme gives each worker, for each model block, what adds up before it sends (`Parts`), and each
root what adds up what comes (`Whole`). With partial sums every data block is computed by whoever is
first; the other two have every holder compute and send, and no worker is asked for more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from hpctrain.errors import ExchangeError
from hpctrain.grad.coded.assignment import Assignment, certify, lost, place
from hpctrain.grad.coded.cells import Buffer
from hpctrain.grad.coded.dealing import FixedRound, Paces, Round
from hpctrain.grad.coded.mds import Code, cyclic_code, worst_amplification
from hpctrain.grad.coded.sums import Node, Sum, Tree

SCHEMES = ("sums", "mds", "vote")
FEWEST_VOTES = 3
BLOCKS_A_WORKER = 4

Drop = Callable[[Buffer], object]


class Column(Protocol):
    """A model block, as far as sums know it."""

    root: int
    """The rank that sums it up."""
    is_linear: bool
    """Whether sums of multiples of its vectors make sense, as those of gradients do."""

    @property
    def nbytes(self) -> int:
        """Size of its vectors."""

    def add(self, left: Buffer, right: Buffer) -> None:
        """Add the second cell to the first."""

    def scale(self, cell: Buffer, factor: float) -> None:
        """Multiply a cell, with its loss."""

    def views(self, cell: Buffer) -> Sequence[torch.Tensor]:
        """The gradients in a cell."""

    def digest(self, cell: Buffer) -> bytes:
        """Of all that a cell says, for comparison."""

    def can_lack(self, blocks: Collection[Node]) -> bool:
        """Whether what these data blocks give can stand for all."""


class Parts(Protocol):
    """What a worker has of a model block and has not sent."""

    nodes: dict[Node, Buffer]
    """Sums to which more may be added in place."""

    def put(self, node: Node, vector: Buffer) -> bool:
        """Take in the gradient on some data blocks."""

    def take_settled(self, expected: Collection[int]) -> list[tuple[Node, Buffer]]:
        """Take out what is to be sent, given the data blocks that may still come."""

    def clear(self) -> None:
        """Forget everything."""


class Whole(Protocol):
    """What a root has of a model block."""

    def put(self, worker: int, node: Node, cell: Buffer) -> bool:
        """Take in what a worker sent; whether it brought anything new."""

    def take_total(self) -> Buffer | None:
        """The sum over all data blocks, once it is there. It is the caller's then."""

    def clear(self) -> None:
        """Forget everything."""


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
        return str(certify(self.assignment, max(0, self.assignment.workers - enough)))

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
    of them is wrong. Late ones are compared too, as long as the round is kept.
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
    blocks = blocks or BLOCKS_A_WORKER * workers
    if sends == "vote":
        return Voted(blocks, workers, copies)
    return Scheme(given or place(placement, blocks, workers, copies), placement)


def majority(holders: Sequence[int]) -> int:
    """How many of them outvote the others."""
    return len(holders) // 2 + 1


# ---------------------------------------------------------------------- at a worker


class Combination:
    """A worker's linear combination of the gradients that it holds, added up as they come."""

    def __init__(self, column: Column, code: Code, worker: int, drop: Drop) -> None:
        self._column = column
        self._coefficients = code.coefficients[worker]
        self._node = Node(worker, worker + 1)
        self._missing = {*np.flatnonzero(self._coefficients).tolist()}
        self._drop = drop
        self._vector: Buffer | None = None
        self.nodes: dict[Node, Buffer] = {}

    def put(self, node: Node, vector: Buffer) -> bool:
        """As for `Parts`."""
        assert node.is_leaf
        self._missing.discard(node.lo)
        self._column.scale(vector, float(self._coefficients[node.lo]))
        if self._vector is None:
            self._vector = vector
        else:
            self._column.add(self._vector, vector)
            self._drop(vector)
        return True

    def take_settled(self, expected: Collection[int]) -> list[tuple[Node, Buffer]]:
        """As for `Parts`."""
        del expected
        if self._missing or self._vector is None:
            return []
        vector, self._vector = self._vector, None
        return [(self._node, vector)]

    def clear(self) -> None:
        """As for `Parts`."""
        if self._vector is not None:
            self._drop(self._vector)
            self._vector = None


# ---------------------------------------------------------------------- at a root


class WholeSum:
    """Partial sums, added up along the tree."""

    def __init__(self, column: Column, tree: Tree, drop: Drop) -> None:
        self.column = column
        self.sum: Sum[Buffer] = Sum(tree, column.add, drop)
        self._drop = drop

    def put(self, worker: int, node: Node, cell: Buffer) -> bool:
        """As for `Whole`."""
        del worker
        return self.sum.put(node, cell)

    def take_total(self) -> Buffer | None:
        """As for `Whole`."""
        return self.sum.nodes.popitem()[1] if self.sum.total is not None else None

    def take_estimate(self, samples: Sequence[int]) -> Estimate | None:
        """An unbiased estimate of the sum from what is there, if anything is.

        What is there is scaled by the samples that are missing. Unbiased if who is late has nothing
        to do with the data, as with samples in random order. Its variance is estimated from how
        much the means of what is there differ, with the correction for a finite population.

        Args:
            samples: of each data block.
        """
        nodes = sorted(self.sum.nodes)
        sizes = [sum(samples[slice(*node)]) for node in nodes]
        present, whole = sum(sizes), sum(samples)
        if not present:
            return None
        variance = 0.0
        if self.column.is_linear:
            means = [
                [view * (whole / size) for view in self.column.views(self.sum.nodes[node])]
                for node, size in zip(nodes, sizes, strict=True)
                if size
            ]
            variance = variance_of_mean(means, [size for size in sizes if size], whole)
        covered = present / whole if self.column.can_lack(nodes) else 0.0
        total = self.sum.nodes.pop(nodes[0])
        for node in nodes[1:]:
            cell = self.sum.nodes.pop(node)
            self.column.add(total, cell)
            self._drop(cell)
        self.column.scale(total, whole / present)
        return Estimate(total, covered, variance)

    def clear(self) -> None:
        """As for `Whole`."""
        self.sum.clear()


@dataclass(frozen=True)
class Estimate:
    """A sum that lacks some data blocks, scaled."""

    total: Buffer
    covered: float
    """Share of the samples that it was made from; 0 if it cannot be used."""
    variance: float
    """Of all its elements together; NaN if too little was there to tell."""


def variance_of_mean(
    means: Sequence[Sequence[torch.Tensor]], sizes: Sequence[int], whole: int
) -> float:
    """Estimated variance of a mean over some samples, as an estimate of that over all.

    Args:
        means: over each part of the samples, as tensors.
        sizes: of the parts.
        whole: number of all samples.

    Returns:
        The sum over all elements; NaN if there is one part only.
    """
    if len(means) < 2:
        return math.nan
    present = sum(sizes)
    spread = 0.0
    for parts in zip(*means, strict=True):
        mean = sum(
            (part * (size / present) for part, size in zip(parts, sizes, strict=True)), 0 * parts[0]
        )
        for part, size in zip(parts, sizes, strict=True):
            norm = torch.linalg.vector_norm(
                torch.view_as_real(part - mean) if part.is_complex() else part - mean,
                dtype=torch.float64,
            )
            spread += size * float(norm) ** 2
    return spread / (len(means) - 1) * (1 / present - 1 / whole)


class Decoded:
    """One vector of each worker, of which some are enough."""

    def __init__(self, column: Column, code: Code, drop: Drop) -> None:
        self._column = column
        self._code = code
        self._drop = drop
        self._vectors: dict[int, Buffer] = {}

    def put(self, worker: int, node: Node, cell: Buffer) -> bool:
        """As for `Whole`."""
        del worker
        if node.lo in self._vectors:
            self._drop(cell)
            return False
        self._vectors[node.lo] = cell
        return True

    def take_total(self) -> Buffer | None:
        """As for `Whole`."""
        if len(self._vectors) < self._code.workers - self._code.stragglers:
            return None
        survivors = sorted(self._vectors)
        total: Buffer | None = None
        for worker, weight in zip(survivors, self._code.decode(survivors), strict=True):
            vector = self._vectors.pop(worker)
            self._column.scale(vector, float(weight))
            if total is None:
                total = vector
            else:
                self._column.add(total, vector)
                self._drop(vector)
        return total

    def clear(self) -> None:
        """As for `Whole`."""
        while self._vectors:
            self._drop(self._vectors.popitem()[1])


class Vote:
    """Copies of partial sums: the first to have a majority counts.

    Args:
        whole: adds up what was voted for.
        holders: workers that compute a data block.
        wrong: told who sent something else.
        drop: takes back a vector.
    """

    def __init__(
        self,
        whole: WholeSum,
        holders: Callable[[int], Sequence[int]],
        wrong: Callable[[int, Node], object],
        drop: Drop,
    ) -> None:
        self._whole = whole
        self._holders = holders
        self._wrong = wrong
        self._drop = drop
        self._copies: dict[Node, dict[bytes, tuple[Buffer, list[int]]]] = {}
        self._elected: dict[Node, bytes] = {}
        self._voted: set[tuple[int, Node]] = set()

    def put(self, worker: int, node: Node, cell: Buffer) -> bool:
        """As for `Whole`."""
        digest = self._whole.column.digest(cell)
        if (worker, node) in self._voted:
            self._drop(cell)
            return False
        self._voted.add((worker, node))
        if node in self._elected:
            if digest != self._elected[node]:
                self._wrong(worker, node)
            self._drop(cell)
            return False
        copies = self._copies.setdefault(node, {})
        if digest in copies:
            copies[digest][1].append(worker)
            self._drop(cell)
        else:
            copies[digest] = cell, [worker]
        winner, voters = copies[digest]
        if len(voters) < majority(self._holders(node.lo)):
            return False
        for other, (copy, others) in self._copies.pop(node).items():
            if other != digest:
                self._drop(copy)
                for each in others:
                    self._wrong(each, node)
        self._elected[node] = digest
        return self._whole.put(worker, node, winner)

    def undecided(self, gone: Collection[int]) -> list[Node]:
        """What all holders have sent that are not gone, without a majority."""
        return [
            node
            for node, copies in self._copies.items()
            if {*self._holders(node.lo)} - {*gone} <= {w for _, ws in copies.values() for w in ws}
        ]

    def take_total(self) -> Buffer | None:
        """As for `Whole`."""
        return self._whole.take_total()

    def clear(self) -> None:
        """As for `Whole`."""
        while self._copies:
            for cell, _ in self._copies.popitem()[1].values():
                self._drop(cell)
        self._whole.clear()
