"""Steps of any shape: branches, several backwards or forwards, none at all, no_sync."""

from __future__ import annotations

import copy

import pytest
import torch
from grad.plain import (
    PER_RANK,
    WIDTH,
    Partly,
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

pytestmark = pytest.mark.mpi


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(WIDTH, WIDTH).double()
        self.right = nn.Linear(WIDTH, WIDTH).double()
        self.neither = nn.Linear(WIDTH, WIDTH).double()
        self.common = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, x: torch.Tensor, left: bool) -> torch.Tensor:
        return self.common((self.left if left else self.right)(x))


def test_branches_that_differ_between_ranks(world: World) -> None:
    """A parameter that no rank used keeps None; one that some rank used has its average."""
    module = Branches()
    model = DataParallel(module, config())
    for step in range(4):
        lefts = [(rank + step) % 2 == 0 for rank in range(world.size)]
        batch = batch_of(world, step)
        model.zero_grad()
        model(own(world, batch), lefts[world.rank]).pow(2).mean().backward()
        alone = copy.deepcopy(module)
        alone.zero_grad()
        losses = [
            alone(batch[r * PER_RANK : (r + 1) * PER_RANK], left).pow(2).mean()
            for r, left in enumerate(lefts)
        ]
        torch.stack(losses).mean().backward()
        assert_close(gradients(module), gradients(alone))
        assert_same_bits(world, gradients(module))


def test_several_backwards_a_step(world: World) -> None:
    module = make("perceptron")
    model = DataParallel(module, config())
    for step in range(3):
        batch = batch_of(world, step)
        model.zero_grad()
        out = model(own(world, batch))
        out.pow(2).mean().backward(retain_graph=True)
        out.sin().mean().backward()
        alone = copy.deepcopy(module)
        alone.zero_grad()
        out = alone(batch)
        (out.pow(2).mean() + out.sin().mean()).backward()
        assert_close(gradients(module), gradients(alone))


def test_several_forwards_in_one_backward(world: World) -> None:
    module = make("perceptron")
    model = DataParallel(module, config())
    for step in range(3):
        first, second = batch_of(world, step), batch_of(world, step + 50)
        model.zero_grad()
        (model(own(world, first)) * model(own(world, second))).mean().backward()
        alone = copy.deepcopy(module)
        alone.zero_grad()
        (alone(first) * alone(second)).mean().backward()
        assert_close(gradients(module), gradients(alone))


def test_no_sync_adds_up_and_the_next_backward_averages(world: World) -> None:
    module = make("perceptron")
    model = DataParallel(module, config())
    for step in range(3):
        first, second = batch_of(world, step), batch_of(world, step + 50)
        model.zero_grad()
        with model.no_sync():
            model(own(world, first)).pow(2).mean().backward()
        posted = model.exchange.channel.posted
        with pytest.raises(RuntimeError, match="on purpose"), model.no_sync():
            raise RuntimeError("on purpose")
        assert model.exchange.channel.posted == posted
        model(own(world, second)).pow(2).mean().backward()
        expected = [a + b for a, b in zip(plain(module, first), plain(module, second), strict=True)]
        assert_close(gradients(module), expected)


def test_parameters_that_are_trained_from_the_second_step_on(world: World) -> None:
    """The first backward sets the order; parameters that it has not seen must still be right."""
    module = Partly().double()
    model = DataParallel(module, config())
    for step in range(4):
        batch = batch_of(world, step)
        use_all = step > 0
        model.zero_grad()
        out = model(own(world, batch))
        if use_all:
            out = module.unused(out)
        out.pow(2).mean().backward()
        alone = copy.deepcopy(module)
        alone.zero_grad()
        out = alone(batch)
        (alone.unused(out) if use_all else out).pow(2).mean().backward()
        assert_close(gradients(module), gradients(alone))


def test_ranks_without_samples_take_part(world: World) -> None:
    """Rank 0 alone computes; the others have no backward in any step."""
    module = make("perceptron")
    model = DataParallel(module, config())
    for step in range(3):
        batch = batch_of(world, step)
        model.zero_grad()
        if world.rank == 0:
            (model(batch).pow(2).mean() * world.size).backward()
        else:
            model.exchange.finish()
        assert_close(gradients(module), plain(module, batch))


def test_gradient_of_a_gradient(world: World) -> None:
    """A gradient penalty: autograd accumulates out of place, into tensors that are no views."""
    module = make("perceptron")
    model = DataParallel(module, config())

    def loss(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        (inner,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return inner.pow(2).mean()

    for step in range(3):
        batch = batch_of(world, step)
        model.zero_grad()
        loss(model, own(world, batch)).backward()
        alone = copy.deepcopy(module)
        alone.zero_grad()
        loss(alone, batch.clone().requires_grad_()).backward()
        assert_close(gradients(module), gradients(alone))
