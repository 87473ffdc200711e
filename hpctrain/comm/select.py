"""Which way to sum each slab: tried out on the slabs themselves, once, when they are made.

What is fastest depends on the MPI library, the size, the dtype and where the ranks sit, and no
rule knows them all. Slabs of one dtype and about one size are tried together; the times of the
slowest rank decide, so that all ranks choose the same.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from hpctrain.comm.channel import Channel, Operation
from hpctrain.comm.collect import all_gather, barrier_on
from hpctrain.comm.memory import Slab

ROUNDS = 3
BUDGET_S = 0.25
"""Time for the rounds of one size; at least one counted round is run."""
MARGIN = 0.9
"""A way replaces the preferred one if it takes less than this share of its time. Where ranks share
cores, a few rounds differ by 5% by chance."""


@dataclass(frozen=True)
class Tried:
    """What the ways took for slabs of one kind."""

    dtype: torch.dtype
    nbytes: int
    times_s: Mapping[str, float]
    way: str

    def __str__(self) -> str:
        times = ", ".join(f"{way} {seconds * 1e3:.2f} ms" for way, seconds in self.times_s.items())
        return f"{size_text(self.nbytes)} of {str(self.dtype)[6:]} by {self.way} ({times})"


Kind = tuple[torch.dtype, int]


def kind_of(slab: Slab) -> Kind:
    """Slabs of one kind, the same dtype and about the same size, are summed the same way."""
    return slab.tensor.dtype, round(math.log(max(1, slab.nbytes), 4))


def select(
    channel: Channel,
    slabs: Sequence[Slab],
    ways: Callable[[Slab], Sequence[str]],
    operations: Callable[[str, Slab], Sequence[Operation]],
) -> dict[Kind, Tried]:
    """Try the possible ways for each kind of slab. Collective; slabs keep their content.

    Args:
        channel: on which slabs will be summed; idle.
        slabs: in the same order on all ranks.
        ways: possible ways of a slab, the preferred one first.
        operations: what sums a slab in a way.

    Returns:
        What was found with the largest slab of each kind.
    """
    largest: dict[Kind, Slab] = {}
    for slab in slabs:
        kind = kind_of(slab)
        if kind not in largest or slab.nbytes > largest[kind].nbytes:
            largest[kind] = slab
    tried = {}
    for kind, slab in largest.items():
        candidates = list(ways(slab))
        times: Mapping[str, float] = {}
        if len(candidates) > 1:
            times = _try(channel, slab, {way: operations(way, slab) for way in candidates})
        way = fastest(times) or candidates[0]
        tried[kind] = Tried(slab.tensor.dtype, slab.nbytes, times, way)
    return tried


def fastest(times_s: Mapping[str, float], margin: float = MARGIN) -> str | None:
    """The first way, unless the fastest takes less than `margin` of its time."""
    if not times_s:
        return None
    preferred = next(iter(times_s))
    best = min(times_s, key=times_s.__getitem__)
    return best if times_s[best] < margin * times_s[preferred] else preferred


def _try(channel: Channel, slab: Slab, arms: Mapping[str, Sequence[Operation]]) -> dict[str, float]:
    """Median seconds of each way on the slowest rank; ways take turns."""
    content = slab.tensor.clone()
    times: dict[str, list[float]] = {way: [] for way in arms}
    rounds = 1 + ROUNDS
    turn = 0
    while turn < rounds:
        for way, operations in arms.items():
            slab.hand_over()
            barrier_on(channel)
            begun_s = time.perf_counter()
            tickets = [channel.post(operation, f"trial of {way}") for operation in operations]
            for ticket in tickets:
                channel.engine.wait(ticket)
            while slab.crossing and not slab.crossing.has_ended:
                pass
            slab.take_back()
            times[way].append(time.perf_counter() - begun_s)
        turn += 1
        if turn == 1:  # the first round plans, and is not counted
            round_s = max(all_gather(channel, sum(taken[0] for taken in times.values())))
            rounds = 1 + max(1, min(ROUNDS, int(BUDGET_S / round_s)))
    slab.tensor.copy_(content)
    everyones = all_gather(channel, {way: taken[1:] for way, taken in times.items()})
    return {way: median_of_slowest([rank[way] for rank in everyones]) for way in arms}


def median_of_slowest(times_s: Sequence[Sequence[float]]) -> float:
    """Median, over turns, of the time of the rank that was slowest in each turn.

    Args:
        times_s: of each rank, its times turn by turn.
    """
    slowest: list[float] = [max(turn) for turn in zip(*times_s, strict=True)]
    return statistics.median(slowest)


def size_text(nbytes: int) -> str:
    """A size for people."""
    return f"{nbytes / 1e6:.3g} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.3g} kB"
