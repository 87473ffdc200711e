"""Gradients in device memory: when they may be read, and what computes and copies them.

A device works through queues of its own (CUDA: streams), so that a call that starts work says
nothing about its end. Nothing here makes the host wait: an operation of the engine yields
`event.query` instead, and who uses a sum has its own stream wait for the event of the last copy.

Two paths lead through MPI, and `comm.select` finds the faster one:

- on the device: where the MPI library takes device memory (comm.device_probe), messages go out of
  and into it, and sums are taken there;
- by the host: each slab has a mirror in host memory, pinned, shared by the ranks of the node where
  that can be had. Chunks are copied to it, summed by any of the host's ways, and copied back, on
  streams of their own, so that one chunk is copied while others are on the wire.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Protocol

import torch
from mpi4py import MPI

from hpctrain.comm.channel import Operation, Steps
from hpctrain.comm.memory import Slab

_log = logging.getLogger("hpctrain")

Work = Callable[[], object]


class Event(Protocol):
    """A point in a device's queue. A device knows its own events."""

    def query(self) -> bool:
        """Whether the device has come there. Does not wait."""


class Device(Protocol):
    """What operations ask of a device. None of it makes the host wait."""

    def mark(self) -> Event:
        """The end of what the calling thread has queued so far."""

    def run(self, work: Work, queue: str, after: Sequence[Event] = ()) -> Event:
        """Queue `work` apart from the program's own, behind `after`; its end.

        Args:
            work: calls that start kernels or copies on the current stream.
            queue: ``out`` and ``in`` copy to and from the host, ``sum`` computes.
            after: what must have ended before.
        """

    def wait(self, event: Event) -> None:
        """Have what the calling thread queues from now on begin after `event`."""

    def enter(self) -> None:
        """Make it the calling thread's device: there MPI libraries look for that of a buffer."""

    def adopt(self, tensor: torch.Tensor) -> None:
        """Keep this device memory, once it is freed, until the queues are done with it."""

    def host_memory(self, nbytes: int) -> torch.Tensor:
        """Zeros on the host that copies reach by direct memory access."""

    def pin(self, address: int, nbytes: int, owner: object) -> None:
        """Have copies to and from other host memory go by direct memory access, if they can.

        Args:
            address: where it begins.
            nbytes: how long it is; ranges must not share pages.
            owner: lives as long as the memory.
        """


class Cuda:
    """A CUDA device (or ROCm by torch's names), with a stream for each kind of work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._queues = {name: torch.cuda.Stream(device) for name in ("out", "in", "sum")}

    def mark(self) -> torch.cuda.Event:
        """The end of what is on the current stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def run(self, work: Work, queue: str, after: Sequence[Any] = ()) -> torch.cuda.Event:
        """Queue `work` on a side stream; its end."""
        stream = self._queues[queue]
        with torch.cuda.device(self.device), torch.cuda.stream(stream), torch.no_grad():
            for event in after:
                stream.wait_event(event)
            work()
            done = torch.cuda.Event()
            done.record(stream)
        return done

    def wait(self, event: Any) -> None:
        """Have the current stream wait, not the host."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def enter(self) -> None:
        """Make its context the calling thread's."""
        torch.cuda.set_device(self.device)

    def adopt(self, tensor: torch.Tensor) -> None:
        """Tell the allocator which streams use the memory."""
        for stream in self._queues.values():
            tensor.record_stream(stream)

    def host_memory(self, nbytes: int) -> torch.Tensor:
        """Memory of torch's pinned allocator."""
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def pin(self, address: int, nbytes: int, owner: object) -> None:
        """Register the memory with the driver; slower copies remain where it refuses."""
        runtime: Any = torch.cuda.cudart()
        with torch.cuda.device(self.device):
            refused = int(runtime.cudaHostRegister(address, nbytes, 0))
            if not refused:
                weakref.finalize(owner, runtime.cudaHostUnregister, address)
                return
            _log.warning("the driver does not pin host memory (error %d): copies are slow", refused)
            with suppress(RuntimeError):  # the next launch would report the refusal as its own
                torch.zeros(1, device=self.device).add_(1)


@cache
def cuda(device: torch.device) -> Cuda:
    """The device's streams, made once."""
    return Cuda(device)


