"""One all-reduce on one node: hpctrain's ways, the raw MPI calls, gloo, and the memory's limit.

Every rank holds a float32 slab and wants the average. The limit is what the memory needs to read
and write every slab once, which no all-reduce in place can go below: the bytes over the bandwidth
that the same ranks reach together, measured in the same rounds. Prints a table and, as its last
line, one JSON object.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch

RANKS = (2, 4)
SIZES_MB = (0.1, 1.0, 4.0, 16.0, 64.0, 100.0)
QUICK_SIZES_MB = (1.0, 64.0)
GLOO_PORT = 29_542
MPI_ARMS = ("MPI Allreduce", "MPI Iallreduce")
TARGETS = {  # (figure, ranks, MB) -> at most
    ("node_shared_over_best_mpi", 4, 64.0): 0.20,
    ("node_shared_over_best_mpi", 4, 1.0): 0.40,
    ("node_shared_over_gloo", 4, 64.0): 0.15,
    ("over_memory_limit", 4, 64.0): 1.6,
}


def time_sizes(sizes_mb: list[float], repeats: int) -> dict[str, Any]:
    """Seconds of all arms by size, on the slowest rank."""
    import hpctrain

    world = hpctrain.join()
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{GLOO_PORT}",
        rank=world.rank,
        world_size=world.size,
    )

    def slowest(value: float) -> float:
        return max(world.comm.allgather(value))

    times = {}
    for megabytes in sizes_mb:
        # Small sums are timed several at a time: a clock's reading and a late start weigh less.
        bundle = max(1, int(4 / megabytes))
        arms = {name: repeated(run, bundle) for name, run in make_arms(world, megabytes).items()}
        taken = harness.take_turns(arms, repeats, world.comm.Barrier, slowest)
        times[str(megabytes)] = {arm: [t / bundle for t in ts] for arm, ts in taken.items()}
    torch.distributed.destroy_process_group()
    return {"times": times, "rank": world.rank}


def repeated(run: Callable[[], object], times: int) -> Callable[[], object]:
    def loop() -> None:
        for _ in range(times):
            run()

    return loop


def make_arms(world: Any, megabytes: float) -> dict[str, Callable[[], object]]:
    """What is timed, each with a buffer of its own."""
    from mpi4py import MPI

    from hpctrain.comm import reduce
    from hpctrain.comm.engine import engine_of
    from hpctrain.comm.reducer import ReduceOptions, Reducer

    count = int(megabytes * 1e6 / 4)
    engine = engine_of(world)
    engine.progress = "hooks"
    channel = engine.channel(f"{megabytes} MB")
    [slab] = Reducer(channel, ReduceOptions()).allocate([count], [torch.float32])
    slab.tensor.fill_(world.rank)
    ways = {
        name: reduce.all_reduce(way, slab, 1 / world.size)
        for name, way in (("node-shared", "shared"), ("messages", "direct"))
    }
    for_mpi, for_gloo = np.ones(count, np.float32), torch.ones(count)
    own, other = np.ones(count, np.float32), np.ones(count, np.float32)

    def iallreduce() -> None:
        comm.Iallreduce(MPI.IN_PLACE, for_mpi).Wait()

    comm = world.comm
    return {
        "node-shared": lambda: channel.run(ways["node-shared"], "node-shared"),
        "messages": lambda: channel.run(ways["messages"], "messages"),
        "MPI Allreduce": lambda: comm.Allreduce(MPI.IN_PLACE, for_mpi),
        "MPI Iallreduce": iallreduce,
        "gloo": lambda: torch.distributed.all_reduce(for_gloo),
        # As many bytes read and written as the slabs of all ranks have.
        "limit: in place": lambda: np.multiply(own, np.float32(1), out=own),
        "limit: copy": lambda: np.copyto(other, own),
    }


def figures_of(times: dict[str, list[float]]) -> dict[str, float]:
    """Ratios of medians, round by round where both arms are timed."""
    best = min(MPI_ARMS, key=lambda arm: statistics.median(times[arm]))
    limit = min(("limit: in place", "limit: copy"), key=lambda a: statistics.median(times[a]))

    def over(arm: str) -> float:
        pairs = zip(times["node-shared"], times[arm], strict=True)
        return round(statistics.median(mine / other for mine, other in pairs), 4)

    return {
        "node_shared_ms": round(statistics.median(times["node-shared"]) * 1e3, 3),
        "node_shared_over_best_mpi": over(best),
        "node_shared_over_gloo": over("gloo"),
        "over_memory_limit": over(limit),
        "messages_over_best_mpi": round(
            statistics.median(times["messages"]) / statistics.median(times[best]), 4
        ),
    }


def draw(figures: dict[str, Any], file: Path) -> None:
    """Time of node-shared over the others, by size and ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots(1, len(RANKS), sharey=True)
    names = {
        "node_shared_over_best_mpi": "over the best MPI call",
        "node_shared_over_gloo": "over gloo",
        "over_memory_limit": "over the memory's limit",
    }
    for ax, ranks in zip(axes, RANKS, strict=True):
        found = figures[f"ranks_{ranks}"]
        for key, label in names.items():
            ax.plot(
                [float(mb) for mb in found], [f[key] for f in found.values()], "o-", label=label
            )
        ax.axhline(1, color="0.6", linewidth=1)
        ax.set(xscale="log", yscale="log", title=f"{ranks} ranks", xlabel="MB a rank")
    axes[0].set_ylabel("time of node-shared")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=150)


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    if options.worker:
        repeats, *sizes = options.worker
        found = time_sizes([float(size) for size in sizes], int(repeats))
        harness.tell(found)
        return
    sizes = QUICK_SIZES_MB if options.quick else SIZES_MB
    repeats = 9 if options.quick else 21
    figures: dict[str, Any] = {}
    rows = []
    for ranks in RANKS:
        times = harness.launch(ranks, str(repeats), *map(str, sizes))["times"]
        figures[f"ranks_{ranks}"] = {size: figures_of(taken) for size, taken in times.items()}
        for size, taken in times.items():
            for arm, seconds in taken.items():
                row = {"ranks": ranks, "MB": size, "arm": arm}
                rows.append(row | {f"{k} ms": v * 1e3 for k, v in harness.spread(seconds).items()})
    figures["targets"] = [
        {
            "figure": figure,
            "ranks": ranks,
            "MB": megabytes,
            "at_most": at_most,
            "found": figures[f"ranks_{ranks}"][str(megabytes)][figure],
        }
        for (figure, ranks, megabytes), at_most in TARGETS.items()
    ]
    harness.finish(harness.table(rows), figures, options.save, partial(draw, figures))


if __name__ == "__main__":
    sys.exit(main())
