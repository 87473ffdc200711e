"""Mistakes of a job's parts that show only when they are used, found before they do harm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from hpctrain.comm.channel import Channel
from hpctrain.comm.collect import all_gather
from hpctrain.data.agreement import describe_data, difference, is_steady
from hpctrain.errors import JobError
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


def loss_mistake(loss: Callable[..., Any], value: Any) -> str | None:
    """What is wrong with the value that the job's loss has returned, or None."""
    if value is None:
        returned = "None"
    elif not isinstance(value, torch.Tensor):
        returned = f"a value of type {type(value).__name__}"
    elif value.numel() != 1:
        returned = f"a tensor of shape {tuple(value.shape)}"
    elif not value.requires_grad:
        returned = "a number without a gradient, as from detach(), item() or no_grad()"
    else:
        return None
    code = getattr(loss, "__code__", None)
    place = f" in {code.co_filename}:{code.co_firstlineno}" if code else ""
    return (
        f"{getattr(loss, '__name__', 'loss')}(){place} returned {returned}; it must return one "
        "number (a 0-dim tensor) that depends on the model"
    )
