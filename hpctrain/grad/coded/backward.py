"""What backward leaves behind: gradients go into cells as it finishes them, column by column."""

from __future__ import annotations

import json
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from hpctrain.comm.device import Device, Event
from hpctrain.errors import ExchangeError
from hpctrain.grad.blocks import partition
from hpctrain.grad.coded.cells import Buffer, Pool, balanced
from hpctrain.grad.coded.columns import BufferColumn, GradientColumn, buffer_columns
from hpctrain.grad.coded.worker import Worker


class _Copy(NamedTuple):
    """Of a cell from the device to the host."""

    ended: Event
    cell: Buffer | None
    """None for what follows the copy before it."""
    then: Callable[[], object]


class Backward:
    """Watches backward on one rank, and hands what it finishes to the rank's worker.

    In the first step the order in which backward finishes gradients is not known: it is observed,
    one rank's is agreed on, and `lay_out` cuts it into columns. Until then, and for gradients that
    a data block does not have, `finish` hands over what is left.

    Args:
        module: its parameters get a hook.
        device: where they are, if not on the host.
        pool: of buffers.
        worker: takes the cells.
        roots: ranks that add up.
        block_bytes: largest column, unless a parameter is larger.
    """

    def __init__(
        self,
        module: nn.Module,
        device: Device | None,
        pool: Pool,
        worker: Worker,
        roots: Sequence[int],
        block_bytes: int,
    ) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self._device = device
        self._pool = pool
        self._worker = worker
        self._roots = tuple(roots)
        self._block_bytes = block_bytes
        self.columns: list[GradientColumn] = []
        """Empty until they are laid out."""
        self.buffers = buffer_columns(module, roots[0])
        self._column_of: list[int] = []
        self._order: dict[int, None] = {}
        """Parameters in the order in which the last backward finished them."""
        self.arrivals = [0] * len(named)
        """How often the gradient of each parameter arrives in one backward."""
        self._due: list[int] = []
        """How often it will still arrive."""
        self._block = -1
        self._loss = 0.0
        self._packed: set[int] = set()
        """Columns of the data block that have been handed over."""
        self._streams = False
        """Whether backward of its last subset runs, so that what is complete goes out."""
        self._copies: deque[_Copy] = deque()
        """From the device, in the order in which they end. Moved by any thread, under a lock."""
        self._lock = threading.Lock()
        this = weakref.ref(self)
        for index, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(partial(_hook, this, index))

    # ------------------------------------------------------------------ a data block

    def begin(self, block: int) -> None:
        """A data block begins, with the buffers of the step."""
        self._block, self._loss, self._streams = block, 0.0, False
        self._packed.clear()
        self.restore_buffers()

    def begin_subset(self, loss: float, is_last: bool) -> None:
        """Backward of a subset begins."""
        self._loss += loss
        if is_last and self.columns:
            self._streams = True
            self._due = list(self.arrivals)
            for column in self.columns:
                column.missing = len(column.members)
        if not self.columns:  # the order and number of gradients are those of one backward
            self._order.clear()
            self.arrivals = [0] * len(self.parameters)

    def finish(self, share: float) -> None:
        """Hand over what hooks have not: all of it in the first step, or unused parameters.

        Args:
            share: of the step's samples that the data block has.
        """
        for column in self.columns:
            if column.index not in self._packed:
                self._put(column)
        for buffers in self.buffers:
            cell = self._pool.take_shared(buffers.nbytes)
            buffers.pack(cell, self._block, share)
            cell.loss = 0.0
            self._worker.put(buffers.index, cell, self._block)
        block = self._worker.finish()
        with self._lock:
            if self._copies:  # nobody gives the data block up before its cells are on the host
                ended = self._copies[-1].ended
                self._copies.append(_Copy(ended, None, lambda: self._worker.done(block)))
                return
        self._worker.done(block)

    def forget(self) -> None:
        """The data block is over: its gradients are not needed any more."""
        self._streams = False
        for parameter in self.parameters:
            parameter.grad = None

    def _arrived(self, index: int) -> None:
        """Backward has accumulated the gradient of a parameter, perhaps not for the last time."""
        if not self.columns:
            self._order.pop(index, None)
            self._order[index] = None
            self.arrivals[index] += 1
            return
        if not self._streams:
            return
        column = self.columns[self._column_of[index]]
        self._due[index] -= 1
        if self._due[index] == 0:
            column.missing -= 1
            if column.missing == 0:
                self._put(column)
        elif column.index in self._packed:
            raise ExchangeError(
                f"the gradient of parameter {self._names[index]} grew after it was sent: its "
                "gradient arrives more often than in the first step",
                fix="checkpoint with use_reentrant=False",
            )

    def _put(self, column: GradientColumn) -> None:
        self._packed.add(column.index)
        worker, block = self._worker, self._block
        left = worker.take_left(column.index, block) if column.adds else None
        if left is not None:
            column.pack_onto(left)
            left.loss += self._loss
            worker.put_sum(column.index, left, block)
            return
        cell = self._pool.take_shared(column.nbytes)
        copied = column.pack(cell)
        cell.loss = self._loss
        if copied is None:
            worker.put(column.index, cell, block)
            return
        with self._lock:
            then = partial(worker.put, column.index, cell, block)
            self._copies.append(_Copy(copied, cell, then))
        self.move_copies()

    # ------------------------------------------------------------------ the model's buffers

    def keep_buffers(self) -> None:
        """Remember the buffers of now, with which every data block of the step begins."""
        for buffers in self.buffers:
            buffers.keep()

    def restore_buffers(self) -> None:
        """Set buffers to those that were kept."""
        for buffers in self.buffers:
            buffers.restore()

    # ------------------------------------------------------------------ copies from a device

    def move_copies(self) -> None:
        """Put in cells whose copies from the device have ended, in order. Any thread."""
        if self._copies:
            with self._lock:
                while self._copies and self._copies[0].ended.query():
                    self._copies.popleft().then()

    @property
    def events(self) -> list[Event]:
        """The ends of copies that are under way."""
        with self._lock:
            return [copy.ended for copy in self._copies]

    def drop_copies(self) -> None:
        """What is still copied came too late for the round."""
        with self._lock:
            copies, self._copies = self._copies, deque()
        for copy in copies:
            if copy.cell:
                self._pool.drop(copy.cell)

    # ------------------------------------------------------------------ columns

    @property
    def all_columns(self) -> list[GradientColumn | BufferColumn]:
        """Of gradients and of buffers, by index."""
        return [*self.columns, *self.buffers]

    def proposal(self) -> bytes:
        """The order that the last backward showed, as it travels."""
        seen = list(self._order)
        unseen = [i for i in reversed(range(len(self.parameters))) if i not in self._order]
        # Of a data block without samples, nothing is known: 0 never sends before the end.
        arrivals = [max(1, n) if seen else 0 for n in self.arrivals]
        return json.dumps([seen + unseen, arrivals]).encode()

    def fits(self, layout: bytes) -> bool:
        """Whether it is an order of this module's parameters."""
        return sorted(json.loads(layout)[0]) == list(range(len(self.parameters)))

    def lay_out(self, layout: bytes) -> None:
        """Make the columns of the order agreed on. The same on all ranks."""
        order, self.arrivals = json.loads(layout)
        parameters = self.parameters
        groups = partition(
            order,
            [p.numel() * p.element_size() for p in parameters],
            [p.dtype for p in parameters],
            self._block_bytes,
            self._block_bytes,  # a short first one would begin nothing: sums wait for the last
        )
        sizes = [sum(parameters[i].numel() for i in group) for group in groups]
        root_of = balanced(sizes, len(self._roots))
        self._column_of = [0] * len(parameters)
        columns = []
        for number, group in enumerate(groups):
            names, members = [self._names[i] for i in group], [parameters[i] for i in group]
            root = self._roots[root_of[number]]
            columns.append(GradientColumn(number, group, names, members, root, self._device))
            for index in group:
                self._column_of[index] = number
        for offset, buffers in enumerate(self.buffers):
            buffers.index = len(columns) + offset
        self.columns = columns


def _hook(backward: weakref.ReferenceType[Backward], index: int, parameter: torch.Tensor) -> None:
    this = backward()
    if this is not None:
        this._arrived(index)
