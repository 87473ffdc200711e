"""Ranks start with the same values, stay in step, and are told when they do not."""

from __future__ import annotations

import pytest
import torch
from grad.plain import PER_RANK, WIDTH, batch_of, config, make, own, perceptron
from torch import nn

from hpctrain import DataParallel, World
from hpctrain.errors import MismatchError

pytestmark = pytest.mark.mpi


def test_ranks_start_with_the_parameters_of_rank_0(world: World) -> None:
    torch.manual_seed(world.rank)
    module = nn.Sequential(perceptron(), nn.BatchNorm1d(WIDTH).double(), nn.Linear(WIDTH, 0))
    module.register_parameter("strided", nn.Parameter(torch.randn(4, 3).t()))
    module[1].running_mean.fill_(world.rank)
    model = DataParallel(module, config())
    model.check_in_sync()
    torch.manual_seed(0)
    assert torch.equal(module[0][0].weight, perceptron()[0].weight)
    assert module[1].running_mean.abs().max() == 0


@pytest.mark.parametrize("mode", ["broadcast", "average", "local"])
def test_buffers(world: World, mode: str) -> None:
    module = nn.BatchNorm1d(WIDTH, momentum=1.0).double()
    model = DataParallel(module, config(buffers=mode))
    batch = batch_of(world, 0)
    for step in range(2):
        batch = batch_of(world, step)
        model(own(world, batch)).sum().backward()
    parts = batch.view(world.size, PER_RANK, WIDTH)
    expected = {"broadcast": parts[0], "average": batch, "local": parts[world.rank]}[mode].mean(0)
    assert torch.allclose(module.running_mean, expected, rtol=1e-12, atol=1e-12)
    assert module.num_batches_tracked == 2


def mismatched(kind: str, rank: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    if rank == 1:
        if kind == "shape":
            model = nn.Sequential(nn.Linear(WIDTH, 5))
        elif kind == "missing":
            model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
        elif kind == "extra":
            model.append(nn.Linear(2, 2))
        elif kind == "dtype":
            model = model.double()
        elif kind == "frozen":
            model[0].weight.requires_grad_(False)
        elif kind == "buffer":
            model.register_buffer("table", torch.zeros(3))
    return model


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("shape", r"0\.weight is \(5, 6\)"),
        ("missing", r"has no parameter 0\.bias"),
        ("extra", r"has parameter 1\.weight"),
        ("dtype", "float64"),
        ("frozen", "requires_grad=False"),
        ("buffer", "has buffer table"),
    ],
)
def test_models_that_differ_are_named_with_rank_and_parameter(
    world: World, kind: str, named: str
) -> None:
    with pytest.raises(MismatchError, match="rank 1.*" + named):
        DataParallel(mismatched(kind, world.rank))


def test_parameters_that_drift_apart_are_named(world: World) -> None:
    module = make("perceptron")
    model = DataParallel(module, config())
    model.check_in_sync()
    if world.rank == 1:
        with torch.no_grad():
            module[2].bias[0] += 1e-9
    with pytest.raises(MismatchError, match=r"rank 1.*parameter 2\.bias"):
        model.check_in_sync()
