"""How long a training step takes: the engine's schedule, played with the costs of all-reduces.

Blocks become ready during backward and go on the wire in order, cut into chunks, as many at a
time as the window lets in (hpctrain/comm/engine.py, hpctrain/comm/reducer.py). The step ends
when backward, the last block and the optimizer have ended.

Not in the model: computation that is slowed down by the sums and copies of the engine's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from hpctrain.plan.cost import Layout, Links, all_reduce, between_nodes


@dataclass(frozen=True, kw_only=True)
class Window:
    """How much the engine has in flight; by default as hpctrain.ExchangeConfig."""

    chunk_bytes: int = 1 << 18
    """Larger blocks are cut into operations of about this size, but not by `shared`."""
    in_flight_bytes: int = 8 << 20
    """Scratch memory of operations in flight, unless one needs more."""
    operations: int = 64
    """Most operations in flight."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a rank computes in a step without any exchange, and the blocks that come of it."""

    forward_s: float
    backward_s: float
    optimizer_s: float = 0.0
    blocks: tuple[tuple[float, int], ...] = ()
    """Of each block, in order: seconds from the beginning of backward until it is ready, bytes."""

    @classmethod
    def even(
        cls, forward_s: float, backward_s: float, optimizer_s: float, sizes: Sequence[int]
    ) -> Work:
        """A backward that takes as long for each byte: blocks of these sizes come one by one."""
        ready = [backward_s * done / max(1, sum(sizes)) for done in accumulate(sizes)]
        return cls(
            forward_s=forward_s,
            backward_s=backward_s,
            optimizer_s=optimizer_s,
            blocks=tuple(zip(ready, sizes, strict=True)),
        )


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step: what is computed, on which ranks, and how blocks are summed."""

    work: Work
    way: str
    layout: Layout
    window: Window = field(default_factory=Window)


def step_s(step: Step, links: Links) -> float:
    """Time of a step: forward, then the longer of backward and the exchange, then the optimizer."""
    work = step.work
    return work.forward_s + max(work.backward_s, exchanged_s(step, links)) + work.optimizer_s


def exchanged_s(step: Step, links: Links) -> float:
    """Seconds from the beginning of backward until the last block is averaged.

    The busier of link and processor serves operations one after another. What else an operation
    takes, latencies and what waits for them, passes while others are served.
    """
    window = step.window
    in_flight: deque[tuple[float, int]] = deque()  # end, scratch
    held = 0
    free_s = ended_s = 0.0
    for ready_s, nbytes in step.work.blocks:
        for part in _chunks(step.way, nbytes, window.chunk_bytes):
            cost = all_reduce(step.way, part, step.layout, links)
            needed = _scratch_bytes(step.way, part, step.layout)
            begun_s = ready_s
            while in_flight and (
                held + needed > window.in_flight_bytes or len(in_flight) >= window.operations
            ):
                oldest_s, freed = in_flight.popleft()
                begun_s = max(begun_s, oldest_s)
                held -= freed
            free_s = max(free_s, begun_s) + cost.busy_s
            ended_s = max(ended_s, free_s + cost.alone_s - cost.busy_s)
            in_flight.append((ended_s, needed))
            held += needed
    return ended_s


def _chunks(way: str, nbytes: int, chunk_bytes: int) -> list[int]:
    """Sizes of the operations that sum a block, as hpctrain.comm.memory cuts it."""
    chunks = -(-(8 * nbytes - chunk_bytes) // (8 * chunk_bytes))
    if way == "shared" or chunks < 2:
        return [nbytes]
    size = -(-nbytes // chunks)
    return [size] * (chunks - 1) + [nbytes - size * (chunks - 1)]


def _scratch_bytes(way: str, nbytes: int, layout: Layout) -> int:
    """What an operation takes of the window's memory, as hpctrain.comm.reduce counts it."""
    members = layout.size
    if way == "two_level":
        members, nbytes = layout.nodes, -(-nbytes // layout.ranks_per_node)
        way = between_nodes(members)
    inboxes = {"direct": members - 1, "ring": min(1, members - 1)}.get(way, 0)
    return inboxes * -(-nbytes // members)
