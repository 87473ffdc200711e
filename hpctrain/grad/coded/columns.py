"""Model blocks as columns: how gradients get into cells, and sums back into `grad`.

A cell of a model block holds the gradients of its parameters and, behind them, one flag each: 1
where the data block used the parameter, so that one that no data block used keeps `grad` None.
16-bit gradients travel, and are summed, as float32. What a forward changes in the model's buffers,
such as batch-norm statistics, travels in columns of its own.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from hpctrain.comm.device import Device, Event
from hpctrain.grad.blocks import layout, slab_size, usable, view_like
from hpctrain.grad.coded.cells import Buffer, add_cells
from hpctrain.grad.coded.sums import Node

PIECES = 4
"""Columns of each root at least, where gradients travel between nodes: while one is added up and
sent back, others come."""
LEAST_COLUMN_BYTES = 1 << 16
"""Smaller ones cost more messages than they save time."""


def column_bytes(model_bytes: int, block_bytes: int, roots: int, travel: bool) -> int:
    """How large columns may be, so that all roots have some, and the same amount of work.

    Args:
        model_bytes: of all gradients.
        block_bytes: largest column that was asked for.
        roots: number of roots.
        travel: whether gradients travel between nodes.
    """
    pieces = roots * PIECES if travel else roots
    return min(block_bytes, max(-(-model_bytes // pieces), LEAST_COLUMN_BYTES))


class GradientColumn:
    """A model block: parameters whose gradients are summed together.

    Args:
        index: of the column.
        members: indices of the parameters.
        names: what messages call them.
        parameters: themselves.
        root: the rank that sums.
        device: where gradients are, if not on the host.
    """

    def __init__(
        self,
        index: int,
        members: Sequence[int],
        names: Sequence[str],
        parameters: Sequence[nn.Parameter],
        root: int,
        device: Device | None = None,
    ) -> None:
        self.index = index
        self.members = tuple(members)
        self.names = tuple(names)
        self.parameters = tuple(parameters)
        self.root = root
        self.missing = len(parameters)
        """Parameters whose gradient backward has not finished, in the last subset of a block."""
        self._device = device
        count, dtype = slab_size(parameters)
        self.dtype = torch.float32 if dtype.itemsize == 2 else dtype
        self._real_itemsize = dtype.itemsize
        self.nbytes = count * self.dtype.itemsize
        self.add = add_cells(self.dtype)
        self.is_linear = True
        self._there: Any = None
        self._own_views: dict[Any, Any] = {}
        self._copied: Event | None = None
        if device is not None:
            self._there = torch.zeros(count, dtype=self.dtype, device=parameters[0].device)
            device.adopt(self._there)

    def pack(self, cell: Buffer) -> Event | None:
        """Copy this rank's gradients into a cell; the end of the copy, if it is still to come.

        Raises:
            ExchangeError: a gradient is sparse, or to be differentiated again.
        """
        if self._device is None:
            self._gather(self._parts(cell, cell.numbers(self.dtype)))
            return None
        if self._copied is not None:
            self._device.wait(self._copied)
        self._gather(self._parts(self, self._there))
        there, here = self._there, cell.numbers(self.dtype)
        ready = self._device.mark()
        self._copied = self._device.run(
            lambda: here.copy_(there, non_blocking=True), "out", (ready,)
        )
        return self._copied

    def scale(self, cell: Buffer, factor: float) -> None:
        """Multiply a cell, with its loss."""
        cell.numbers(self.dtype).mul_(factor)
        cell.loss *= factor

    def views(self, cell: Buffer) -> Sequence[torch.Tensor]:
        """The gradients in a cell, in the dtype of sums."""
        return self._parts(cell, cell.numbers(self.dtype))[0]

    def digest(self, cell: Buffer) -> bytes:
        """Of gradients, flags and loss; what lies between them says nothing."""
        views, flags = self._parts(cell, cell.numbers(self.dtype))
        return digest_of([*views, flags], cell.loss)

    def can_lack(self, blocks: Collection[Node]) -> bool:
        """Gradients of some data blocks, scaled, can stand for all."""
        return bool(blocks)

    @property
    def adds(self) -> bool:
        """Whether `pack_onto` can be used: gradients are on the host, in the dtype of sums."""
        return self._device is None and self.dtype.itemsize == self._real_itemsize

    def pack_onto(self, cell: Buffer) -> None:
        """Add this rank's gradients to those of a cell: the same bits as by way of one of its own.

        Raises:
            ExchangeError: a gradient is sparse, or to be differentiated again.
        """
        views, flags = self._parts(cell, cell.numbers(self.dtype))
        sources, targets = [], []
        for place, (parameter, view) in enumerate(zip(self.parameters, views, strict=True)):
            if parameter.grad is None:
                view.add_(0)  # as a cell of zeros does, to whose sum -0 would matter
            else:
                flags[place] += 1
                sources.append(usable(parameter.grad, self.names[place]))
                targets.append(view)
        if sources:
            torch._foreach_add_(targets, sources)

    def show(self, result: Buffer) -> Event | None:
        """Make a sum the parameters' gradients; they are views of it where dtypes allow.

        Returns:
            The end of the copy to the device, if there is one: so long the result is needed.
        """
        event = None
        views, flags = self._parts(result, result.numbers(self.dtype))
        used = (flags != 0).tolist()
        if self._device is not None:
            here = result.numbers(self.dtype)
            if self._copied is not None:
                self._device.wait(self._copied)
            there = self._there
            ready = self._device.mark()
            event = self._device.run(lambda: there.copy_(here, non_blocking=True), "in", (ready,))
            self._device.wait(event)
            views, _ = self._parts(self, self._there)
        for parameter, view, is_used in zip(self.parameters, views, used, strict=True):
            parameter.grad = view.to(parameter.dtype) if is_used else None
        return event

    def _gather(self, parts: tuple[Sequence[torch.Tensor], torch.Tensor]) -> None:
        views, flags = parts
        flags.fill_(1)
        sources, targets = [], []
        for place, (parameter, view) in enumerate(zip(self.parameters, views, strict=True)):
            if parameter.grad is None:
                view.zero_()
                flags[place] = 0
            else:
                sources.append(usable(parameter.grad, self.names[place]))
                targets.append(view)
        if sources:
            torch._foreach_copy_(targets, sources)

    def _parts(
        self, owner: Any, elements: torch.Tensor
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
        """Views of the elements as gradients, and the flags. Made once for each memory."""
        cached: dict[Any, Any] = owner.cached if isinstance(owner, Buffer) else self._own_views
        key = ("views", self.index)
        if key not in cached:
            parameter = self.parameters[0]
            if parameter.is_complex():
                elements = torch.view_as_complex(elements.view(-1, 2))
            itemsize = elements.element_size()
            # Offsets are those of the parameters' own dtype: as many elements in a wider one.
            offsets, payload = layout(
                [p.numel() for p in self.parameters], parameter.dtype.itemsize
            )
            assert itemsize >= parameter.dtype.itemsize
            views = [
                view_like(elements[start : start + p.numel()], p)
                for start, p in zip(offsets, self.parameters, strict=True)
            ]
            flags = elements[payload:]
            cached[key] = views, torch.view_as_real(flags)[:, 0] if flags.is_complex() else flags
        found: tuple[Sequence[torch.Tensor], torch.Tensor] = cached[key]
        return found


class BufferColumn:
    """Buffers of the model of one dtype: what the forwards of each data block make of them.

    Floating-point ones become the mean over samples of what they were after each data block, all
    others what they were after data block 0. Every data block begins with those of the step. Before
    the former travels a mark each, 0 where no data block changed it: it keeps its bits then.
    """

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, names: Sequence[str], root: int
    ) -> None:
        self.index = -1
        self.root = root
        self._module = module
        self._names = tuple(names)
        self.is_linear = False
        self._averages = dtype.is_floating_point or dtype.is_complex
        self._dtype = torch.float64 if self._averages else torch.int64
        self.add = add_cells(self._dtype)
        self._sizes = [buffer.numel() for buffer in self._buffers()]
        self._marks = len(self._sizes) if self._averages else 0
        self.nbytes = 8 * (self._marks + sum(self._sizes))
        self._begin: list[torch.Tensor] = []

    def keep(self) -> None:
        """Remember the buffers of now, with which every data block begins."""
        self._begin = [buffer.clone() for buffer in self._buffers()]

    def restore(self) -> None:
        """Set buffers to those that were kept."""
        with torch.no_grad():
            for buffer, value in zip(self._buffers(), self._begin, strict=True):
                buffer.copy_(value)

    def pack(self, cell: Buffer, block: int, weight: float) -> None:
        """Put what a data block made of the buffers into a cell, with that block's weight."""
        numbers = cell.numbers(self._dtype)
        if not weight if self._averages else block:
            numbers.zero_()
            return
        buffers = self._buffers()
        marks, values = numbers[: self._marks], numbers[self._marks :]
        values.copy_(torch.cat([buffer.flatten().to("cpu", self._dtype) for buffer in buffers]))
        if self._averages:
            values.mul_(weight)
            kept = [_has_bits_of(*both) for both in zip(buffers, self._begin, strict=True)]
            marks.copy_(torch.tensor(kept).logical_not())

    def show(self, result: Buffer) -> None:
        """Set the buffers to what all data blocks made of them together."""
        numbers = result.numbers(self._dtype)
        parts = numbers[self._marks :].split(self._sizes)
        is_new = numbers[: self._marks].tolist() if self._averages else [1.0] * len(parts)
        with torch.no_grad():
            for buffer, part, new in zip(self._buffers(), parts, is_new, strict=True):
                if new:
                    buffer.copy_(part.view(buffer.shape))

    def scale(self, cell: Buffer, factor: float) -> None:
        """Multiply a cell, if it is part of a mean."""
        if self._averages:
            cell.numbers(self._dtype).mul_(factor)

    def views(self, cell: Buffer) -> Sequence[torch.Tensor]:
        """All numbers in a cell."""
        return [cell.numbers(self._dtype)]

    def digest(self, cell: Buffer) -> bytes:
        """Of all numbers in a cell."""
        return digest_of(self.views(cell), cell.loss)

    def can_lack(self, blocks: Collection[Node]) -> bool:
        """Buffers that are not averaged are those of data block 0."""
        return self._averages or any(node.lo == 0 for node in blocks)

    def _buffers(self) -> list[torch.Tensor]:
        named = dict(self._module.named_buffers())
        found = (named[name].detach() for name in self._names)
        return [torch.view_as_real(b) if b.is_complex() else b for b in found]


def _has_bits_of(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    mine, its = (each.contiguous().flatten().view(torch.uint8) for each in (tensor, other))
    return torch.equal(mine, its)


def digest_of(tensors: Sequence[torch.Tensor], loss: float) -> bytes:
    """The same for the same bits only."""
    made = hashlib.blake2b(struct.pack("d", loss), digest_size=16)
    for tensor in tensors:
        made.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return made.digest()


def buffer_columns(module: nn.Module, root: int) -> list[BufferColumn]:
    """The columns of the module's buffers, one a dtype; they get their index later."""
    kinds: dict[torch.dtype, list[str]] = {}
    for name, buffer in module.named_buffers():
        if buffer.numel():
            kinds.setdefault(buffer.dtype, []).append(name)
    return [BufferColumn(module, dtype, names, root) for dtype, names in kinds.items()]
