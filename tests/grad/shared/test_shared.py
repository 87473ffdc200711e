"""A root and children on real ranks: the bits of one process, in groups of any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpctrain import DataParallel, ExchangeConfig, Shared, SharedConfig, World
from hpctrain.comm.collect import barrier_on
from hpctrain.comm.engine import engine_of
from hpctrain.errors import ExchangeError, JobError
from hpctrain.grad.shared.rules import RuleConfig, Server
from hpctrain.grad.shared.shared import shared_tensors

pytestmark = pytest.mark.mpi

ROUNDS, STEPS = 3, 2


def encoder(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh()).double()


def head(child: int) -> nn.Module:
    torch.manual_seed(10 + child)
    return nn.Linear(6, 1).double()


def batch(child: int, number: int) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(1000 * child + number)
    return torch.randn(8, 4, dtype=torch.float64, generator=drawn)


def train(child: int, model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    optimizer.zero_grad()
    x = batch(child, number)
    loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def alone(children: int, config: RuleConfig) -> torch.Tensor:
    """What one process makes of as many children."""
    models = [nn.Sequential(encoder(6), head(child)) for child in range(children)]
    optimizers = [optimizer_of(model) for model in models]
    trained = sum(p.numel() for p in encoder(6).parameters())
    server = Server(config, flat(encoder(6)), trained)
    for number in range(ROUNDS):
        rows = []
        for child, model in enumerate(models):
            with torch.no_grad():
                values = server.target.split([t.numel() for t in shared_tensors(model[0])])
                for tensor, value in zip(shared_tensors(model[0]), values, strict=True):
                    tensor.copy_(value.view_as(tensor))
            for step in range(STEPS):
                train(child, model, optimizers[child], STEPS * number + step)
            rows.append(flat(model[0]))
        server.step(torch.stack(rows), [5 + child for child in range(children)])
    return server.target


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in shared_tensors(module)])


def follow(shared: Shared, wrap: Callable[[nn.Module], nn.Module] = lambda m: m) -> nn.Module:
    """A child's part."""
    mine = encoder(**shared.instruction()["kind"])
    model = wrap(nn.Sequential(mine, head(shared.child)))
    optimizer = optimizer_of(model)
    for turn in shared.turns(mine, samples=5 + shared.child):
        for step in range(STEPS):
            number = STEPS * turn.number + step
            turn.figures["loss"] = train(shared.child, model, optimizer, number)
    shared.take_last()
    shared.goodbye()
    return mine


@pytest.mark.parametrize(
    "config",
    [{}, {"rule": "median"}, {"server": "adam", "server_rate": 0.1, "server_momentum": 0.9}],
    ids=str,
)
def test_children_have_the_bits_of_one_process(world: World, config: dict[str, Any]) -> None:
    if world.size == 1:
        with pytest.raises(JobError, match="needs a root and children"):
            Shared(SharedConfig(**config))
        return
    shared = Shared(SharedConfig(**config))
    expected = alone(world.size - 1, RuleConfig(**config))
    if shared.is_root:
        trained = encoder(6)
        rounds = shared.lead(trained, ROUNDS, kind={"width": 6})
        assert all(np.isfinite(child.figures.get("loss", 0.0)) for child in rounds.children)
    else:
        trained = follow(shared)
    assert torch.equal(flat(trained), expected)
    barrier_on(engine_of(world).control)


def test_groups_of_ranks_average_their_gradients(world: World) -> None:
    if world.size < 3:
        return
    group = 3 if world.size == 4 else 2
    if (world.size - 1) % group:
        return
    shared = Shared(SharedConfig(group=group))
    if shared.is_root:
        trained = encoder(6)
        shared.lead(trained, ROUNDS, kind={"width": 6})
    else:
        options = ExchangeConfig(deterministic=True, buffers="broadcast")
        trained = follow(shared, lambda m: DataParallel(m, options, world=shared.world))
    # All ranks of a group have the same batch here, so that the mean is what each has. A third of
    # three is not, and the bias before batch norm has nothing but such roundings as its gradient,
    # which AdamW divides by their own size (and 1e-8).
    expected = alone((world.size - 1) // group, RuleConfig())
    atol = 1e-14 if group == 2 else 1e-9
    torch.testing.assert_close(flat(trained), expected, rtol=1e-12, atol=atol)
    barrier_on(engine_of(world).control)


def test_child_that_fails_after_the_last_turn_keeps_nobody_waiting(world: World) -> None:
    """It has heard of the end already."""
    if world.size < 3:
        return
    shared = Shared(SharedConfig())
    said: list[str] = []
    if shared.is_root:
        shared.lead(encoder(6), 1, kind={"width": 6}, say=said.append)
        assert any("its disk is full" in text for text in said)
    elif shared.child == 0:
        for _ in shared.turns(encoder(**shared.instruction()["kind"]), samples=1):
            pass
        shared.refuse("its disk is full")
        shared.wait_for_end()
    else:
        follow(shared)
    barrier_on(engine_of(world).control)


def test_another_encoder_is_left_out(world: World) -> None:
    if world.size < 3:
        return
    shared = Shared(SharedConfig())
    said: list[str] = []
    if shared.is_root:
        shared.lead(encoder(6), ROUNDS, kind={"width": 6}, say=said.append)
        assert any("encoder of other parameters" in text for text in said)
    elif shared.child == 0:
        shared.instruction()
        with pytest.raises(ExchangeError, match="left out: it would train an encoder of other"):
            next(shared.turns(encoder(7), samples=1))
        shared.wait_for_end()
    else:
        follow(shared)
    barrier_on(engine_of(world).control)
