"""Ordered model blocks: groups of parameters that share one flat slab of gradients.

A block goes on the wire whole or in parts. Its slab holds the gradients of its parameters, each
on cache lines of its own, and behind them one *flag* a parameter: 1 where this rank has a gradient.
Summed with the rest, the flags tell every rank, without a message of their own, which parameters
no rank used, so that their `grad` stays None and the optimizer leaves them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from math import prod
from typing import Any, NoReturn

import torch
from torch import nn

from hpctrain.comm.channel import Ticket
from hpctrain.comm.memory import ALIGN_BYTES, Slab
from hpctrain.errors import ExchangeError


class OnTheWire(torch.Tensor):
    """Stands for a gradient that is not there yet, so that nobody mistakes a part for the sum."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Refuse everything."""
        raise ExchangeError(
            "a gradient is still on the wire, since next_forward lets the next forward begin first",
            fix="call model.wait_for_gradients() before you look at gradients or change them, "
            "as clipping does",
            everywhere=True,
        )


class Block:
    """Parameters whose gradients travel together.

    Attributes:
        index: position in the order in which backward finishes blocks.
        members: indices of the parameters, in the order in which backward finishes them.
        names: what messages call the parameters.
        parameters: the parameters themselves.
        slab: gradients and flags, as real elements; `slab_size` says how many.
        views: the part of the slab that is each parameter's gradient.
        gradients: the slab without its flags.
        delivered: whether hooks have brought every gradient into the slab in this step.
        released: whether parts of it are on the wire in this step, so that it takes nothing more.
        missing: parameters whose gradient backward has not yet finished in this step.
        ready_s: when backward had finished the last of them, since its beginning.
        tickets: the operations that reduce the slab, while they are under way.
    """

    def __init__(
        self,
        index: int,
        members: Sequence[int],
        names: Sequence[str],
        parameters: Sequence[nn.Parameter],
        slab: Slab,
    ) -> None:
        self.index = index
        self.members = tuple(members)
        self.names = tuple(names)
        self.parameters = tuple(parameters)
        self.slab = slab
        dtype = parameters[0].dtype
        offsets, payload = layout([p.numel() for p in parameters], dtype.itemsize)
        elements = slab.tensor
        if dtype.is_complex:
            elements = torch.view_as_complex(elements.view(-1, 2))
        self.views = tuple(
            view_like(elements[start : start + parameter.numel()], parameter)
            for start, parameter in zip(offsets, parameters, strict=True)
        )
        self.gradients = elements[:payload]
        flags = elements[payload:]
        flags.fill_(1)
        real = torch.view_as_real(flags)[:, 0] if dtype.is_complex else flags
        self._flags: Any = real
        self._set_flags: Callable[[], object] = partial(real.fill_, 1)
        if slab.crossing is None:
            # As integers of the same width, in NumPy: an operation on so few elements costs less
            # than torch's, and needs no dtype of its own for bfloat16.
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
            self._flags = real.view(bits[real.element_size()]).numpy()
            self._set_flags = partial(self._flags.fill, self._flags[0].copy())
        self._is_whole = False
        self.missing = len(parameters)
        self.ready_s = 0.0
        self._hidden: tuple[torch.Tensor, ...] = ()
        self.tickets: list[Ticket] = []
        self.delivered = False
        self.released = False

    @property
    def label(self) -> str:
        """What messages and traces call the block."""
        return f"block {self.index}"

    def deliver(self) -> None:
        """Backward has finished every gradient: bring those into the slab that are not there yet.

        Raises:
            ExchangeError: a gradient is gone, sparse, or to be differentiated again.
        """
        self._collect(may_lack=False)
        self.delivered = True

    def fill(self) -> None:
        """Bring the gradients that this rank has into the slab, zeros for the others.

        Raises:
            ExchangeError: a gradient is sparse, or to be differentiated again.
        """
        self._collect(may_lack=True)

    def _collect(self, may_lack: bool) -> None:
        """Many small gradients are moved by one call: a call a gradient would cost more."""
        self._set_flags()
        positions, sources, targets = [], [], []
        for position, (parameter, view) in enumerate(zip(self.parameters, self.views, strict=True)):
            gradient = parameter.grad
            if gradient is view:
                continue
            if gradient is None and may_lack:
                view.zero_()
                self._flags[position] = 0
                continue
            positions.append(position)
            sources.append(usable(gradient, self.names[position]))
            targets.append(view)
        if sources:
            torch._foreach_copy_(targets, sources)
            for position, view in zip(positions, targets, strict=True):
                self.parameters[position].grad = view

    def settle(self) -> None:
        """After the sum: give every parameter that some rank used its gradient, others None.

        Raises:
            ExchangeError: a gradient is not the one that was exchanged.
        """
        if self.delivered:  # used by this rank, and every gradient is its view
            self._check_kept()
            return
        for parameter, view, is_used in zip(self.parameters, self.views, self._used(), strict=True):
            if not is_used:
                parameter.grad = None
            elif parameter.grad is not view:
                parameter.grad = view

    def hide(self) -> None:
        """Instead of `settle`, before the sum is there: refuse every look at a gradient.

        Raises:
            ExchangeError: a gradient is not the one that is being exchanged.
        """
        self._is_whole = self.delivered
        if self.delivered:
            self._check_kept()
        if not self._hidden:
            self._hidden = tuple(
                view.new_zeros(()).expand(view.shape).as_subclass(OnTheWire) for view in self.views
            )
        for parameter, hidden in zip(self.parameters, self._hidden, strict=True):
            parameter.grad = hidden

    def withhold(self) -> list[int]:
        """Take hidden gradients away from an optimizer's step; the places of their parameters.

        Others were taken away by the program, so that they count for nothing.
        """
        places = []
        for place, parameter in enumerate(self.parameters):
            if parameter.grad is self._hidden[place]:
                parameter.grad = None
                places.append(place)
        return places

    def reveal(self, places: Sequence[int] | None = None) -> None:
        """After the sum: show gradients that are hidden, or those of the parameters at `places`."""
        # On a device, to read flags is to wait for it.
        used = [True] * len(self.parameters) if self._is_whole else self._used()
        for place in range(len(self.parameters)) if places is None else places:
            parameter = self.parameters[place]
            if places is not None or parameter.grad is self._hidden[place]:
                parameter.grad = self.views[place] if used[place] else None

    def _used(self) -> list[bool]:
        """Of each parameter, whether some rank has a gradient, once the sum is there."""
        used: list[bool] = (self._flags != 0).tolist()
        return used

    def _check_kept(self) -> None:
        for name, parameter, view in zip(self.names, self.parameters, self.views, strict=True):
            if parameter.grad is not view:
                raise ExchangeError(
                    f"the gradient of parameter {name} was replaced by another hook after it "
                    f"had been handed over with {self.label}",
                    fix="change gradients in place, after backward or in a hook on the tensor",
                )


