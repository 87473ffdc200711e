"""Costs of all-reduces: limits that any of them must keep, and known values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hpctrain.comm import reduce
from hpctrain.plan.cost import DIRECT_NODES, WAYS, Cost, Layout, Links, all_reduce

LINKS = Links(latency_s=1e-4, bytes_per_s=1e8, memory_bytes_per_s=1e10, overhead_s=1e-5)
BETWEEN = [way for way in WAYS if way != "shared"]
LAYOUTS = [
    Layout(nodes=nodes, ranks_per_node=ranks)
    for nodes in (2, 3, 4, 7, 16, 17)
    for ranks in (1, 2, 8)
]
SIZES = (1, 100, 1 << 16, 1 << 18, 1 << 26)


def test_ways_are_those_of_the_reducer() -> None:
    on_host = tuple(way for way in reduce.WAYS if way not in reduce.STAY_ON_DEVICE)
    assert on_host == WAYS
    assert DIRECT_NODES == reduce.DIRECT_RANKS


@pytest.mark.parametrize("way", WAYS)
def test_one_rank_costs_nothing(way: str) -> None:
    assert all_reduce(way, 1 << 20, Layout(nodes=1), LINKS) == Cost(0, 0, 0)


@pytest.mark.parametrize("way", BETWEEN)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_bytes_cost_latencies_and_overheads_only(way: str, layout: Layout) -> None:
    cost = all_reduce(way, 0, layout, LINKS)
    assert cost.wire_s == 0
    rounds, rest = divmod((cost.alone_s - cost.processor_s) / LINKS.latency_s + 1e-6, 1)
    assert rounds >= 2
    assert rest < 1e-5
    assert cost.processor_s >= 2 * LINKS.overhead_s


@pytest.mark.parametrize("way", BETWEEN)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("halving", [False, True])
def test_no_way_is_faster_than_the_links_allow(way: str, layout: Layout, halving: bool) -> None:
    """A node must send 2 (n-1)/n of a slab (Patarasuk and Yuan, 2009)."""
    for nbytes in SIZES:
        cost = all_reduce(way, nbytes, layout, replace(LINKS, halving=halving))
        least_s = 2 * (layout.nodes - 1) / layout.nodes * nbytes / LINKS.bytes_per_s
        assert cost.wire_s >= least_s * (1 - 1e-12)
        assert cost.alone_s >= cost.busy_s >= cost.wire_s


def test_ring_halving_and_direct_between_single_ranks_are_bandwidth_optimal() -> None:
    for nodes in (2, 4, 16):
        layout = Layout(nodes=nodes)
        for way in ("ring", "direct", "native"):
            cost = all_reduce(way, 1 << 20, layout, replace(LINKS, halving=True))
            least_s = 2 * (nodes - 1) / nodes * (1 << 20) / LINKS.bytes_per_s
            assert cost.wire_s == pytest.approx(least_s)


@pytest.mark.parametrize("way", BETWEEN)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_more_bytes_never_cost_less(way: str, layout: Layout) -> None:
    links = replace(LINKS, eager_bytes=1 << 16, handshake=0.2)
    costs = [all_reduce(way, nbytes, layout, links) for nbytes in SIZES]
    assert sorted(costs, key=lambda cost: cost.alone_s) == costs
    assert sorted(costs, key=lambda cost: cost.busy_s) == costs


@pytest.mark.parametrize("way", BETWEEN)
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_more_ranks_are_never_faster(way: str, ranks: int) -> None:
    for nbytes in SIZES:
        costs = [
            all_reduce(way, nbytes, Layout(nodes=nodes, ranks_per_node=ranks), LINKS)
            for nodes in (1, 2, 3, 4, 6, 8, 13, 16)
        ]
        alone = [cost.alone_s for cost in costs]
        wire = [cost.wire_s for cost in costs]
        assert alone == sorted(alone)
        assert wire == sorted(wire)


def test_halving_takes_logarithmically_many_rounds() -> None:
    links = replace(LINKS, halving=True, overhead_s=0.0)
    for size, rounds in ((2, 2), (4, 4), (1024, 20), (1025, 22)):
        cost = all_reduce("native", 0, Layout(nodes=size), links)
        assert cost.alone_s == pytest.approx(rounds * LINKS.latency_s)


@pytest.mark.parametrize(
    ("nodes", "ranks", "into_or_out"),
    [(2, 1, 1), (3, 1, 2), (4, 1, 2), (5, 1, 3), (8, 1, 3), (2, 2, 2)],
)
def test_tree_is_limited_by_its_busiest_node(nodes: int, ranks: int, into_or_out: int) -> None:
    """With 2 ranks on each of 2 nodes, the broadcast sends from 0 to 2 and from 1 to 3."""
    layout = Layout(nodes=nodes, ranks_per_node=ranks)
    cost = all_reduce("native", 1000, layout, LINKS)
    assert cost.wire_s == pytest.approx(into_or_out * 1000 / LINKS.bytes_per_s)


def test_what_waits_for_acknowledgements_takes_turns_in_a_tree() -> None:
    """A root with two children: 2 operands in and 2 out, of which 3 in 4 bytes wait."""
    links = replace(LINKS, eager_bytes=1 << 16)
    cost = all_reduce("native", 1 << 18, Layout(nodes=3), links)
    assert cost.wire_s == pytest.approx((2 + 0.75 * 2) * (1 << 18) / LINKS.bytes_per_s)
    small = all_reduce("native", 1 << 16, Layout(nodes=3), links)
    assert small.wire_s == pytest.approx(2 * (1 << 16) / LINKS.bytes_per_s)


def test_handshakes_cost_messages_that_are_larger_than_eager_ones() -> None:
    links = replace(LINKS, eager_bytes=1000, handshake=0.25)
    for way in ("ring", "direct"):
        at_once = all_reduce(way, 4000, Layout(nodes=4), links)
        assert at_once.wire_s == all_reduce(way, 4000, Layout(nodes=4), LINKS).wire_s
        waits = all_reduce(way, 4400, Layout(nodes=4), links)
        assert waits.wire_s == pytest.approx(1.1 * 1.25 * at_once.wire_s)


def test_two_levels_send_less_than_all_pairs_between_nodes() -> None:
    layout = Layout(nodes=4, ranks_per_node=8)
    direct = all_reduce("direct", 1 << 20, layout, LINKS)
    two_level = all_reduce("two_level", 1 << 20, layout, LINKS)
    assert direct.wire_s == pytest.approx(8 * two_level.wire_s)
    assert two_level.processor_s < direct.processor_s


def test_shared_memory_has_no_latency_and_no_second_node() -> None:
    node = Layout(nodes=1, ranks_per_node=8)
    cost = all_reduce("shared", 1 << 20, node, LINKS)
    assert cost.wire_s == 0
    assert cost.alone_s == cost.processor_s == all_reduce("two_level", 1 << 20, node, LINKS).alone_s
    assert cost.alone_s >= 2 * (1 << 20) / LINKS.memory_bytes_per_s
    with pytest.raises(ValueError, match="within one node, and the layout is 2x8"):
        all_reduce("shared", 1 << 20, replace(node, nodes=2), LINKS)


def test_crowded_cores_slow_the_processors_part_only() -> None:
    layout = Layout(nodes=4)
    for way in ("native", "direct", "ring"):
        one = all_reduce(way, 1 << 20, layout, LINKS)
        three = all_reduce(way, 1 << 20, layout, replace(LINKS, crowding=3.0))
        assert three.processor_s == pytest.approx(3 * one.processor_s)
        assert three.wire_s == one.wire_s
        assert three.alone_s - one.alone_s == pytest.approx(2 * one.processor_s)


def test_ten_thousand_ranks_have_finite_costs() -> None:
    layout = Layout(nodes=1280, ranks_per_node=8)
    for way in BETWEEN:
        assert math.isfinite(all_reduce(way, 1 << 22, layout, LINKS).alone_s)


def test_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match="way = 'rign': allowed are native"):
        all_reduce("rign", 1, Layout(nodes=2), LINKS)
