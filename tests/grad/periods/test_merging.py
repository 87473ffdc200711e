"""What parameters make of changes that come late, bit for bit as NumPy makes it."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from grad.periods.in_numpy import Array, Fragment, trained
from quantize_in_numpy import QuantizedMean

from hpctrain.comm.quantize import QUANTIZERS
from hpctrain.grad.periods.merging import Changes, compensate
from hpctrain.grad.periods.method import PRESETS, Method, mistakes_of
from hpctrain.grad.periods.schedule import Act, Schedule

COUNT = 70
STEPS = 40


def start() -> Array:
    return np.random.default_rng(0).standard_normal(COUNT).astype(np.float32)


def pulls(ranks: int) -> list[Array]:
    """Where the data of each rank pull the parameters, in each iteration."""
    draw = np.random.default_rng(1)
    return [draw.standard_normal((ranks, COUNT)).astype(np.float32) for _ in range(STEPS + 1)]


def in_torch(method: Method, ranks: int) -> list[torch.Tensor]:
    """The parameters of all ranks, each with its own `Changes`."""
    towards = pulls(ranks)
    parts = (40, 30)
    models = [[p.clone() for p in torch.from_numpy(start()).split(parts)] for _ in range(ranks)]
    changes = [Changes(method, model, ranks) for model in models]
    wire = QuantizedMean(COUNT, ranks, QUANTIZERS[method.wire].bits) if is_narrow(method) else None
    captured = [torch.empty(COUNT) for _ in range(ranks)]
    means: dict[int, torch.Tensor] = {}
    for i in range(1, STEPS + 1):
        for model, towards_what in zip(models, towards[i], strict=True):
            for p, to in zip(model, torch.from_numpy(towards_what).split(parts), strict=True):
                p.add_((to - p) * 0.125)
        for action in Schedule(method).after(i):
            if action.act is Act.CAPTURE:
                for each, buffer in zip(changes, captured, strict=True):
                    each.capture(buffer)
                rows = torch.stack(captured)
                if wire:
                    means[i] = torch.from_numpy(wire(rows.numpy()))
                else:
                    means[i] = sum(rows[1:], rows[0]) * (1 / ranks)
            if action.act is Act.PULL:
                mean = means.pop(action.of)
                for each in changes:
                    each.pull(mean.clone())
    return [torch.cat(model) for model in models]


def in_numpy(method: Method, ranks: int) -> Fragment:
    towards = pulls(ranks)

    def step(x: Array, i: int) -> Array:
        return x + (towards[i] - x) * np.float32(0.125)

    if is_narrow(method):
        mean = QuantizedMean(COUNT, ranks, QUANTIZERS[method.wire].bits)
        return trained(method, start(), ranks, STEPS, step, mean)
    return trained(method, start(), ranks, STEPS, step)


def is_narrow(method: Method) -> bool:
    return method.wire in QUANTIZERS


def assert_equal(method: Method, ranks: int) -> None:
    expected = in_numpy(method, ranks)
    for found, row in zip(in_torch(method, ranks), expected.x, strict=True):
        if method.outer == "adam":  # whose square root is rounded by others
            np.testing.assert_allclose(found.numpy(), row, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(found.numpy(), row)


WITH_CHANGES = [name for name, method in PRESETS.items() if method.sends == "changes"]


@pytest.mark.parametrize("wire", ["same", *QUANTIZERS])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", WITH_CHANGES)
def test_presets(name: str, ranks: int, wire: str) -> None:
    method = dataclasses.replace(PRESETS[name], period=4, wire=wire, fragments=1)
    lag = 4 if method.pull_lag == PRESETS[name].period else method.pull_lag
    assert_equal(dataclasses.replace(method, pull_lag=lag), ranks)


@pytest.mark.parametrize("seed", range(200))
def test_any_method(seed: int) -> None:
    draw = random.Random(seed)
    period = draw.randint(1, 9)
    merge = draw.choice(("correct", "replace", "mix", "eager"))
    outer = draw.choice(("sgd", "nesterov", "adam"))
    method = Method(
        sends="changes",
        period=period,
        pull_lag=period if merge == "eager" else draw.randint(0, period),
        merge=merge,
        mix=draw.random() if merge == "mix" else 0.0,
        outer=outer,
        outer_rate=draw.uniform(0.1, 1.0),
        outer_momentum=draw.uniform(0.1, 0.95) if outer != "sgd" or draw.random() < 0.5 else 0.0,
        outer_clip=draw.choice((0.0, 0.3)),
        wire="same" if outer == "adam" else draw.choice(("same", *QUANTIZERS)),
    )
    assert not list(mistakes_of(method))
    assert_equal(method, draw.randint(1, 4))


def test_average_of_parameters() -> None:
    """Local SGD is what its name says."""
    method = dataclasses.replace(PRESETS["local"], period=STEPS)
    found = in_torch(method, 3)
    alone = trained(
        dataclasses.replace(method, period=STEPS + 1),
        *(start(), 3, STEPS),
        lambda x, i: x + (pulls(3)[i] - x) * np.float32(0.125),
    )
    np.testing.assert_allclose(found[0].numpy(), alone.x.mean(axis=0), rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


def test_what_is_ahead_stays_ahead() -> None:
    """Steps between capturing and taking in are not lost, with merge = "correct"."""
    method = Method(sends="changes", period=4, pull_lag=2, merge="correct")
    local = [torch.zeros(3)]
    changes, change = Changes(method, local, 2), torch.empty(3)
    local[0] += 1.0
    changes.capture(change)
    assert change.tolist() == [1.0] * 3
    local[0] += 0.5
    changes.pull(torch.full((3,), 3.0))
    assert local[0].tolist() == [3.5] * 3
    assert changes.anchor.tensor.tolist() == [3.0] * 3


def test_parameters_of_any_shape_and_type() -> None:
    local = [
        torch.ones(2, 3, dtype=torch.bfloat16),
        torch.zeros(0, 4),
        torch.ones((), dtype=torch.complex64) * 2j,
    ]
    changes = Changes(PRESETS["local"], local, 1)
    change = torch.empty_like(changes.anchor.tensor)
    local[0] += 1
    changes.capture(change)
    assert change.tolist() == [1.0] * 6 + [0.0] * 2
    changes.pull(change * 0.5)
    assert local[0].tolist() == [[1.5] * 3] * 2
    assert local[2] == 2j


def test_a_late_gradient_is_corrected_to_first_order() -> None:
    """Exactly, where the loss is quadratic, and its curvature the gradient's square."""
    gradient = torch.tensor([2.0, -1.0])
    compensate(gradient, torch.tensor([1.5, 1.0]), torch.tensor([1.0, 3.0]), 0.5)
    assert gradient.tolist() == [2.0 + 0.5 * 4 * 0.5, -1.0 + 0.5 * 1 * -2.0]
