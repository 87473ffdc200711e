"""What hpctrain is compared with: torch DDP on gloo, Heat's DataParallel, one plain all-reduce.

Each peer gets its own copy of a model. Some average gradients while backward runs; the others come
with a function to call after it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

DDP = ("ddp_25mb", "ddp_4mb")
HEAT = ("heat", "heat_blocking")

Step = Callable[[], object]


def ddp(model: nn.Module, name: str) -> nn.Module:
    """torch's DistributedDataParallel with the buckets that one of `DDP` names."""
    return nn.parallel.DistributedDataParallel(
        model, bucket_cap_mb=float(name[4:-2]), gradient_as_bucket_view=True
    )


def without_heat() -> str:
    """Why Heat's arms are left out; empty if it can be imported. Starts MPI if nobody has."""
    try:
        importlib.import_module("heat")
    except Exception as error:  # it may be missing, or a part of it not fit this torch
        return in_a_line(error)
    return ""


def in_a_line(error: Exception) -> str:
    """Kind of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def heat(model: nn.Module, name: str, comm: Any) -> tuple[nn.Module, Step | None]:
    """Heat's DataParallel, which all-reduces each gradient as soon as backward has it.

    Unless it blocks, Heat waits in the next forward, before each layer; here it waits when backward
    has ended, as it does by itself after the last step. Otherwise parameters of a module that is
    not called, only read from, are one step late: a GPT's table of places, a ParameterList. Speed
    hardly changes, as nothing moves in between: over a link of 1 Gbit/s, six steps in a row took
    0.96 to 1.09 of the time.

    Args:
        model: wrapped in place.
        name: one of `HEAT`.
        comm: nobody else's communicator.
    """
    import heat

    start = {key: value.clone() for key, value in model.state_dict().items()}
    wrapped = heat.nn.DataParallel(
        model,
        heat.core.communication.MPICommunication(comm),
        heat.optim.DataParallelOptimizer(torch.optim.SGD(model.parameters())),
        blocking_parameter_updates=name == "heat_blocking",
    )
    model.load_state_dict(start)  # Heat draws parameters of its own

    def wait() -> None:
        wrapped.eval()
        wrapped.train()

    return wrapped, None if name == "heat_blocking" else wait


def plain_exchange(model: nn.Module, comm: Any) -> Step:
    """What a home-made script does: one blocking all-reduce of all gradients after backward."""
    from mpi4py import MPI

    parameters = list(model.parameters())
    counts = [p.numel() for p in parameters]
    flat = torch.empty(sum(counts))

    def exchange() -> None:
        torch.cat([p.grad.flatten() for p in parameters if p.grad is not None], out=flat)
        comm.Allreduce(MPI.IN_PLACE, flat.numpy())
        flat.div_(comm.Get_size())
        for parameter, part in zip(parameters, flat.split(counts), strict=True):
            parameter.grad = part.view_as(parameter)

    return exchange
