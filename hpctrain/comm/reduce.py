"""Ways to sum a slab over all ranks, as operations for the engine.

- ``native``: the MPI library's own ``Iallreduce``. Its order of summation depends on the library,
  the number of ranks and the position of an element in the slab.
- ``direct``: a reduce-scatter followed by an all-gather, both by ``Isend``/``Irecv`` between all
  pairs of ranks. Rank r sums slice r of all ranks in rank order and sends the result to everyone.
  Each element is summed in the same order whatever the size and number of slabs, so results
  are the same bits on every rank, from run to run and for any block size. It moves
  2 (n-1)/n of a slab in and out of each rank, which is the least that an all-reduce can do, but
  in 2 (n-1) messages, which is why large worlds use ``native``.

Both multiply the sum by a scale, 1/n for an average. 16-bit elements are always summed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from mpi4py import MPI

from hpctrain.comm.engine import FIRST_FIXED_TAG, LANES, Operation, Steps
from hpctrain.comm.memory import Slab, aligned, buffer_of

WAYS = ("native", "direct")
WIRE_DTYPES: dict[str, torch.dtype | None] = {
    "same": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

DIRECT_RANKS = 16
"""Largest world for which ``direct`` is chosen by itself; messages grow with the square."""

PIECE_BYTES = 1 << 18
"""Sums work on pieces of this size, three of which stay in a core's own cache."""

_MPI_TYPES = {torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE}


def is_native(dtype: torch.dtype) -> bool:
    """Whether MPI libraries sum elements of this dtype."""
    return dtype in _MPI_TYPES


def choose(size: int, dtype: torch.dtype, ordered: bool) -> str:
    """The way to sum slabs of `dtype` over `size` ranks.

    Args:
        size: number of ranks.
        dtype: real dtype of the slab.
        ordered: whether the sum must be taken in rank order, or narrowed on the wire.
    """
    if ordered or not is_native(dtype):
        return "direct"
    return "direct" if size <= DIRECT_RANKS else "native"


