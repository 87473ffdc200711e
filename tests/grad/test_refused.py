"""What cannot be averaged is refused with advice, and its neighbours that can work."""

from __future__ import annotations

import pytest
import torch
from grad.plain import (
    WIDTH,
    Partly,
    Recomputed,
    assert_close,
    batch_of,
    config,
    gradients,
    make,
    own,
    plain,
)
from torch import nn

from hpctrain import DataParallel, World
from hpctrain.errors import ExchangeError

pytestmark = pytest.mark.mpi


def refused(kind: str) -> nn.Module:
    if kind == "sparse":
        return nn.Embedding(4, 4, sparse=True)
    if kind == "lazy":
        return nn.LazyLinear(4)
    if kind == "meta":
        return nn.Linear(3, 3, device="meta")
    return nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.complex32))])


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("sparse", "sparse=False"),
        ("lazy", "one forward pass before"),
        ("meta", "on the CPU"),
        ("complex32", "wider copy"),
    ],
)
def test_what_cannot_be_exchanged_is_refused_with_advice(
    world: World, kind: str, advice: str
) -> None:
    with pytest.raises(ExchangeError, match=advice):
        DataParallel(refused(kind))


def test_gradient_that_arrives_too_late_is_refused(world: World) -> None:
    """More re-entrant segments than in the first step: the slab is on the wire already."""
    module = Recomputed(nested=True).double()
    model = DataParallel(module, config(block_bytes=1))
    module.repeats = 1
    model(own(world, batch_of(world, 0))).pow(2).mean().backward()
    module.repeats = 3
    with pytest.raises(ExchangeError, match=r"shared\.\w+ grew after block \d+ went on the wire"):
        model(own(world, batch_of(world, 1))).pow(2).mean().backward()
    with pytest.raises(ExchangeError, match="did not finish"):
        model(own(world, batch_of(world, 2)))


def test_that_model_works_without_overlap(world: World) -> None:
    module = Recomputed(nested=True).double()
    model = DataParallel(module, config(block_bytes=1, overlap=False))
    for step in range(3):
        module.repeats = 1 + step
        batch = batch_of(world, step)
        model.zero_grad()
        model(own(world, batch)).pow(2).mean().backward()
        assert_close(gradients(module), plain(module, batch))


def test_unfrozen_parameter_is_refused(world: World) -> None:
    module = Partly()
    model = DataParallel(module, config())
    module.frozen.requires_grad_(True)
    with pytest.raises(ExchangeError, match=r"frozen\.weight was frozen"):
        model(torch.zeros(1, WIDTH))


def test_parameter_frozen_later_keeps_no_gradient(world: World) -> None:
    module = make("perceptron")
    model = DataParallel(module, config())
    model(own(world, batch_of(world, 0))).pow(2).mean().backward()
    model.zero_grad()
    module[0].requires_grad_(False)
    batch = batch_of(world, 1)
    model(own(world, batch)).pow(2).mean().backward()
    assert_close(gradients(module), plain(module, batch))
