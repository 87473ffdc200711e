"""What coded steps took against the best that their holders could do, and who or what was slow.

Arithmetic on the traces of a run: which worker worked when on which data block, and whose
gradients the root took.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from hpctrain.records import Span
from hpctrain.trace import CODED, DATA_BLOCKS, is_finite

USED = "used"
REDUNDANT = "redundant"
GIVEN_UP = "given up"

SLOW = 1.3
"""Times the median from which on a worker, or a data block, is called slow."""
CLOCK_S = 1e-7
"""Shorter times say nothing about speed."""
LONG_S = 1e9
"""Times that are no shorter are damage."""


@dataclass(frozen=True)
class Attempt:
    """One worker's work on one data block in one step."""

    rank: int
    block: int
    start_s: float
    end_s: float
    computed: bool
    """False: given up before it was finished."""

    @property
    def duration_s(self) -> float:
        """Time it took, or had taken when it was given up."""
        return self.end_s - self.start_s


@dataclass(frozen=True, kw_only=True)
class CodedStep:
    """A step as the root saw it, and what the workers did in it."""

    step: int
    start_s: float
    end_s: float
    holders: tuple[tuple[int, ...], ...]
    """Ranks that have the samples of each data block, its owner first."""
    sources: tuple[int, ...]
    """Rank whose gradient of each data block was used."""
    redundant: frozenset[tuple[int, int]]
    """Data block and rank of what reached the root, or would have, and was not used."""
    vectors: float
    """Gradient vectors' worth of bytes that reached the root."""
    samples: tuple[int, ...]
    attempts: tuple[Attempt, ...]

    @property
    def took_s(self) -> float:
        """T: from the beginning of the step until the root had the sum of the last model block."""
        return self.end_s - self.start_s

    @cached_property
    def best_s(self) -> float:
        """T*: time by which each data block could have been computed once by one of its holders.

        Of a worker that finished none, only the time until it gave up is known, of which the
        longest counts: T* is optimistic there. A worker without any attempt computes nothing,
        unless the root used its gradients: then its trace is missing, and T* is NaN.
        """
        if not {attempt.rank for attempt in self.attempts}.issuperset(self.sources):
            return math.nan
        return smallest_time(durations_s(self.attempts), self.holders)

    @property
    def ratio(self) -> float | None:
        """T / T*; None when T* is not known."""
        return self.took_s / self.best_s if 0 < self.best_s < math.inf else None

    @property
    def redundant_share(self) -> float:
        """Data blocks that were computed again, and not used, over data blocks."""
        return len(self.redundant) / len(self.holders)

    @property
    def busy_s(self) -> float:
        """Time that all workers spent on data blocks."""
        return sum(attempt.duration_s for attempt in self.attempts)

    @property
    def wasted_s(self) -> float:
        """Time that all workers spent on data blocks that were given up or not used."""
        return sum(a.duration_s for a in self.attempts if self.fate(a) != USED)

    def fate(self, attempt: Attempt) -> str:
        """What became of an attempt: `USED`, `REDUNDANT` or `GIVEN_UP`."""
        if not attempt.computed:
            return GIVEN_UP
        return USED if self.sources[attempt.block] == attempt.rank else REDUNDANT


def durations_s(attempts: Iterable[Attempt]) -> dict[int, float]:
    """Time that each worker needs for a data block, at least if it finished none."""
    finished: dict[int, list[float]] = {}
    given_up: dict[int, float] = {}
    for attempt in attempts:
        if attempt.computed:
            finished.setdefault(attempt.rank, []).append(attempt.duration_s)
        else:
            given_up[attempt.rank] = max(attempt.duration_s, given_up.get(attempt.rank, 0.0))
    return given_up | {rank: statistics.fmean(times) for rank, times in finished.items()}


# ---------------------------------------------------------------------- the best that can be


