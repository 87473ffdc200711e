"""What an all-reduce costs, in every way, on any layout: Hockney's model.

A message of m bytes takes a latency, m over the link's rate, and a rank's processor for a while
(Hockney, "The communication challenge for MPP", 1994). The costs of whole all-reduces follow
(Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH",
2005; Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
2009). Since several are in flight at a time, a cost has three figures: how long it keeps the
busiest link, how long it keeps a rank's processor, and how long it takes alone; with them
`hpctrain.plan.schedule` plays a training step.

Not in the model: links that several nodes share, and nodes or ranks that differ.

Times are in seconds, sizes in bytes, rates in bytes a second. A node's link carries `bytes_per_s`
in each direction at the same time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

WAYS = ("native", "direct", "ring", "shared", "two_level")
"""Of the host, as in hpctrain.comm.reduce, which tells what they do."""
DIRECT_NODES = 16
"""Most nodes between which `two_level` exchanges by all pairs, as in hpctrain.comm.reduce."""

_COPIES = 4
"""Bytes read and written for each byte of a message within a node: copied in and copied out."""
_SUM = 3
"""Bytes read and written for each byte that is added to another."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Ranks: the same number on each node, numbered node by node."""

    nodes: int
    ranks_per_node: int = 1

    @property
    def size(self) -> int:
        """All ranks."""
        return self.nodes * self.ranks_per_node

    def __str__(self) -> str:
        return f"{self.nodes}x{self.ranks_per_node}"


@dataclass(frozen=True, kw_only=True)
class Links:
    """Facts of a machine and its MPI library.

    Attributes:
        latency_s: of a message between nodes, beside its bytes and the processor's part.
        bytes_per_s: of a node's link, in each direction.
        memory_bytes_per_s: at which one rank reads and writes memory while all do.
        overhead_s: a rank's processor, for each operation and for each message out and in.
        crowding: ranks that share a core, at least 1; the processor's part takes so much longer.
        eager_bytes: what a message carries at once. The rest waits for the receiver to acknowledge,
            and acknowledgements queue behind data that goes the same way.
        handshake: share of the time on the wire that this adds where messages larger than
            `eager_bytes` go both ways at the same time.
        halving: whether the library's Iallreduce is Rabenseifner's, as MPICH's. Open MPI 5, in
            place, reduces up a binomial tree and broadcasts down one.
    """

    latency_s: float
    bytes_per_s: float
    memory_bytes_per_s: float
    overhead_s: float
    crowding: float = 1.0
    eager_bytes: float = math.inf
    handshake: float = 0.0
    halving: bool = False


@dataclass(frozen=True)
class Cost:
    """What an all-reduce costs.

    Attributes:
        wire_s: how long it keeps the busiest node's link.
        processor_s: how long it keeps the processor of the busiest rank.
        alone_s: how long it takes with nothing else in flight; no less than `busy_s`.
    """

    wire_s: float
    processor_s: float
    alone_s: float

    @property
    def busy_s(self) -> float:
        """Shortest time from the end of one to the end of the next when many are in flight."""
        return max(self.wire_s, self.processor_s)


@lru_cache(maxsize=4096)
def all_reduce(way: str, nbytes: int, layout: Layout, links: Links) -> Cost:
    """Cost of one operation that sums `nbytes` bytes over all ranks.

    Args:
        way: one of `WAYS`.
        nbytes: of each rank, not cut into chunks.
        layout: the ranks.
        links: the machine.

    Raises:
        ValueError: there is no such way, or it cannot sum over this layout.
    """
    if way not in WAYS:
        raise ValueError(f"way = {way!r}: allowed are {', '.join(WAYS)}")
    if way == "shared" and layout.nodes > 1:
        raise ValueError(f"way = 'shared' sums within one node, and the layout is {layout}")
    if layout.size == 1:
        return Cost(0.0, 0.0, 0.0)
    if way == "native":
        return (_halving if links.halving else _tree)(nbytes, layout, links)
    if way == "direct":
        return _direct(nbytes, layout, links)
    return _ring(nbytes, layout, links) if way == "ring" else _two_level(nbytes, layout, links)


def between_nodes(nodes: int) -> str:
    """How `two_level` exchanges the sums of `nodes` nodes."""
    return "direct" if nodes <= DIRECT_NODES else "ring"


def _direct(nbytes: float, layout: Layout, links: Links) -> Cost:
    """All pairs, twice: 2 rounds, and 2 (p-1)/p of the bytes out of each rank."""
    size, ranks = layout.size, layout.ranks_per_node
    part = nbytes / size
    return _cost(
        layout,
        links,
        rounds=2,
        messages=2 * (size - 1),
        wire_bytes=2 * ranks * (size - ranks) * part * _handshakes(part, links),
        moved_bytes=2 * (ranks - 1) * part * _COPIES + (size - 1) * part * _SUM,
    )


def _ring(nbytes: float, layout: Layout, links: Links) -> Cost:
    """2 (p-1) rounds of 1/p of the bytes each; of a node, one rank sends to the next node."""
    size, is_alone = layout.size, layout.ranks_per_node == 1
    rounds = 2 * (size - 1)
    part = nbytes / size
    return _cost(
        layout,
        links,
        rounds=rounds,
        messages=rounds,
        wire_bytes=rounds * part * _handshakes(part, links),
        moved_bytes=rounds * part * (0 if is_alone else _COPIES) + (size - 1) * part * _SUM,
    )


