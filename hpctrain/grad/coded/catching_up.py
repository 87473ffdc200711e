"""The state that a rank which fell behind is given: all that a step changes."""

from __future__ import annotations

import io
from typing import Any, Protocol

import torch
from torch import nn


class Stateful(Protocol):
    """What else has a state that a rank which fell behind must be given."""

    def state_dict(self) -> Any:
        """Its state, of tensors, numbers, text, and lists and dicts of them."""

    def load_state_dict(self, state: Any) -> None:
        """Take over a state."""


def packed(
    module: nn.Module, optimizer: torch.optim.Optimizer, extra: Stateful | None, step: int
) -> bytes:
    """The state after so many steps."""
    file = io.BytesIO()
    torch.save(
        {
            "module": module.state_dict(),
            "buffers": _left_out(module),
            "optimizer": optimizer.state_dict(),
            "extra": extra.state_dict() if extra else None,
            "step": step,
        },
        file,
    )
    return file.getvalue()


def unpack(
    data: bytes, module: nn.Module, optimizer: torch.optim.Optimizer, extra: Stateful | None
) -> int:
    """Take over what `packed` gave. Returns the number of steps."""
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    module.load_state_dict(state["module"])
    with torch.no_grad():
        for name, buffer in _left_out(module).items():
            buffer.copy_(state["buffers"][name])
    optimizer.load_state_dict(state["optimizer"])
    if extra:
        extra.load_state_dict(state["extra"])
    return int(state["step"])


def _left_out(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that the module does not count to its state, by name."""
    saved = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name not in saved}