def scratch_bytes(slab: Slab, wire: torch.dtype | None, size: int) -> int:
    """Temporary memory that `all_reduce` needs for a slab on `size` ranks."""
    count, itemsize = slab.tensor.numel(), slab.tensor.element_size()
    inbox = (size - 1) * -(-count // size)
    if wire is not None and wire.itemsize < itemsize:
        return aligned(count * wire.itemsize) + inbox * wire.itemsize
    return inbox * itemsize


def all_reduce(
    way: str,
    slab: Slab,
    scale: float,
    wire: torch.dtype | None = None,
    *,
    scratch: torch.Tensor | None = None,
    lane: int = 0,
) -> Operation:
    """An operation that replaces `slab` on every rank by `scale` times the sum over ranks.

    It is planned when it first runs, always on the same communicator afterwards, and then runs
    without allocating.

    Args:
        way: one of `WAYS`.
        slab: real elements, of the same number and dtype on all ranks.
        scale: factor of the sum.
        wire: 16-bit dtype on the wire, or None for the slab's own; needs ``direct``.
        scratch: at least `scratch_bytes` bytes, which nobody else uses while the operation runs;
            by default memory of its own.
        lane: tells operations apart that run on one channel at the same time; below `LANES`.
    """
    if way == "native":
        assert slab.tensor.dtype in _MPI_TYPES and wire is None
        return _native(slab.tensor, scale)
    return _Direct(slab, scale, wire, scratch, lane)


def _native(slab: torch.Tensor, scale: float) -> Operation:
    spec = [buffer_of(slab), slab.numel(), _MPI_TYPES[slab.dtype]]

    def steps(comm: MPI.Intracomm, tag: int) -> Steps:
        yield [comm.Iallreduce(MPI.IN_PLACE, spec, MPI.SUM)]
        if scale != 1:
            slab.mul_(scale)

    return steps


class _Direct:
    """The way ``direct`` for one slab, with persistent requests and all views made once."""

    def __init__(
        self,
        slab: Slab,
        scale: float,
        wire: torch.dtype | None,
        scratch: torch.Tensor | None,
        lane: int,
    ) -> None:
        self._slab = slab.tensor
        self._slab_and_scratch = slab, scratch
        self._scale = scale
        self._wire_dtype = wire if wire and wire.itemsize < slab.tensor.element_size() else None
        self._tag = FIRST_FIXED_TAG + 2 * (lane % LANES)
        self._planned_for: MPI.Intracomm | None = None

    def __call__(self, comm: MPI.Intracomm, tag: int) -> Steps:
        if self._planned_for is None:
            self._plan(comm)
        assert self._planned_for is comm, "planned for another channel"
        if self._wire_dtype is not None:
            # Scaled before it is narrowed: a sum of float16 gradients may exceed 65,504.
            torch.mul(self._slab, self._scale, out=self._wire)
        if self._scatter:
            MPI.Prequest.Startall(self._scatter)
            yield self._scatter
        self._sum()
        if self._gather:
            MPI.Prequest.Startall(self._gather)
            yield self._gather
        if self._wire_dtype is not None:
            self._slab.copy_(self._wire)

    def _plan(self, comm: MPI.Intracomm) -> None:
        rank, size = comm.Get_rank(), comm.Get_size()
        slab, scratch = self._slab_and_scratch
        if scratch is None:
            scratch = torch.empty(scratch_bytes(slab, self._wire_dtype, size), dtype=torch.uint8)
        self._wire, factor = self._slab, self._scale
        if self._wire_dtype is not None:
            nbytes = self._slab.numel() * self._wire_dtype.itemsize
            self._wire, factor = scratch[:nbytes].view(self._wire_dtype), 1.0
            scratch = scratch[aligned(nbytes) :]

        cuts = slices(self._slab.numel(), size)
        mine = self._wire[cuts[rank]]
        others = [peer for peer in range(size) if peer != rank]
        inbox = scratch[: mine.numel() * mine.element_size() * (size - 1)].view(self._wire.dtype)
        parts = {
            peer: inbox[place * mine.numel() : (place + 1) * mine.numel()]
            for place, peer in enumerate(others)
        }
        self._scatter = _exchange(
            comm, self._tag, {peer: self._wire[cuts[peer]] for peer in others}, parts
        )
        self._gather = _exchange(
            comm,
            self._tag + 1,
            dict.fromkeys(others, mine),
            {peer: self._wire[cuts[peer]] for peer in others},
        )
        ordered = [mine if peer == rank else parts[peer] for peer in range(size)]
        self._sum = SumInOrder(mine, ordered, factor)
        self._planned_for = comm


def slices(count: int, size: int) -> list[slice]:
    """Cut `count` elements into `size` slices, as even as can be; some may be empty."""
    cuts = [count * index // size for index in range(size + 1)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]


class SumInOrder:
    """Writes ``scale * (((parts[0] + parts[1]) + parts[2]) + ...)`` to `out` when called.

    Works piece by piece, so that a piece stays in the core's own cache between additions. 16-bit
    parts are summed in float32 and rounded once. `out` may be one of the parts; the first part
    may be overwritten.
    """

    def __init__(self, out: torch.Tensor, parts: Sequence[torch.Tensor], scale: float) -> None:
        self._scale = scale
        self._wide: torch.Tensor | None = None
        step = PIECE_BYTES // out.element_size()
        if out.element_size() == 2:
            step //= 2
            self._wide = torch.empty(min(step, out.numel()), dtype=torch.float32)
        self._pieces = [
            (out[start : start + step], [part[start : start + step] for part in parts])
            for start in range(0, out.numel(), step)
        ]

    def __call__(self) -> None:
        """Sum what the parts hold now."""
        for out, parts in self._pieces:
            if self._wide is not None:
                self._sum_wide(self._wide[: out.numel()], out, parts)
                continue
            total = parts[0]
            for part in parts[1:-1]:
                total.add_(part)
            if len(parts) == 1:
                out.copy_(total)
            else:
                torch.add(total, parts[-1], out=out)
            if self._scale != 1:
                out.mul_(self._scale)

    def _sum_wide(
        self, total: torch.Tensor, out: torch.Tensor, parts: Sequence[torch.Tensor]
    ) -> None:
        total.copy_(parts[0])
        for part in parts[1:]:
            total.add_(part)
        if self._scale != 1:
            total.mul_(self._scale)
        out.copy_(total)


def _exchange(
    comm: MPI.Intracomm,
    tag: int,
    sends: dict[int, torch.Tensor],
    receives: dict[int, torch.Tensor],
) -> list[MPI.Prequest]:
    """Messages to and from each peer, to be started; empty ones are left out on both sides."""
    requests = [
        comm.Recv_init([buffer_of(part), MPI.BYTE], peer, tag)
        for peer, part in receives.items()
        if part.numel()
    ]
    requests += [
        comm.Send_init([buffer_of(part), MPI.BYTE], peer, tag)
        for peer, part in sends.items()
        if part.numel()
    ]
    return requests
