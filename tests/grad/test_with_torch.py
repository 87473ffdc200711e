"""What torch offers around a model works with averaged gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from grad.plain import (
    WIDTH,
    assert_close,
    assert_same_bits,
    batch_of,
    config,
    gradients,
    make,
    own,
    plain,
)
from torch import nn

from hpctrain import DataParallel, World
from hpctrain.comm.collect import all_gather
from hpctrain.comm.engine import engine_of

pytestmark = pytest.mark.mpi


def test_norm_and_clipping_need_no_communication(world: World) -> None:
    module = make("perceptron")
    model = DataParallel(module, config())
    for step in range(2):
        model.zero_grad()
        model(own(world, batch_of(world, step))).pow(2).mean().backward()
        posted = model.exchange.channel.posted
        norm = model.exchange.gradient_norm()
        clipped = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.01)
        assert model.exchange.channel.posted == posted
        assert abs(norm / clipped - 1) < 1e-12
        assert abs(model.exchange.gradient_norm() - 0.01) < 1e-6


def test_norm_of_16_bit_gradients_does_not_overflow(world: World) -> None:
    module = nn.Linear(100, 100, bias=False).half()
    model = DataParallel(module, config())
    (model(torch.ones(1, 100).half()).sum() * 1000).backward()
    assert model.exchange.gradient_norm().item() == pytest.approx(1000 * 100, rel=1e-3)


@pytest.mark.parametrize("foreach", [False, True])
def test_optimizers_with_and_without_foreach(world: World, foreach: bool) -> None:
    module, alone = make("perceptron"), make("perceptron")
    model = DataParallel(module, config())
    ours = torch.optim.AdamW(module.parameters(), lr=0.01, foreach=foreach)
    theirs = torch.optim.AdamW(alone.parameters(), lr=0.01, foreach=foreach)
    for step in range(4):
        batch = batch_of(world, step)
        ours.zero_grad()
        theirs.zero_grad()
        model(own(world, batch)).pow(2).mean().backward()
        alone(batch).pow(2).mean().backward()
        ours.step()
        theirs.step()
    for a, b in zip(module.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    model.check_in_sync()


def test_autocast_to_bfloat16(world: World) -> None:
    module = make("perceptron", torch.float32)
    model = DataParallel(module, config())
    for step in range(2):
        x = own(world, batch_of(world, step).float())
        alone = copy.deepcopy(module)
        alone.zero_grad()
        model.zero_grad()
        for net in (model, alone):
            with torch.autocast("cpu", torch.bfloat16):
                loss = net(x).float().pow(2).mean()
            loss.backward()
        parts = all_gather(engine_of(world).control, gradients(alone))
        expected = [sum(p[i] for p in parts) / world.size for i in range(len(parts[0]))]
        assert_close(gradients(module), expected)


@pytest.mark.parametrize("inside", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiled(world: World, inside: bool) -> None:
    module = make("perceptron")
    if inside:
        model: Any = DataParallel(torch.compile(module, backend="aot_eager"), config())
    else:
        model = torch.compile(DataParallel(module, config()), backend="aot_eager")
    for step in range(3):
        batch = batch_of(world, step)
        module.zero_grad()
        model(own(world, batch)).pow(2).mean().backward()
        assert_close(gradients(module), plain(module, batch))
        assert_same_bits(world, gradients(module))


@pytest.mark.slow
def test_very_large_parameter(world: World) -> None:
    rows = 27_000_000 // WIDTH  # over 100 MB in float32
    module = nn.Embedding.from_pretrained(torch.ones(rows, WIDTH), freeze=False)
    model = DataParallel(module, config(block_bytes=1 << 20))
    index = torch.tensor([world.rank, rows - 1])
    model(index).sum().backward()
    gradient = module.weight.grad
    assert gradient is not None
    assert torch.allclose(gradient[: world.size], torch.tensor(1 / world.size))
    assert torch.equal(gradient[rows - 1], torch.ones(WIDTH))
    assert gradient[world.size : rows - 1].abs().max() == 0


def test_wrapped_module_is_reached_through_the_wrapper(world: World) -> None:
    module = make("tied")
    model = DataParallel(module, config())
    assert model.first is module.first
    with pytest.raises(AttributeError):
        _ = model.nothing_of_that_name


def test_two_models_in_one_backward(world: World) -> None:
    """Their blocks interleave differently on each rank, and travel on channels of their own."""
    left, right = make("perceptron"), make("tied")
    models = DataParallel(left, config()), DataParallel(right, config())
    for step in range(3):
        batch = batch_of(world, step)
        for model in models:
            model.zero_grad()
        (models[0](own(world, batch)) + models[1](own(world, batch))).pow(2).mean().backward()
        alone = copy.deepcopy(left), copy.deepcopy(right)
        for model in alone:
            model.zero_grad()
        (alone[0](batch) + alone[1](batch)).pow(2).mean().backward()
        assert_close(gradients(left), gradients(alone[0]))
        assert_close(gradients(right), gradients(alone[1]))
