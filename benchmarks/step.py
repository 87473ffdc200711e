"""One training step: hpctrain, torch DDP on gloo, Heat, and the plain step without overlap.

The same model, data and optimizer in every arm, on 2 and 4 ranks. Prints a table and, as its last
line, one JSON object with, per rank count: the time over that of the better DDP (median of the
rounds' ratios) for a 25 MB GPT with little to compute and for other models, the part of the GPT's
step that waited for the wire, the cost of a block, and the peak memory over DDP's.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F
from peers import DDP, HEAT, Step, ddp, heat, in_a_line, plain_exchange, without_heat
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
import digits
import stdlib_lm
from stdlib_lm import CONTEXT, GPT

RANKS = (2, 4)
DDP_PORT = 29_541
MEMORY_STEPS = 5
TINY_PARAMETERS = 256
SMALL_PARAMETERS = 2000
SLOW = ("main_job", "2000_small")
"""Left out where a minute must do."""

EXACT = 1e-4
"""Relative difference of gradients that have been averaged right."""
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10)
"""Of the plot, where it comes so far."""


@dataclass(frozen=True)
class Case:
    """A model and what one rank computes in a step."""

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module], torch.Tensor]


def cases() -> list[Case]:
    """The first one is the 25 MB model of the headline."""
    windows = {n: torch.randint(0, 256, (n, CONTEXT + 1), generator=seeded()) for n in (1, 16)}
    images = torch.rand(32, 1, 8, 8, generator=seeded())
    labels = torch.randint(0, 10, (32,), generator=seeded())
    few = torch.rand(8, 16, generator=seeded())

    def of_windows(count: int) -> Callable[[nn.Module], torch.Tensor]:
        batch = windows[count]

        def loss(model: nn.Module) -> torch.Tensor:
            logits = model(batch[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

        return loss

    return [
        Case("gpt_25mb", lambda: GPT(width=256, layers=8, heads=4), of_windows(1)),
        Case("main_job", stdlib_lm.model, of_windows(16)),
        Case("digits", digits.model, lambda model: F.cross_entropy(model(images), labels)),
        Case("tiny", lambda: nn.Linear(16, 1), lambda model: model(few).pow(2).mean()),
        Case("2000_small", lambda: Small(SMALL_PARAMETERS), lambda model: model().mean()),
    ]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


class Small(nn.Module):
    """Many parameters of 64 elements, and next to nothing to compute."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.terms = nn.ParameterList(nn.Parameter(torch.ones(64)) for _ in range(count))

    def forward(self) -> torch.Tensor:
        return torch.stack(list(self.terms)).sum()


