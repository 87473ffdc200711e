"""The same model on every rank: checked by name and shape, set equal, and its buffers kept so."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpctrain.comm import reduce
from hpctrain.comm.channel import LANES, Channel, Operation, Ticket
from hpctrain.comm.collect import all_gather, broadcast, broadcast_tensor
from hpctrain.comm.memory import Slab
from hpctrain.errors import MismatchError
from hpctrain.world import World

Signature = list[tuple[str, str]]
"""Name of each parameter or buffer, and what must agree about it."""

BUFFER_MODES = ("broadcast", "average", "local")


def signature(module: nn.Module) -> Signature:
    """What must be equal on all ranks, before a single value is compared."""
    # Gradients lie in a slab in the memory layout of their parameter.
    parameters = [
        (
            f"parameter {name}",
            f"{_shape(p)} on {p.device.type}, strides {p.stride()}, "
            f"requires_grad={p.requires_grad}",
        )
        for name, p in module.named_parameters()
    ]
    return parameters + [(f"buffer {name}", _shape(b)) for name, b in module.named_buffers()]


def difference(root: Signature, other: Signature) -> str | None:
    """The first way in which another rank's model is not the root's, or None."""
    mine, theirs = dict(root), dict(other)
    for name, facts in root:
        if name not in theirs:
            return f"has no {name}, which rank 0 has"
        if theirs[name] != facts:
            return f"{name} is {theirs[name]}, but on rank 0 {facts}"
    for name, _ in other:
        if name not in mine:
            return f"has {name}, which rank 0 has not"
    if [name for name, _ in root] != [name for name, _ in other]:
        return "holds its parameters in another order than rank 0"
    return None


def check_same_model(channel: Channel, world: World, module: nn.Module) -> None:
    """Make sure that all ranks hold the same model. Collective.

    Raises:
        MismatchError: on every rank, naming each rank that differs and its first difference.
    """
    own = signature(module)
    found = difference(broadcast(channel, own, label="model check"), own)
    _raise_together(channel, world, found, "the model is not the same on all ranks")


def check_same_values(channel: Channel, world: World, module: nn.Module) -> None:
    """Make sure that parameters have the same bits on all ranks. Collective.

    Raises:
        MismatchError: on every rank, naming each rank that differs and its first parameter.
    """
    named = list(module.named_parameters())
    own = [_checksum(parameter) for _, parameter in named]
    root = broadcast(channel, own, label="parameter check")
    differing = [name for (name, _), a, b in zip(named, own, root, strict=True) if a != b]
    found = f"parameter {differing[0]} has other values than on rank 0" if differing else None
    _raise_together(channel, world, found, "parameters have drifted apart")


def _raise_together(channel: Channel, world: World, found: str | None, what: str) -> None:
    lines = [
        f"{world.name_of(rank)} {text}"
        for rank, text in enumerate(all_gather(channel, found, label="model check"))
        if text
    ]
    if lines:
        raise MismatchError(
            what,
            where="; ".join(lines[:4]) + (f" and {len(lines) - 4} more" if lines[4:] else ""),
            fix="build the model in the same way on every rank, without branches on the rank",
            everywhere=True,
        )


def broadcast_state(channel: Channel, module: nn.Module) -> None:
    """Overwrite all parameters and buffers by the root's. Collective."""
    tickets = []
    copies = []
    for tensor in (*module.parameters(), *module.buffers()):
        data = tensor.detach()
        flat = data.cpu().contiguous()  # itself, where it is both
        if flat is not data:
            copies.append((data, flat))
        nbytes = flat.numel() * flat.element_size()
        tickets.append(channel.post(broadcast_tensor(flat), "initial parameters", nbytes))
    for ticket in tickets:
        channel.engine.wait(ticket)
    for data, flat in copies:
        data.copy_(flat)


def broadcast_gathered(channel: Channel, optimizer: torch.optim.Optimizer) -> None:
    """Overwrite what an optimizer has gathered by the root's, and leave its options. Collective."""
    own = optimizer.state_dict()
    if not any(all_gather(channel, bool(own["state"]), label="optimizer's state")):
        return
    gathered = broadcast(channel, own["state"], label="optimizer's state")
    if channel.rank:
        load_gathered(optimizer, {"state": gathered, "param_groups": own["param_groups"]})