def smallest_time(durations: Mapping[int, float], holders: Sequence[Collection[int]]) -> float:
    """Smallest time by which each data block can be computed once by one of its holders.

    Args:
        durations: time that each worker needs for a data block, one after another; a worker that
            is not named computes none.
        holders: workers that may compute each data block.

    Returns:
        The time; infinite when a data block has no holder that computes.
    """
    held = Counter(rank for ranks in holders for rank in set(ranks) if rank in durations)
    times = sorted({n * durations[rank] for rank, most in held.items() for n in range(most + 1)})
    if not holders:
        return 0.0

    def room(time: float) -> dict[int, int]:
        return {rank: _fitting(time, durations[rank], most) for rank, most in held.items()}

    # Where all workers together have too little room, no search for who computes what is needed.
    first = bisect_left(times, True, key=lambda time: sum(room(time).values()) >= len(holders))
    place = bisect_left(times, True, lo=first, key=lambda time: _all_fit(room(time), holders))
    return times[place] if place < len(times) else math.inf


def _fitting(time: float, duration: float, most: int) -> int:
    """Data blocks that a worker finishes by `time`; never one less because of rounding."""
    return most if duration * most <= time else int(time / duration * (1 + 1e-12))


def _all_fit(room: Mapping[int, int], holders: Sequence[Collection[int]]) -> bool:
    """Whether each data block finds a holder with room for it."""
    taken: dict[int, set[int]] = {rank: set() for rank in room}
    return all(_place(block, taken, room, holders) for block in range(len(holders)))


def _place(
    block: int,
    taken: Mapping[int, set[int]],
    room: Mapping[int, int],
    holders: Sequence[Collection[int]],
) -> bool:
    """Give a data block to a holder, moving others to holders of theirs if need be."""
    came_by: dict[int, int] = {}  # worker -> data block that would come to it
    home: dict[int, int] = {}  # data block -> worker that it would leave
    reached = [block]
    for moving in reached:
        for rank in holders[moving]:
            if rank not in taken or rank in came_by:
                continue
            came_by[rank] = moving
            if len(taken[rank]) == room[rank]:
                home.update(dict.fromkeys(taken[rank], rank))
                reached += taken[rank]
                continue
            to: int | None = rank
            while to is not None:
                moved = came_by[to]
                taken[to].add(moved)
                to = home.get(moved)
                if to is not None:
                    taken[to].remove(moved)
            return True
    return False


# ---------------------------------------------------------------------- slow workers, slow data


@dataclass(frozen=True, kw_only=True)
class Slowness:
    """How slow workers and data blocks were, as factors of the median one."""

    workers: Mapping[int, float]
    """Time that a worker needs for the same data, of those that finished any."""
    at_least: Mapping[int, float]
    """The same of workers that finished none: a bound, from how long they had worked."""
    slow_steps: Mapping[int, float]
    """Share of a worker's steps in which it was slow."""
    blocks: Mapping[int, float]
    """Time per sample of the data blocks at a position in the batch."""
    slow_data: Sequence[tuple[int, int]]
    """Step and data block of those that were slow on all workers that tried them, two or more."""
    tried: int
    """Data blocks, of all steps, that two or more workers tried."""
    slow_once: int
    """Data blocks, of all steps, that were slow on the only worker that tried them, which is no
    slower with others, at a position that is not slow in other steps."""
    alone: Collection[int]
    """Workers that were the only ones to try their positions in the batch: if they look slow, it
    may also be their data."""

    def slow_workers(self) -> dict[int, float]:
        """Workers from `SLOW` on, those that finished none included."""
        return {r: f for r, f in sorted({**self.workers, **self.at_least}.items()) if f >= SLOW}

    def slow_blocks(self) -> dict[int, float]:
        """Positions in the batch from `SLOW` on."""
        return {block: factor for block, factor in sorted(self.blocks.items()) if factor >= SLOW}


class _Pace(NamedTuple):
    """An attempt as the fit sees it."""

    step: int
    rank: int
    block: int
    log: float
    """Logarithm of the seconds per sample."""
    computed: bool


