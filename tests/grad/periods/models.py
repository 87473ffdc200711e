"""Small models, their data, and how these tests train them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from hpctrain import ExchangeConfig, World
from hpctrain.grad.periods.method import Method, PeriodsConfig
from hpctrain.grad.periods.periods import Periods

WIDTH = 5
STEPS = 20
RATE = 0.125
ORDERED = ExchangeConfig(deterministic=True, progress="hooks")

Optimizers = dict[str, Callable[[Any], torch.optim.Optimizer]]
OPTIMIZERS: Optimizers = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


class Net(nn.Module):
    """With a layer that is used in every third iteration alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 7)
        self.rare = nn.Linear(7, 7)
        self.last = nn.Linear(7, 1)

    def forward(self, x: torch.Tensor, iteration: int) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        if iteration % 3 == 2:
            x = self.rare(x)
        return self.last(x)


class Averaging(nn.Module):
    """What it is in training depends on a running mean, which each forward replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(WIDTH, 1)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor, iteration: int) -> torch.Tensor:
        del iteration
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        found: torch.Tensor = self.last(x - self.mean)
        return found


def net() -> Net:
    torch.manual_seed(7)
    return Net()


def loss_of(model: nn.Module, rank: int, iteration: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1000 * iteration + rank)
    x = torch.randn(4, WIDTH, generator=draw)
    loss: torch.Tensor = (model(x, iteration) - x.sum(1, keepdim=True)).square().mean()
    return loss


def config_of(method: Method) -> PeriodsConfig:
    return PeriodsConfig(**dataclasses.asdict(method))


def train(
    method: Method, optimizer: str, world: World, steps: int = STEPS, limit_mb: float = 0.0
) -> tuple[Net, Periods]:
    """This rank's model, and what has trained it."""
    model = net()
    config = dataclasses.replace(config_of(method), memory_limit_mb=limit_mb)
    periods = Periods(
        model,
        OPTIMIZERS[optimizer](model.parameters()),
        config,
        exchange=ExchangeConfig(deterministic=True, chunk_bytes=64),
        world=world,
    )
    go_on(periods, world.rank, steps)
    return model, periods


def go_on(periods: Periods, rank: int, steps: int) -> None:
    while periods.iteration < steps:
        periods.optimizer.zero_grad()
        loss_of(periods.module, rank, periods.iteration + 1).backward()
        periods.step()


def parameters(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"parameter {number}: {one} is not {other}"


class Quadratic(nn.Module):
    """Its gradient is what it is away from a point, exactly in any order."""

    def __init__(self, start: np.ndarray, cuts: list[int]) -> None:
        super().__init__()
        self.parts = nn.ParameterList(
            nn.Parameter(part.clone()) for part in torch.from_numpy(start).split(cuts)
        )
