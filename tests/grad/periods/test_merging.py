"""What parameters make of changes that come late, bit for bit as NumPy makes it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from grad.periods.in_numpy import (
    Array,
    Mean,
    mean_in_rank_order,
    trained,
    trained_in_fragments,
)
from quantize_in_numpy import QuantizedMean

from hpctrain.comm.quantize import QUANTIZERS
from hpctrain.grad.periods.merging import Changes, compensate
from hpctrain.grad.periods.method import PRESETS, Method, mistakes_of
from hpctrain.grad.periods.schedule import Act, Schedule, fragments_of

COUNT = 70
STEPS = 40


def start() -> Array:
    return np.random.default_rng(0).standard_normal(COUNT).astype(np.float32)


def pulls(ranks: int) -> list[Array]:
    """Where the data of each rank pull the parameters, in each iteration."""
    draw = np.random.default_rng(1)
    return [draw.standard_normal((ranks, COUNT)).astype(np.float32) for _ in range(STEPS + 1)]


def in_torch(
    method: Method, ranks: int, sizes: Sequence[int] = (40, 30), make: type[Changes] = Changes
) -> list[torch.Tensor]:
    """The parameters of all ranks, each with its own `Changes`."""
    towards = pulls(ranks)
    models = [[p.clone() for p in torch.from_numpy(start()).split(sizes)] for _ in range(ranks)]
    cuts = fragments_of(sizes, method.fragments)
    changes = [[make(method, model[cut], ranks) for model in models] for cut in cuts]
    means = [mean_of(method, ranks)(sum(sizes[cut])) for cut in cuts]
    staged: dict[int, Array] = {}
    came: dict[tuple[int, int], torch.Tensor] = {}
    for i in range(1, STEPS + 1):
        for model, towards_what in zip(models, towards[i], strict=True):
            for p, to in zip(model, torch.from_numpy(towards_what).split(sizes), strict=True):
                p.add_((to - p) * 0.125)
        for action in Schedule(method).after(i):
            place = action.fragment
            if action.act is Act.CAPTURE:
                rows = [torch.empty(sum(sizes[cuts[place]])) for _ in range(ranks)]
                for each, row in zip(changes[place], rows, strict=True):
                    each.capture(row)
                staged[place] = torch.stack(rows).numpy()
            elif action.act is Act.PUSH:
                came[place, action.of] = torch.from_numpy(means[place](staged[place]))
            else:
                mean = came.pop((place, action.of))
                for each in changes[place]:
                    each.pull(mean.clone())
    return [torch.cat(model) for model in models]


def in_numpy(method: Method, ranks: int, sizes: Sequence[int] = (40, 30)) -> Array:
    towards = pulls(ranks)

    def step(x: Array, i: int, cut: slice) -> Array:
        return x + (towards[i][:, cut] - x) * np.float32(0.125)

    ends = np.cumsum([sum(sizes[cut]) for cut in fragments_of(sizes, method.fragments)])
    starts = np.split(start(), ends[:-1])
    return trained_in_fragments(method, starts, ranks, STEPS, step, mean_of(method, ranks))


def mean_of(method: Method, ranks: int) -> Callable[[int], Mean]:
    """Makes the mean over ranks of so many elements."""
    if not is_narrow(method):
        return lambda count: mean_in_rank_order
    return lambda count: QuantizedMean(count, ranks, QUANTIZERS[method.wire].bits)


def is_narrow(method: Method) -> bool:
    return method.wire in QUANTIZERS


def assert_equal(method: Method, ranks: int, sizes: Sequence[int] = (40, 30)) -> None:
    expected = in_numpy(method, ranks, sizes)
    for found, row in zip(in_torch(method, ranks, sizes), expected, strict=True):
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
    assert_equal(drawn(draw), draw.randint(1, 4), shapes(draw))


def drawn(draw: random.Random) -> Method:
    """Any method with changes."""
    period = draw.randint(1, 9)
    merge = draw.choice(("correct", "replace", "mix", "eager"))
    outer = draw.choice(("sgd", "nesterov", "adam"))
    pull_lag = {"eager": period, "replace": draw.choice((0, period))}.get(
        merge, draw.randint(0, period)
    )
    momentum = draw.uniform(0.1, 0.95) if outer != "sgd" or draw.random() < 0.5 else 0.0
    method = Method(
        sends="changes",
        period=period,
        push_lag=draw.randint(0, max(0, pull_lag - 1)),
        pull_lag=pull_lag,
        merge=merge,
        mix=draw.random() if merge == "mix" else 0.0,
        fragments=draw.choice((1, 2, 3, 5)),
        outer=outer,
        outer_rate=draw.uniform(0.1, 1.0),
        outer_momentum=momentum,
        outer_clip=draw.choice((0.0, 0.3)) if momentum and outer != "adam" else 0.0,
        wire="same" if outer == "adam" else draw.choice(("same", *QUANTIZERS)),
    )
    assert not list(mistakes_of(method))
    return method


def shapes(draw: random.Random) -> list[int]:
    """Sizes of the parameters of a model, some of which may have no elements."""
    cuts = sorted(draw.randint(0, COUNT) for _ in range(draw.randint(0, 6)))
    return [after - before for before, after in pairwise([0, *cuts, COUNT])]


class Forgets(Changes):
    """Loses the steps that were taken since the capture."""

    def pull(self, mean: torch.Tensor) -> None:
        super().pull(mean)
        self.anchor.scatter(self._local)


class CountsTwice(Changes):
    """Its own change stays, besides the mean."""

    def pull(self, mean: torch.Tensor) -> None:
        before = torch.cat([p.flatten() for p in self._local])
        super().pull(mean + (before - self.anchor.tensor))


class HalfTheMean(Changes):
    """Takes in half of what comes."""

    def pull(self, mean: torch.Tensor) -> None:
        super().pull(mean * 0.5)


@pytest.mark.parametrize("wrong", [Forgets, CountsTwice, HalfTheMean])
def test_wrong_merge_is_caught(wrong: type[Changes]) -> None:
    method = Method(sends="changes", period=4, pull_lag=2, merge="correct", fragments=2)
    expected = in_numpy(method, 3)
    right = torch.stack(in_torch(method, 3)).numpy()
    np.testing.assert_array_equal(right, expected)
    assert not np.array_equal(torch.stack(in_torch(method, 3, make=wrong)).numpy(), expected)


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
