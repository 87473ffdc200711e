"""Sums along the tree: the same bits in every order of arrival, and no vector lost or kept."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from itertools import pairwise

import numpy as np
import pytest

from hpctrain.grad.coded.sums import Node, Sum, tree_of

COUNTS = range(1, 41)
ORDERS = 1000


class Vectors:
    """Makes vectors, and keeps account of them: each is dropped once, or is still somewhere."""

    def __init__(self, blocks: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        scales = 10.0 ** draw.integers(-4, 5, (blocks, 1))  # so that every order rounds its own way
        self.leaves = (draw.standard_normal((blocks, 3)) * scales).astype(np.float32)
        self.made: dict[int, np.ndarray] = {}
        self.drops: Counter[int] = Counter()

    def canonical(self, node: Node) -> np.ndarray:
        if node.is_leaf:
            return self.leaves[node.lo].copy()
        left, right = node.halves()
        return self.canonical(left) + self.canonical(right)

    def make(self, node: Node) -> np.ndarray:
        vector = self.canonical(node)
        self.made[id(vector)] = vector
        return vector

    def add(self, left: np.ndarray, right: np.ndarray) -> None:
        assert not self.drops[id(left)] and not self.drops[id(right)]
        left += right

    def drop(self, vector: np.ndarray) -> None:
        assert id(vector) in self.made
        self.drops[id(vector)] += 1
        assert self.drops[id(vector)] == 1
        vector.fill(np.nan)  # whoever still reads it shows

    def sum(self) -> Sum[np.ndarray]:
        return Sum(tree_of(len(self.leaves)), self.add, self.drop)

    def check_none_lost(self, kept: Collection[np.ndarray]) -> None:
        left = {number for number in self.made if not self.drops[number]}
        assert left == {id(vector) for vector in kept}


def nodes_of(node: Node) -> list[Node]:
    if node.is_leaf:
        return [node]
    return [node, *(part for half in node.halves() for part in nodes_of(half))]


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.tobytes() == right.tobytes()


@pytest.mark.parametrize("blocks", COUNTS)
def test_every_node(blocks: int) -> None:
    tree = tree_of(blocks)
    assert tree is tree_of(blocks)
    nodes = nodes_of(tree.root)
    assert tree.root == (0, blocks)
    assert len(nodes) == len({*nodes}) == 2 * blocks - 1
    assert {node for node in nodes if node.is_leaf} == {Node(b, b + 1) for b in range(blocks)}
    assert {*tree.parents} == {*tree.siblings} == {*nodes} - {tree.root}
    for node in nodes:
        size = node.hi - node.lo
        assert size > 0
        path = [*tree.path(node)]
        assert path[0] == node
        assert path[-1] == tree.root
        assert all(tree.parents[part] == whole for part, whole in pairwise(path))
        if not node.is_leaf:
            left, right = node.halves()
            assert (left.lo, left.hi, right.hi) == (node.lo, right.lo, node.hi)
            first = left.hi - left.lo
            assert first.bit_count() == 1  # cut at the largest power of two
            assert first < size <= 2 * first
            assert tree.parents[left] == tree.parents[right] == node
            assert (tree.siblings[left], tree.siblings[right]) == (right, left)


@pytest.mark.parametrize("blocks", COUNTS)
def test_aligned_runs_are_nodes_whatever_the_number_of_blocks(blocks: int) -> None:
    tree = tree_of(blocks)
    for size in (1, 2, 4, 8, 16, 32):
        for lo in range(0, blocks - size + 1, size):
            node = Node(lo, lo + size)
            assert node == tree.root or node in tree.parents


def test_no_blocks_are_no_tree() -> None:
    with pytest.raises(AssertionError):
        tree_of(0)


def test_leaves_in_every_order() -> None:
    draw = random.Random(0)
    for number in range(ORDERS):
        blocks = draw.choice(COUNTS)
        vectors = Vectors(blocks, number)
        sum_ = vectors.sum()
        order = draw.sample(range(blocks), blocks)
        for count, block in enumerate(order):
            assert sum_.total is None
            assert not sum_.covers(Node(block, block + 1))
            assert sum_.put(Node(block, block + 1), vectors.make(Node(block, block + 1)))
            there = {*order[: count + 1]}
            assert {b for node in sum_.nodes for b in range(*node)} == there
            for node, vector in sum_.nodes.items():
                assert same_bits(vector, vectors.canonical(node))
                assert node == sum_._tree.root or sum_._tree.siblings[node] not in sum_.nodes
        total = sum_.total
        assert total is not None
        assert same_bits(total, vectors.canonical(Node(0, blocks)))
        vectors.check_none_lost([total])


def test_nodes_duplicates_and_overlaps_in_every_order() -> None:
    """As from workers and helpers: parts that were there, or that cover what was there."""
    draw = random.Random(1)
    for number in range(ORDERS):
        blocks = draw.choice(COUNTS)
        vectors = Vectors(blocks, number)
        sum_ = vectors.sum()
        nodes = nodes_of(Node(0, blocks))
        if draw.random() < 0.8:  # most nodes are small, and the largest ends it at once
            nodes = [node for node in nodes if node.hi - node.lo <= max(1, blocks // 2)]
        there: set[int] = set()
        while sum_.total is None:
            node = draw.choice(nodes)
            new = not there.issuperset(range(*node))
            assert sum_.covers(node) is not new
            assert sum_.put(node, vectors.make(node)) is new
            there.update(range(*node))
            assert {b for part in sum_.nodes for b in range(*part)} == there
            assert sum(part.hi - part.lo for part in sum_.nodes) == len(there)
            vectors.check_none_lost(sum_.nodes.values())
        assert same_bits(sum_.total, vectors.canonical(Node(0, blocks)))
        for node in draw.sample(nodes, min(3, len(nodes))):  # what comes later still
            assert not sum_.put(node, vectors.make(node))
        vectors.check_none_lost([sum_.total])


def test_clear_drops_everything() -> None:
    vectors = Vectors(11, 0)
    sum_ = vectors.sum()
    for block in (0, 1, 2, 5, 10):
        sum_.put(Node(block, block + 1), vectors.make(Node(block, block + 1)))
    sum_.clear()
    assert not sum_.nodes
    vectors.check_none_lost([])


def sent(blocks: int, own: range, order: Collection[int] | None = None) -> list[Node]:
    """What a worker sends if it computes its own data blocks one after another."""
    vectors = Vectors(blocks, blocks)
    sum_ = vectors.sum()
    expected = {*own}
    gone: list[tuple[Node, np.ndarray]] = []
    for block in own if order is None else order:
        expected.discard(block)
        sum_.put(Node(block, block + 1), vectors.make(Node(block, block + 1)))
        gone += sum_.take_settled(expected)
    assert not sum_.nodes
    vectors.check_none_lost([vector for _, vector in gone])
    for node, vector in gone:
        assert same_bits(vector, vectors.canonical(node))
    nodes = [node for node, _ in gone]
    assert sorted(b for node in nodes for b in range(*node)) == [*own]
    return nodes


@pytest.mark.parametrize("blocks", COUNTS)
def test_a_worker_sends_as_few_vectors_as_can_be(blocks: int) -> None:
    """Every largest node within a run, once, in whatever order its data blocks are computed."""
    draw = random.Random(blocks)
    tree = tree_of(blocks)
    for lo in range(blocks):
        for hi in range(lo + 1, blocks + 1):
            own = range(lo, hi)
            within = {node for node in nodes_of(tree.root) if lo <= node.lo and node.hi <= hi}
            largest = {n for n in within if n == tree.root or tree.parents[n] not in within}
            assert {*sent(blocks, own)} == largest
            nodes = sent(blocks, own, draw.sample(own, len(own)))
            assert len(nodes) == len(largest)


def test_vectors_of_common_runs() -> None:
    assert sent(32, range(8, 12)) == [(8, 12)]
    assert sent(32, range(16)) == [(0, 16)]
    assert sent(32, range(32)) == [(0, 32)]
    assert sent(20, range(5)) == [(0, 4), (4, 5)]  # the first while the second is computed
    assert sent(20, range(5, 10)) == [(5, 6), (6, 8), (8, 10)]
    assert sent(20, range(16, 20)) == [(16, 20)]
    assert sent(6, range(4, 6)) == [(4, 6)]
    assert sent(1, range(1)) == [(0, 1)]


def test_what_may_still_grow_stays() -> None:
    vectors = Vectors(8, 0)
    sum_ = vectors.sum()

    def put(*blocks: int) -> None:
        for block in blocks:
            sum_.put(Node(block, block + 1), vectors.make(Node(block, block + 1)))

    def taken(*expected: int) -> list[Node]:
        return [node for node, _ in sum_.take_settled(expected)]

    put(0)
    assert taken(1) == []
    put(3)
    assert taken(1, 2) == []  # 0 waits for 1, 3 for 2
    assert taken(2) == [(0, 1)]  # nobody brings 1 any more
    put(2)
    assert taken(1) == [(2, 4)]  # 0 is gone, so this grows only by 0 and 1
    put(4, 5)
    assert taken(6, 7) == []
    put(6)
    assert taken(7) == []  # (4, 6) may grow by 6, which is there, and 7
    assert {*taken()} == {(4, 6), (6, 7)}
    assert not sum_.nodes


def test_what_others_compute_settles_what_waits_for_it() -> None:
    """A straggler stops holding back what would have grown with a data block that is taken."""
    vectors = Vectors(4, 0)
    sum_ = vectors.sum()
    sum_.put(Node(0, 1), vectors.make(Node(0, 1)))
    assert sum_.take_settled({1, 2, 3}) == []
    assert [node for node, _ in sum_.take_settled({2, 3})] == [(0, 1)]


def test_random_expectations() -> None:
    """Whatever comes when, and whatever does not come: each data block leaves once."""
    draw = random.Random(2)
    for number in range(ORDERS):
        blocks = draw.choice(COUNTS)
        vectors = Vectors(blocks, number)
        sum_, root = vectors.sum(), vectors.sum()
        expected = {*draw.sample(range(blocks), draw.randint(0, blocks))}
        came = {*draw.sample(range(blocks), draw.randint(0, blocks))} | expected
        gone: list[int] = []
        for block in draw.sample(sorted(came), len(came)):
            expected.discard(block)
            if draw.random() < 0.9:
                sum_.put(Node(block, block + 1), vectors.make(Node(block, block + 1)))
            for node, vector in sum_.take_settled(expected):
                gone += range(*node)
                root.put(node, vector)
            for node in sum_.nodes:  # each is part of a larger one that is still to come
                sibling = sum_._tree.siblings[node]
                inside = {b for n in sum_.nodes for b in range(*n)} | expected
                assert inside.issuperset(range(*sibling))
        assert not sum_.nodes
        assert len(gone) == len({*gone})
        for node, vector in root.nodes.items():
            assert same_bits(vector, vectors.canonical(node))
        vectors.check_none_lost(root.nodes.values())
