"""Parts of a trainer's state that may not fit the job which continues from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hpctrain.errors import JobError
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
    own = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, gathered in state["state"].items():
        needed = _gathered_by(table, parameters[index].dim()) if index < len(parameters) else set()
        missing = sorted(needed - set(gathered))
        if missing:
            raise _misfit(
                "optimizer", f"{name} with the job's options needs {missing[0]!r} as well"
            )
    try:
        optimizer.load_state_dict(dict(state))
    except ValueError as error:
        raise _misfit("optimizer", str(error)) from error
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)


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
