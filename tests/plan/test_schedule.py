"""The schedule of a step: between its longest part and the sum of all, and the window's effect."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from hpctrain import ExchangeConfig
from hpctrain.comm import channel, reduce
from hpctrain.comm.memory import Slab, chunk_cuts
from hpctrain.plan.cost import WAYS, Layout, Links, all_reduce
from hpctrain.plan.schedule import (
    Step,
    Window,
    Work,
    _chunks,
    _scratch_bytes,
    exchanged_s,
    step_s,
)

LINKS = Links(latency_s=1e-3, bytes_per_s=1e7, memory_bytes_per_s=1e10, overhead_s=1e-5)
FOUR = Layout(nodes=4)
WORK = Work.even(0.1, 0.2, 0.01, [100_000, 400_000, 1_000_000, 300_000])


@pytest.mark.parametrize("nbytes", [64, 4096, 4608, 4672, 8192, 8256, 40_000, 1 << 20])
def test_blocks_are_cut_as_slabs_are(nbytes: int) -> None:
    """Up to cache lines; what exceeds a chunk by less than an eighth is not worth another."""
    chunks = _chunks("direct", nbytes, 4096)
    assert sum(chunks) == nbytes
    cuts = chunk_cuts(nbytes // 4, 4, 4096) or [slice(0, nbytes // 4)]
    assert len(cuts) == len(chunks)
    assert all(
        abs(4 * (cut.stop - cut.start) - size) <= 64 * len(cuts)
        for cut, size in zip(cuts, chunks, strict=True)
    )
    assert max(chunks) <= 4096 * 9 / 8


def test_window_is_the_engines() -> None:
    config, window = ExchangeConfig(), Window()
    assert window.chunk_bytes == config.chunk_bytes
    assert window.in_flight_bytes == config.in_flight_bytes
    assert window.operations == channel.IN_FLIGHT


@pytest.mark.parametrize("way", ["native", "direct", "ring", "two_level"])
@pytest.mark.parametrize("nbytes", [4, 4000, 1 << 18])
def test_scratch_is_what_the_reducer_counts(way: str, nbytes: int) -> None:
    place = cast(Any, SimpleNamespace(across=range(3), lanes=2))
    slab = Slab(torch.zeros(nbytes // 4), place)
    expected = reduce.scratch_bytes(way, slab, None, 6)
    found = _scratch_bytes(way, nbytes, Layout(nodes=3, ranks_per_node=2))
    assert abs(found - expected) <= 64 * 2 * 4  # slices are whole elements, and on cache lines


def test_one_rank_only_computes() -> None:
    step = Step(work=WORK, way="ring", layout=Layout(nodes=1))
    assert step_s(step, LINKS) == pytest.approx(0.31)


def test_blocks_are_ready_in_proportion_to_their_bytes() -> None:
    assert Work.even(0, 1.0, 0, [1, 3, 4]).blocks == ((0.125, 1), (0.5, 3), (1.0, 4))
    assert Work.even(0, 1.0, 0, []).blocks == ()


@pytest.mark.parametrize("way", [way for way in WAYS if way != "shared"])
@pytest.mark.parametrize("rate", [1e5, 1e6, 1e7, 1e8, 1e12])
def test_step_is_between_its_longest_part_and_the_sum_of_all(way: str, rate: float) -> None:
    links = replace(LINKS, bytes_per_s=rate)
    window = Window(chunk_bytes=1 << 30)
    step = Step(work=WORK, way=way, layout=FOUR, window=window)
    costs = [all_reduce(way, nbytes, FOUR, links) for _, nbytes in WORK.blocks]
    compute_s = WORK.forward_s + WORK.backward_s + WORK.optimizer_s
    first_s = WORK.blocks[0][0]
    took_s = step_s(step, links)
    around_s = WORK.forward_s + WORK.optimizer_s
    assert took_s >= compute_s
    assert took_s >= around_s + first_s + sum(cost.busy_s for cost in costs)
    assert took_s >= around_s + WORK.backward_s + costs[-1].alone_s
    assert took_s <= compute_s + sum(cost.alone_s for cost in costs) + 1e-9


def test_exchange_without_blocks_takes_no_time() -> None:
    assert exchanged_s(Step(work=Work.even(0.1, 0.2, 0, []), way="ring", layout=FOUR), LINKS) == 0


def test_window_hides_latencies() -> None:
    """All at once, latencies of operations pass together; one at a time, they add up."""
    work = Work.even(0, 0, 0, [20 * (1 << 16)])
    window = Window(chunk_bytes=1 << 16)
    links = replace(LINKS, latency_s=1e-2)
    one = all_reduce("ring", 1 << 16, FOUR, links)

    def took_s(window: Window) -> float:
        return exchanged_s(Step(work=work, way="ring", layout=FOUR, window=window), links)

    assert took_s(window) == pytest.approx(19 * one.busy_s + one.alone_s)
    assert took_s(replace(window, operations=1)) == pytest.approx(20 * one.alone_s)
    scratch = _scratch_bytes("ring", 1 << 16, FOUR)
    two = took_s(replace(window, in_flight_bytes=2 * scratch))
    assert two == took_s(replace(window, operations=2))
    assert took_s(window) < two < 20 * one.alone_s
    assert took_s(replace(window, in_flight_bytes=1)) == pytest.approx(20 * one.alone_s)


def test_chunks_make_large_blocks_finish_earlier_than_whole_ones_of_a_tree() -> None:
    """What goes down the tree overlaps with what goes up, chunk by chunk."""
    work = Work.even(0, 0, 0, [1 << 22])
    links = replace(LINKS, latency_s=1e-6)
    whole, cut = (
        exchanged_s(
            Step(work=work, way="native", layout=FOUR, window=Window(chunk_bytes=chunk)), links
        )
        for chunk in (1 << 22, 1 << 18)
    )
    assert cut < 0.6 * whole


def test_shared_blocks_are_not_cut() -> None:
    node = Layout(nodes=1, ranks_per_node=4)
    work = Work.even(0, 0, 0, [1 << 22])
    step = Step(work=work, way="shared", layout=node)
    assert exchanged_s(step, LINKS) == all_reduce("shared", 1 << 22, node, LINKS).alone_s


def test_faster_links_never_make_a_step_slower() -> None:
    for way in ("native", "direct", "ring"):
        step = Step(work=WORK, way=way, layout=FOUR)
        times = [step_s(step, replace(LINKS, bytes_per_s=rate)) for rate in (1e6, 1e7, 1e8, 1e9)]
        assert times == sorted(times, reverse=True)
        assert times[-1] < times[0]