def gradient_norm(blocks: Sequence[Block]) -> torch.Tensor:
    """Euclidean norm of all gradients of `blocks` together, float64."""
    return norm_of([block.gradients for block in blocks])


def norm_of(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm of gradients together, float64."""
    norms = [_norm(gradient) for gradient in gradients]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _norm(gradients: torch.Tensor) -> torch.Tensor:
    """As float64, but summed wide only where squares overflow, which takes thrice as long."""
    widest = torch.complex128 if gradients.is_complex() else torch.float64
    wide = torch.float32 if gradients.element_size() == 2 else None
    if gradients.device.type != "cpu":  # to look at a first result would be to wait for it
        wide = widest
    norm: torch.Tensor = torch.linalg.vector_norm(gradients, dtype=wide).double()
    if wide is not widest and not norm.isfinite():
        norm = torch.linalg.vector_norm(gradients, dtype=widest).double()
    return norm


def slab_size(parameters: Sequence[nn.Parameter]) -> tuple[int, torch.dtype]:
    """Number and dtype of the real elements of a block's slab."""
    dtype = parameters[0].dtype
    _, payload = layout([p.numel() for p in parameters], dtype.itemsize)
    count = payload + len(parameters)
    return (2 * count, dtype.to_real()) if dtype.is_complex else (count, dtype)


def usable(gradient: torch.Tensor | None, name: str) -> torch.Tensor:
    """The gradient of a parameter, if it is one that can be averaged.

    Raises:
        ExchangeError: it is not, with what to do instead.
    """
    if gradient is None or gradient.is_sparse:
        raise ExchangeError(
            f"the gradient of parameter {name} is sparse or was taken away by another hook",
            fix="use nn.Embedding(..., sparse=False), and do not clear gradients from hooks",
        )
    if gradient.requires_grad:
        raise ExchangeError(
            f"the gradient of parameter {name} is to be differentiated again (create_graph=True), "
            "which averaged gradients cannot be",
            fix="compute such a gradient with torch.autograd.grad on the module itself (.module), "
            "and call backward without create_graph",
        )
    return gradient


def move(parameter: nn.Parameter, view: torch.Tensor, name: str) -> None:
    """Make `view` the parameter's gradient, with the values that it has now.

    Raises:
        ExchangeError: the gradient cannot be averaged.
    """
    view.copy_(usable(parameter.grad, name))
    parameter.grad = view


def layout(counts: Sequence[int], itemsize: int) -> tuple[list[int], int]:
    """Offsets of parts of a slab, in elements, and the length of all parts together.

    Each part begins on a cache line.
    """
    step = max(1, ALIGN_BYTES // itemsize)
    offsets, end = [], 0
    for count in counts:
        offsets.append(end)
        end += -(-count // step) * step
    return offsets, end


def partition(
    order: Sequence[int],
    nbytes: Sequence[int],
    kinds: Sequence[Hashable],
    block_bytes: int,
    first_bytes: int,
) -> list[list[int]]:
    """Group parameters into blocks.

    A block holds parameters of one kind (dtype) and at most `block_bytes`, or one parameter that
    is larger. The first block of each kind is closed at `first_bytes` already, so that the wire
    starts early. Blocks are ordered by the parameter that completes them.

    Args:
        order: parameter indices in the order in which backward finishes them.
        nbytes: size of each parameter.
        kinds: what keeps parameters apart.
        block_bytes: limit of a block.
        first_bytes: limit of the first block of a kind.

    Returns:
        Parameter indices of each block.
    """
    closed: list[tuple[int, list[int]]] = []
    open_blocks: dict[Hashable, list[int]] = {}
    filled: dict[Hashable, int] = {}
    limits: dict[Hashable, int] = {}
    last: dict[Hashable, int] = {}

    def close(kind: Hashable) -> None:
        closed.append((last[kind], open_blocks.pop(kind)))
        limits[kind] = block_bytes

    for place, index in enumerate(order):
        kind = kinds[index]
        limit = limits.get(kind, min(first_bytes, block_bytes))
        if kind in open_blocks and filled[kind] + nbytes[index] > limit:
            close(kind)
        if kind not in open_blocks:
            open_blocks[kind], filled[kind] = [], 0
        open_blocks[kind].append(index)
        filled[kind] += nbytes[index]
        last[kind] = place
    for kind in list(open_blocks):
        close(kind)
    return [members for _, members in sorted(closed)]


def view_like(elements: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """The elements in the parameter's shape, and in its memory layout if that has no gaps."""
    if is_dense(parameter.shape, parameter.stride()):
        return elements.as_strided(parameter.shape, parameter.stride(), elements.storage_offset())
    return elements.view(parameter.shape)


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor of this layout touches each of its elements once and leaves no gaps."""
    if prod(shape) == 0:
        return False
    expected = 1
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length == 1:
            continue
        if stride != expected:
            return False
        expected *= length
    return True
