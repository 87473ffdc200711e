"""Measured facts about this job's ranks and wires: clocks, latency, bandwidth, best progress mode.

Every function is collective.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI

from hpctrain.comm import reduce
from hpctrain.comm.channel import Channel, Operation, Steps
from hpctrain.comm.collect import all_gather, barrier_on
from hpctrain.comm.engine import PROGRESS_MODES, Engine
from hpctrain.comm.memory import Slab
from hpctrain.comm.reducer import ReduceOptions, Reducer
from hpctrain.comm.select import Tried, median_of_slowest
from hpctrain.trace import now_s

CLOCK_ROUNDS = 20
TRIAL_REPEATS = 7
TRIAL_BLOCKS = 6
TRIAL_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Link:
    """What a message between rank 0 and another rank costs."""

    rank: int
    latency_s: float
    """Half a round trip of 8 bytes, median."""
    bytes_per_s: float
    """Of a large message, one way."""


def clock_offset(channel: Channel) -> float:
    """Seconds to add to this rank's clock to get rank 0's.

    Each rank in turn exchanges small messages with rank 0; the fastest of several round trips
    gives the offset, to within half of its duration (Cristian, 1989).
    """
    offset_s = 0.0
    for rank in range(1, channel.size):
        if channel.rank in (0, rank):
            offset_s = channel.run(_clock_rounds(rank), "clock")
        else:
            channel.run(_skip, "clock")
    return 0.0 if channel.rank == 0 else offset_s


def _skip(comm: MPI.Intracomm, tag: int) -> Steps:
    """Operation that does nothing, so that all ranks count the same operations."""
    yield []


def _clock_rounds(other: int) -> Operation:
    def steps(comm: MPI.Intracomm, tag: int) -> Steps:
        stamp = np.zeros(1)
        best_s, offset_s = float("inf"), 0.0
        for _ in range(CLOCK_ROUNDS):
            if comm.Get_rank() == 0:
                yield [comm.Irecv(stamp, other, tag)]
                stamp[0] = now_s()
                yield [comm.Isend(stamp, other, tag)]
            else:
                sent_s = now_s()
                yield [comm.Isend(stamp, 0, tag)]
                yield [comm.Irecv(stamp, 0, tag)]
                took_s = now_s() - sent_s
                if took_s < best_s:
                    best_s, offset_s = took_s, float(stamp[0]) - (sent_s + took_s / 2)
        return offset_s

    return steps


def measure_links(channel: Channel, large_bytes: int = 4 << 20, rounds: int = 15) -> list[Link]:
    """Latency and bandwidth between rank 0 and every other rank, on all ranks."""
    links = []
    for rank in range(1, channel.size):
        medians = []
        for nbytes in (8, large_bytes):
            barrier_on(channel)
            if channel.rank in (0, rank):
                medians.append(channel.run(_ping_pong(rank, nbytes, rounds), "ping-pong"))
            else:
                medians.append(channel.run(_skip, "ping-pong"))
        links.append(medians)
    measured = all_gather(channel, links)[0]
    return [
        Link(rank + 1, latency_s, large_bytes / large_s)
        for rank, (latency_s, large_s) in enumerate(measured)
    ]


def _ping_pong(other: int, nbytes: int, rounds: int) -> Operation:
    """Operation of rank 0 and `other`: median time of one way."""

    def steps(comm: MPI.Intracomm, tag: int) -> Steps:
        message = np.zeros(nbytes, np.uint8)
        times = []
        peer = other if comm.Get_rank() == 0 else 0
        for _ in range(rounds + 1):
            begun_s = now_s()
            if comm.Get_rank() == 0:
                yield [comm.Isend(message, peer, tag)]
                yield [comm.Irecv(message, peer, tag)]
            else:
                yield [comm.Irecv(message, peer, tag)]
                yield [comm.Isend(message, peer, tag)]
            times.append((now_s() - begun_s) / 2)
        return statistics.median(times[1:])

    return steps


def progress_trial(engine: Engine) -> dict[str, float]:
    """Seconds that each progress mode needs for the same blocks and computation.

    Computation comes in small kernels with a poll after each, as gradient hooks do. Modes take
    turns; a mode's figure is its median time on the slowest rank.
    """
    channel = engine.channel("progress trial")
    slabs = [Slab.allocate(TRIAL_BLOCK_BYTES // 4, torch.float32) for _ in range(TRIAL_BLOCKS)]
    operations = [
        reduce.all_reduce("direct", slab, 1.0, lane=lane) for lane, slab in enumerate(slabs)
    ]
    matrix = torch.rand(128, 128)
    before = engine.progress
    times: dict[str, list[float]] = {mode: [] for mode in PROGRESS_MODES}
    for _ in range(TRIAL_REPEATS + 1):
        for mode in PROGRESS_MODES:
            engine.progress = mode
            barrier_on(channel)
            begun_s = now_s()
            tickets = []
            for index, operation in enumerate(operations):
                for _ in range(8):
                    torch.mm(matrix, matrix)
                    engine.poll()
                tickets.append(channel.post(operation, f"trial {index}"))
            for ticket in tickets:
                engine.wait(ticket)
            times[mode].append(now_s() - begun_s)
    engine.progress = before
    channel.abandon()
    everyones = all_gather(engine.control, {mode: taken[1:] for mode, taken in times.items()})
    return {mode: median_of_slowest([rank[mode] for rank in everyones]) for mode in times}


def measure_all_reduce(engine: Engine, sizes: Sequence[int]) -> list[Tried]:
    """Seconds to sum float32 slabs of `sizes` bytes by each way, and the way that a run takes."""
    channel = engine.channel("all-reduce trial")
    reducer = Reducer(channel, ReduceOptions())
    counts = [nbytes // 4 for nbytes in sizes]
    reducer.plan(reducer.allocate(counts, [torch.float32] * len(counts)))
    channel.abandon()
    return reducer.tried
