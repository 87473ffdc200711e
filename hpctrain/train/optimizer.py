"""Optimizers of torch.optim by name, and the learning rate over time."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpctrain.config import check, key_text, nearest, option
from hpctrain.errors import shortened, shown

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
            f"{where}.name: unknown optimizer {shown(name)}{nearest(str(name), _OPTIMIZERS)}"
        )
        return
    arguments = _arguments(name)
    usable: dict[str, Any] = {"name": name}
    for key, value in table.items():
        place = f"{where}.{key_text(key)}"
        if key == "name":
            continue
        if key not in arguments:
            mistakes.append(f"{place}: unknown key for {name}{nearest(key, arguments)}")
        elif wrong := _wrong(key, value, arguments[key]):
            mistakes.append(f"{place}: {wrong}, got {shown(value)}")
        else:
            usable[key] = value
    while refusal := _refusal(usable):
        culprit = next(
            (k for k in usable if k != "name" and _refusal(_without(usable, k)) != refusal), None
        )
        if culprit is None:
            mistakes.append(f"{where}: {name} refuses its arguments: {refusal}")
            return
        mistakes.append(f"{where}.{key_text(culprit)}: {name} refuses it: {refusal}")
        usable = _without(usable, culprit)


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


def _arguments(name: str) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(_OPTIMIZERS[name]).parameters.items())[1:])


def _without(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name != key}


def _wrong(key: str, value: object, parameter: inspect.Parameter) -> str:
    """What is wrong with the type of an argument; torch takes `foreach = "no"` for true."""
    if key == "capturable" and value is True:
        return "needs a GPU; leave it out"
    kind = str(parameter.annotation)
    if "bool" in kind or isinstance(parameter.default, bool):
        return "" if isinstance(value, bool) else "expected true or false"
    if isinstance(parameter.default, tuple):
        count = len(parameter.default)
        fits = isinstance(value, list) and len(value) == count and all(map(_is_number, value))
        return "" if fits else f"expected a list of {count} numbers"
    if "float" in kind or _is_number(parameter.default):
        return "" if _is_number(value) else "expected a number"
    return ""


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1 << 1023 if isinstance(value, int) else math.isfinite(value)


def _refusal(table: Mapping[str, Any]) -> str:
    """What the optimizer has against a table, when it is made or in its first step; else empty."""
    parameter = nn.Parameter(torch.zeros(1, 1))
    parameter.grad = torch.zeros(1, 1)
    try:
        build_optimizer([parameter], table).step()
    except Exception as error:
        return shortened(str(error)) or type(error).__name__
    return ""
