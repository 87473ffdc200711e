"""Averaged gradients equal those of one process on the whole batch, whatever the model does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grad.plain import (
    MODELS,
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


def run(world: World, module: nn.Module, steps: int = 3, **values: Any) -> list[Any]:
    """Train for a few steps, comparing each gradient with the plain one; returns all gradients."""
    model = DataParallel(module, config(**values))
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    seen = []
    for step in range(steps):
        batch = batch_of(world, step)
        dtype = next(module.parameters()).dtype
        batch = batch.to(dtype)
        optimizer.zero_grad()
        model(own(world, batch)).pow(2).mean().backward()
        found = gradients(module)
        assert_close(found, plain(module, batch))
        assert_same_bits(world, found)
        seen.append(found)
        optimizer.step()
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_overlap_on_and_off_give_the_same_bits(world: World, name: str) -> None:
    with_overlap = run(world, make(name), overlap=True)
    without = run(world, make(name), overlap=False)
    for first, second in zip(with_overlap, without, strict=True):
        for a, b in zip(first, second, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("progress", ["thread", "hooks"])
@pytest.mark.parametrize("way", ["native", "direct"])
def test_every_way_and_progress_mode(world: World, way: str, progress: str) -> None:
    run(world, make("perceptron"), way=way, progress=progress)


def test_float32(world: World) -> None:
    run(world, make("perceptron", torch.float32))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("perceptron", (1, 100, 1000, 1 << 20)),
        ("tied", (1, 100, 1 << 20)),
        pytest.param("2,000 tiny", (5000, 1 << 20), marks=pytest.mark.slow),
    ],
)
def test_deterministic_gives_the_same_bits_for_any_block_size(
    world: World, name: str, sizes: tuple[int, ...]
) -> None:
    runs = [
        run(world, make(name, torch.float32), steps=2, deterministic=True, block_bytes=size)
        for size in sizes
    ]
    for other in runs[1:]:
        for first, second in zip(runs[0], other, strict=True):
            for a, b in zip(first, second, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_16_bits_on_the_wire_are_summed_in_float32(world: World, wire: str) -> None:
    """Each rank's part is rounded once and the sum once: no error that grows with the ranks."""
    module = make("perceptron", torch.float32)
    model = DataParallel(module, config(wire=wire, way="direct", buffers="local"))
    dtype = getattr(torch, wire)
    for step in range(3):
        x = own(world, batch_of(world, step).float())
        alone = copy.deepcopy(module)
        alone.zero_grad()
        alone(x).pow(2).mean().backward()
        parts = all_gather(engine_of(world).control, gradients(alone))
        model.zero_grad()
        model(x).pow(2).mean().backward()
        for index, found in enumerate(gradients(module)):
            total = sum((part[index] / world.size).to(dtype).float() for part in parts)
            expected = total.to(dtype).float()
            assert torch.allclose(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
        assert_same_bits(world, gradients(module))


def test_shared_memory_has_no_wire_that_would_round(world: World) -> None:
    found = []
    for wire in ("same", "bfloat16"):
        module = make("perceptron", torch.float32)
        model = DataParallel(module, config(wire=wire, way="shared"))
        model(own(world, batch_of(world, 0).float())).pow(2).mean().backward()
        found.append([gradient.clone() for gradient in gradients(module)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters(world: World, dtype: torch.dtype) -> None:
    module = make("perceptron", dtype)
    model = DataParallel(module, config())
    x = own(world, batch_of(world, 0).to(dtype))
    model(x).pow(2).mean().backward()
    found = gradients(module)
    assert_same_bits(world, found)
    alone = copy.deepcopy(module)
    alone.zero_grad()
    alone(x).pow(2).mean().backward()
    parts = all_gather(engine_of(world).control, gradients(alone))
    for index, gradient in enumerate(found):
        total = parts[0][index].float()
        for part in parts[1:]:
            total = total + part[index].float()
        assert torch.equal(gradient, (total * (1 / world.size)).to(dtype))


def test_loss_is_unchanged_by_the_wrapper(world: World) -> None:
    module = make("perceptron")
    x = batch_of(world, 0)
    assert torch.equal(F.mse_loss(DataParallel(module, config())(x), x), F.mse_loss(module(x), x))


# ---------------------------------------------------------------- views


def test_gradients_are_views_of_one_slab_a_block(world: World) -> None:
    module = make("perceptron")
    model = DataParallel(module, config())
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        model(own(world, batch_of(world, 0))).sum().backward()
        for block in model.exchange.blocks:
            slab = block.slab.tensor.untyped_storage().data_ptr()
            for parameter in block.parameters:
                assert parameter.grad.untyped_storage().data_ptr() == slab
    assert sum(len(block.parameters) for block in model.exchange.blocks) == 6


def test_kept_views_are_accumulated_in_place(world: World) -> None:
    module = make("perceptron")
    model = DataParallel(module, config())
    model(own(world, batch_of(world, 0))).pow(2).mean().backward()
    before = [p.grad for p in module.parameters()]
    model.zero_grad(set_to_none=False)
    batch = batch_of(world, 1)
    model(own(world, batch)).pow(2).mean().backward()
    assert all(p.grad is b for p, b in zip(module.parameters(), before, strict=True))
    assert_close(gradients(module), plain(module, batch))


def test_order_follows_backward_and_stays(world: World) -> None:
    module = make("perceptron")
    model = DataParallel(module, config())
    orders = []
    for step in range(3):
        model.zero_grad()
        model(own(world, batch_of(world, step))).sum().backward()
        orders.append([block.members for block in model.exchange.blocks])
    assert orders[0] == orders[1] == orders[2]
    flat = [index for members in orders[0] for index in members]
    assert flat.index(5) < flat.index(0)  # the last layer's bias is done long before the first's
    assert len(all_gather(engine_of(world).control, orders[0])) == world.size
    assert all(o == orders[0] for o in all_gather(engine_of(world).control, orders[0]))
