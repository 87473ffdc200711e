"""Which way is chosen from measured times, and that trying leaves the slabs as they were."""

from __future__ import annotations

import pytest
import torch

from hpctrain import World
from hpctrain.comm.channel import Operation, Steps
from hpctrain.comm.engine import engine_of
from hpctrain.comm.memory import Slab
from hpctrain.comm.select import fastest, kind_of, select, size_text


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({}, None),
        ({"direct": 3.0}, "direct"),
        ({"shared": 1.0, "direct": 2.0}, "shared"),
        ({"shared": 1.0, "direct": 0.97}, "shared"),
        ({"shared": 1.0, "direct": 0.9, "ring": 0.8}, "ring"),
    ],
)
def test_the_preferred_way_stays_unless_another_is_clearly_faster(
    times: dict[str, float], chosen: str | None
) -> None:
    assert fastest(times) == chosen


def test_slabs_of_about_one_size_and_one_dtype_are_of_one_kind() -> None:
    kinds = [kind_of(Slab(torch.zeros(n))) for n in (0, 1000, 1100, 1_000_000)]
    assert kinds[1] == kinds[2]
    assert len(set(kinds)) == 3
    assert kind_of(Slab(torch.zeros(500, dtype=torch.float64))) != kinds[1]


def test_sizes_are_told_in_one_unit_each() -> None:
    assert [size_text(n) for n in (500, 25_600, 4_194_304)] == ["0.5 kB", "25.6 kB", "4.19 MB"]


@pytest.mark.mpi
def test_the_faster_way_is_found_and_contents_are_kept(world: World) -> None:
    engine = engine_of(world)
    channel = engine.channel("select")
    slab = Slab(torch.full((64,), float(world.rank)))

    def operations(way: str, slab: Slab) -> list[Operation]:
        def steps(comm: object, tag: int) -> Steps:
            for _ in range(1 if way == "fast" else 5000):
                slab.tensor.add_(1)
            yield []

        return [steps]

    [tried] = select(channel, [slab], lambda _: ["slow", "fast"], operations).values()
    assert tried.way == "fast"
    assert set(tried.times_s) == {"slow", "fast"}
    assert (slab.tensor == world.rank).all()
    assert "by fast (slow" in str(tried)
