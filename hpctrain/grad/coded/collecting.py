"""What a worker adds up before it sends, and what a root makes of what comes, by scheme."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from hpctrain.grad.coded.cells import Buffer
from hpctrain.grad.coded.mds import Code
from hpctrain.grad.coded.sums import Node, Sum, Tree

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


def majority(holders: Sequence[int]) -> int:
    """How many of them outvote the others."""
    return len(holders) // 2 + 1
