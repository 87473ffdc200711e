"""In which order blocks go on the wire when the next forward starts before all of them are there.

Backward finishes the last layers first, and the next forward needs the first layers first. Sent in
the order of backward, the blocks that are needed first would come last, and where the wire is the
bottleneck nothing would be gained. So a block that is needed earlier overtakes those that are
waiting to be sent, also between two parts of one, as in P3 (Jayarajan et al., 2019) and
ByteScheduler (Peng et al., 2019). Ranks must agree on the order, so it is not decided as blocks
come: it is worked out once, from times measured on all ranks, and kept.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from hpctrain.comm.reducer import Parts

STEPS = 4
"""Steps whose times decide about the order."""


class StepTimes(NamedTuple):
    """What one rank saw of the blocks in one step; seconds by block."""

    ready_s: Sequence[float]
    """When backward had finished the block, since its beginning."""
    wire_s: Sequence[float]
    """The block's share of the time in which blocks were on the wire, by its size."""


def wire_order(
    ready_s: Sequence[float],
    wire_s: Sequence[float],
    needed: Sequence[int],
    parts: Sequence[int],
) -> list[Parts]:
    """The order in which to send parts: of the blocks that are ready, the first needed first.

    Args:
        ready_s: when each block can be sent.
        wire_s: how long sending it takes.
        needed: rank of each block among those that the next forward needs.
        parts: how many parts of the same size each block has.
    """
    coming = sorted(range(len(ready_s)), key=lambda block: (ready_s[block], block), reverse=True)
    waiting: list[tuple[int, float, int]] = []
    order: list[Parts] = []
    sent = [0] * len(parts)
    clock_s = 0.0
    while coming or waiting:
        if not waiting:
            clock_s = max(clock_s, ready_s[coming[-1]])
        while coming and ready_s[coming[-1]] <= clock_s:
            block = coming.pop()
            heapq.heappush(waiting, (needed[block], ready_s[block], block))
        _, _, block = waiting[0]
        start = sent[block]
        if order and order[-1].slab == block:
            start = order.pop().start
        sent[block] += 1
        order.append(Parts(block, start, sent[block]))
        if sent[block] == parts[block]:
            heapq.heappop(waiting)
        clock_s += wire_s[block] / parts[block]
    return order


def by_last_part(order: Sequence[Parts]) -> list[int]:
    """Blocks in the order in which their last parts are sent."""
    last = {parts.slab: place for place, parts in enumerate(order)}
    return sorted(last, key=last.__getitem__)


def agreed_order(
    measured: Sequence[Sequence[StepTimes]], needed: Sequence[int], parts: Sequence[int]
) -> list[Parts]:
    """The order for all ranks: by medians over steps of the rank that was last in each.

    Args:
        measured: what each rank saw, step by step.
        needed: see `wire_order`.
        parts: see `wire_order`.
    """
    blocks = range(len(needed))

    def median_of_last(field: int, block: int) -> float:
        last: list[float] = [
            max(rank[field][block] for rank in step) for step in zip(*measured, strict=True)
        ]
        return statistics.median(last)

    return wire_order(
        [median_of_last(0, block) for block in blocks],
        [median_of_last(1, block) for block in blocks],
        needed,
        parts,
    )