def fresh(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.model()


def make_step(case: Case, model: nn.Module, after: Step | None = None) -> Step:
    """A whole step: forward, backward, exchange, optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        case.loss(model).backward()
        if after:
            after()
        optimizer.step()

    return step


def join_gloo(rank: int, size: int) -> None:
    address = f"tcp://127.0.0.1:{DDP_PORT}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=size)


# ---------------------------------------------------------------- workers, one process a rank


def time_cases(repeats: int, names: Sequence[str]) -> dict[str, Any]:
    """Times of all arms for each model, memory of the first, and the cost of a block."""
    import hpctrain

    world = hpctrain.join()
    torch.set_num_threads(1)
    first, *others = [case for case in cases() if case.name in names]
    ours = hpctrain.DataParallel(fresh(first))
    step = make_step(first, ours)
    memory = peak_after(step)

    join_gloo(world.rank, world.size)
    missing = without_heat()
    heat_comm = None if missing else world.comm.Dup()
    models = {first.name: time_arms(world, heat_comm, first, ours, step, repeats)}
    for case in others:
        model = hpctrain.DataParallel(fresh(case))
        step = make_step(case, model)
        models[case.name] = time_arms(world, heat_comm, case, model, step, repeats)
    return {
        "left_out": {"heat": missing} if missing else {},
        "models": models,
        "overhead_us": overhead_of_a_block(world, repeats * 5),
        "peak_bytes": max(world.comm.allgather(memory)),
        "rank": world.rank,
    }


def time_arms(
    world: Any, heat_comm: Any, case: Case, ours: Any, step: Step, repeats: int
) -> dict[str, Any]:
    """Times of a model's step in all arms; Heat's only with a communicator for it."""
    peers: dict[str, tuple[nn.Module, Step | None]] = {
        name: (ddp(fresh(case), name), None) for name in DDP
    }
    if heat_comm:
        peers |= {name: heat(fresh(case), name, heat_comm) for name in HEAT}
    alone, unexchanged = fresh(case), fresh(case)
    peers["plain"] = (alone, plain_exchange(alone, world.comm))
    left_out = {}
    for name, (model, after) in {"hpctrain": (ours, None), **peers}.items():
        try:
            check(world, case, name, model, after)
        except RuntimeError as error:  # Heat cannot take every model
            if name not in HEAT:
                raise
            del peers[name]
            left_out[f"{name} in {case.name}"] = in_a_line(error)
    exposed: list[float] = []

    def timed() -> None:
        step()
        exposed.append(ours.exchange.exposed_s)

    while ours.exchange.is_trying:
        step()
    arms = {
        "hpctrain": timed,
        **{name: make_step(case, model, after) for name, (model, after) in peers.items()},
        "no exchange": make_step(case, unexchanged),
    }
    times = harness.take_turns(
        arms, repeats, world.comm.Barrier, lambda value: max(world.comm.allgather(value))
    )
    share = [e / t for e, t in zip(exposed[-repeats:], times["hpctrain"], strict=True)]
    return {
        "times": times,
        "left_out": left_out,
        "exposed": statistics.median(world.comm.allgather(statistics.median(share))),
        "progress": ours.exchange.progress,
        "ways": ours.exchange.reducer.summary(),
        "blocks": len(ours.exchange.blocks),
    }


def check(world: Any, case: Case, arm: str, model: nn.Module, after: Step | None) -> None:
    """Every arm must average: the fastest way to be wrong is to send nothing."""
    start = fresh(case)
    case.loss(start).backward()
    truth = gradients(start) * (1 + world.size) / 2
    with torch.no_grad():
        for parameter, first in zip(model.parameters(), start.parameters(), strict=True):
            parameter.copy_(first)
    model.zero_grad()
    (case.loss(model) * (1 + world.rank)).backward()  # the data are the same on all ranks
    if after:
        after()
    error = float((gradients(model) - truth).norm() / truth.norm())
    if error > EXACT:
        raise AssertionError(f"{case.name}: gradients of {arm} are wrong by {error:.1e}")


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def peak_after(step: Step) -> int:
    """Peak memory of this process after a few steps, in bytes."""
    for _ in range(MEMORY_STEPS):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def overhead_of_a_block(world: Any, repeats: int) -> float:
    """Microseconds that a step takes longer for each block more, everything else being equal."""
    import hpctrain

    arms = {}
    for name, block_bytes in (("one block", 1 << 20), ("a block each", 1)):
        model = hpctrain.DataParallel(
            Small(TINY_PARAMETERS), hpctrain.ExchangeConfig(block_bytes=block_bytes)
        )

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
    case = cases()[0]
    peak = torch.tensor(peak_after(make_step(case, ddp(fresh(case), DDP[0]))))
    torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    torch.distributed.destroy_process_group()
    return {"peak_bytes": int(peak), "rank": rank}


# ---------------------------------------------------------------- parent


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    if options.worker:
        kind, *rest = options.worker
        result = time_cases(int(rest[0]), rest[1:]) if kind == "times" else measure_ddp_memory()
        harness.tell(result)
        if kind == "memory":
            os._exit(0)  # one of gloo's threads aborts the process now and then when it ends
        return
    repeats = 7 if options.quick else 31
    names = [case.name for case in cases() if not (options.quick and case.name in SLOW)]
    figures: dict[str, Any] = {}
    rows = []
    left_out: dict[str, str] = {}
    for ranks in RANKS:
        found = harness.launch(ranks, "times", str(repeats), *names)
        left_out |= found["left_out"]
        ddp_memory = harness.launch(ranks, "memory")
        for model, measured in found["models"].items():
            left_out |= measured["left_out"]
            for name, taken in measured["times"].items():
                row = {"ranks": ranks, "model": model, "arm": name}
                row |= {f"{key} ms": value * 1e3 for key, value in harness.spread(taken).items()}
                over = harness.ratios(measured["times"], name, DDP)
                rows.append(row | {"over better DDP": statistics.median(over)})
        figures[f"ranks_{ranks}"] = {
            **headline(next(iter(found["models"].values()))),
            "overhead_us_per_block": round(found["overhead_us"], 2),
            "peak_rss_ratio_to_ddp": round(found["peak_bytes"] / ddp_memory["peak_bytes"], 4),
            "models": {name: headline(measured) for name, measured in found["models"].items()},
        }
    figures["left_out"] = left_out
    text = "\n".join([harness.table(rows), *harness.left_out(left_out)])
    harness.finish(text, figures, options.save, partial(draw, figures))


def headline(measured: dict[str, Any]) -> dict[str, Any]:
    """What the JSON says of a model; Heat and the plain step are told by their ratio to DDP too."""
    times = measured["times"]
    figures = told("ratio_to_ddp", harness.ratios(times, "hpctrain", DDP))
    figures |= told("plain_ratio_to_ddp", harness.ratios(times, "plain", DDP))
    heats = [name for name in HEAT if name in times]
    if heats:
        better = min(heats, key=lambda name: statistics.median(times[name]))
        figures |= {"better_heat": better}
        figures |= told("heat_ratio_to_ddp", harness.ratios(times, better, DDP))
        figures |= told("ratio_to_heat", harness.ratios(times, "hpctrain", heats))
    return {
        **figures,
        "exposed_fraction": round(measured["exposed"], 4),
        **{key: measured[key] for key in ("progress", "ways", "blocks")},
    }


def draw(figures: dict[str, Any], file: Path) -> None:
    """Each arm's ratio to the better DDP with its quartiles, by model and number of ranks."""
    from matplotlib.figure import Figure

    arms = {"hpctrain": "", "plain": "plain_", "better Heat": "heat_"}
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, len(RANKS), sharey=True)
    for axis, ranks in zip(axes, RANKS, strict=True):
        models = figures[f"ranks_{ranks}"]["models"]
        axis.axhline(1, color="0.6", linewidth=1)
        for number, (label, prefix) in enumerate(arms.items()):
            name = f"{prefix}ratio_to_ddp"
            found = [(x, of) for x, of in enumerate(models.values()) if name in of]
            if not found:
                continue
            middles = [of[name] for _, of in found]
            away = [[abs(of[f"{name}_quartiles"][i] - of[name]) for _, of in found] for i in (0, 1)]
            places = [x + 0.2 * (number - 1) for x, _ in found]
            axis.errorbar(places, middles, away, fmt="osD"[number], capsize=3, label=label)
        axis.set(title=f"{ranks} ranks", yscale="log", xlim=(-0.5, len(models) - 0.5))
        axis.set_xticks(range(len(models)), [name.replace("_", "\n") for name in models])
    ticks = [tick for tick in TICKS if axes[0].get_ylim()[0] < tick < axes[0].get_ylim()[1]]
    axes[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0].minorticks_off()
    axes[0].set_ylabel("step over better DDP's")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(arms))
    figure.savefig(file, dpi=150)


def told(name: str, values: Sequence[float]) -> dict[str, Any]:
    """A figure and its quartiles."""
    found = {key: round(value, 4) for key, value in harness.spread(values).items()}
    return {name: found["median"], f"{name}_quartiles": [found["low"], found["high"]]}


if __name__ == "__main__":
    main()
