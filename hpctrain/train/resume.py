"""Parts of a trainer's state that may not fit the job which continues from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hpctrain.errors import JobError, told
from hpctrain.grad.replicas import load_gathered
from hpctrain.train.optimizer import build_optimizer


def restore_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a model's state.

    Raises:
        JobError: on every rank, when it is of another model.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise _misfit("model", str(error)) from error


@contextmanager
def state_of_a_run() -> Iterator[None]:
    """Tell in one line that what is restored inside is no state, however that shows.

    Raises:
        JobError: on this rank at least.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise JobError(
            f"the checkpoint holds something else than the state of a run: {told(error)}",
            fix="choose another --run-dir, or restore this one from a copy",
        ) from error


def optimizer_name(table: Mapping[str, Any]) -> str:
    """Name of the optimizer that a job's table describes."""
    return str(table.get("name", "adamw"))


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    table: Mapping[str, Any],
    state: Mapping[str, Any],
    written_by: str | None,
) -> None:
    """Load what an optimizer has gathered. Its options stay those of the job, which may be new.

    Args:
        optimizer: receives the state.
        table: from which it was built.
        state: of the checkpoint.
        written_by: name of the optimizer that wrote it, where that is known.

    Raises:
        JobError: on every rank, when it is of another optimizer.
    """
    name = optimizer_name(table)
    if written_by not in (None, name):
        raise _misfit("optimizer", f"it was written by {written_by}, and the job says {name}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, gathered in state["state"].items():
        needed = _gathered_by(table, parameters[index].dim()) if index < len(parameters) else set()
        missing = sorted(needed - set(gathered))
        if missing:
            raise _misfit(
                "optimizer", f"{name} with the job's options needs {missing[0]!r} as well"
            )
    try:
        load_gathered(optimizer, state)
    except ValueError as error:
        raise _misfit("optimizer", str(error)) from error


class BuffersBefore:
    """A model's buffers as they were before a step, which has changed them but may not count.

    Whether a forward has written to a buffer cannot be seen: all are copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copies: dict[tuple[nn.Module, str], torch.Tensor] = {}
        self.step = -1
        """Steps that were done when they were copied."""

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Keep them as they are now, when so many steps are done."""
        self.step = step
        for place, buffer in self._buffers():
            copy = self._copies.get(place)
            if copy is not None and (copy.shape, copy.dtype) == (buffer.shape, buffer.dtype):
                copy.copy_(buffer)
            else:
                self._copies[place] = buffer.detach().clone()

    @torch.no_grad()
    def put_back(self, step: int) -> None:
        """Have them as they were after so many steps, if they were copied since."""
        if step != self.step:
            return
        for (owner, name), buffer in self._buffers():
            copy = self._copies[owner, name]
            if (copy.shape, copy.dtype) == (buffer.shape, buffer.dtype):
                buffer.copy_(copy)
            else:
                owner._buffers[name] = copy.clone()

    def _buffers(self) -> Iterator[tuple[tuple[nn.Module, str], torch.Tensor]]:
        for owner in self._model.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    yield (owner, name), buffer


def local_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the model's state, by name."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


@torch.no_grad()
def restore_local_buffers(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Set buffers to what `local_buffers` gave."""
    for name, buffer in local_buffers(model).items():
        if name in values:
            buffer.copy_(values[name])


def _gathered_by(table: Mapping[str, Any], dimensions: int) -> set[str]:
    """What an optimizer keeps of a parameter with this number of dimensions after a step."""
    parameter = nn.Parameter(torch.zeros([1] * dimensions))
    parameter.grad = torch.zeros_like(parameter)
    trial = build_optimizer([parameter], table)
    trial.step()
    return {key for key, value in trial.state[parameter].items() if value is not None}


def _misfit(part: str, why: str) -> JobError:
    return JobError(
        f"the checkpoint is of another {part}: {why}",
        fix=f"choose another --run-dir, or continue with the {part} that wrote it",
        everywhere=True,
    )
