"""Slabs of one exchange: made, planned and averaged, whichever way is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hpctrain import World
from hpctrain.comm.engine import Engine, engine_of
from hpctrain.comm.memory import Slab
from hpctrain.comm.reducer import ReduceOptions, Reducer
from hpctrain.errors import ExchangeError

pytestmark = pytest.mark.mpi

COUNTS = [3, 100_003, 0, 5000]
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16]
LAYOUTS = {
    2: [[[0, 1]], [[0], [1]]],
    3: [[[0, 1, 2]], [[0, 1], [2]], [[0], [1], [2]]],
    4: [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 1, 2], [3]]],
}


@pytest.fixture
def engine(world: World) -> Engine:
    if world.size not in LAYOUTS:
        pytest.skip("layouts are listed for 2 to 4 ranks")
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
    tickets = [t for index in range(len(slabs)) for t in reducer.post(index, f"slab {index}")]
    for ticket in tickets:
        engine.wait(ticket)


@pytest.mark.parametrize("layout", range(3))
@pytest.mark.parametrize("way", ["auto", "direct", "ring", "two_level", "native"])
@pytest.mark.parametrize("wire", ["same", "bfloat16"])
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 4096])
def test_average_over_pretended_nodes(
    engine: Engine,
    world: World,
    layout: int,
    way: str,
    wire: str,
    chunk_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if layout >= len(LAYOUTS[world.size]):
        pytest.skip("fewer layouts for this number of ranks")
    if way == "native" and wire != "same":
        pytest.skip("refused by ExchangeConfig")
    pretend(engine, LAYOUTS[world.size][layout], monkeypatch)
    channel = engine.channel("reducer")
    options = ReduceOptions(way=way, wire=wire, chunk_bytes=chunk_bytes)
    reducer = Reducer(channel, options)
    slabs = reducer.allocate(COUNTS, DTYPES)
    reducer.plan(slabs)
    for _ in range(2):  # planned once, run again
        average(reducer, slabs, engine, world.rank)
        for slab, count, dtype in zip(slabs, COUNTS, DTYPES, strict=True):
            parts = [values(rank, count, dtype).double() for rank in range(world.size)]
            exact = sum(parts) / world.size
            steps = torch.finfo(dtype).eps
            if wire != "same":
                steps = max(steps, torch.finfo(torch.bfloat16).eps)
            magnitude = sum(part.abs() for part in parts)
            assert ((slab.tensor.double() - exact).abs() <= magnitude * steps * 2).all()
            bits = [t.tolist() for t in _all(engine, slab.tensor)]
            assert all(other == bits[0] for other in bits)


def _all(engine: Engine, tensor: torch.Tensor) -> list[torch.Tensor]:
    from hpctrain.comm.collect import all_gather

    return all_gather(engine.control, tensor.clone())


@pytest.mark.parametrize("layout", range(3))
def test_ordered_sums_do_not_depend_on_chunks(
    engine: Engine, world: World, layout: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layout >= len(LAYOUTS[world.size]):
        pytest.skip("fewer layouts for this number of ranks")
    pretend(engine, LAYOUTS[world.size][layout], monkeypatch)
    found = []
    for chunk_bytes in (1 << 20, 64, 12_345):
        reducer = Reducer(
            engine.channel("ordered"), ReduceOptions(ordered=True, chunk_bytes=chunk_bytes)
        )
        slabs = reducer.allocate([10_007], [torch.float32])
        reducer.plan(slabs)
        average(reducer, slabs, engine, world.rank)
        found.append(slabs[0].tensor.clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


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
