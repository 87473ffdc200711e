"""Parts of the ranks as worlds of their own, beside each other and beside the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hpctrain import DataParallel, ExchangeConfig, World
from hpctrain.comm.collect import all_gather, all_sum, barrier_on
from hpctrain.comm.engine import engine_of
from hpctrain.comm.node import shared_slabs
from hpctrain.comm.part import split
from hpctrain.errors import ExchangeError

pytestmark = pytest.mark.mpi


def part_of(rank: int) -> int:
    return rank % 2


def members(world: World) -> list[int]:
    return [rank for rank in range(world.size) if part_of(rank) == part_of(world.rank)]


def test_a_part_is_a_world(world: World) -> None:
    part = split(world, part_of(world.rank), lambda: None)
    mine = members(world)
    assert (part.size, part.rank) == (len(mine), mine.index(world.rank))
    assert [seat.launched_as for seat in part.seats] == [
        world.seats[rank].launched_as for rank in mine
    ]
    assert part.is_root == (part.rank == 0)
    assert part.name_of(part.rank) == world.name_of(world.rank)
    engine = engine_of(part)
    assert all_gather(engine.control, world.rank) == mine
    ticket = engine_of(world).control.post(lambda comm, tag: iter(()), "of all")
    assert all_sum(engine.control, np.array([1.0])).tolist() == [len(mine)]
    engine_of(world).wait(ticket)
    assert all_gather(engine_of(world).control, world.rank) == list(range(world.size))


@pytest.mark.parametrize("way", ["auto", "direct", "ring", "shared"])
def test_gradients_are_averaged_within_a_part(world: World, way: str) -> None:
    part = split(world, part_of(world.rank), lambda: None)
    torch.manual_seed(0)
    model = DataParallel(
        nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double(),
        ExchangeConfig(way=way, block_bytes=100),
        world=part,
    )
    for step in range(part_of(world.rank) + 2):  # another number of steps in each part
        model.zero_grad()
        of = [
            torch.randn(
                4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(r + step)
            )
            for r in members(world)
        ]
        model(of[part.rank]).square().mean().backward()
        mine = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        with model.no_sync():
            sums = [torch.zeros_like(g) for g in mine]
            for x in of:
                found = torch.autograd.grad(model.module(x).square().mean(), model.parameters())
                sums = [a + b for a, b in zip(sums, found, strict=True)]
        for gradient, total in zip(mine, sums, strict=True):
            torch.testing.assert_close(gradient, total / part.size, rtol=1e-12, atol=1e-15)
    model.check_in_sync()
    barrier_on(engine_of(world).control)


def test_who_waits_for_a_lost_part_is_told(world: World) -> None:
    reasons: list[str] = []
    part = split(world, 0, lambda: reasons[0] if reasons else None)
    if world.size == 1:
        return
    control = engine_of(part).control
    if world.rank == 0:
        reasons.append("somebody is gone")
        with pytest.raises(ExchangeError, match=r"the last: somebody is gone"):
            barrier_on(control, "the last")
    barrier_on(engine_of(world).control)
    if world.rank > 0:
        barrier_on(control, "the last")
    barrier_on(engine_of(world).control)


def test_memory_on_a_node_is_that_of_one_part(world: World) -> None:
    """A rank that has had a part in another division keeps the two apart."""
    for number in (world.rank // 2, part_of(world.rank), 0):
        part = split(world, number, lambda: None)
        for _ in range(2):
            slabs = shared_slabs(engine_of(part), [10], [torch.float32])
            if slabs and slabs[0].place:
                assert len(slabs[0].place.parts) == part.local_size
            del slabs
    barrier_on(engine_of(world).control)
