"""Random methods over real ranks, bit for bit as NumPy in one process."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from grad.periods.in_numpy import (
    Mean,
    mean_in_rank_order,
    trained_in_fragments,
    trained_late,
)
from grad.periods.models import (
    OPTIMIZERS,
    RATE,
    STEPS,
    Quadratic,
    assert_same,
    config_of,
    loss_of,
    net,
    parameters,
    train,
)
from quantize_in_numpy import QuantizedMean

from hpctrain import ExchangeConfig, World
from hpctrain.comm.collect import all_gather
from hpctrain.comm.engine import engine_of
from hpctrain.comm.quantize import GROUP, QUANTIZERS
from hpctrain.grad.periods.late import LateGradients
from hpctrain.grad.periods.method import Method, mistakes_of
from hpctrain.grad.periods.periods import Periods
from hpctrain.grad.periods.schedule import fragments_of

pytestmark = pytest.mark.mpi


class Alone:
    """A model and its optimizer in one process, which stand for those of one rank or of all."""

    def __init__(self, optimizer: str) -> None:
        self.model = net()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())

    def gradient(self, rank: int, iteration: int) -> list[torch.Tensor | None]:
        self.optimizer.zero_grad()
        loss_of(self.model, rank, iteration).backward()
        return [p.grad for p in self.model.parameters()]

    def take(self, gradient: list[torch.Tensor | None]) -> None:
        for p, g in zip(self.model.parameters(), gradient, strict=True):
            p.grad = g
        self.optimizer.step()


def mean(gradients: list[list[torch.Tensor | None]]) -> list[torch.Tensor | None]:
    """In the order of ranks; None where no rank has one."""
    found: list[torch.Tensor | None] = []
    for column in zip(*gradients, strict=True):
        there = [g for g in column if g is not None]
        zero = torch.zeros_like(there[0]) if there else None
        total = None
        for g in column if there else ():
            term = zero if g is None else g
            total = term if total is None else total + term
        found.append(None if total is None else total * (1 / len(column)))
    return found


def expected(method: Method, optimizer: str, ranks: int) -> tuple[list[Alone], Alone]:
    """All ranks after the last iteration, and what they agree on."""
    shared = Alone(optimizer)
    locals_ = [copy.deepcopy(shared) for _ in range(ranks)]
    told: dict[int, list[list[torch.Tensor | None]]] = {}
    for i in range(1, STEPS + 1):
        told[i] = [alone.gradient(rank, i) for rank, alone in enumerate(locals_)]
        told[i] = copy.deepcopy(told[i])
        due = i - method.pull_lag
        if due >= 1:
            shared.take(mean(told[due]))
            locals_ = [copy.deepcopy(shared) for _ in range(ranks)]
        if method.merge == "correct" and method.pull_lag:
            for rank, alone in enumerate(locals_):
                first = due + 1 if due >= 1 else i
                for ahead in range(first, i + 1):
                    alone.take(told[ahead][rank])
    return locals_, shared


@pytest.mark.parametrize("lags", [(0, 1), (0, 2), (1, 2), (2, 5)], ids=str)
@pytest.mark.parametrize("merge", ["late", "correct"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_that_come_late(
    world: World, optimizer: str, merge: str, lags: tuple[int, int]
) -> None:
    method = Method(push_lag=lags[0], pull_lag=lags[1], merge=merge)
    model, periods = train(method, optimizer, world)
    locals_, shared = expected(method, optimizer, world.size)
    assert_same(parameters(model), parameters(locals_[world.rank].model))
    with periods.shared():
        assert_same(parameters(model), parameters(shared.model))
    assert_same(parameters(model), parameters(locals_[world.rank].model))
    periods.finish()
    everyones = all_gather(engine_of(world).control, parameters(model))
    for other in everyones:
        assert_same(other, everyones[0])


@pytest.mark.parametrize("seed", range(30))
def test_any_method_with_changes(world: World, seed: int) -> None:
    """As NumPy, fragment by fragment."""
    draw = random.Random(seed)
    period = draw.randint(1, 6)
    merge = draw.choice(("correct", "replace", "mix", "eager"))
    pull_lag = {"eager": period, "replace": draw.choice((0, period))}.get(
        merge, draw.randint(0, period)
    )
    method = Method(
        sends="changes",
        period=period,
        push_lag=draw.randint(0, max(0, pull_lag - 1)),
        pull_lag=pull_lag,
        merge=merge,
        mix=draw.random() if merge == "mix" else 0.0,
        fragments=draw.choice((1, 2, 4)),
        outer=draw.choice(("sgd", "nesterov")),
        outer_rate=0.7,
        outer_momentum=0.9,
        wire=draw.choice(("same", *QUANTIZERS)),
        warmup=draw.choice((0, 0, 1, 7)),
    )
    assert not list(mistakes_of(method))
    numbers = np.random.default_rng(seed)
    count = draw.choice((1, 64, 70, 300))
    start = numbers.standard_normal(count).astype(np.float32)
    towards = numbers.standard_normal((STEPS + 1, world.size, count)).astype(np.float32)
    ends = sorted(draw.randint(0, count) for _ in range(3))
    sizes = [after - before for before, after in pairwise([0, *ends, count])]
    module = trained_towards(towards, start, sizes, method, world, torch.optim.SGD, lr=RATE)

    def step(x: np.ndarray, i: int, cut: slice) -> np.ndarray:
        return x - (x - towards[i][:, cut]) * np.float32(RATE)

    def together(x: np.ndarray, i: int, cut: slice) -> np.ndarray:
        return x - mean_in_rank_order(x - towards[i][:, cut]) * np.float32(RATE)

    cuts = fragments_of(sizes, method.fragments)
    starts = np.split(start, np.cumsum([sum(sizes[cut]) for cut in cuts])[:-1])
    expected = trained_in_fragments(
        *(method, starts, world.size, STEPS, step), mean_of(method, world.size), together
    )
    np.testing.assert_array_equal(torch.cat(parameters(module)).numpy(), expected[world.rank])


@pytest.mark.parametrize("seed", range(30))
def test_any_method_with_gradients(world: World, seed: int) -> None:
    """As NumPy, with plain SGD."""
    draw = random.Random(seed)
    merge = draw.choice(("late", "correct", "compensate"))
    pull_lag = draw.randint(1, 5)
    method = Method(
        push_lag=draw.randint(0, pull_lag - 1),
        pull_lag=pull_lag,
        merge=merge,
        compensation=0.04 if merge == "compensate" else 0.0,
        wire=draw.choice(("same", *QUANTIZERS)),
        warmup=draw.choice((0, 0, 1, 7)),
    )
    assert not list(mistakes_of(method))
    numbers = np.random.default_rng(seed)
    count, momentum = draw.choice((1, 64, 70, 300)), draw.choice((0.0, 0.5))
    start = numbers.standard_normal(count).astype(np.float32)
    towards = numbers.standard_normal((STEPS + 1, world.size, count)).astype(np.float32)
    module = trained_towards(
        *(towards, start, [count], method, world, torch.optim.SGD), lr=RATE, momentum=momentum
    )
    told = -(-count // GROUP) * GROUP  # whole groups; flags are not rounded
    wires = [mean_of(method, world.size)(told) for _ in range(LateGradients.slots(method))]

    def mean(rows: np.ndarray) -> np.ndarray:
        wires.append(wires.pop(0))  # iterations take turns on as many as are on the wire
        filled = np.zeros((world.size, told), np.float32)
        filled[:, :count] = rows
        return wires[-1](filled)[:count]

    every, _ = trained_late(
        *(method, start, world.size, STEPS, lambda x, i: x - towards[i], RATE, momentum, mean)
    )
    found = torch.cat(parameters(module)).numpy()
    np.testing.assert_array_equal(found, every[world.rank])


def trained_towards(
    towards: np.ndarray,
    start: np.ndarray,
    sizes: list[int],
    method: Method,
    world: World,
    optimizer: type[torch.optim.Optimizer],
    **values: float,
) -> Quadratic:
    """A model that each rank's data pull somewhere else in each iteration."""
    module = Quadratic(start, sizes)
    periods = Periods(
        module,
        optimizer(module.parameters(), **values),  # type: ignore[call-arg]
        config_of(method),
        exchange=ExchangeConfig(deterministic=True),
        world=world,
    )
    for i in range(1, STEPS + 1):
        own = torch.from_numpy(towards[i, world.rank])
        for p, to in zip(module.parameters(), own.split(sizes), strict=True):
            p.grad = p.detach() - to
        periods.step()
    return module


def mean_of(method: Method, ranks: int) -> Callable[[int], Mean]:
    """Makes the mean over ranks of so many elements."""
    if method.wire not in QUANTIZERS or ranks == 1:
        return lambda count: mean_in_rank_order
    return lambda count: QuantizedMean(count, ranks, QUANTIZERS[method.wire].bits)
