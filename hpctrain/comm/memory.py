"""Memory that MPI may touch: flat slabs of elements, and scratch that is used again and again."""

from __future__ import annotations

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


class Scratch:
    """Buffers for operations in flight, kept for the next ones.

    Holds as many buffers as were ever in use at once, each as large as the largest request it
    has served. Not for several threads; the engine's lock guards it.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []
        self._lent: dict[int, torch.Tensor] = {}

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of `count` undefined elements; hand it back with `give`."""
        nbytes = count * dtype.itemsize
        fitting = [buffer for buffer in self._free if buffer.numel() >= nbytes]
        if fitting:
            buffer = min(fitting, key=torch.Tensor.numel)
            self._free = [kept for kept in self._free if kept is not buffer]
        else:
            if self._free:  # replace one that is too small instead of keeping both
                self._free.pop()
            buffer = torch.empty(max(1, nbytes), dtype=torch.uint8)
        self._lent[buffer.data_ptr()] = buffer
        return buffer[:nbytes].view(dtype)

    def give(self, tensor: torch.Tensor) -> None:
        """Hand back a tensor from `take`, whole; nobody may use it afterwards."""
        self._free.append(self._lent.pop(tensor.untyped_storage().data_ptr()))
