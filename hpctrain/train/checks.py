"""Mistakes of a job's parts that show only when they are used, found before they do harm."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hpctrain.comm.channel import Channel
from hpctrain.comm.collect import all_gather
from hpctrain.data.agreement import describe_data, difference, is_steady
from hpctrain.errors import JobError, shown
from hpctrain.world import World


def check_same_data(channel: Channel, world: World, data: Any, what: str) -> None:
    """Make sure that all ranks hold the same data, as far as a few samples tell. Collective.

    Raises:
        JobError: on every rank, naming those that differ from rank 0.
    """
    lines: list[str] = []
    # A difference must show again: samples that are random now and then look steady at first.
    for repeats in (2, 10):
        everyone = all_gather(channel, describe_data(data, repeats), label="data check")
        if not all(map(is_steady, everyone)):
            everyone = [replace(facts, samples=()) for facts in everyone]
        found = [difference(everyone[0], facts) for facts in everyone]
        lines = [f"{world.name_of(rank)} {text}" for rank, text in enumerate(found) if text]
        if not lines:
            return
    raise JobError(
        f"the {what} data is not the same on all ranks",
        where="; ".join(lines[:4]) + (f" and {len(lines) - 4} more" if lines[4:] else ""),
        fix="give every rank all of the data, in the same order: hpctrain cuts it into shares; "
        "draw random data from a generator with a fixed seed",
        everywhere=True,
    )


def model_mistake(model: Any) -> str | None:
    """What the job's `model` has returned, if that cannot be trained, or None."""
    if isinstance(model, type) and issubclass(model, nn.Module):
        return f"the class {model.__name__}, and not an instance of it"
    if not isinstance(model, nn.Module):
        return f"no torch module: got {type(model).__name__!r}"
    parameters = list(model.parameters())
    if not parameters:
        return "a model without parameters"
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in parameters):
        return (
            "a model with parameters of unknown shape, as lazy modules have before their first use"
        )
    if any(p.is_meta for p in parameters):
        return "a model on the device 'meta', whose parameters have no values"
    if not any(p.requires_grad for p in parameters):
        return "a model whose parameters are all frozen (requires_grad = False)"
    return None


def loss_mistake(loss: Callable[..., Any], value: Any) -> str | None:
    """What is wrong with the value that the job's loss has returned, or None."""
    if value is None:
        returned = "None"
    elif not isinstance(value, torch.Tensor):
        returned = f"a value of type {type(value).__name__}"
    elif value.is_complex() or value.numel() != 1:
        returned = f"a tensor of shape {tuple(value.shape)}"
        if value.is_complex():
            returned = "a complex number"
    elif value.is_meta:
        returned = "a number without a value, on the device 'meta'"
    elif not value.requires_grad:
        returned = "a number without a gradient, as from detach(), item() or no_grad()"
    else:
        return None
    return (
        f"{_named(loss, 'loss')} returned {returned}; it must return one number (a 0-dim tensor) "
        "that depends on the model"
    )


def checked_metrics(metrics: Callable[..., Any], values: Any) -> dict[str, float]:
    """The numbers that the job's metrics have returned, by name.

    Raises:
        JobError: they are none.
    """
    if isinstance(values, Mapping):
        with suppress(TypeError, ValueError, RuntimeError):  # what is no number, or several
            return {str(name): float(value) for name, value in values.items()}
    raise JobError(
        f"{_named(metrics, 'metrics')} returned {shown(values)} in place of numbers by name",
        allowed="a dict of names and numbers, which may be 0-dim tensors",
    )


@contextmanager
def refused_exits() -> Iterator[None]:
    """No part of a job ends the program, least of all with a status that says that it is done.

    Raises:
        JobError: something has called sys.exit; names the place.
    """
    try:
        yield
    except SystemExit as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise JobError(
            "the job has called sys.exit() while it was trained",
            value=error.code,
            where=f"{frame.filename}:{frame.lineno} in {frame.name}",
            fix="raise an exception instead, which ends all ranks, or set train.steps",
        ) from None


def _named(function: Callable[..., Any], name: str) -> str:
    """`loss() in jobs/x.py:12`, as far as the function tells."""
    code = getattr(function, "__code__", None)
    place = f" in {code.co_filename}:{code.co_firstlineno}" if code else ""
    return f"{getattr(function, '__name__', name)}(){place}"
