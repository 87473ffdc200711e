"""Sums over real ranks, against the same sums made one after another."""

from __future__ import annotations

import pytest
import torch

from hpctrain import World
from hpctrain.comm import reduce
from hpctrain.comm.collect import all_gather
from hpctrain.comm.engine import Engine, engine_of
from hpctrain.comm.memory import Ring, Slab, aligned

pytestmark = pytest.mark.mpi

COUNTS = [0, 1, 2, 3, 5, 64, 1023, 100_003]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=["thread", "hooks"])
def engine(world: World, request: pytest.FixtureRequest) -> Engine:
    engine = engine_of(world)
    engine.progress = request.param
    return engine


def values(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, generator=generator).to(dtype)


def in_rank_order(parts: list[torch.Tensor], scale: float) -> torch.Tensor:
    """The sum that every way must come close to, and ``direct`` must equal."""
    wide = torch.float32 if parts[0].element_size() == 2 else parts[0].dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return (total * scale).to(parts[0].dtype)


def summed(
    engine: Engine,
    way: str,
    mine: torch.Tensor,
    scale: float = 1.0,
    wire: torch.dtype | None = None,
) -> torch.Tensor:
    slab = Slab(mine.clone())
    operation = reduce.all_reduce(way, slab, scale, wire)
    engine.control.run(operation, way)
    return slab.tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_direct_sums_in_rank_order(
    engine: Engine, world: World, count: int, dtype: torch.dtype
) -> None:
    scale = 1 / world.size
    found = summed(engine, "direct", values(world.rank, count, dtype), scale)
    parts = [values(rank, count, dtype) for rank in range(world.size)]
    assert torch.equal(found, in_rank_order(parts, scale))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_native_is_close_and_the_same_everywhere(
    engine: Engine, world: World, count: int, dtype: torch.dtype
) -> None:
    found = summed(engine, "native", values(world.rank, count, dtype), 0.5)
    parts = [values(rank, count, dtype) for rank in range(world.size)]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert torch.allclose(found, in_rank_order(parts, 0.5), rtol=tolerance, atol=tolerance)
    assert all(torch.equal(found, other) for other in all_gather(engine.control, found))


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_narrow_wire_rounds_each_part_and_the_sum_once(
    engine: Engine, world: World, count: int, dtype: torch.dtype, wire: torch.dtype
) -> None:
    scale = 1 / world.size
    found = summed(engine, "direct", values(world.rank, count, dtype), scale, wire)
    parts = [(values(rank, count, dtype) * scale).to(wire) for rank in range(world.size)]
    assert torch.equal(found, in_rank_order(parts, 1.0).to(dtype))


def test_large_float16_gradients_do_not_overflow_on_the_wire(engine: Engine, world: World) -> None:
    mine = torch.full((10,), 60_000.0)
    found = summed(engine, "direct", mine, 1 / world.size, torch.float16)
    assert torch.allclose(found, mine, rtol=1e-3)


@pytest.mark.parametrize("cut", [1, 7, 100, 1000])
def test_direct_gives_the_same_bits_however_the_slab_is_cut(
    engine: Engine, world: World, cut: int
) -> None:
    mine = values(world.rank, 1000, torch.float32)
    whole = summed(engine, "direct", mine, 1 / 3)
    pieces = [summed(engine, "direct", piece, 1 / 3) for piece in mine.split(cut)]
    assert torch.equal(torch.cat(pieces), whole)


def test_planned_operations_run_again_and_again_on_a_small_ring(
    engine: Engine, world: World
) -> None:
    """Slabs take turns with scratch that is far smaller than all of them together."""
    channel = engine.channel("ring", in_flight_bytes=9000)
    slabs = [Slab.allocate(n, torch.float32) for n in (1, 1000, 3, 77, 2000, 900, 1, 1500)]
    wires = [None, torch.bfloat16] * 4
    needed = [
        aligned(reduce.scratch_bytes(slab, wire, world.size))
        for slab, wire in zip(slabs, wires, strict=True)
    ]
    ring = Ring(9000 + 8 * 128 * world.size, max(needed))
    operations = [
        reduce.all_reduce("direct", slab, 1.0, wire, scratch=ring.part(nbytes), lane=lane)
        for lane, (slab, wire, nbytes) in enumerate(zip(slabs, wires, needed, strict=True))
    ]
    for turn in range(5):
        for slab in slabs:
            slab.tensor.copy_(values(world.rank + turn, slab.tensor.numel(), torch.float32))
        tickets = [
            channel.post(operation, "sum", slab.nbytes)
            for operation, slab in zip(operations, slabs, strict=True)
        ]
        for ticket in tickets:
            engine.wait(ticket)
        for slab, wire in zip(slabs, wires, strict=True):
            parts = [
                values(rank + turn, slab.tensor.numel(), torch.float32).to(wire or torch.float32)
                for rank in range(world.size)
            ]
            assert torch.equal(slab.tensor, in_rank_order(parts, 1.0).float()), turn


def test_infinity_and_nan_reach_every_rank(engine: Engine, world: World) -> None:
    mine = torch.ones(9)
    if world.rank == world.size - 1:
        mine[4], mine[5] = float("inf"), float("nan")
    for way in reduce.WAYS:
        found = summed(engine, way, mine)
        assert found[4] == float("inf")
        assert found[5].isnan()
        assert found[[0, 8]].tolist() == [world.size, world.size]
