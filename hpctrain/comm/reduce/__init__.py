"""Ways to sum a slab over all ranks, as operations for the engine.

- ``native``: the MPI library's own ``Iallreduce``. Its order of summation depends on the library,
  the number of ranks and the position of an element in the slab.
- ``direct``: reduce-scatter and all-gather by messages between all pairs of ranks, summed in rank
  order: the same bits from run to run and for any block size.
- ``ring``: the same by messages between neighbours only.
- ``shared``: out of memory that the ranks of a node share, in rank order, without messages. One
  node only; has the bits of ``direct``.
- ``two_level``: ``shared`` within each node; between nodes every rank exchanges its slice with
  the ranks of the same place on other nodes.

A slab on a device is summed by these on its mirror on the host, or where it lies:

- ``device_direct``, ``device_ring``: as ``direct`` and ``ring``, by messages out of and into device
  memory, summed by the device.

``native`` is for the host alone: collectives must begin in the same order on all ranks, and an
operation that first waits for a device begins whenever that has come.

All multiply the sum by a scale, 1/n for an average, and leave the same bits on every rank. Where a
wire of 16 bits is asked for, it is used between processes that do not share memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mpi4py import MPI

from hpctrain.comm.channel import Operation, Steps
from hpctrain.comm.device import staged
from hpctrain.comm.memory import Slab, buffer_of
from hpctrain.comm.reduce.messages import Direct, Ring
from hpctrain.comm.reduce.shared import SharedSum

STAY_ON_DEVICE = ("device_direct", "device_ring")
WAYS = ("native", "direct", "ring", "shared", "two_level", *STAY_ON_DEVICE)
IN_SHARED_MEMORY = ("shared", "two_level")
WIRE_DTYPES: dict[str, torch.dtype | None] = {
    "same": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

DIRECT_RANKS = 16
"""Largest group that exchanges between all pairs; messages grow with the square."""

_MPI_TYPES = {torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE}


def is_native(dtype: torch.dtype) -> bool:
    """Whether MPI libraries sum elements of this dtype."""
    return dtype in _MPI_TYPES


def possible(
    nodes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    *,
    in_shared_memory: bool,
    ordered: bool,
    narrow: bool,
    on_device: bool = False,
    stays: bool = False,
) -> list[str]:
    """The ways that can sum slabs of `dtype`, the one to prefer among equals first.

    Args:
        nodes: ranks of each node.
        dtype: real dtype of the slab.
        in_shared_memory: whether slabs are in memory that the ranks of a node share.
        ordered: whether an element's order of summation must depend on nothing but the layout of
            ranks.
        narrow: whether the wire has 16 bits.
        on_device: whether the slab is in device memory.
        stays: whether messages may begin and end there. That is tried out within a host alone, so
            that between nodes such a way is taken when it is forced, and not by itself.
    """
    size = sum(len(ranks) for ranks in nodes)
    stays = stays and len(nodes) == 1
    ways = []
    if in_shared_memory:
        ways.append("shared" if len(nodes) == 1 else "two_level")
    if size <= DIRECT_RANKS or ordered:
        ways.append("direct")
        if stays:
            ways.append("device_direct")
    if len(nodes) == 1 and (size <= DIRECT_RANKS or ordered):
        return ways  # they have the same bits, so that measured times do not decide about results
    if ordered:
        return ways[:1]
    ways.append("ring")
    if is_native(dtype) and not narrow and not on_device:
        ways.append("native")
    return ways


def scratch_bytes(
    way: str, slab: Slab, wire: torch.dtype | None, size: int, ordered: bool = False
) -> int:
    """Temporary memory that `all_reduce` needs for a slab on `size` ranks."""
    count, dtype = slab.tensor.numel(), slab.tensor.dtype
    way = way.removeprefix("device_")
    if way == "direct":
        return Direct.scratch_bytes(count, dtype, wire, size)
    if way == "ring":
        return Ring.scratch_bytes(count, dtype, wire, size)
    if way == "two_level" and slab.place is not None:
        nodes = len(slab.place.across)
        most = -(-count // slab.place.lanes) + 64
        return _between(nodes, ordered).scratch_bytes(most, dtype, wire, max(1, nodes))
    return 0


def all_reduce(
    way: str,
    slab: Slab,
    scale: float,
    wire: torch.dtype | None = None,
    *,
    ordered: bool = False,
    scratch: torch.Tensor | None = None,
    lane: int = 0,
) -> Operation:
    """An operation that replaces `slab` on every rank by `scale` times the sum over ranks.

    It is planned when it first runs, always on the same communicator afterwards, and then runs
    without allocating.

    Args:
        way: one of `WAYS`; ``shared`` and ``two_level`` need a slab in node-shared memory.
        slab: real elements, of the same number and dtype on all ranks.
        scale: factor of the sum.
        wire: 16-bit dtype on the wire, or None for the slab's own; not for ``native``.
        ordered: for ``two_level``, whether nodes are summed in order.
        scratch: at least `scratch_bytes` bytes, which nobody else uses while the operation runs,
            where the messages are; by default memory of its own.
        lane: tells operations apart that run on one channel at the same time; below `LANES`.
    """
    crossing = slab.crossing
    if crossing and way not in STAY_ON_DEVICE:
        on_host = all_reduce(
            way, crossing.mirror, scale, wire, ordered=ordered, scratch=scratch, lane=lane
        )
        return staged(slab, on_host)
    way = way.removeprefix("device_")
    if way == "native":
        assert slab.tensor.dtype in _MPI_TYPES and wire is None and crossing is None
        return _native(slab.tensor, scale)
    if way in IN_SHARED_MEMORY:
        assert slab.place is not None
        between = _between(len(slab.place.across), ordered)
        return SharedSum(slab, scale, wire, between, scratch, lane)
    by_messages = Direct if way == "direct" else Ring
    return by_messages(slab.tensor, scale, wire, None, scratch, lane, crossing)


def _between(nodes: int, ordered: bool) -> type[Direct] | type[Ring]:
    """How nodes exchange their sums: in few steps while they are few, then by fewest messages."""
    return Direct if ordered or nodes <= DIRECT_RANKS else Ring


def _native(slab: torch.Tensor, scale: float) -> Operation:
    spec = [buffer_of(slab), slab.numel(), _MPI_TYPES[slab.dtype]]

    def steps(comm: MPI.Intracomm, tag: int) -> Steps:
        yield [comm.Iallreduce(MPI.IN_PLACE, spec, MPI.SUM)]
        if scale != 1:
            slab.mul_(scale)

    return steps