class Crossing:
    """Joins a slab in device memory to its mirror on the host; shared by the slab's owners.

    Args:
        device: the device's queues.
        mirror: as many elements on the host, in node-shared memory if that can be had.
        chunks: of the slab's chunks.
    """

    def __init__(self, device: Device, mirror: Slab, chunks: Sequence[Crossing]) -> None:
        self.device = device
        self.mirror = mirror
        self._all = (self, *chunks)
        self.ready: Event | None = None
        """The end of the kernels that wrote the slab."""
        self.summed: Event | None = None
        """The end of the copy or kernel that wrote the sum."""

    def hand_over(self) -> None:
        """The program has queued what writes the slab; operations may read it behind that."""
        event = self.device.mark()
        for part in self._all:
            part.ready = event

    @property
    def has_ended(self) -> bool:
        """Whether all sums have been written."""
        return all(part.summed is None or part.summed.query() for part in self._all)

    def take_back(self) -> None:
        """Have the program's queue wait for the sum; the operations must have ended."""
        for part in self._all:
            if part.summed is not None:
                self.device.wait(part.summed)
                part.summed = None


def on_device(mirror: Slab, tensor: torch.Tensor, device: Device) -> Slab:
    """The slab that `tensor` is, with a slab on the host as its mirror.

    Args:
        mirror: as many elements on the host, of the same dtype.
        tensor: one-dimensional and contiguous, on the device.
        device: its queues.
    """
    device.adopt(tensor)
    chunks, start = [], 0
    for chunk in mirror.chunks:
        end = start + chunk.tensor.numel()
        chunks.append(on_device(chunk, tensor[start:end], device))
        start = end
    crossings = [chunk.crossing for chunk in chunks if chunk.crossing]
    crossing = Crossing(device, mirror, crossings)
    return Slab(tensor, mirror.place, tuple(chunks), crossing)


def staged(slab: Slab, on_host: Operation) -> Operation:
    """Sum by way of the host: copy to the mirror, sum there, copy back.

    Args:
        slab: on a device.
        on_host: sums the mirror.
    """
    crossing = slab.crossing
    assert crossing is not None
    device, mirror = crossing.device, crossing.mirror

    def copy_out() -> None:
        mirror.tensor.copy_(slab.tensor, non_blocking=True)

    def copy_in() -> None:
        slab.tensor.copy_(mirror.tensor, non_blocking=True)

    last: Event | None = None

    def steps(comm: MPI.Intracomm, tag: int) -> Steps:
        nonlocal last
        # The copy of the step before may still be reading the mirror.
        after = [event for event in (crossing.ready, last) if event is not None]
        yield device.run(copy_out, "out", after).query
        yield from on_host(comm, tag)
        last = crossing.summed = device.run(copy_in, "in")

    return steps


class DeviceSum:
    """As `sums.SumInOrder`, by kernels of the device: one for all parts where CuPy is installed.

    The same bits as on the host: parts are added one after another, 16-bit ones in float32.
    """

    def __init__(
        self, outs: Sequence[torch.Tensor], parts: Sequence[torch.Tensor], scale: float
    ) -> None:
        self._outs = tuple(outs)
        self._parts = tuple(parts)
        self._scale = scale
        self._fused = _fused(self._outs[0], self._parts, scale)

    def __call__(self) -> None:
        """Queue the sum of what the parts hold then."""
        out, *copies = self._outs
        if self._fused:
            self._fused()
        elif out.element_size() == 2:
            total = self._parts[0].float()
            for part in self._parts[1:]:
                total.add_(part)
            out.copy_(total.mul_(self._scale))
        else:
            total = self._parts[0]
            for part in self._parts[1:]:
                total = torch.add(total, part)
            torch.mul(total, self._scale, out=out)
        for copy in copies:
            copy.copy_(out)


_CUPY_TYPES = {torch.float32: "float32", torch.float64: "float64", torch.float16: "float16"}


def _fused(out: torch.Tensor, parts: Sequence[torch.Tensor], scale: float) -> Work | None:
    """One kernel that sums all parts, or None where CuPy is missing or lacks the dtype."""
    if not out.is_cuda or out.dtype not in _CUPY_TYPES or not out.numel():
        return None
    try:
        import cupy
    except ImportError:
        return None
    wide = "double" if out.dtype == torch.float64 else "float"
    names = [f"part{number}" for number in range(len(parts))]
    total = f"({wide}){names[0]}"
    for name in names[1:]:
        total = f"({total} + ({wide}){name})"
    kernel = cupy.ElementwiseKernel(
        ", ".join(f"T {name}" for name in names),
        "T out",
        f"out = (T)(({wide}){scale!r} * {total})",
        "hpctrain_sum",
    )
    arrays = [cupy.asarray(part) for part in (*parts, out)]

    def run() -> None:
        stream = torch.cuda.current_stream(out.device)
        with cupy.cuda.Device(out.device.index), _as_cupy(cupy, stream):
            kernel(*arrays)

    return run


def _as_cupy(cupy: Any, stream: torch.cuda.Stream) -> Any:
    """The same stream; older versions of either know no protocol for it."""
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream)
