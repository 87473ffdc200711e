"""Sums over data blocks along a fixed tree: the same bits in whatever order and from whomever.

The sum of data blocks lo to hi - 1 is a *node*. Its two halves are cut at the largest power of
two, so that blocks pair up as in a binary counter, and a run of blocks that one worker owns is
mostly a few nodes, which it can send as one vector each. A node has the same bits wherever it was
added up, since it is always its left half plus its right half.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import Generic, NamedTuple, TypeVar

Vector = TypeVar("Vector")


class Node(NamedTuple):
    """Data blocks lo to hi - 1."""

    lo: int
    hi: int

    @property
    def is_leaf(self) -> bool:
        """Whether it is a single data block."""
        return self.hi - self.lo == 1

    def halves(self) -> tuple[Node, Node]:
        """The two nodes whose sum it is."""
        middle = self.lo + (1 << (self.hi - self.lo - 1).bit_length() - 1)
        return Node(self.lo, middle), Node(middle, self.hi)


class Tree:
    """The nodes of a number of data blocks. Use `tree_of`, which makes each tree once."""

    def __init__(self, blocks: int) -> None:
        assert blocks > 0
        self.blocks = blocks
        self.root = Node(0, blocks)
        self.parents: dict[Node, Node] = {}
        self.siblings: dict[Node, Node] = {}
        waiting = [self.root]
        while waiting:
            node = waiting.pop()
            if not node.is_leaf:
                left, right = node.halves()
                self.parents[left] = self.parents[right] = node
                self.siblings[left], self.siblings[right] = right, left
                waiting += (left, right)

    def path(self, node: Node) -> Iterator[Node]:
        """The node and those that it is part of, upwards."""
        yield node
        while node != self.root:
            node = self.parents[node]
            yield node


tree_of = cache(Tree)


class Sum(Generic[Vector]):
    """What is there of a sum over data blocks, in as few nodes as possible.

    Args:
        tree: of all data blocks.
        add: adds the second vector to the first, in place.
        drop: takes back a vector that is not needed any more.
    """

    def __init__(
        self, tree: Tree, add: Callable[[Vector, Vector], object], drop: Callable[[Vector], object]
    ) -> None:
        self._tree = tree
        self._add = add
        self._drop = drop
        self.nodes: dict[Node, Vector] = {}
        """Nodes that are there; none is part of another."""

    def covers(self, node: Node) -> bool:
        """Whether all of the node's data blocks are in one that is there."""
        return any(larger in self.nodes for larger in self._tree.path(node))

    def put(self, node: Node, vector: Vector) -> bool:
        """Take in a node; whether it brought anything new. Takes the vector over in any case."""
        if self.covers(node):
            self._drop(vector)
            return False
        if not node.is_leaf:
            for part in [p for p in self.nodes if node.lo <= p.lo and p.hi <= node.hi]:
                self._drop(self.nodes.pop(part))
        while node != self._tree.root:
            sibling = self._tree.siblings[node]
            other = self.nodes.pop(sibling, None)
            if other is None:
                break
            left, right = (vector, other) if node.lo < sibling.lo else (other, vector)
            self._add(left, right)
            self._drop(right)
            node, vector = self._tree.parents[node], left
        self.nodes[node] = vector
        return True

    @property
    def total(self) -> Vector | None:
        """The sum over all data blocks, once all are there."""
        return self.nodes.get(self._tree.root)

    def take_settled(self, expected: Collection[int]) -> list[tuple[Node, Vector]]:
        """Take out the nodes that will not grow any more.

        Args:
            expected: data blocks that may still come.
        """
        settled = [node for node in self.nodes if not self._may_grow(node, expected)]
        return [(node, self.nodes.pop(node)) for node in settled]

    def _may_grow(self, node: Node, expected: Collection[int]) -> bool:
        if node == self._tree.root or not expected:
            return False
        sibling = self._tree.siblings[node]
        missing = set(range(*sibling))
        for there in self.nodes:
            missing.difference_update(range(*there))
        return all(block in expected for block in missing)

    def clear(self) -> None:
        """Forget everything."""
        while self.nodes:
            self._drop(self.nodes.popitem()[1])
