from __future__ import annotations

import numpy as np
import pytest
import torch

from hpctrain import World
from hpctrain.comm.channel import Channel
from hpctrain.comm.collect import all_gather, all_sum, barrier_on, broadcast, broadcast_tensor
from hpctrain.comm.engine import engine_of

pytestmark = pytest.mark.mpi


@pytest.fixture
def control(world: World) -> Channel:
    return engine_of(world).control


@pytest.mark.parametrize("root", [0, -1])
@pytest.mark.parametrize("size", [0, 1, 10_000_000])
def test_broadcast(control: Channel, world: World, root: int, size: int) -> None:
    root %= world.size
    value = {"rank": world.rank, "data": bytes(size)}
    assert broadcast(control, value, root) == {"rank": root, "data": bytes(size)}


def test_all_gather_of_objects_of_different_size(control: Channel, world: World) -> None:
    found = all_gather(control, "x" * world.rank)
    assert found == ["x" * rank for rank in range(world.size)]


def test_all_gather_of_tensors_keeps_their_bits(control: Channel, world: World) -> None:
    mine = torch.tensor([float("nan"), -0.0, world.rank + 0.1], dtype=torch.bfloat16)
    found = all_gather(control, mine)
    assert torch.equal(found[world.rank].view(torch.int16), mine.view(torch.int16))


@pytest.mark.parametrize("shape", [(), (3,), (2, 4), (0, 3)])
def test_all_sum_adds_in_rank_order(control: Channel, world: World, shape: tuple[int]) -> None:
    parts = [np.random.default_rng(rank).random(shape) for rank in range(world.size)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    found = all_sum(control, parts[world.rank])
    assert np.array_equal(found, total)


@pytest.mark.parametrize("shape", [(0,), (), (3, 5), (1_000_000,)])
def test_broadcast_tensor(control: Channel, world: World, shape: tuple[int]) -> None:
    tensor = torch.full(shape, float(world.rank))
    control.run(broadcast_tensor(tensor, world.size - 1), "broadcast")
    assert torch.equal(tensor, torch.full(shape, world.size - 1.0))


def test_barrier_waits_for_the_last_rank(control: Channel, world: World) -> None:
    """No rank is through before the last one has told rank 0 that it is on its way."""
    if world.rank == world.size - 1:
        world.comm.send("coming", 0)
    barrier_on(control)
    if world.rank == 0:
        assert world.comm.iprobe(world.size - 1)
        assert world.comm.recv(source=world.size - 1) == "coming"
