"""Training with what comes late over real ranks, bit for bit as in one process."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from grad.periods.in_numpy import (
    Mean,
    mean_in_rank_order,
    trained_in_fragments,
    trained_late,
)
from quantize_in_numpy import QuantizedMean
from torch import nn

from hpctrain import DataParallel, ExchangeConfig, World
from hpctrain.comm.collect import all_gather, barrier_on
from hpctrain.comm.engine import engine_of
from hpctrain.comm.quantize import GROUP, QUANTIZERS
from hpctrain.errors import ExchangeError, JobError
from hpctrain.grad.periods.late import LateGradients
from hpctrain.grad.periods.method import PRESETS, Method, PeriodsConfig, mistakes_of
from hpctrain.grad.periods.periods import Periods
from hpctrain.grad.periods.schedule import fragments_of

pytestmark = pytest.mark.mpi

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


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_a_lag_bits_are_those_of_every_step(world: World, optimizer: str) -> None:
    model, _ = train(Method(), optimizer, world)
    plain = net()
    wrapped = DataParallel(plain, ORDERED, world=world)
    updates = OPTIMIZERS[optimizer](wrapped.parameters())
    for iteration in range(1, STEPS + 1):
        updates.zero_grad()
        loss_of(wrapped, world.rank, iteration).backward()
        updates.step()
    assert_same(parameters(model), parameters(plain))


@pytest.mark.parametrize("buffers", ["broadcast", "average"])
@pytest.mark.parametrize("preset", ["every_step", "diloco"])
def test_buffers_are_those_of_every_step_while_nothing_is_late(
    world: World, preset: str, buffers: str
) -> None:
    config = PeriodsConfig(preset=preset, warmup=0 if preset == "every_step" else STEPS)
    exchange = dataclasses.replace(ORDERED, buffers=buffers)
    torch.manual_seed(7)
    plain, model = (Averaging() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    periods = Periods(model, optimizer, config, exchange=exchange, world=world)
    go_on(periods, world.rank, STEPS)
    wrapped = DataParallel(plain, exchange, world=world)
    updates = torch.optim.SGD(plain.parameters(), lr=0.05)
    for iteration in range(1, STEPS + 1):
        updates.zero_grad()
        loss_of(wrapped, world.rank, iteration).backward()
        updates.step()
    assert_same([*model.state_dict().values()], [*plain.state_dict().values()])


@pytest.mark.parametrize("preset", ["od_sgd", "diloco", "eager_diloco"])
def test_a_look_at_what_all_agree_on_changes_nothing(world: World, preset: str) -> None:
    found = []
    for looks in (False, True):
        torch.manual_seed(7)
        model = Averaging()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        config = PeriodsConfig(preset=preset)
        periods = Periods(model, optimizer, config, exchange=ORDERED, world=world)
        for step in (5, 9, STEPS):
            go_on(periods, world.rank, step)
            if looks:
                with periods.shared():
                    means = all_gather(engine_of(world).control, model.mean.clone())
                    assert_same(means, [means[0]] * world.size)
        found.append([*model.state_dict().values()])
    assert_same(*found)


@pytest.mark.parametrize("in_flight_bytes", [1 << 12, 1 << 16])
@pytest.mark.parametrize("way", ["direct", "ring"])
def test_more_elements_than_may_be_in_flight(world: World, way: str, in_flight_bytes: int) -> None:
    count = 50_021
    module = Quadratic(np.zeros(count, np.float32), [count])
    periods = Periods(
        module,
        torch.optim.SGD(module.parameters(), lr=1.0),
        exchange=ExchangeConfig(way=way, chunk_bytes=1 << 12, in_flight_bytes=in_flight_bytes),
        world=world,
    )
    expected, base = torch.zeros(count), torch.arange(count) % 64.0
    for step in range(1, 5):
        module.parts[0].grad = -base * (world.rank + 1) * step * world.size
        periods.step()
        expected += base * step * sum(range(1, world.size + 1))
    torch.testing.assert_close(module.parts[0].detach(), expected)


@pytest.mark.parametrize("preset", ["every_step", "od_sgd", "diloco"])
def test_parameters_that_lie_otherwise_in_memory(world: World, preset: str) -> None:
    """Fused optimizers take a gradient as it lies, whatever its strides say."""
    found = []
    for fused in (False, True):
        torch.manual_seed(7)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        config = PeriodsConfig(preset=preset, warmup=3)
        periods = Periods(model, optimizer, config, exchange=ORDERED, world=world)
        for step in range(6):
            optimizer.zero_grad()
            draw = torch.Generator().manual_seed(10 * step + world.rank)
            model(torch.randn(2, 3, 8, 8, generator=draw)).square().mean().backward()
            periods.step()
        found.append(parameters(model))
    torch.testing.assert_close(*found)


def test_complex_parameter_behind_an_odd_number_of_elements(world: World) -> None:
    module = nn.ParameterList(
        [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, dtype=torch.complex64))]
    )
    periods = Periods(module, torch.optim.SGD(module.parameters(), lr=1.0), world=world)
    for p in module:
        p.grad = torch.full_like(p, -1.0 if not p.is_complex() else -1j)
    periods.step()
    assert_same(parameters(module), [torch.ones(3), torch.full((2,), 1j)])


@pytest.mark.parametrize("wire", QUANTIZERS)
def test_parameters_that_nobody_has_used_stay_in_few_bits(world: World, wire: str) -> None:
    """What rounding has lost of other iterations must not say that they were."""
    module = Quadratic(np.ones(60, np.float32), [1] * 60)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, weight_decay=0.5)
    config = PeriodsConfig(preset="every_step", wire=wire)
    periods = Periods(module, optimizer, config, exchange=ORDERED, world=world)
    draw = random.Random(3)
    values = [1.0] * 60
    for _ in range(30):
        used = [{n for n in range(60) if draw.random() < 0.1} for _ in range(world.size)]
        for n, p in enumerate(module.parameters()):
            p.grad = torch.zeros_like(p) if n in used[world.rank] else None
        periods.step()
        values = [v * 0.75 if n in set.union(*used) else v for n, v in enumerate(values)]
        assert [p.item() for p in module.parameters()] == pytest.approx(values)


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


# ---------------------------------------------------------------------- changes


class Quadratic(nn.Module):
    """Its gradient is what it is away from a point, exactly in any order."""

    def __init__(self, start: np.ndarray, cuts: list[int]) -> None:
        super().__init__()
        self.parts = nn.ParameterList(
            nn.Parameter(part.clone()) for part in torch.from_numpy(start).split(cuts)
        )


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


@pytest.mark.parametrize("steps", [3, 8, 13])
@pytest.mark.parametrize("name", [n for n, method in PRESETS.items() if method.merge != "mix"])
def test_no_step_is_lost_or_counts_twice(world: World, name: str, steps: int) -> None:
    """Also at the end, and when training goes on after it."""
    changed = {"period": 4} if PRESETS[name].sends == "changes" else {}
    config = PeriodsConfig(
        preset=name,
        outer="sgd",
        outer_rate=1.0,
        outer_momentum=0.0,
        outer_clip=0.0,
        compensation=0.0,
        **changed,
    )
    module = Quadratic(np.zeros(3, np.float32), [1, 2])
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    periods = Periods(module, optimizer, config, exchange=ORDERED, world=world)
    for turn in (1, 2):
        for _ in range(steps):
            for p in module.parameters():
                p.grad = -torch.ones_like(p)
            periods.step()
        periods.finish()
        np.testing.assert_allclose(torch.cat(parameters(module)), turn * steps, rtol=1e-6)


def test_a_check_may_change_gradients(world: World) -> None:
    """Of steps that are taken again and again, too."""
    module = Quadratic(np.zeros(3, np.float32), [1, 2])
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    config = PeriodsConfig(preset="od_sgd", pull_lag=3)
    periods = Periods(module, optimizer, config, exchange=ORDERED, world=world)

    def halve(gradients: list[torch.Tensor], is_shared: bool) -> bool:
        for gradient in gradients:
            gradient.mul_(0.5)
        return True

    periods.check = halve
    for step in range(1, 9):
        for p in module.parameters():
            p.grad = -torch.ones_like(p)
        periods.step()
        np.testing.assert_allclose(torch.cat(parameters(module)), step / 2)


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


@pytest.mark.parametrize("name", PRESETS)
def test_presets_end_with_the_same_parameters_everywhere(world: World, name: str) -> None:
    model, periods = train(PRESETS[name], "adamw", world, steps=35)
    periods.finish()
    everyones = all_gather(engine_of(world).control, parameters(model))
    for other in everyones:
        assert_same(other, everyones[0])
    assert all(p.isfinite().all() for p in everyones[0])


@pytest.mark.parametrize(
    "name", [*PRESETS, "streaming_diloco int8", "diloco same 5", "od_sgd same 5"]
)
@pytest.mark.parametrize("at", [9, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 16))])
def test_resumed_training_has_the_same_bits(world: World, name: str, at: int) -> None:
    """Also with changes on the wire, roundings that are still to be sent, and in a warm-up."""
    words = name.split()
    preset, wire, warmup = [*words, *("", "same", "0")[len(words) :]]
    method = dataclasses.replace(PRESETS[preset], wire=wire, warmup=int(warmup))
    model, periods = train(method, "adamw", world, steps=at)
    state = copy.deepcopy(periods.state_dict())
    go_on(periods, world.rank, STEPS)
    other, again = train(method, "adamw", world, steps=0)
    again.load_state_dict(state)
    go_on(again, world.rank, STEPS)
    assert_same(parameters(other), parameters(model))


@pytest.mark.parametrize("at", [3, 9])
@pytest.mark.parametrize("preset", ["od_sgd", "diloco", "streaming_diloco"])
def test_going_back_to_a_state(world: World, preset: str, at: int) -> None:
    """Also from after the warm-up into it, with something else on the wire."""
    method = dataclasses.replace(PRESETS[preset], warmup=5)
    model, periods = train(method, "adamw", world, steps=at)
    state = copy.deepcopy(periods.state_dict())
    go_on(periods, world.rank, STEPS)
    expected = parameters(model)
    for _ in range(2):
        periods.load_state_dict(state)
        go_on(periods, world.rank, STEPS)
        assert_same(parameters(model), expected)


@pytest.mark.parametrize("name", PRESETS)
def test_finishing_once_more_changes_nothing(world: World, name: str) -> None:
    """But for the rounding of a mean of equal values, which eager merges take."""
    model, periods = train(PRESETS[name], "adamw", world)
    periods.finish()
    before = parameters(model)
    periods.finish()
    torch.testing.assert_close(parameters(model), before, rtol=1e-6, atol=1e-9)


def test_unused_parameters_leave_nothing_in_the_optimizer(world: World) -> None:
    module = Quadratic(np.zeros(2, np.float32), [1, 1])
    optimizer = torch.optim.AdamW(module.parameters())
    config = PeriodsConfig(preset="od_sgd")
    periods = Periods(module, optimizer, config, exchange=ORDERED, world=world)
    for _ in range(4):
        module.parts[0].grad = torch.ones(1)
        periods.step()
    assert list(optimizer.state_dict()["state"]) == [0]


# ---------------------------------------------------------------------- mistakes


def test_memory_limit(world: World) -> None:
    method = PRESETS["diloco"]
    _, periods = train(method, "sgd", world, steps=0)
    needed_mb = periods.held_bytes() / 1e6
    assert needed_mb > 0
    train(method, "sgd", world, steps=0, limit_mb=needed_mb * 1.001)
    with pytest.raises(ExchangeError, match="memory_limit_mb"):
        train(method, "sgd", world, steps=0, limit_mb=needed_mb * 0.999)


def test_state_of_another_method(world: World) -> None:
    _, periods = train(PRESETS["local"], "sgd", world, steps=1)
    _, other = train(PRESETS["diloco"], "sgd", world, steps=0)
    with pytest.raises(ExchangeError, match="another method"):
        other.load_state_dict(periods.state_dict())
    barrier_on(engine_of(world).control)


def test_optimizer_of_other_parameters(world: World) -> None:
    model = net()
    some = torch.optim.SGD(model.first.parameters(), lr=0.1)
    with pytest.raises(ExchangeError, match="exactly the parameters"):
        Periods(model, some, world=world)


@pytest.mark.parametrize("lag", [1, 3])
def test_memory_of_the_optimizers_state_counts_after_its_first_step(world: World, lag: int) -> None:
    method = dataclasses.replace(PRESETS["od_sgd"], pull_lag=lag)
    _, periods = train(method, "adamw", world, steps=0)
    before_mb = periods.held_bytes() / 1e6
    with pytest.raises(ExchangeError, match="memory_limit_mb"):
        train(method, "adamw", world, steps=lag + 2, limit_mb=before_mb * 1.001)


def test_way_that_does_nothing(world: World) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    exchange = ExchangeConfig(way="ring")
    with pytest.raises(ExchangeError, match="does nothing with integers"):
        Periods(model, optimizer, PeriodsConfig(wire="int8"), exchange=exchange, world=world)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"preset": "co2", "outer_momentum": 0.0}, "outer_clip"),
        ({"preset": "co2", "outer": "adam"}, "outer_clip"),
        ({"merge": "compensate"}, "pull_lag must be at least 1"),
    ],
)
def test_what_does_nothing_is_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(JobError, match=text):
        PeriodsConfig(**values)


def test_lag_of_a_whole_period_follows_the_period() -> None:
    assert PeriodsConfig(preset="co2", period=16).method.pull_lag == 16
    assert PeriodsConfig(preset="eager_diloco", period=4).method.pull_lag == 4
    assert PeriodsConfig(preset="corrected", period=4).method.pull_lag == 2
    with pytest.raises(JobError, match="gives up the local steps"):
        PeriodsConfig(preset="co2", period=16, pull_lag=8)
