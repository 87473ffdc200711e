"""The best that holders can do, against trying everything, and what was slow, against what was
planted."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest

from hpctrain import straggling
from hpctrain.straggling import (
    GIVEN_UP,
    REDUNDANT,
    USED,
    CodedStep,
    median_polish,
    read_steps,
    slowness,
    smallest_time,
)
from hpctrain.trace import CODED, DATA_BLOCKS


def ring(workers: int, owned: int) -> list[list[int]]:
    """Holders of data blocks when the next worker holds what a worker owns."""
    return [[block // owned, (block // owned + 1) % workers] for block in range(workers * owned)]


def tried_all(durations: dict[int, float], holders: Sequence[Sequence[int]]) -> float:
    """The smallest time over all ways to give each data block to a holder."""
    choices = [[rank for rank in ranks if rank in durations] for ranks in holders]
    return min(
        (
            max((durations[rank] * way.count(rank) for rank in way), default=0.0)
            for way in itertools.product(*choices)
        ),
        default=math.inf,
    )


# ---------------------------------------------------------------------- the best that can be


@pytest.mark.parametrize("seed", range(60))
def test_smallest_time_is_the_best_of_all_ways(seed: int) -> None:
    draw = random.Random(seed)
    workers, blocks = draw.randint(1, 5), draw.randint(0, 7)
    durations = {rank: draw.choice([0.1, 0.25, 0.3, 0.7, draw.random()]) for rank in range(workers)}
    holders = [draw.sample(range(workers), draw.randint(1, workers)) for _ in range(blocks)]
    if draw.random() < 0.3:
        del durations[draw.randrange(workers)]
    assert smallest_time(durations, holders) == pytest.approx(tried_all(durations, holders))


def test_one_of_eight_workers_at_a_fifth_of_the_speed() -> None:
    """Seven do five data blocks each, the slow one its first: any 100 ms are too short for 32."""
    assert smallest_time(
        {rank: 0.125 if rank == 3 else 0.025 for rank in range(8)}, ring(8, 4)
    ) == (pytest.approx(0.125))


@pytest.mark.parametrize("slow", [(0, 4), (0, 1)])
def test_two_of_eight_workers_at_half_speed(slow: tuple[int, int]) -> None:
    """By 125 ms six do five each and two do two each, 34 in all; by 100 ms it is 28 of 32."""
    durations = {rank: 0.05 if rank in slow else 0.025 for rank in range(8)}
    assert smallest_time(durations, ring(8, 4)) == pytest.approx(0.125)


def test_without_redundancy_the_slowest_decides() -> None:
    holders = [[block // 4] for block in range(8)]
    assert smallest_time({0: 0.025, 1: 0.125}, holders) == pytest.approx(0.5)


def test_data_block_that_nobody_can_compute() -> None:
    assert smallest_time({0: 1.0}, [[0], [1]]) == math.inf
    assert smallest_time({}, [[0]]) == math.inf
    assert smallest_time({0: 1.0}, [[]]) == math.inf


def test_nothing_takes_no_time() -> None:
    assert smallest_time({0: 1.0}, []) == 0.0
    assert smallest_time({0: 0.0}, [[0], [0]]) == 0.0


def test_many_workers_are_quick() -> None:
    draw = random.Random(0)
    durations = {rank: draw.uniform(0.02, 0.2) for rank in range(128)}
    begun_s = time.perf_counter()
    assert 0.05 < smallest_time(durations, ring(128, 8)) < 1.6
    assert time.perf_counter() - begun_s < 5


# ---------------------------------------------------------------------- figures of a step


def attempt(
    rank: int, block: int, length_s: float, computed: bool = True, step: int = 1, at_s: float = 0.0
) -> dict[str, Any]:
    return {
        "track": DATA_BLOCKS, "name": f"data block {block}", "rank": rank, "start_s": at_s,
        "end_s": at_s + length_s, "step": step, "block": block, "computed": computed,
    }  # fmt: skip


def root(holders: list[list[int]], took_s: float, step: int = 1, **facts: Any) -> dict[str, Any]:
    return {
        "track": CODED, "name": "step", "rank": 0, "start_s": 0.0, "end_s": took_s, "step": step,
        "holders": holders, "sources": [ranks[0] for ranks in holders], "redundant": [],
        "vectors": 2.0, "samples": [8] * len(holders), **facts,
    }  # fmt: skip


def one_step(*spans: dict[str, Any]) -> CodedStep:
    (step,), damaged = read_steps(spans)
    assert damaged == 0
    return step


HOLDERS = [[0, 1], [0, 1], [1, 0], [1, 0]]


def test_figures_of_a_step() -> None:
    """Worker 1 is slow: worker 0 does one of its data blocks, and begins the other in vain."""
    step = one_step(
        root(HOLDERS, took_s=3.3, sources=[0, 0, 1, 0]),
        *(attempt(0, 0, 1.0), attempt(0, 1, 1.0), attempt(0, 3, 1.0), attempt(0, 2, 0.25, False)),
        *(attempt(1, 2, 3.0), attempt(1, 3, 0.75, False)),
    )
    assert step.took_s == pytest.approx(3.3)
    assert step.best_s == pytest.approx(3.0)
    assert step.ratio == pytest.approx(1.1)
    assert step.redundant_share == 0
    assert step.busy_s == pytest.approx(7.0) and step.wasted_s == pytest.approx(1.0)
    assert [step.fate(a) for a in step.attempts] == [USED] * 3 + [GIVEN_UP, USED, GIVEN_UP]


def test_redundant_is_what_the_root_or_a_worker_saw() -> None:
    """The root told of one that a worker whose trace is missing computed; it missed a late one."""
    spans = [attempt(0, block, 1.0) for block in range(4)]
    told = root(HOLDERS, took_s=4.0, sources=[0] * 4, redundant=[[2, 5]])
    step = one_step(told, *spans, attempt(1, 3, 2.0))
    assert step.redundant == {(2, 5), (3, 1)}
    assert step.redundant_share == 0.5
    assert step.wasted_s == pytest.approx(2.0)
    assert step.fate(step.attempts[-1]) == REDUNDANT


def test_worker_that_finished_none_counts_with_the_longest_that_it_tried() -> None:
    spans = [attempt(0, block, 1.0) for block in range(4)]
    tries = [attempt(1, 2, 2.5, computed=False), attempt(1, 3, 0.5, computed=False)]
    step = one_step(root(HOLDERS, took_s=4.0, sources=[0] * 4), *spans, *tries)
    assert step.best_s == pytest.approx(3.0)
    assert straggling.durations_s(step.attempts) == {0: pytest.approx(1.0), 1: pytest.approx(2.5)}


def test_dead_worker_computes_nothing() -> None:
    spans = [attempt(0, block, 1.0) for block in range(4)]
    step = one_step(root(HOLDERS, took_s=4.4, sources=[0] * 4), *spans)
    assert step.best_s == pytest.approx(4.0) and step.ratio == pytest.approx(1.1)


def test_best_time_is_not_known_where_a_trace_is_missing() -> None:
    """Worker 1 supplied half of the data blocks, but left no trace."""
    step = one_step(root(HOLDERS, took_s=2.0), attempt(0, 0, 1.0), attempt(0, 1, 1.0))
    assert math.isnan(step.best_s) and step.ratio is None
    assert one_step(root(HOLDERS, took_s=2.0)).ratio is None


# ---------------------------------------------------------------------- slow workers, slow data


def test_median_polish_recovers_planted_effects() -> None:
    draw = random.Random(1)
    rows = {0: 0.0, 1: 0.0, 2: 1.5, 3: -0.5, 4: 0.0}
    columns = {0: 0.0, 1: 0.7, 2: 0.0, 3: 0.0, 4: 0.0, 5: -0.2, 6: 0.0}
    values = [
        (row, column, 3 + effect + other + draw.uniform(-0.02, 0.02))
        for row, effect in rows.items()
        for column, other in columns.items()
        for _ in range(3)
    ]
    for place in draw.sample(range(len(values)), len(values) // 10):
        values[place] = (*values[place][:2], draw.uniform(-9, 9))
    level, found_rows, found_columns = median_polish(values)
    assert level == pytest.approx(3, abs=0.1)
    assert found_rows == {row: pytest.approx(effect, abs=0.1) for row, effect in rows.items()}
    assert found_columns == {key: pytest.approx(of, abs=0.1) for key, of in columns.items()}
    assert median_polish([]) == (0.0, {}, {})


def run_of(
    slow: dict[int, float],
    slow_data: dict[tuple[int, int], float] | None = None,
    slow_blocks: dict[int, float] | None = None,
    samples: Sequence[int] = (8,) * 16,
    workers: int = 8,
    steps: int = 10,
) -> list[CodedStep]:
    """Both holders finish each data block, two a worker: ten milliseconds a sample."""
    draw = random.Random(5)
    spans = []
    for step in range(1, steps + 1):
        holders = ring(workers, 2)
        spans.append(root(holders, 1.0, step, samples=list(samples[: len(holders)])))
        for block, ranks in enumerate(holders):
            for rank in ranks:
                factor = slow.get(rank, 1) * (slow_data or {}).get((step, block), 1)
                factor *= (slow_blocks or {}).get(block, 1) * draw.uniform(0.95, 1.05)
                spans.append(attempt(rank, block, 0.01 * samples[block] * factor, step=step))
    return read_steps(spans)[0]


def test_slow_worker_is_found() -> None:
    found = slowness(run_of({3: 5.0, 6: 0.8}))
    assert found.slow_workers() == {3: pytest.approx(5.0, rel=0.1)}
    assert found.workers[6] == pytest.approx(0.8, rel=0.1)
    assert found.slow_steps == {rank: float(rank == 3) for rank in range(8)}
    assert found.slow_blocks() == {} and found.slow_data == [] and not found.alone
    assert (found.tried, found.slow_once) == (160, 0)


def test_data_block_with_more_samples_is_not_slow() -> None:
    samples = [8, 2] * 8
    found = slowness(run_of({3: 5.0}, samples=samples))
    assert found.slow_workers().keys() == {3} and found.slow_blocks() == {}


def test_slow_data_is_no_slow_worker() -> None:
    found = slowness(run_of({}, slow_data={(4, 5): 3.0, (7, 0): 2.0, (7, 9): 2.0}))
    assert found.slow_workers() == {} and found.slow_blocks() == {}
    assert found.slow_data == [(4, 5), (7, 0), (7, 9)]
    assert set(found.slow_steps.values()) == {0.0}


def test_position_that_is_slow_in_all_steps() -> None:
    found = slowness(run_of({2: 2.0}, slow_blocks={11: 3.0}))
    assert found.slow_blocks() == {11: pytest.approx(3.0, rel=0.1)}
    assert found.slow_workers() == {2: pytest.approx(2.0, rel=0.1)}


def test_step_in_which_all_are_slow_has_no_stragglers() -> None:
    every = {(4, block): 3.0 for block in range(16)}
    found = slowness(run_of({}, slow_data=every))
    assert found.slow_data == [] and set(found.slow_steps.values()) == {0.0}


def test_of_two_workers_the_slower_is_slow() -> None:
    found = slowness(run_of({1: 2.0}, workers=2))
    assert found.slow_workers() == {1: pytest.approx(2.0, rel=0.1)}


def test_disturbed_worker_is_slow_in_some_steps_only() -> None:
    """Worker 4 holds four data blocks, all of which it computed slowly in two steps of ten."""
    steps = run_of({})
    spans = [
        attempt(
            a.rank, a.block, a.duration_s * (4 if a.rank == 4 and s.step < 3 else 1), True, s.step
        )
        for s in steps
        for a in s.attempts
    ]
    found = slowness(read_steps([root(ring(8, 2), 1.0, s.step) for s in steps] + spans)[0])
    assert found.slow_workers() == {} and found.slow_data == []
    assert found.slow_steps == {rank: 0.2 if rank == 4 else 0.0 for rank in range(8)}


def test_worker_that_never_finishes_is_slow_at_least_so_much() -> None:
    holders = ring(3, 1)
    spans = [root(holders, 1.0, step, sources=[0, 1, 0]) for step in (1, 2)]
    for step in (1, 2):
        spans += [attempt(rank, block, 1.0, step=step) for rank, block in ((0, 0), (1, 1), (0, 2))]
        spans += [attempt(2, 2, 2.0, False, step), attempt(2, 1, 0.1, False, step)]
    found = slowness(read_steps(spans)[0])
    assert found.workers.keys() == {0, 1}
    assert found.at_least == {2: pytest.approx(2.0)} and found.slow_workers().keys() == {2}
    assert found.slow_steps[2] == 1.0


def test_what_was_given_up_soon_tells_nothing() -> None:
    """Worker 1 gave up both slow ones and quick ones early; worker 0 alone shows what was slow."""
    spans = [root([[0, 1]] * 4, 1.0, sources=[0] * 4)]
    spans += [attempt(0, block, 3.0 if block == 2 else 1.0) for block in range(4)]
    spans += [attempt(1, block, 0.5, computed=False) for block in range(4)]
    found = slowness(read_steps(spans)[0])
    assert found.slow_data == [] and found.tried == 0
    assert found.alone == {0} and found.slow_workers() == {}


def test_slow_once_may_be_either() -> None:
    """One holder a data block: the second of worker 0 was slow in the last of three steps."""
    spans = []
    for step in (1, 2, 3):
        spans.append(root([[0], [0], [1], [1]], 1.0, step))
        for block in range(4):
            slow = (step, block) == (3, 1)
            spans.append(attempt(block // 2, block, 4.0 if slow else 1.0, step=step))
    found = slowness(read_steps(spans)[0])
    assert found.slow_once == 1 and found.slow_data == [] and found.alone == {0, 1}


def test_slowness_of_nothing() -> None:
    assert slowness([]).slow_workers() == {}
    spans = [root(HOLDERS, 1.0), attempt(0, 0, 1.0, computed=False)]
    found = slowness(read_steps(spans)[0])
    assert found.workers == found.at_least == found.slow_steps == {}
    nothing = [root(HOLDERS, 1.0, samples=[0] * 4), *(attempt(0, b, 0.0) for b in range(4))]
    assert slowness(read_steps(nothing)[0]).workers == {}


# ---------------------------------------------------------------------- from the traces


def test_steps_are_in_order_and_have_their_attempts() -> None:
    spans = [attempt(0, 0, 1.0, step=step) for step in (3, 1, 2, 2)]
    steps, damaged = read_steps([*spans, root(HOLDERS, 1.0, 2), root(HOLDERS, 1.0, 1)])
    assert [(step.step, len(step.attempts)) for step in steps] == [(1, 1), (2, 2)]
    assert damaged == 0


HUGE = 10**400
DAMAGED_STEPS: list[dict[str, Any]] = [
    {"holders": None}, {"holders": []}, {"holders": [1, 2, 3, 4]}, {"holders": [[0], ["1"]]},
    {"holders": [[0]]}, {"holders": {"0": [1]}}, {"sources": [0]}, {"sources": [None] * 4},
    {"sources": "0000"}, {"redundant": [[0]]}, {"redundant": [0, 1]}, {"redundant": [[4, 0]]},
    {"redundant": None}, {"vectors": "2"}, {"vectors": float("nan")}, {"vectors": HUGE},
    {"samples": [8.5] * 4}, {"samples": [-1] * 4}, {"samples": [HUGE] * 4}, {"samples": 8},
    {"step": -1}, {"step": HUGE}, {"end_s": -1.0}, {"end_s": 1e300},
]  # fmt: skip
DAMAGED_ATTEMPTS: list[dict[str, Any]] = [
    {"block": None}, {"block": "0"}, {"block": -1}, {"block": 4}, {"block": [0]}, {"block": 0.0},
    {"computed": None}, {"computed": 1}, {"step": -1}, {"end_s": -1.0}, {"end_s": 1e300},
]  # fmt: skip


def test_spans_that_make_no_sense_are_passed_over_and_counted() -> None:
    good = [root(HOLDERS, 2.0), attempt(0, 0, 1.0)]
    bad = [root(HOLDERS, 2.0) | facts for facts in DAMAGED_STEPS]
    bad += [attempt(1, 2, 1.0) | facts for facts in DAMAGED_ATTEMPTS]
    for span in good:
        own = {*span} - {"track", "name", "rank", "start_s", "end_s"}
        bad += [{key: value for key, value in span.items() if key != left} for left in own]
    steps, damaged = read_steps([*bad, *good])
    assert steps == read_steps(good)[0]
    assert damaged == len(bad)


def test_times_may_differ_wildly() -> None:
    spans = [attempt(0, 0, 1e8), attempt(0, 1, 1e-12), attempt(1, 2, 0.0), attempt(1, 3, 1e-6)]
    step = one_step(root(HOLDERS, 2.0, samples=[1, 1, 1, 1 << 50]), *spans)
    assert step.ratio is not None and slowness([step]).workers.keys() == {0, 1}
