"""Sums straight out of memory that the ranks of a node share.

Every rank of a node sums one slice over the slabs of all of them, in rank order and in pieces that
fit the core's cache, and writes the sum back into all slabs while it is still there. Each byte
of a slab is read once and written once; no message is sent. Counters in shared memory say how far
each rank is.

With several nodes, the ranks of the same place on each node then exchange the sums of their slice
by messages. So all ranks and all links work; there is no leader that carries everything.
"""

from __future__ import annotations

from functools import partial

import torch
from mpi4py import MPI

from hpctrain.comm.channel import Steps
from hpctrain.comm.memory import ALIGN_BYTES, Slab
from hpctrain.comm.reduce.messages import Direct, Ring
from hpctrain.comm.reduce.sums import SumInOrder, slices


class SharedSum:
    """All-reduce of a slab in node-shared memory.

    On one node, and with `ordered` between nodes, each element is summed in the same order for
    any block size: ranks of a node first, then nodes.

    Args:
        slab: with a place in node-shared memory.
        scale: factor of the sum.
        wire: narrower dtype between nodes, or None for the slab's own.
        between: how nodes exchange their sums.
        scratch: for `between`; see there.
        lane: see `all_reduce`.
    """

    def __init__(
        self,
        slab: Slab,
        scale: float,
        wire: torch.dtype | None,
        between: type[Direct] | type[Ring],
        scratch: torch.Tensor | None,
        lane: int,
    ) -> None:
        assert slab.place is not None
        self._place = place = slab.place
        cuts = slices(
            slab.tensor.numel(), place.lanes, max(1, ALIGN_BYTES // slab.tensor.element_size())
        )
        self._across = None
        self._sum = self._spread = None
        if place.local_rank >= place.lanes:
            return  # nodes of fewer ranks have no partner for this one
        cut = cuts[place.local_rank]
        parts = [part[cut] for part in place.parts]
        mine = parts[place.local_rank]
        others = [part for part in parts if part is not mine]
        if len(place.across) == 1:
            self._sum = SumInOrder([mine, *others], parts, scale)
            return
        self._sum = SumInOrder([mine], parts, scale)
        self._across = between(mine, 1.0, wire, place.across, scratch, lane)
        self._spread = SumInOrder(others, [mine], 1.0) if others else None

    @property
    def sent_bytes(self) -> int:
        """Of messages of this rank so far."""
        return self._across.sent_bytes if self._across else 0

    def __call__(self, comm: MPI.Intracomm, tag: int) -> Steps:
        """The operation."""
        place = self._place
        epoch = place.begin()
        place.ready.announce(epoch)
        yield partial(place.ready.reached, epoch)
        if self._sum:
            self._sum()
        if self._across:
            yield from self._across(comm, tag)
        if self._spread:
            self._spread()
        place.done.announce(epoch)
        yield partial(place.done.reached, epoch)
