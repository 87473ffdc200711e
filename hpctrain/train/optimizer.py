"""Optimizers of torch.optim by name, and the learning rate over time."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpctrain.config import check, nearest, option

_UNFIT = ("LBFGS", "SparseAdam", "Muon")  # need a closure, sparse gradients, matrices alone
_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls)
    and issubclass(cls, torch.optim.Optimizer)
    and cls is not torch.optim.Optimizer
    and name not in _UNFIT
}


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over time, as a factor of the optimizer's `lr`."""

    name: str = option("constant", choices=("constant", "linear", "cosine"))
    """Shape after the warm-up: constant, or falling to `final` along a line or a half cosine."""
    warmup: int = option(0, minimum=0)
    """Steps over which the rate rises along a line from zero; may exceed those of a short trial."""
    final: float = option(0.0, minimum=0, maximum=1)
    """Factor that the rate falls to, reached when the last step is done."""

    def __post_init__(self) -> None:
        check(self)

    def factor(self, step: int, steps: int) -> float:
        """The factor in step `step` of `steps`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.name == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, steps - self.warmup)
        fall = done if self.name == "linear" else (1 - math.cos(math.pi * done)) / 2
        return 1.0 - (1.0 - self.final) * fall


def check_optimizer(table: Mapping[str, Any], where: str, mistakes: list[str]) -> None:
    """Add a line to `mistakes` for every mistake of an optimizer's table.

    Args:
        table: `name`, the lower-case name of a class of torch.optim, and its arguments.
        where: dotted name of the place.
        mistakes: receives `where: what is wrong`.
    """
    name = table.get("name", "adamw")
    if not isinstance(name, str) or name not in _OPTIMIZERS:
        mistakes.append(
            f"{where}.name: unknown optimizer {name!r}{nearest(str(name), _OPTIMIZERS)}"
        )
        return
    arguments = _arguments(name)
    unknown = [key for key in table if key != "name" and key not in arguments]
    for key in unknown:
        mistakes.append(f"{where}.{key}: unknown key for {name}{nearest(key, arguments)}")
    odd = [k for k, v in table.items() if isinstance(v, float) and not math.isfinite(v)]
    mistakes += [f"{where}.{key}: got {table[key]}; allowed: a finite number" for key in odd]
    if unknown or odd:
        return
    try:
        build_optimizer([nn.Parameter(torch.zeros(1, 1))], table)
    except Exception as error:
        mistakes.append(f"{where}: {name} refuses its arguments: {error}")


def build_optimizer(
    parameters: Iterable[nn.Parameter], table: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer that a checked table describes."""
    arguments: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in table.items()
        if key != "name"
    }
    return _OPTIMIZERS[table.get("name", "adamw")](parameters, **arguments)


def _arguments(name: str) -> list[str]:
    return list(inspect.signature(_OPTIMIZERS[name]).parameters)[1:]
