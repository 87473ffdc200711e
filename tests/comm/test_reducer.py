"""Slabs of one exchange: made, planned and averaged, whichever way is taken."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from hpctrain import World
from hpctrain.comm.collect import all_gather
from hpctrain.comm.engine import Engine, engine_of
from hpctrain.comm.memory import Slab
from hpctrain.comm.reducer import Parts, ReduceOptions, Reducer
from hpctrain.errors import ExchangeError

pytestmark = pytest.mark.mpi

COUNTS = [3, 100_003, 0, 5000]
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16]


def layouts(size: int) -> list[list[list[int]]]:
    """Ranks by node: one node, each rank alone, two nodes as even as can be, one rank apart."""
    ranks = list(range(size))
    half = -(-size // 2)
    found = [[ranks], [[rank] for rank in ranks]]
    if size > 2:
        found += [[ranks[:half], ranks[half:]], [ranks[:-1], ranks[-1:]]]
    return found


@pytest.fixture
def engine(world: World) -> Engine:
    if world.size == 1:
        pytest.skip("a single rank has nobody to sum with")
    return engine_of(world)


def pretend(engine: Engine, nodes: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the ranks take other ranks of this machine for ranks of other nodes."""
    roots = {rank: ranks[0] for ranks in nodes for rank in ranks}
    seats = tuple(
        replace(seat, local_root=roots[rank]) for rank, seat in enumerate(engine.world.seats)
    )
    monkeypatch.setattr(engine, "world", replace(engine.world, seats=seats))


def values(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(rank)).to(dtype)


def average(reducer: Reducer, slabs: list[Slab], engine: Engine, rank: int) -> None:
    for slab in slabs:
        slab.tensor.copy_(values(rank, slab.tensor.numel(), slab.tensor.dtype))
    tickets = [
        t for index in range(len(slabs)) for t in reducer.post(Parts(index), f"slab {index}")
    ]
    for ticket in tickets:
        engine.wait(ticket)


WAYS = ("auto", "direct", "ring", "two_level")
WAYS_AND_WIRES = [("native", "same"), *product(WAYS, ("same", "bfloat16"))]


@pytest.mark.parametrize(("way", "wire"), WAYS_AND_WIRES)
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 4096])
def test_average_over_pretended_nodes(
    engine: Engine,
    world: World,
    way: str,
    wire: str,
    chunk_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for nodes in layouts(world.size):
        pretend(engine, nodes, monkeypatch)
        options = ReduceOptions(way=way, wire=wire, chunk_bytes=chunk_bytes)
        reducer = Reducer(engine.channel("reducer"), options)
        slabs = reducer.allocate(COUNTS, DTYPES)
        reducer.plan(slabs)
        for _ in range(2):  # planned once, run again
            average(reducer, slabs, engine, world.rank)
            assert_averages(engine, slabs, narrow=wire != "same")


def assert_averages(engine: Engine, slabs: list[Slab], narrow: bool) -> None:
    """Close to the exact average, and the same bits on all ranks."""
    size = engine.world.size
    for found in (slab.tensor for slab in slabs):
        parts = [values(rank, found.numel(), found.dtype).double() for rank in range(size)]
        exact = sum(parts) / size
        step = max(torch.finfo(found.dtype).eps, torch.finfo(torch.bfloat16).eps if narrow else 0)
        # Each of at most `size` additions rounds a sum that is no larger than that of magnitudes.
        bound = sum(part.abs() for part in parts) * step * (size + 1) / 2
        assert ((found.double() - exact).abs() <= bound).all()
    bits = [slab.tensor.view(torch.uint8).numpy().tobytes() for slab in slabs]
    assert all(other == bits for other in all_gather(engine.control, bits))


def test_ordered_sums_do_not_depend_on_chunks(
    engine: Engine, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for nodes in layouts(world.size):
        pretend(engine, nodes, monkeypatch)
        found = []
        for chunk_bytes in (1 << 20, 64, 1_235):
            options = ReduceOptions(ordered=True, chunk_bytes=chunk_bytes)
            reducer = Reducer(engine.channel("ordered"), options)
            slabs = reducer.allocate([3001], [torch.float32])
            reducer.plan(slabs)
            average(reducer, slabs, engine, world.rank)
            found.append(slabs[0].tensor.clone())
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("way", ["direct", "ring", "two_level"])
def test_scratch_that_is_far_too_small_for_all_gives_right_sums(
    engine: Engine, world: World, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many tiny slabs, whose scratch is larger than they are, wait for each other's."""
    counts = [3, 500, 1, 2, 7, 900] * 20
    for nodes in layouts(world.size):
        pretend(engine, nodes, monkeypatch)
        channel = engine.channel("tight", in_flight_bytes=1000)
        options = ReduceOptions(way=way, in_flight_bytes=1000, wire="bfloat16")
        reducer = Reducer(channel, options)
        slabs = reducer.allocate(counts, [torch.float32] * len(counts))
        reducer.plan(slabs)
        average(reducer, slabs, engine, world.rank)
        assert_averages(engine, slabs, narrow=True)


def test_two_level_on_one_node_is_shared(engine: Engine) -> None:
    reducer = Reducer(engine.channel("one node"), ReduceOptions(way="two_level"))
    slabs = reducer.allocate([100], [torch.float32])
    reducer.plan(slabs)
    assert reducer.ways == ["shared"]


def test_ways_of_an_earlier_run_are_kept(engine: Engine, world: World) -> None:
    reducer = Reducer(engine.channel("kept"), ReduceOptions())
    slabs = reducer.allocate([100, 200], [torch.float32] * 2)
    reducer.plan(slabs, ways=["direct", "shared"])
    assert reducer.ways == ["direct", "shared"]
    assert not reducer.tried
    average(reducer, slabs, engine, world.rank)
    expected = sum(values(rank, 200, torch.float32) for rank in range(world.size)) / world.size
    assert torch.allclose(slabs[1].tensor, expected)


def test_ways_that_are_no_longer_possible_are_chosen_again(engine: Engine) -> None:
    reducer = Reducer(engine.channel("again"), ReduceOptions())
    slabs = reducer.allocate([100], [torch.float32])
    reducer.plan(slabs, ways=["two_level"])
    assert reducer.ways[0] in ("shared", "direct")


def test_shared_is_refused_between_nodes(
    engine: Engine, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(engine, [[rank] for rank in range(world.size)], monkeypatch)
    with pytest.raises(ExchangeError, match="within one node"):
        Reducer(engine.control, ReduceOptions(way="shared"))
