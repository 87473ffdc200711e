"""Cells that are not sent: a root on the same node reads them where they lie.

Each worker that shares a node with a root has an *arena*, memory that all ranks of it can use.
A cell that was made there is lent: what travels is the place where it lies. The root may add others
to it, keep it as long as it likes, and says when it needs it no more. A rank that dies leaves its
arena to those who still read in it. A root that never gives anything back costs memory only: where
the arena is used up, cells are made elsewhere, and sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from hpctrain.comm.memory import aligned
from hpctrain.grad.coded.cells import HEADER_BYTES, Buffer, Kind, Pool
from hpctrain.grad.coded.worker import Post

LEAST_BYTES = 1 << 15
"""Smaller cells are sent: to say where they lie would cost as much."""
ROUNDS = 3
"""An arena holds the cells of so many rounds: a root keeps sums for one round after theirs."""


class Arena:
    """This rank's memory for cells that it lends, and that of the others on its node.

    Args:
        rank: this rank.
        parts: memory of each rank of the node, by rank.
        least_bytes: smaller pieces are not given out.
    """

    def __init__(self, rank: int, parts: Mapping[int, torch.Tensor], least_bytes: int) -> None:
        self.rank = rank
        self.parts = parts
        self._mine = parts[rank]
        self._least_bytes = least_bytes
        self._used = 0

    def carve(self, nbytes: int) -> torch.Tensor | None:
        """A piece that nobody has had yet, or None if the arena is used up."""
        begin, end = self._used, self._used + nbytes
        if nbytes < self._least_bytes or end > self._mine.numel():
            return None
        self._used = aligned(end)
        return self._mine[begin:end]

    def place_of(self, buffer: Buffer) -> int:
        """Where in this rank's memory a buffer begins that was carved from it."""
        return buffer.whole.data_ptr() - self._mine.data_ptr()


def arena_sizes(
    module: nn.Module, nodes: Sequence[Sequence[int]], roots: Sequence[int], workers: Sequence[int]
) -> list[int]:
    """How many bytes each rank should have to lend: none where there is no root to lend to."""
    elements = sum(p.numel() + 1 for p in module.parameters() if p.requires_grad)
    widest = max((p.element_size() for p in module.parameters()), default=0)
    nbytes = int(1.02 * ROUNDS * elements * max(4, widest)) + 64 * HEADER_BYTES
    sizes = [0] * sum(map(len, nodes))
    for ranks in nodes:
        for rank in ranks:
            if rank in workers and any(root in ranks and root != rank for root in roots):
                sizes[rank] = nbytes
    return sizes


class Lending:
    """Lends this rank's cells, and borrows those of others. For any thread.

    Args:
        arena: memory of the ranks of this node.
        pool: of this rank's buffers.
        send: for all that is not lent.
    """

    def __init__(self, arena: Arena, pool: Pool, send: Post) -> None:
        self._arena = arena
        self._pool = pool
        self._send = send
        self._lent: dict[int, Buffer] = {}
        self._seen: dict[tuple[int, int], Buffer] = {}
        """Buffers over the memory of others, with the views of it that they keep."""

    def post(self, rank: int, buffer: Buffer) -> None:
        """Lend a cell to a root, if it can be; else send it. As `Post`, it takes the cell over."""
        arena = self._arena
        if not buffer.is_shared or rank == arena.rank or rank not in arena.parts:
            self._send(rank, buffer)
            return
        place = arena.place_of(buffer)
        self._lent[place] = buffer
        # The message that tells of it is also what orders memory: who has it sees what was written.
        nbytes = buffer.whole.numel()
        self._send(rank, self._pool.message(Kind.LENT, buffer.round, place, nbytes))

    def borrow(self, source: int, note: Buffer) -> Buffer:
        """The cell of which another rank says where it lies."""
        place, nbytes = note.lo, note.hi
        self._pool.drop(note)
        buffer = self._seen.get((source, place))
        if buffer is None:
            memory = self._arena.parts[source][place : place + nbytes]
            back = partial(self._give_back, source, place)
            buffer = self._seen[source, place] = Buffer(memory, give_back=back)
        buffer.holders = 1
        return buffer

    def came_back(self, note: Buffer) -> None:
        """A root needs a cell of this rank no more."""
        self._pool.drop(self._lent.pop(note.lo))
        self._pool.drop(note)

    def _give_back(self, source: int, place: int) -> None:
        self._send(source, self._pool.message(Kind.BACK, 0, place))
