"""Who was the first whose numbers were not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import nn

from hpctrain.comm.channel import Channel
from hpctrain.comm.collect import all_gather
from hpctrain.world import World


def first_not_finite(
    control: Channel, world: World, loss: float, bad_gradient: Callable[[], str] | None
) -> str:
    """Whose loss was not finite, or else whose gradient, if any. Collective.

    Args:
        control: over all ranks.
        world: names them.
        loss: this rank's.
        bad_gradient: finds this rank's parameter whose gradient is not; None where nobody can.
    """
    losses = all_gather(control, loss, label="search for a loss not finite")
    bad = [world.name_of(rank) for rank, value in enumerate(losses) if not math.isfinite(value)]
    if bad:
        return f"the loss of {', '.join(bad)}"
    if bad_gradient:
        found = all_gather(control, bad_gradient(), label="search for a gradient not finite")
        bad = [f"that of {name} on {world.name_of(r)}" for r, name in enumerate(found) if name]
    return "no loss, but a gradient in backward" + (f": {', '.join(bad)}" if bad else "")


def bad_parameter(model: nn.Module, losses: Iterable[torch.Tensor]) -> str:
    """The parameter whose gradient is not finite after a backward of these, if there is one.

    All gradients are lost by then, and the state of generators and buffers: the run is to end.

    Args:
        model: whose gradients nobody else may be told of meanwhile.
        losses: made one after another; one that cannot be made again ends the search.
    """
    with suppress(Exception):  # as with data that is read but once
        model.zero_grad(set_to_none=True)
        for loss in losses:
            loss.backward()
        named = model.named_parameters()
        bad = (n for n, p in named if p.grad is not None and not p.grad.isfinite().all())
        return next(bad, "")
    return ""