def slowness(steps: Iterable[CodedStep]) -> Slowness:
    """Tell slow workers, which redundancy cures, from slow data, which it does not.

    The logarithm of the time per sample is taken for the sum of an effect of the worker and one of
    the data block's position in the batch, found by alternating medians from what was finished.
    So a data block with more samples is expected to take longer, and a step or two in which
    something else was in the way make no worker slow. What was given up would have taken longer
    than it did: it counts where it was slow already.
    """
    paces = [
        _Pace(
            step.step, a.rank, a.block, math.log(a.duration_s / step.samples[a.block]), a.computed
        )
        for step in steps
        for a in step.attempts
        if a.duration_s > CLOCK_S and step.samples[a.block]
    ]
    done = [pace for pace in paces if pace.computed]
    level, workers, blocks = median_polish([(p.rank, p.block, p.log) for p in done])

    rest: dict[int, list[float]] = {}
    for pace in done:
        rest.setdefault(pace.step, []).append(pace.log - level - workers[pace.rank])
    # A step in which all are slow has no stragglers. Of an even number, the faster half decides.
    usual = {step: statistics.median_low(logs) for step, logs in rest.items()}
    paces = [p._replace(log=p.log - level - usual[p.step]) for p in paces if p.step in usual]

    tries = _tries(p._replace(log=p.log - workers[p.rank]) for p in paces if p.rank in workers)
    shared = {where: min(of.values()) for where, of in tries.items() if len(of) > 1}
    slow_data = {where for where, log in shared.items() if _is_slow(log)}

    own = [p._replace(log=p.log - blocks.get(p.block, 0.0)) for p in paces]
    own = [pace for pace in own if (pace.step, pace.block) not in slow_data]
    return Slowness(
        workers={rank: math.exp(effect) for rank, effect in workers.items()},
        at_least=_bounds([pace for pace in own if pace.rank not in workers]),
        slow_steps=_slow_steps(own),
        blocks={block: math.exp(effect) for block, effect in blocks.items()},
        slow_data=sorted(slow_data),
        tried=len(shared),
        slow_once=sum(
            len(of) == 1 and _is_slow(min(of.values()) - blocks.get(block, 0.0))
            for (_, block), of in tries.items()
        ),
        alone=_alone(own),
    )


def _is_slow(log: float) -> bool:
    return log >= math.log(SLOW)


def _tells(pace: _Pace) -> bool:
    """Whether an attempt tells if it was slow: what was given up soon does not."""
    return pace.computed or _is_slow(pace.log)


def _tries(paces: Iterable[_Pace]) -> dict[tuple[int, int], dict[int, float]]:
    """By step and data block: what each worker that tried it tells."""
    tries: dict[tuple[int, int], dict[int, float]] = {}
    for pace in filter(_tells, paces):
        tries.setdefault((pace.step, pace.block), {})[pace.rank] = pace.log
    return tries


def _alone(paces: Iterable[_Pace]) -> set[int]:
    """Workers that share no position in the batch with another."""
    ranks: dict[int, set[int]] = {}
    for pace in filter(_tells, paces):
        ranks.setdefault(pace.block, set()).add(pace.rank)
    shared = {rank for of in ranks.values() if len(of) > 1 for rank in of}
    return {rank for of in ranks.values() for rank in of} - shared


def _slow_steps(paces: Iterable[_Pace]) -> dict[int, float]:
    """Share of each worker's steps in which it was slower than the median worker."""
    steps: dict[tuple[int, int], list[float]] = {}
    for pace in filter(_tells, paces):
        steps.setdefault((pace.rank, pace.step), []).append(pace.log)
    seen = Counter(rank for rank, _ in steps)
    slow = Counter(r for (r, _), of in steps.items() if _is_slow(statistics.median(of)))
    return {rank: slow[rank] / count for rank, count in seen.items()}


def _bounds(paces: Iterable[_Pace]) -> dict[int, float]:
    """Least factors of workers that finished nothing, from the longest that they tried."""
    longest: dict[int, dict[int, float]] = {}
    for pace in paces:
        of = longest.setdefault(pace.rank, {})
        of[pace.step] = max(pace.log, of.get(pace.step, pace.log))
    return {rank: math.exp(statistics.median(of.values())) for rank, of in longest.items()}


