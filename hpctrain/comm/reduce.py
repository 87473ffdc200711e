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

from hpctrain.comm.engine import Operation, Steps
from hpctrain.comm.memory import Scratch, Slab, buffer_of

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


def choose(size: int, dtype: torch.dtype, wire: torch.dtype | None, ordered: bool) -> str:
    """The way to sum slabs of `dtype` over `size` ranks.

    Args:
        size: number of ranks.
        dtype: real dtype of the slab.
        wire: 16-bit dtype on the wire, or None for the slab's own.
        ordered: whether the sum must be taken in rank order.
    """
    if ordered or wire is not None or dtype not in _MPI_TYPES:
        return "direct"
    return "direct" if size <= DIRECT_RANKS else "native"


def all_reduce(
    way: str, slab: Slab, scale: float, wire: torch.dtype | None, scratch: Scratch
) -> Operation:
    """An operation that replaces `slab` on every rank by `scale` times the sum over ranks.

    Args:
        way: one of `WAYS`.
        slab: real elements, of the same number and dtype on all ranks.
        scale: factor of the sum.
        wire: 16-bit dtype on the wire, or None for the slab's own; needs ``direct``.
        scratch: where temporary memory comes from.
    """
    if way == "native":
        assert slab.tensor.dtype in _MPI_TYPES and wire is None
        return _native(slab.tensor, scale)
    return _direct(slab.tensor, scale, wire, scratch)


def _native(slab: torch.Tensor, scale: float) -> Operation:
    spec = [buffer_of(slab), slab.numel(), _MPI_TYPES[slab.dtype]]

    def steps(comm: MPI.Intracomm, tag: int) -> Steps:
        yield [comm.Iallreduce(MPI.IN_PLACE, spec, MPI.SUM)]
        if scale != 1:
            slab.mul_(scale)

    return steps


def _direct(
    slab: torch.Tensor, scale: float, wire_dtype: torch.dtype | None, scratch: Scratch
) -> Operation:
    narrows = wire_dtype is not None and slab.element_size() > 2

    def steps(comm: MPI.Intracomm, tag: int) -> Steps:
        rank, size = comm.Get_rank(), comm.Get_size()
        if size == 1:
            if scale != 1:
                slab.mul_(scale)
            return
        cuts = slices(slab.numel(), size)
        mine = cuts[rank]
        wire, factor = slab, scale
        if narrows:
            # Scaled before it is narrowed: a sum of float16 gradients may exceed 65,504.
            wire, factor = scratch.take(slab.numel(), wire_dtype or slab.dtype), 1.0
            torch.mul(slab, scale, out=wire)

        count = mine.stop - mine.start
        inbox = scratch.take(count * (size - 1), wire.dtype)
        others = [peer for peer in range(size) if peer != rank]
        parts = dict(zip(others, inbox.split(count) if count else (), strict=False))
        yield _exchange(comm, tag, {peer: wire[cuts[peer]] for peer in others}, parts)

        ordered = (
            [wire[mine] if peer == rank else parts[peer] for peer in range(size)] if count else []
        )
        sum_in_order(wire[mine], ordered, factor)
        scratch.give(inbox)

        yield _exchange(
            comm,
            tag + 1,
            dict.fromkeys(others, wire[mine]),
            {peer: wire[cuts[peer]] for peer in others},
        )
        if narrows:
            slab.copy_(wire)
            scratch.give(wire)

    return steps


def slices(count: int, size: int) -> list[slice]:
    """Cut `count` elements into `size` slices, as even as can be; some may be empty."""
    cuts = [count * index // size for index in range(size + 1)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]


def sum_in_order(out: torch.Tensor, parts: Sequence[torch.Tensor], scale: float) -> None:
    """Write ``scale * (((parts[0] + parts[1]) + parts[2]) + ...)`` to `out`.

    16-bit parts are summed in float32 and rounded once. `out` may be one of the parts; the first
    part may be overwritten.
    """
    if out.element_size() == 2:
        _sum_16_bit(out, parts, scale)
        return
    step = PIECE_BYTES // out.element_size()
    for start in range(0, out.numel(), step):
        pieces = [part[start : start + step] for part in parts]
        total, target = pieces[0], out[start : start + step]
        for piece in pieces[1:-1]:
            total.add_(piece)
        if len(pieces) == 1:
            target.copy_(total)
        else:
            torch.add(total, pieces[-1], out=target)
        if scale != 1:
            target.mul_(scale)


def _sum_16_bit(out: torch.Tensor, parts: Sequence[torch.Tensor], scale: float) -> None:
    step = PIECE_BYTES // 4
    total = torch.empty(min(step, out.numel()), dtype=torch.float32)
    for start in range(0, out.numel(), step):
        pieces = [part[start : start + step] for part in parts]
        piece_total = total[: pieces[0].numel()]
        piece_total.copy_(pieces[0])
        for piece in pieces[1:]:
            piece_total.add_(piece)
        if scale != 1:
            piece_total.mul_(scale)
        out[start : start + step].copy_(piece_total)


def _exchange(
    comm: MPI.Intracomm,
    tag: int,
    sends: dict[int, torch.Tensor],
    receives: dict[int, torch.Tensor],
) -> list[MPI.Request]:
    """Start a message to and from each peer; empty ones are left out on both sides."""
    requests = [
        comm.Irecv([buffer_of(part), MPI.BYTE], peer, tag)
        for peer, part in receives.items()
        if part.numel()
    ]
    requests += [
        comm.Isend([buffer_of(part), MPI.BYTE], peer, tag)
        for peer, part in sends.items()
        if part.numel()
    ]
    return requests
