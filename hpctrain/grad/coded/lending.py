"""Gradients that are not sent: ranks of a root's node read them where they lie.

Each worker that shares a node with a root has an *arena*, memory that all ranks of it can use.
A cell that was made there is lent: what travels is the place where it lies. The root may add others
to it, keep it as long as it likes, and says when it needs it no more. A result that lies in an
arena is lent as well, to be copied. A rank that dies leaves its arena to those who still read in
it. Who never gives anything back costs memory only: where the arena is used up, cells are made
elsewhere, and sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from hpctrain.comm.memory import aligned
from hpctrain.grad.coded.cells import HEADER_BYTES, Buffer, Kind, Pool, Spot
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

    def carve(self, nbytes: int) -> Buffer | None:
        """A piece that nobody has had yet, or None if the arena is used up."""
        begin, end = self._used, self._used + nbytes
        if nbytes < self._least_bytes or end > self._mine.numel():
            return None
        self._used = aligned(end)
        return Buffer(self._mine[begin:end], Spot(self.rank, begin))


def arena_sizes(
    module: nn.Module, nodes: Sequence[Sequence[int]], roots: Sequence[int], workers: Sequence[int]
) -> list[int]:
    """How many bytes each rank should have to lend: none where there is no root, or nobody else."""
    elements = sum(p.numel() + 1 for p in module.parameters() if p.requires_grad)
    widest = max((p.element_size() for p in module.parameters()), default=0)
    nbytes = int(1.02 * ROUNDS * elements * max(4, widest)) + 64 * HEADER_BYTES
    sizes = [0] * sum(map(len, nodes))
    for ranks in nodes:
        if len(ranks) > 1 and not {*roots}.isdisjoint(ranks):
            for rank in {*workers}.intersection(ranks):
                sizes[rank] = nbytes
    return sizes


class Lending:
    """Lends what lies in arenas, and uses what others lend. For any thread.

    Args:
        arena: memory of the ranks of this node.
        pool: of this rank's buffers.
        send: for all that is not lent.
    """

    def __init__(self, arena: Arena, pool: Pool, send: Post) -> None:
        self._arena = arena
        self._pool = pool
        self._send = send
        self._lent: dict[tuple[int, Spot], Buffer] = {}
        """What each rank has."""
        self._seen: dict[tuple[int, Spot], Buffer] = {}
        """Buffers over memory that was lent, by lender, with the views of it that they keep."""
        self._ranks = {*arena.parts} - {arena.rank}
        """Who can be lent something."""

    def lend_or_send(self, rank: int, buffer: Buffer) -> None:
        """Lend it, if it can be; else send it. As `Post`, it takes the buffer over."""
        spot = buffer.spot
        if spot is None or rank not in self._ranks:
            self._send(rank, buffer)
            return
        self._lent[rank, spot] = buffer
        nbytes = buffer.whole.numel()
        # The note is also what orders memory: who has it sees what was written before.
        note = self._pool.message(Kind.LENT, buffer.round, spot.begin, nbytes, spot.rank)
        self._send(rank, note)

    def fetch(self, source: int, note: Buffer) -> Buffer:
        """What another rank has lent: a cell itself, a result as a copy, which may be changed."""
        spot, nbytes = Spot(note.column, note.lo), note.hi
        self._pool.drop(note)
        buffer = self._seen.get((source, spot))
        if buffer is None:
            memory = self._arena.parts[spot.rank][spot.begin : spot.begin + nbytes]
            back = partial(self._give_back, source, spot)
            buffer = self._seen[source, spot] = Buffer(memory, spot, back)
        if buffer.kind is Kind.RESULT:
            copy = self._pool.take(buffer.payload.numel())
            copy.whole.copy_(buffer.whole)
            self._give_back(source, spot)
            return copy
        buffer.holders = 1
        return buffer

    def came_back(self, source: int, note: Buffer) -> None:
        """A rank needs no more what it was lent."""
        self._end(source, Spot(note.column, note.lo))
        self._pool.drop(note)

    def died(self, rank: int) -> None:
        """A rank that lends nothing on is dead: it needs nothing any more."""
        self._ranks.discard(rank)
        for borrower, spot in list(self._lent):
            if borrower == rank:
                self._end(rank, spot)

    def _end(self, rank: int, spot: Spot) -> None:
        buffer = self._lent.pop((rank, spot), None)  # which it may have given back before it died
        if buffer:
            self._pool.drop(buffer)

    def _give_back(self, source: int, spot: Spot) -> None:
        # To make the message takes the pool's lock, behind which nothing is read that was lent.
        self._send(source, self._pool.message(Kind.BACK, 0, spot.begin, column=spot.rank))
