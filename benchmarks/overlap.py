"""How much of the communication backward hides: device-like compute, and a busy interpreter.

A model of equal blocks whose backward takes a given time a block: asleep, as when a device
computes, or in a loop of pure Python, which holds the interpreter lock. Communication is timed
alone, then backward is given 1.5 times as long, so that all of it could be hidden. The exposed
share is how long a step waits for the wire after its backward, over the communication alone, on
the rank that comes last and so waits for no other; what the whole step takes longer than its
computation is told beside it, and has the copying of gradients into their blocks in it. Two
controls must lose: blocks that are posted during backward but never moved before it ends, and no
overlap at all.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from torch import nn

RANKS = 2
BLOCKS, BLOCK_MB = 24, 4
COMPUTE_OVER_WIRE = 1.5
TARGETS = {"asleep": 0.10, "python": 0.40}
CONTROLS = ("posted, never moved", "no overlap")
CONTROL_AT_LEAST = 0.8


class Busy(torch.autograd.Function):
    """Hands its input through; backward takes `seconds`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, timer: Timer) -> torch.Tensor:
        ctx.timer = timer
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.timer.spend()
        return gradient, None


class Timer:
    """Lets time pass, asleep or in pure Python."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.asleep = True

    def spend(self) -> None:
        if self.asleep:
            time.sleep(self.seconds)
            return
        end_s = time.perf_counter() + self.seconds
        while time.perf_counter() < end_s:
            pass


class Layer(nn.Module):
    """A large parameter that costs next to nothing, and a backward of known length."""

    def __init__(self, count: int, timer: Timer) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count))
        self.timer = timer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = Busy.apply(x + self.weight[0], self.timer)
        return out


def model_of(timer: Timer) -> nn.Sequential:
    return nn.Sequential(*(Layer(BLOCK_MB * 1_000_000 // 4, timer) for _ in range(BLOCKS)))


def measure(repeats: int) -> dict[str, Any]:
    """Exposed share of each arm, and the communication alone."""
    import hpctrain
    from hpctrain.comm.engine import engine_of

    world = hpctrain.join()
    torch.set_num_threads(1)
    timer = Timer()

    def wrap(**options: Any) -> Any:
        config = hpctrain.ExchangeConfig(block_bytes=BLOCK_MB * 1_000_000, **options)
        model = hpctrain.DataParallel(model_of(timer), config)
        for _ in range(3):
            step(model)
        return model

    def step(model: Any) -> None:
        model(torch.zeros(())).backward()

    def slowest(value: float) -> float:
        return max(world.comm.allgather(value))

    hidden = wrap(progress="thread")
    late = wrap(overlap=False)
    engine_of(world).poll = lambda: None  # hooks take it when they are made
    stuck = wrap(progress="hooks")
    alone = model_of(timer)

    waits: dict[str, list[float]] = {}

    def timed(name: str, model: Any, seconds: float, asleep: bool) -> Callable[[], None]:
        def run() -> None:
            timer.seconds, timer.asleep = seconds, asleep
            step(model)
            if model is not alone:
                waits.setdefault(name, []).append(model.exchange.exposed_s)

        return run

    arms = {"communication": timed("communication", late, 0.0, True)}
    harness.take_turns(arms, repeats, world.comm.Barrier, slowest)
    wire_s = min(world.comm.allgather(statistics.median(waits["communication"][-repeats:])))
    each_s = COMPUTE_OVER_WIRE * wire_s / BLOCKS
    kinds = {
        "asleep": (hidden, True),
        "python": (hidden, False),
        "posted, never moved": (stuck, True),
        "no overlap": (late, True),
        "compute asleep": (alone, True),
        "compute python": (alone, False),
    }
    arms = {name: timed(name, model, each_s, asleep) for name, (model, asleep) in kinds.items()}
    times = harness.take_turns(arms, repeats, world.comm.Barrier, slowest)
    exposed = {
        name: [min(turn) for turn in zip(*world.comm.allgather(taken[-repeats:]), strict=True)]
        for name, taken in waits.items()
    }
    return {"times": times, "exposed": exposed, "wire_s": wire_s, "rank": world.rank}


def draw(figures: dict[str, Any], file: Path) -> None:
    """Exposed share of each arm with its quartiles, and where its target begins."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axis = figure.subplots()
    for row, (arm, share) in enumerate(figures["exposed_share"].items()):
        ((bound, value),) = figures["targets"][arm].items()
        must_lose = bound == "at_least"
        axis.barh(row, share, 0.6, color="0.75" if must_lose else "C0")
        low, high = figures["exposed_share_quartiles"][arm]
        axis.plot([low, high], [row, row], color="black", linewidth=1.2)
        axis.plot([value, value], [row - 0.4, row + 0.4], color="C3", linewidth=2)
        told = f"{share:.2f}, aim {bound.replace('_', ' ')} {value}"
        axis.text(1.02, row, told, va="center", transform=axis.get_yaxis_transform())
    names = [f"{arm}\n(control)" if arm in CONTROLS else arm for arm in figures["exposed_share"]]
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel="exposed share of the communication")
    figure.savefig(file, dpi=150)


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    if options.worker:
        found = measure(int(options.worker[0]))
        harness.tell(found)
        return
    found = harness.launch(RANKS, str(9 if options.quick else 31))
    times, wire_s = found["times"], found["wire_s"]
    rows, shares = [], {}
    for arm in (*TARGETS, *CONTROLS):
        compute = times["compute python" if arm == "python" else "compute asleep"]
        longer = [(t - c) / wire_s for t, c in zip(times[arm], compute, strict=True)]
        shares[arm] = harness.spread([wait / wire_s for wait in found["exposed"][arm]])
        row = {"arm": arm, **{f"exposed {k}": v for k, v in shares[arm].items()}}
        rows.append(row | {"whole step longer": statistics.median(longer)})
    figures = {
        "communication_ms": round(wire_s * 1e3, 2),
        "exposed_share": {arm: round(share["median"], 4) for arm, share in shares.items()},
        "exposed_share_quartiles": {
            arm: [round(share["low"], 4), round(share["high"], 4)] for arm, share in shares.items()
        },
        "targets": {
            **{arm: {"at_most": limit} for arm, limit in TARGETS.items()},
            **{arm: {"at_least": CONTROL_AT_LEAST} for arm in CONTROLS},
        },
    }
    harness.finish(harness.table(rows), figures, options.save, partial(draw, figures))


if __name__ == "__main__":
    sys.exit(main())
