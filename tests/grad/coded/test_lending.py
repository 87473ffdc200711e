"""What is lent is used where it lies, and is free again when nobody can need it any more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from hpctrain.grad.coded.cells import HEADER_BYTES, Buffer, Kind, Pool
from hpctrain.grad.coded.lending import ROUNDS, Arena, Lending, arena_sizes

ROOT, OWNER, OTHER = range(3)
CELL_BYTES = 128
ROOM = 2 * (HEADER_BYTES + CELL_BYTES)


class Node:
    """Three ranks that share memory, and what they have sent each other."""

    def __init__(self) -> None:
        self.parts = {rank: torch.zeros(ROOM, dtype=torch.uint8) for rank in range(3)}
        self.arenas = [Arena(rank, self.parts, CELL_BYTES) for rank in range(3)]
        self.pools = [Pool(share=arena.carve) for arena in self.arenas]
        self.sent: list[tuple[int, int, Buffer]] = []
        self.ranks = [
            Lending(arena, self.pools[rank], self._sends(rank))
            for rank, arena in enumerate(self.arenas)
        ]

    def _sends(self, source: int) -> Callable[[int, Buffer], None]:
        return lambda to, letter: self.sent.append((source, to, letter))

    def cell(self, value: int) -> Buffer:
        """Of the owner, in its arena while there is room."""
        cell = self.pools[OWNER].take_shared(CELL_BYTES).write(Kind.CELL, 7)
        cell.payload.fill_(value)
        return cell

    def deliver(self) -> Buffer | None:
        """The oldest message, as its receiver has it; None for what came back."""
        source, to, letter = self.sent.pop(0)
        if letter.kind is Kind.BACK:
            self.ranks[to].came_back(source, letter)
            return None
        return self.ranks[to].fetch(source, letter) if letter.kind is Kind.LENT else letter

    def lend_result(self) -> Buffer:
        """The root lends the owner's cell to the two others, as a result, and drops it."""
        self.ranks[OWNER].lend_or_send(ROOT, self.cell(5))
        total = self.deliver()
        assert total
        total.write(Kind.RESULT, 7)
        self.pools[ROOT].hold(total, 2)
        for rank in (OWNER, OTHER):
            self.ranks[ROOT].lend_or_send(rank, total)
        self.pools[ROOT].drop(total)
        return total

    def is_free(self) -> bool:
        """Whether the owner's first cell may be used again."""
        return self.cell(0).spot == (OWNER, 0)


def test_a_cell_is_used_where_it_lies() -> None:
    node = Node()
    cell = node.cell(3)
    node.ranks[OWNER].lend_or_send(ROOT, cell)
    lent = node.deliver()
    assert lent
    assert (lent.kind, lent.round, lent.holders) == (Kind.CELL, 7, 1)
    lent.payload.add_(1)
    assert cell.payload.eq(4).all()
    assert cell.holders == 1
    node.pools[ROOT].drop(lent)
    assert node.deliver() is None
    assert cell.holders == 0
    assert node.is_free()


def test_a_result_is_copied_by_all_before_it_is_free() -> None:
    node = Node()
    total = node.lend_result()
    results = [node.deliver(), node.deliver()]
    for result in results:
        assert result
        assert result.kind is Kind.RESULT
        assert result.spot is None
        assert result.payload.eq(5).all()
        result.payload.fill_(9)
    assert total.payload.eq(5).all()
    node.deliver()
    assert total.holders == 1
    node.deliver()
    assert total.holders == 0
    assert not node.is_free()  # the owner has not heard of it yet
    node.deliver()
    assert node.is_free()


def test_a_dead_rank_needs_nothing() -> None:
    node = Node()
    total = node.lend_result()
    node.deliver()
    node.ranks[ROOT].died(OTHER)
    node.deliver()  # what it had sent before
    assert total.holders == 1
    node.deliver()
    assert total.holders == 0
    node.deliver()  # the dead one's last word
    node.deliver()
    assert node.is_free()
    cell = node.cell(1)
    node.ranks[OWNER].died(OTHER)
    node.ranks[OWNER].lend_or_send(OTHER, cell)  # is sent, for the mailbox to drop
    assert node.sent.pop() == (OWNER, OTHER, cell)


def test_what_does_not_fit_is_sent() -> None:
    node = Node()
    cells = [node.cell(value) for value in range(3)]
    assert [cell.spot is not None for cell in cells] == [True, True, False]
    small = node.pools[ROOT].take_shared(CELL_BYTES // 4)
    assert small.spot is None
    node.ranks[OWNER].lend_or_send(ROOT, cells[2])
    assert node.deliver() is cells[2]


@pytest.mark.parametrize(
    ("nodes", "roots", "workers", "lend"),
    [
        (((0, 1, 2),), (0,), (1, 2), (1, 2)),
        (((0, 1, 2),), (0,), (0, 1, 2), (0, 1, 2)),
        (((0, 1), (2, 3)), (0,), (1, 2, 3), (1,)),
        (((0, 2), (1, 3)), (0, 1), (2, 3), (2, 3)),
        (((0,), (1, 2)), (0,), (0, 1, 2), ()),
        (((0,),), (0,), (0,), ()),
    ],
)
def test_who_lends(
    nodes: tuple[tuple[int, ...], ...],
    roots: tuple[int, ...],
    workers: tuple[int, ...],
    lend: tuple[int, ...],
) -> None:
    module = nn.Linear(100, 10)
    sizes = arena_sizes(module, nodes, roots, workers)
    assert tuple(rank for rank, nbytes in enumerate(sizes) if nbytes) == lend
    assert all(nbytes > ROUNDS * 4 * 1010 for nbytes in sizes if nbytes)
