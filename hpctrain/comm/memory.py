"""Memory that MPI may touch: flat slabs of elements, and scratch that operations share in turn."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from mpi4py import MPI

if TYPE_CHECKING:
    from hpctrain.comm.device import Crossing

ALIGN_BYTES = 64
"""Parts of a slab begin on cache lines, so that no two ranks ever write to one line."""


class Counters:
    """How far each rank of a node is: one counter a rank, in memory that they share.

    A rank writes its own counter only. The fence keeps what a rank wrote to memory before it
    announced an epoch visible to all that have seen the announcement.
    """

    def __init__(self, cells: Sequence[memoryview], mine: int, fence: Callable[[], None]) -> None:
        self._cells = cells
        self._mine = cells[mine]
        self._fence = fence

    def announce(self, epoch: int) -> None:
        """This rank has reached `epoch`."""
        self._fence()
        self._mine[0] = epoch

    def reached(self, epoch: int) -> bool:
        """Whether all ranks of the node have reached `epoch`."""
        for cell in self._cells:
            if cell[0] < epoch:
                return False
        self._fence()
        return True


class Place:
    """Where a slab lies in memory that the ranks of a node share.

    Attributes:
        parts: this slab on each rank of the node, by local rank.
        local_rank: this rank's place on its node.
        lanes: how many ranks of each node sum a slice.
        across: the rank of the same place on every node, by node; empty for ranks without a lane.
        ready: counters of slabs that may be read.
        done: counters of slices that are summed and written back.
    """

    def __init__(
        self,
        parts: Sequence[torch.Tensor],
        local_rank: int,
        lanes: int,
        across: Sequence[int],
        ready: Counters,
        done: Counters,
    ) -> None:
        self.parts = tuple(parts)
        self.local_rank = local_rank
        self.lanes = lanes
        self.across = tuple(across)
        self.ready = ready
        self.done = done
        self._epoch = 0

    def begin(self) -> int:
        """The epoch of the next sum, the same on all ranks of the node."""
        self._epoch += 1
        return self._epoch


@dataclass(frozen=True)
class Slab:
    """A contiguous run of elements in host or device memory.

    Attributes:
        tensor: one-dimensional and contiguous; lives as long as the slab.
        place: where other ranks of the node find it, or its mirror, if they can.
        chunks: the slab in pieces, if it is larger than one.
        crossing: what joins it to its mirror on the host, if it is on a device.
    """

    tensor: torch.Tensor
    place: Place | None = None
    chunks: tuple[Slab, ...] = ()
    crossing: Crossing | None = None

    @classmethod
    def allocate(cls, count: int, dtype: torch.dtype, chunk_bytes: int | None = None) -> Slab:
        """A slab of `count` zeros in memory of this process."""
        tensor = torch.zeros(count, dtype=dtype)
        cuts = chunk_cuts(count, dtype.itemsize, chunk_bytes)
        return cls(tensor, chunks=tuple(Slab(tensor[cut]) for cut in cuts))

    def hand_over(self) -> None:
        """Before operations are posted: they read behind what the program has queued so far."""
        if self.crossing:
            self.crossing.hand_over()

    def take_back(self) -> None:
        """After operations have ended: what the program queues from now on sees the sum."""
        if self.crossing:
            self.crossing.take_back()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.tensor.numel() * self.tensor.element_size()


def buffer_of(tensor: torch.Tensor) -> MPI.buffer:
    """The bytes of a contiguous tensor, for MPI to read or write while the tensor lives.

    MPI libraries that take device memory tell it by its address.
    """
    assert tensor.is_contiguous()
    return MPI.buffer.fromaddress(tensor.data_ptr(), tensor.numel() * tensor.element_size())


class ScratchRing:
    """Scratch memory for operations that run in order: each gets the next part of one buffer.

    Parts are given out once, when operations are planned, and wrap around. Two parts overlap only
    if the parts given out between them fill the buffer, so operations may use theirs freely as
    long as those in flight, in order, need no more than `nbytes` together.

    Args:
        nbytes: how much the operations in flight may need together.
        largest: the largest part that will be asked for; lost, at most, where the ring wraps.
        device: where; by default on the host.
    """

    def __init__(self, nbytes: int, largest: int, device: torch.device | None = None) -> None:
        self._buffer = torch.empty(nbytes + largest, dtype=torch.uint8, device=device)
        self._next = 0

    def part(self, nbytes: int) -> torch.Tensor:
        """The next `nbytes` bytes, of undefined content, beginning on a cache line."""
        if self._next + nbytes > self._buffer.numel():
            self._next = 0
        start = self._next
        self._next = aligned(start + nbytes)
        return self._buffer[start : start + nbytes]


def chunk_cuts(count: int, itemsize: int, chunk_bytes: int | None) -> list[slice]:
    """Cut a slab into even chunks of about `chunk_bytes`, on cache lines; none if it is one chunk.

    They may be larger by an eighth: a full block has flags behind its gradients, which are not
    worth a chunk.
    """
    if chunk_bytes is None:
        return []
    chunks = -(-(8 * count * itemsize - chunk_bytes) // (8 * chunk_bytes))
    if chunks < 2:
        return []
    step = aligned(-(-count * itemsize // chunks)) // itemsize
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def release_freed() -> None:
    """Give memory that was freed back to the system, where the C library can.

    For moments at which much was freed that will not be needed again in the same sizes; malloc
    would keep it, and the process's peak would count it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others need not
    if trim is not None:
        trim(0)


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to whole cache lines."""
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
