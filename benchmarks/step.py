"""One training step: hpctrain, torch DDP on gloo, and the plain step without overlap.

The same GPT, data and optimizer in every arm, on 2 and 4 ranks. Prints a table and, as its last
line, one JSON object with, per rank count: the time over that of the better DDP (median of the
rounds' ratios), the part of a step that waited for the wire, the cost of a block, and the peak
memory over DDP's.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
from stdlib_lm import CONTEXT, GPT

RANKS = (2, 4)
WIDTH, LAYERS, BATCH = 256, 8, 4
DDP_PORT = 29_541
MEMORY_STEPS = 5
TINY_PARAMETERS = 256

Step = Callable[[], object]


def gpt() -> nn.Module:
    """A GPT of 25 MB with little to compute: 4 windows a rank."""
    torch.manual_seed(0)
    return GPT(WIDTH, LAYERS, heads=4)


def windows() -> torch.Tensor:
    return torch.randint(0, 256, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(1))


def make_step(model: nn.Module, parameters: list[nn.Parameter], after: Step | None = None) -> Step:
    """A whole step: forward, backward, exchange, optimizer."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    batch = windows()

    def step() -> None:
        optimizer.zero_grad()
        logits = model(batch[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        if after:
            after()
        optimizer.step()

    return step


def join_gloo(rank: int, size: int) -> None:
    address = f"tcp://127.0.0.1:{DDP_PORT}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=size)


def ddp(model: nn.Module, bucket_mb: float) -> nn.Module:
    return nn.parallel.DistributedDataParallel(
        model, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True
    )


def plain_exchange(model: nn.Module, comm: Any) -> Step:
    """What a home-made script does: one blocking all-reduce of all gradients after backward."""
    from mpi4py import MPI

    parameters = list(model.parameters())
    counts = [p.numel() for p in parameters]
    flat = torch.empty(sum(counts))

    def exchange() -> None:
        torch.cat([p.grad.flatten() for p in parameters if p.grad is not None], out=flat)
        comm.Allreduce(MPI.IN_PLACE, flat.numpy())
        flat.div_(comm.Get_size())
        for parameter, part in zip(parameters, flat.split(counts), strict=True):
            parameter.grad = part.view_as(parameter)

    return exchange


# ---------------------------------------------------------------- workers, one process a rank


def time_arms(repeats: int) -> dict[str, Any]:
    """Times of all arms, memory of the first, and the cost of a block."""
    import hpctrain

    world = hpctrain.join()
    torch.set_num_threads(1)
    ours = hpctrain.DataParallel(gpt())
    hpctrain_step = make_step(ours, list(ours.parameters()))
    memory = peak_after(hpctrain_step)

    join_gloo(world.rank, world.size)
    base = gpt()
    wrapped = {f"ddp_{mb}mb": ddp(copy.deepcopy(base), mb) for mb in (25, 4)}
    alone = copy.deepcopy(base)
    arms = {
        "hpctrain": hpctrain_step,
        **{name: make_step(m, list(m.parameters())) for name, m in wrapped.items()},
        "plain": make_step(alone, list(alone.parameters()), plain_exchange(alone, world.comm)),
        "no exchange": make_step(base, list(base.parameters())),
    }
    exposed: list[float] = []

    def timed() -> None:
        hpctrain_step()
        exposed.append(ours.exchange.exposed_s)

    while ours.exchange.is_trying:
        hpctrain_step()

    def slowest(value: float) -> float:
        return max(world.comm.allgather(value))

    times = harness.take_turns({**arms, "hpctrain": timed}, repeats, world.comm.Barrier, slowest)
    share = [e / t for e, t in zip(exposed[-repeats:], times["hpctrain"], strict=True)]
    return {
        "times": times,
        "exposed": statistics.median(world.comm.allgather(statistics.median(share))),
        "overhead_us": overhead_of_a_block(world, repeats * 5),
        "peak_bytes": max(world.comm.allgather(memory)),
        "progress": ours.exchange.progress,
        "blocks": len(ours.exchange.blocks),
    }


def peak_after(step: Step) -> int:
    """Peak memory of this process after a few steps, in bytes."""
    for _ in range(MEMORY_STEPS):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Tiny(nn.Module):
    """Many parameters of 64 elements, and next to nothing to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.terms = nn.ParameterList(nn.Parameter(torch.ones(64)) for _ in range(TINY_PARAMETERS))

    def forward(self) -> torch.Tensor:
        return torch.stack(list(self.terms)).sum()


def overhead_of_a_block(world: Any, repeats: int) -> float:
    """Microseconds that a step takes longer for each block more, everything else being equal."""
    import hpctrain

    arms = {}
    for name, block_bytes in (("one block", 1 << 20), ("a block each", 1)):
        model = hpctrain.DataParallel(Tiny(), hpctrain.ExchangeConfig(block_bytes=block_bytes))

        def step(model: nn.Module = model) -> None:
            model.zero_grad()
            model().backward()

        arms[name] = step
        while model.exchange.is_trying:
            step()
    times = harness.take_turns(
        arms, repeats, world.comm.Barrier, lambda value: max(world.comm.allgather(value))
    )
    one, each = (statistics.median(times[name]) for name in arms)
    return (each - one) / (TINY_PARAMETERS - 1) * 1e6


def measure_ddp_memory() -> dict[str, Any]:
    """Peak memory of DDP in a process without MPI and hpctrain."""
    environment = os.environ
    rank, size = (
        int(environment.get(f"OMPI_COMM_WORLD_{name}") or environment[f"PMI_{name}"])
        for name in ("RANK", "SIZE")
    )
    torch.set_num_threads(1)
    join_gloo(rank, size)
    model = ddp(gpt(), 25)
    peak = torch.tensor(peak_after(make_step(model, list(model.parameters()))))
    torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    torch.distributed.destroy_process_group()
    return {"peak_bytes": int(peak), "rank": rank}


# ---------------------------------------------------------------- parent


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    if options.worker:
        kind, *rest = options.worker
        result = time_arms(int(rest[0])) if kind == "times" else measure_ddp_memory()
        if result.get("rank", 0) == 0:
            print(json.dumps(result), flush=True)
        return
    repeats = 7 if options.quick else 31
    figures: dict[str, Any] = {}
    rows = []
    for ranks in RANKS:
        found = harness.launch(ranks, "times", str(repeats))
        ddp_memory = harness.launch(ranks, "memory")
        times = found["times"]
        against = harness.spread(harness.ratios(times, "hpctrain", ["ddp_25mb", "ddp_4mb"]))
        for name, taken in times.items():
            row = {"ranks": ranks, "arm": name}
            row |= {f"{key} ms": value * 1e3 for key, value in harness.spread(taken).items()}
            over = harness.ratios(times, name, ["ddp_25mb", "ddp_4mb"])
            rows.append(row | {"over better DDP": statistics.median(over)})
        figures[f"ranks_{ranks}"] = {
            "ratio_to_ddp": round(against["median"], 4),
            "ratio_to_ddp_quartiles": [round(against["low"], 4), round(against["high"], 4)],
            "exposed_fraction": round(found["exposed"], 4),
            "overhead_us_per_block": round(found["overhead_us"], 2),
            "peak_rss_ratio_to_ddp": round(found["peak_bytes"] / ddp_memory["peak_bytes"], 4),
            "progress": found["progress"],
            "blocks": found["blocks"],
        }
    harness.finish(harness.table(rows), figures, options.save)


if __name__ == "__main__":
    main()