def load_gathered(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what an optimizer of the same kind has gathered, and leave its options as they are."""
    own = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(dict(state))
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)


class BufferSync:
    """Makes the module's buffers (batch-norm statistics, say) equal on all ranks after a step.

    Buffers are looked up anew each time, since a forward may replace them, and written only where
    they change: a mask that autograd has saved for another backward stays as it is.

    Args:
        module: whose buffers.
        channel: on which they travel.
        mode: ``broadcast`` takes the root's; ``average`` the mean over ranks of floating-point
            buffers and the root's of all others; ``local`` leaves each rank its own.
    """

    def __init__(self, module: nn.Module, channel: Channel, mode: str) -> None:
        self._channel = channel
        self._groups: list[_Group] = []
        self._tickets: list[Ticket] = []
        if mode == "local" or channel.size == 1:
            return
        kinds: dict[torch.dtype, list[_Named]] = {}
        seen: set[int] = set()
        for path, owner in module.named_modules():
            for key, buffer in owner._buffers.items():
                if buffer is not None and buffer.numel() and id(buffer) not in seen:
                    seen.add(id(buffer))
                    name = f"{path}.{key}" if path else key
                    named = _Named(name, owner, key, buffer.shape, buffer.dtype)
                    kinds.setdefault(buffer.dtype, []).append(named)
        for dtype, buffers in kinds.items():
            flat = torch.empty(sum(buffer.shape.numel() for buffer in buffers), dtype=dtype)
            averages = mode == "average" and dtype.is_floating_point
            # Lanes from the end, so that they are not those of blocks.
            lane = LANES - 1 - len(self._groups)
            operation = (
                reduce.all_reduce("direct", Slab(flat), 1.0, lane=lane)
                if averages
                else broadcast_tensor(flat)
            )
            self._groups.append(_Group(buffers, flat, averages, operation))

    def post(self, weight: float) -> None:
        """Start; every rank must. `weight` is this rank's share of the step's samples."""
        for group in self._groups:
            parts = [named.buffer().flatten().to(group.flat.device) for named in group.buffers]
            torch.cat(parts, out=group.flat)
            if group.averages:
                group.flat.mul_(weight)
            nbytes = group.flat.numel() * group.flat.element_size()
            self._tickets.append(self._channel.post(group.operation, "buffers", nbytes))

    @property
    def has_come(self) -> bool:
        """Whether all that `post` started has ended well."""
        return all(ticket.done and ticket.error is None for ticket in self._tickets)

    def finish(self) -> None:
        """Wait for what `post` started and store it."""
        for group in self._groups:
            self._channel.engine.wait(self._tickets.pop(0))
            parts = group.flat.split([named.shape.numel() for named in group.buffers])
            with torch.no_grad():
                for named, part in zip(group.buffers, parts, strict=True):
                    buffer = named.buffer()
                    value = part.view(named.shape).to(buffer.device)
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


@dataclass(frozen=True)
class _Named:
    """A buffer by its name: whichever tensor that is at the time."""

    name: str
    owner: nn.Module
    key: str
    shape: torch.Size
    dtype: torch.dtype

    def buffer(self) -> torch.Tensor:
        """The tensor of now.

        Raises:
            MismatchError: its shape or dtype is no longer that of the start.
        """
        buffer = self.owner._buffers.get(self.key)
        if buffer is None or buffer.shape != self.shape or buffer.dtype != self.dtype:
            raise MismatchError(
                f"buffer {self.name} changed its shape or dtype after DataParallel was made",
                value="nothing" if buffer is None else _shape(buffer),
                allowed=f"{tuple(self.shape)} {str(self.dtype).removeprefix('torch.')}",
                fix="keep it out of the module's buffers, or wrap with buffers = 'local'",
            )
        return buffer.detach()


@dataclass(frozen=True)
class _Group:
    """Buffers of one dtype, and the flat copy in which they travel."""

    buffers: Sequence[_Named]
    flat: torch.Tensor
    averages: bool
    operation: Operation


def _shape(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.detach().flatten().contiguous().view(torch.uint8).cpu().numpy().data)
