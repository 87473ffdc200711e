"""Memory that MPI may touch: flat slabs of elements, and scratch that operations share in turn."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from mpi4py import MPI

ALIGN_BYTES = 64
"""Parts of a slab begin on cache lines, so that no two ranks ever write to one line."""


@dataclass(frozen=True)
class Slab:
    """A contiguous run of elements in host memory.

    Attributes:
        tensor: one-dimensional and contiguous; lives as long as the slab.
    """

    tensor: torch.Tensor

    @classmethod
    def allocate(cls, count: int, dtype: torch.dtype) -> Slab:
        """A slab of `count` zeros in host memory."""
        return cls(torch.zeros(count, dtype=dtype))

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.tensor.numel() * self.tensor.element_size()


def buffer_of(tensor: torch.Tensor) -> MPI.buffer:
    """The bytes of a contiguous host tensor, for MPI to read or write while the tensor lives."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return MPI.buffer.fromaddress(tensor.data_ptr(), tensor.numel() * tensor.element_size())


class Ring:
    """Scratch memory for operations that run in order: each gets the next part of one buffer.

    Parts are given out once, when operations are planned, and wrap around. Two parts overlap only
    if the parts given out between them fill the buffer, so operations may use theirs freely as
    long as those in flight, in order, need no more than `nbytes` together.

    Args:
        nbytes: how much the operations in flight may need together.
        largest: the largest part that will be asked for; lost, at most, where the ring wraps.
    """

    def __init__(self, nbytes: int, largest: int) -> None:
        self._buffer = torch.empty(nbytes + largest, dtype=torch.uint8)
        self._next = 0

    def part(self, nbytes: int) -> torch.Tensor:
        """The next `nbytes` bytes, of undefined content, beginning on a cache line."""
        if self._next + nbytes > self._buffer.numel():
            self._next = 0
        start = self._next
        self._next = aligned(start + nbytes)
        return self._buffer[start : start + nbytes]


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
