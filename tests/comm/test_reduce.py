"""Sums over real ranks, against the same sums made one after another."""

from __future__ import annotations

import pytest
import torch

from hpctrain import World
from hpctrain.comm import reduce
from hpctrain.comm.collect import all_gather
from hpctrain.comm.engine import Engine, engine_of
from hpctrain.comm.memory import ScratchRing, Slab, aligned
from hpctrain.comm.node import shared_slabs
from hpctrain.comm.reduce.sums import slices

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
    if way in reduce.IN_SHARED_MEMORY:
        slab = shared_slab(engine, mine)
    operation = reduce.all_reduce(way, slab, scale, wire)
    engine.control.run(operation, way)
    return slab.tensor.clone()


def shared_slab(engine: Engine, mine: torch.Tensor) -> Slab:
    if engine.world.size == 1:
        pytest.skip("a single rank shares memory with nobody")
    slabs = shared_slabs(engine, [mine.numel()], [mine.dtype])
    assert slabs is not None
    slabs[0].tensor.copy_(mine)
    return slabs[0]


@pytest.mark.parametrize("way", ["direct", "shared"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_direct_and_shared_sum_in_rank_order(
    engine: Engine, world: World, dtype: torch.dtype, way: str
) -> None:
    for count in COUNTS:
        scale = 1 / world.size
        found = summed(engine, way, values(world.rank, count, dtype), scale)
        parts = [values(rank, count, dtype) for rank in range(world.size)]
        assert torch.equal(found, in_rank_order(parts, scale))


@pytest.mark.parametrize("way", ["native", "ring"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_native_and_ring_are_close_and_the_same_everywhere(
    engine: Engine, world: World, dtype: torch.dtype, way: str
) -> None:
    for count in COUNTS:
        found = summed(engine, way, values(world.rank, count, dtype), 0.5)
        parts = [values(rank, count, dtype) for rank in range(world.size)]
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        assert torch.allclose(found, in_rank_order(parts, 0.5), rtol=tolerance, atol=tolerance)
        assert all(torch.equal(found, other) for other in all_gather(engine.control, found))


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_narrow_wire_rounds_each_part_and_the_sum_once(
    engine: Engine, world: World, dtype: torch.dtype, wire: torch.dtype
) -> None:
    for count in COUNTS:
        scale = 1 / world.size
        found = summed(engine, "direct", values(world.rank, count, dtype), scale, wire)
        parts = [(values(rank, count, dtype) * scale).to(wire) for rank in range(world.size)]
        assert torch.equal(found, in_rank_order(parts, 1.0).to(dtype))


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ring_with_a_narrow_wire_rounds_once_a_hop(
    engine: Engine, world: World, dtype: torch.dtype, wire: torch.dtype
) -> None:
    for count in COUNTS:
        scale = 1 / world.size
        found = summed(engine, "ring", values(world.rank, count, dtype), scale, wire)
        parts = [values(rank, count, dtype) for rank in range(world.size)]
        exact = sum(part.double() for part in parts) * scale
        # Each hop rounds a partial sum, which is at most the sum of magnitudes, to half a step.
        narrow = dtype if dtype.itemsize == 2 else wire
        magnitude = sum(part.double().abs() for part in parts) * scale
        bound = magnitude * torch.finfo(narrow).eps * (world.size + 1) + torch.finfo(narrow).tiny
        assert ((found.double() - exact).abs() <= bound).all()
        assert all(torch.equal(found, other) for other in all_gather(engine.control, found))


def test_ring_sums_each_slice_in_its_own_order(engine: Engine, world: World) -> None:
    """Slice m begins on rank m; with numbers whose order of summation shows in the bits."""
    count = 8 * world.size
    parts = [values(rank, count, torch.float32) * 10.0**rank for rank in range(world.size)]
    found = summed(engine, "ring", parts[world.rank])
    for index, cut in enumerate(slices(count, world.size)):
        turned = parts[index:] + parts[:index]
        assert torch.equal(found[cut], in_rank_order([part[cut] for part in turned], 1.0))


def test_large_float16_gradients_do_not_overflow_on_the_wire(engine: Engine, world: World) -> None:
    mine = torch.full((10,), 60_000.0)
    found = summed(engine, "direct", mine, 1 / world.size, torch.float16)
    assert torch.allclose(found, mine, rtol=1e-3)


@pytest.mark.parametrize("way", ["direct", "shared"])
@pytest.mark.parametrize("cut", [77, 100, 1000])
def test_rank_order_gives_the_same_bits_however_the_slab_is_cut(
    engine: Engine, world: World, cut: int, way: str
) -> None:
    mine = values(world.rank, 1000, torch.float32)
    whole = summed(engine, way, mine, 1 / 3)
    pieces = [summed(engine, way, piece, 1 / 3) for piece in mine.split(cut)]
    assert torch.equal(torch.cat(pieces), whole)


def test_planned_operations_run_again_and_again_on_a_small_ring(
    engine: Engine, world: World
) -> None:
    """Slabs take turns with scratch that is far smaller than all of them together."""
    channel = engine.channel("ring", in_flight_bytes=9000)
    slabs = [Slab.allocate(n, torch.float32) for n in (1, 1000, 3, 77, 2000, 900, 1, 1500)]
    wires = [None, torch.bfloat16] * 4
    needed = [
        aligned(reduce.scratch_bytes("direct", slab, wire, world.size))
        for slab, wire in zip(slabs, wires, strict=True)
    ]
    ring = ScratchRing(9000 + 8 * 128 * world.size, max(needed))
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
    ways = [way for way in reduce.WAYS if world.size > 1 or way not in reduce.IN_SHARED_MEMORY]
    for way in ways:
        found = summed(engine, way, mine)
        assert found[4] == float("inf")
        assert found[5].isnan()
        assert found[[0, 8]].tolist() == [world.size, world.size]