def _halving(nbytes: float, layout: Layout, links: Links) -> Cost:
    """Rabenseifner's: 2 log2 p rounds, 2 (p-1)/p of the bytes out of each rank.

    Near ranks exchange the large parts, so that little leaves a node. With a number of ranks that
    is no power of two, spare ranks hand their bytes to a neighbour, and get them back in the end.
    """
    size, ranks = layout.size, layout.ranks_per_node
    levels = size.bit_length() - 1
    has_spare = size > 1 << levels
    rounds = 2 * levels + 2 * has_spare
    handed = 2 * nbytes * has_spare
    return _cost(
        layout,
        links,
        rounds=rounds,
        messages=rounds,
        wire_bytes=2 * nbytes * (1 - ranks / size) + handed * (ranks == 1),
        moved_bytes=(2 * nbytes * (1 - 1 / ranks) + handed * (ranks > 1)) * _COPIES + nbytes * _SUM,
    )


def _tree(nbytes: float, layout: Layout, links: Links) -> Cost:
    """Reduce and broadcast along binomial trees: 2 log2 p rounds of all bytes.

    The limit is the link of the busiest node, with what goes in and what goes out. What the
    broadcast sends after an acknowledgement waits for data of the reduction, so that this part
    does not pass it in the other direction, but follows it.
    """
    levels, outer, into, out_of = _tree_traffic(layout.size, layout.ranks_per_node)
    follows = max(0.0, 1 - links.eager_bytes / max(1, nbytes))
    most = float(np.max(np.maximum(into, out_of) + follows * np.minimum(into, out_of)))
    return _cost(
        layout,
        links,
        rounds=2 * outer,
        messages=2 * levels,
        wire_bytes=nbytes * most,
        moved_bytes=nbytes * (2 * (levels - outer) * _COPIES + levels * _SUM),
        path_bytes=nbytes * 2 * outer,
    )


@lru_cache(maxsize=256)
def _tree_traffic(size: int, ranks_per_node: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Open MPI's binomial reduce to rank 0 and broadcast from it.

    Returns:
        Levels of the tree; those of them at which rank 0 talks to other nodes; and how often all
        bytes go into each node and out of it.
    """
    levels = (size - 1).bit_length()
    outer = sum(ranks_per_node <= 1 << level < size for level in range(levels))
    rank = np.arange(1, size)
    reduces_to = rank - (rank & -rank)
    hears_from = rank - (1 << (np.frexp(rank)[1] - 1))
    nodes = -(-size // ranks_per_node)
    into, out_of = np.zeros(nodes, int), np.zeros(nodes, int)
    for source, target in ((rank, reduces_to), (hears_from, rank)):
        left, right = source // ranks_per_node, target // ranks_per_node
        out_of += np.bincount(left[left != right], minlength=nodes)
        into += np.bincount(right[left != right], minlength=nodes)
    return levels, outer, into, out_of


def _two_level(nbytes: float, layout: Layout, links: Links) -> Cost:
    """A slice a rank: summed in shared memory, then exchanged with its place on other nodes."""
    inside = _cost(layout, links, messages=1, moved_bytes=2 * nbytes)
    if layout.nodes == 1:
        return inside
    exchange = _direct if between_nodes(layout.nodes) == "direct" else _ring
    lane = exchange(nbytes / layout.ranks_per_node, Layout(nodes=layout.nodes), links)
    wire_s = lane.wire_s * layout.ranks_per_node  # all ranks of a node at the same time
    return Cost(
        wire_s,
        inside.processor_s + lane.processor_s,
        inside.alone_s + lane.alone_s - lane.wire_s + wire_s,
    )


def _handshakes(message_bytes: float, links: Links) -> float:
    """How many times longer messages of this size keep a link that is busy both ways."""
    return 1 + links.handshake * (message_bytes > links.eager_bytes)


def _cost(
    layout: Layout,
    links: Links,
    *,
    messages: int,
    rounds: int = 0,
    wire_bytes: float = 0.0,
    moved_bytes: float = 0.0,
    path_bytes: float = 0.0,
) -> Cost:
    """A cost from counts.

    Args:
        layout: the ranks.
        links: the machine.
        messages: out of the busiest rank, each with one in.
        rounds: messages between nodes that wait for one another.
        wire_bytes: that the busiest node's link must carry before it is free, if there are links.
        moved_bytes: that the busiest rank reads and writes in memory.
        path_bytes: that go over links one after another, where these are more than `wire_bytes`.
    """
    processor_s = links.crowding * (
        (1 + messages) * links.overhead_s + moved_bytes / links.memory_bytes_per_s
    )
    if layout.nodes == 1:
        return Cost(0.0, processor_s, processor_s)
    wire_s = wire_bytes / links.bytes_per_s
    path_s = max(wire_s, path_bytes / links.bytes_per_s)
    return Cost(wire_s, processor_s, rounds * links.latency_s + path_s + processor_s)
