"""Training with what comes late over real ranks: what always holds, states, mistakes."""

from __future__ import annotations

import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
from grad.periods.models import (
    OPTIMIZERS,
    ORDERED,
    STEPS,
    Averaging,
    Quadratic,
    assert_same,
    go_on,
    loss_of,
    net,
    parameters,
    train,
)
from torch import nn

from hpctrain import DataParallel, ExchangeConfig, World
from hpctrain.comm.collect import all_gather, barrier_on
from hpctrain.comm.engine import engine_of
from hpctrain.comm.quantize import QUANTIZERS
from hpctrain.errors import ExchangeError
from hpctrain.grad.periods.method import PRESETS, Method, PeriodsConfig
from hpctrain.grad.periods.periods import Periods

pytestmark = pytest.mark.mpi


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


@pytest.mark.parametrize("steps", [13, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 8))])
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


@pytest.mark.parametrize("name", PRESETS)
def test_presets_end_with_the_same_parameters_everywhere(world: World, name: str) -> None:
    model, periods = train(PRESETS[name], "adamw", world, steps=35)
    periods.finish()
    everyones = all_gather(engine_of(world).control, parameters(model))
    for other in everyones:
        assert_same(other, everyones[0])
    assert all(p.isfinite().all() for p in everyones[0])


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in PRESETS if name != "corrected"),
        pytest.param("corrected", marks=pytest.mark.slow),
        *("streaming_diloco int8", "diloco same 5", "od_sgd same 5"),
    ],
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


@pytest.mark.parametrize("preset", ["every_step", "one_late", "od_sgd"])
def test_rate_that_is_a_tensor(world: World, preset: str) -> None:
    """Its schedulers write to it, while gradients that are late have that of their iteration."""

    def trained(rate: float | torch.Tensor) -> list[torch.Tensor]:
        module = net()
        optimizer = torch.optim.SGD(module.parameters(), lr=rate)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        config = PeriodsConfig(preset=preset)
        periods = Periods(module, optimizer, config, exchange=ORDERED, world=world)
        for iteration in range(1, 6):
            go_on(periods, world.rank, iteration)
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25 / 32)
        periods.finish()
        return parameters(module)

    assert_same(trained(torch.tensor(0.25)), trained(0.25))


def test_optimizer_that_has_gathered_alone(world: World) -> None:
    """Where steps are on the gradient of all ranks, they are with the state of rank 0."""
    module = net()
    rate = torch.tensor(0.01)
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate)
    for iteration in range(4):
        optimizer.zero_grad()
        loss_of(module, world.rank, iteration).backward()
        optimizer.step()
    config = PeriodsConfig(preset="od_sgd")
    periods = Periods(module, optimizer, config, exchange=ORDERED, world=world)
    assert optimizer.param_groups[0]["lr"] is rate
    go_on(periods, world.rank, 4)
    assert optimizer.param_groups[0]["lr"] is rate
    periods.finish()
    for other in all_gather(engine_of(world).control, parameters(module)):
        assert_same(other, parameters(module))


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