def median_polish(
    values: Sequence[tuple[int, int, float]], rounds: int = 20
) -> tuple[float, dict[int, float], dict[int, float]]:
    """Fit value = level + row + column by alternating medians (Tukey), which outliers do not move.

    Args:
        values: row, column and value; any number of a cell, also none.
        rounds: how often to go over rows and columns.

    Returns:
        The level, and the effects of rows and of columns, of which each time the median is 0.
    """
    effects: tuple[dict[int, float], dict[int, float]] = ({}, {})
    for _ in range(rounds):
        moved = 0.0
        for axis in (0, 1):
            rest: dict[int, list[float]] = {}
            for *cell, value in values:
                fitted = effects[0].get(cell[0], 0.0) + effects[1].get(cell[1], 0.0)
                rest.setdefault(cell[axis], []).append(value - fitted)
            for key, left in rest.items():
                move = statistics.median(left)
                effects[axis][key] = effects[axis].get(key, 0.0) + move
                moved = max(moved, abs(move))
        if moved < 1e-6:
            break
    level = 0.0
    for of in effects:
        # Of two workers, the faster is the median: else none would ever be slow.
        middle = statistics.median_low(of.values()) if of else 0.0
        level += middle
        of.update({key: effect - middle for key, effect in of.items()})
    return level, *effects


# ---------------------------------------------------------------------- from the traces


def read_steps(spans: Iterable[Span]) -> tuple[list[CodedStep], int]:
    """The coded steps among the spans of all ranks.

    Returns:
        The steps in order, and the number of spans that make no sense and were passed over. What
        was worked on in steps that the root did not trace is no damage, and left out.
    """
    damaged = 0
    roots: dict[int, Span] = {}
    worked: dict[int, list[Attempt]] = {}
    for span in spans:
        if span["track"] == CODED:
            if _is_step(span):
                roots[span["step"]] = span
            else:
                damaged += 1
        elif span["track"] == DATA_BLOCKS:
            if _is_attempt(span):
                facts = (span[key] for key in ("rank", "block", "start_s", "end_s", "computed"))
                worked.setdefault(span["step"], []).append(Attempt(*facts))
            else:
                damaged += 1
    steps = []
    for number, span in sorted(roots.items()):
        known = len(span["holders"])
        attempts = [attempt for attempt in worked.get(number, []) if attempt.block < known]
        damaged += len(worked.get(number, [])) - len(attempts)
        steps.append(_step(span, attempts))
    return steps, damaged


def _step(span: Span, attempts: Sequence[Attempt]) -> CodedStep:
    sources = tuple(span["sources"])
    # The root cannot know of what was finished after the step, or was on a worker that died.
    seen = {(a.block, a.rank) for a in attempts if a.computed and a.rank != sources[a.block]}
    return CodedStep(
        step=span["step"],
        start_s=span["start_s"],
        end_s=span["end_s"],
        holders=tuple(map(tuple, span["holders"])),
        sources=sources,
        redundant=frozenset({(block, rank) for block, rank in span["redundant"]} | seen),
        vectors=span["vectors"],
        samples=tuple(span["samples"]),
        attempts=tuple(attempts),
    )


def _is_attempt(span: Span) -> bool:
    return (
        _is_count(span.get("step"))
        and _is_count(span.get("block"))
        and isinstance(span.get("computed"), bool)
        and 0 <= span["end_s"] - span["start_s"] < LONG_S
    )


def _is_step(span: Span) -> bool:
    holders, redundant = span.get("holders"), span.get("redundant")
    if not isinstance(holders, list) or not isinstance(redundant, list) or not holders:
        return False
    return (
        _is_count(span.get("step"))
        and all(_are_counts(ranks) for ranks in holders)
        and all(_are_counts(pair, 2) and pair[0] < len(holders) for pair in redundant)
        and _are_counts(span.get("sources"), len(holders))
        and _are_counts(span.get("samples"), len(holders))
        and is_finite(span.get("vectors"))
        and 0 <= span["vectors"] < 1 << 53
        and 0 <= span["end_s"] - span["start_s"] < LONG_S
    )


def _are_counts(values: Any, length: int | None = None) -> bool:
    """Whether a value read from JSON is a list of ranks, numbers of data blocks or of samples."""
    return (
        isinstance(values, list)
        and (length is None or len(values) == length)
        and all(map(_is_count, values))
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 53
