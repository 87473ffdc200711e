"""A model of step time, fitted on 2 to 4 ranks: how well it predicts other layouts, and far ones.

Hosts are namespaces on one machine (cluster.py), joined by links of 100 Mbit/s: slow enough that
with 8 hosts the links and not the two cores are the limit. Models have equal layers, whose compute
is slept through, which leaves the cores free as a GPU does. Three things are done:

1. Steps of three models are measured on 2, 3 and 4 ranks, in every way to sum blocks that can run
   there, and a few constants of hpctrain.plan.cost are fitted to them. How long each model
   computes without any exchange is measured on 2 ranks.
2. The model predicts what it was not fitted to: three other models on the same ranks, and all
   models on 6 and 8 ranks. These are measured as well, and compared. A control stands beside the
   model, which must be worse: an all-reduce of any way takes what an ideal one needs on the wire.
3. It computes the step time of 8 to 10,240 ranks on hardware that is stated and that nobody has
   measured. These figures are SIMULATED, and say so.

Prints both tables, the target, and JSON as its last line.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cluster
import harness
import torch
from links import SleepLayer, Stepper
from torch import nn

from hpctrain import ExchangeConfig
from hpctrain.comm.engine import LONGEST_POLL_S
from hpctrain.plan.cost import WAYS, Layout, Links
from hpctrain.plan.fit import fit
from hpctrain.plan.schedule import Step, Window, Work, step_s

RATE = "100mbit"
BURST = "32kb"
TARGET = 0.15
"""Median of |predicted / measured - 1| over all that was held out."""
FITTED_TO = (Layout(nodes=2), Layout(nodes=3), Layout(nodes=4), Layout(nodes=2, ranks_per_node=2))
HELD_OUT = (
    Layout(nodes=6),
    Layout(nodes=8),
    Layout(nodes=3, ranks_per_node=2),
    Layout(nodes=4, ranks_per_node=2),
)
QUICK_LAYOUTS = (Layout(nodes=2), Layout(nodes=4), Layout(nodes=6))
REPEATS, QUICK_REPEATS = 9, 7


@dataclass(frozen=True)
class Model:
    """Equal layers that sleep, and the block size with which they are exchanged.

    Has what links.Stepper asks of its work.
    """

    layers: int
    layer_bytes: int
    block_bytes: int
    compute_s: float
    """Forward and backward."""

    def model(self) -> nn.Module:
        forward_s = self.compute_s / self.layers / 3
        count = self.layer_bytes // 4
        return nn.Sequential(*(Layer(count, forward_s) for _ in range(self.layers)))

    def input(self, rank: int) -> torch.Tensor:
        return torch.full((1, 1), 1.0 + rank)


class Layer(SleepLayer):
    """A layer of any number of weights."""

    def __init__(self, count: int, forward_s: float) -> None:
        super().__init__(forward_s)
        self.weight = nn.Parameter(torch.zeros(count))


# Wire and compute about equal; nearly all wire; and 32 tiny blocks, where messages count.
FITTED_MODELS = {
    "1 MB, balanced": Model(16, 1 << 16, 1 << 17, 0.12),
    "2 MB, wire": Model(8, 1 << 18, 1 << 19, 0.03),
    "32 blocks of 2 kB": Model(32, 1 << 11, 1 << 11, 0.01),
}
HELD_OUT_MODELS = {
    "1.5 MB, wire": Model(12, 1 << 17, 3 << 17, 0.06),
    "3 MB, compute": Model(6, 1 << 19, 1 << 20, 0.4),
    "12 blocks of 16 kB": Model(24, 1 << 13, 1 << 14, 0.02),
}
MODELS = FITTED_MODELS | HELD_OUT_MODELS
QUICK_MODELS = ("1 MB, balanced", "32 blocks of 2 kB", "12 blocks of 16 kB")

# Where the fit begins. What is fitted: rate, overhead and handshake. A message that arrives waits
# for half a pause between two polls, which is the latency here. Memory is of no weight at this
# rate: a round figure.
FREE = ("bytes_per_s", "overhead_s", "handshake")
BOX = Links(
    latency_s=LONGEST_POLL_S / 2,
    bytes_per_s=12e6,
    memory_bytes_per_s=5e9,
    overhead_s=1e-4,
    eager_bytes=(1 << 16) - 64,  # Open MPI's for TCP, less a header
    handshake=0.1,
)

# The hardware of the simulation: nodes of 8 ranks, 100 Gbit/s a node, messages that need no
# acknowledgement, and a model of 400 MB in float32 with 150 ms of compute.
FAR_RANKS_PER_NODE = 8
FAR_RANKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 10240)
FAR = Links(latency_s=2e-6, bytes_per_s=12.5e9, memory_bytes_per_s=20e9, overhead_s=1e-5)
FAR_BYTES = 400_000_000
FAR_FORWARD_S, FAR_BACKWARD_S, FAR_OPTIMIZER_S = 0.05, 0.10, 0.01
SIZES = (ExchangeConfig().block_bytes, Window().chunk_bytes)
"""Blocks and chunks of hpctrain."""
SIZES_TEXT = f"{SIZES[0] >> 20} MB blocks, {SIZES[1] >> 10} kB chunks"
OTHER_SIZES = tuple(
    (block << 20, chunk << 20) for block in (1, 4, 16, 64) for chunk in (1, 4, 16, 64)
)
"""Among which the best are looked for."""
COLOURS = {way: f"C{index}" for index, way in enumerate(WAYS)}
FAR_WAYS = {
    "native, tree": ("native", FAR),
    "native, halving": ("native", replace(FAR, halving=True)),
    **{way: (way, FAR) for way in WAYS[1:]},
}


def ways_on(layout: Layout) -> list[str]:
    """The ways that run on a layout; `two_level` needs nodes of several ranks."""
    return [
        way
        for way in WAYS
        if not (way == "shared" and layout.nodes > 1)
        and not (way == "two_level" and layout.ranks_per_node == 1)
    ]


# ---------------------------------------------------------------- worker, one process a rank


def run_worker(specification: str) -> dict[str, Any]:
    """Times of each model and way, the compute of each model, and the sizes of its blocks."""
    import hpctrain
    from hpctrain.comm.collect import all_gather, barrier_on
    from hpctrain.comm.engine import engine_of

    wanted = json.loads(specification)
    world = hpctrain.join()
    torch.set_num_threads(1)
    control = engine_of(world).control

    def together() -> None:
        barrier_on(control)

    def slowest(value: float) -> float:
        return max(all_gather(control, value))

    arms: dict[str, Callable[[], None]] = {}
    alone: dict[str, Stepper] = {}
    blocks: dict[str, list[int]] = {}
    for name in wanted["models"]:
        model = MODELS[name]
        for way in wanted["ways"]:
            config = hpctrain.ExchangeConfig(
                way=way, block_bytes=model.block_bytes, progress="thread"
            )
            wrapped = hpctrain.DataParallel(model.model(), config)
            arms[f"{name}|{way}"] = stepper = Stepper(model, world.rank, wrapped)
            stepper()
            blocks[name] = [block.slab.nbytes for block in wrapped.exchange.blocks]
            assert wrapped.exchange.reducer.ways == [way] * len(blocks[name])
            mean = 1 + (world.size - 1) / 2
            assert (stepper.gradients() - mean).abs().max() < 1e-5 * mean
        if wanted["alone"]:
            alone[name] = arms[f"{name}|"] = Stepper(model, world.rank, model.model())
    repeats = wanted["repeats"]
    times = harness.take_turns(arms, repeats, together, slowest, warm_up=1)
    parts = {
        name: [statistics.median(part) for part in zip(*stepper.parts_s[-repeats:], strict=True)]
        for name, stepper in alone.items()
    }
    return {"rank": world.rank, "times": times, "parts": parts, "blocks": blocks}


# ---------------------------------------------------------------- parent


@dataclass(frozen=True)
class Measured:
    """One model, summed in one way on one layout."""

    name: str
    step: Step
    times_s: tuple[float, ...]
    is_held_out: bool


def box(layout: Layout, links: Links, cores: int) -> Links:
    """The machine as one layout has it: all hosts share its cores."""
    return replace(links, crowding=max(1.0, layout.size / cores))


def measure(layouts: Sequence[Layout], models: Sequence[str], repeats: int) -> list[Measured]:
    """Every model in every way on every layout, and what each model computes.

    The first layout measures compute, and shows the blocks.
    """
    found: list[Measured] = []
    works: dict[str, Work] = {}
    for layout in layouts:
        begun_s = time.monotonic()
        wanted = {
            "models": models,
            "ways": ways_on(layout),
            "repeats": repeats,
            "alone": layout == layouts[0],
        }
        with cluster.Cluster(layout.nodes, RATE, BURST) as made:
            told = harness.launch(layout.ranks_per_node, json.dumps(wanted), on=made)
        if layout == layouts[0]:
            works = {name: Work.even(*told["parts"][name], told["blocks"][name]) for name in models}
        for arm, times_s in told["times"].items():
            name, _, way = arm.partition("|")
            if way:
                step = Step(work=works[name], way=way, layout=layout)
                is_held_out = name in HELD_OUT_MODELS or layout not in FITTED_TO
                found.append(Measured(name, step, tuple(times_s), is_held_out))
        print(f"{layout}: {time.monotonic() - begun_s:.0f} s", file=sys.stderr)
    return found


def fitted(found: Sequence[Measured], cores: int) -> Links:
    """The machine, with constants that are fitted to what is not held out."""
    of_fit = [each for each in found if not each.is_held_out]
    constants: dict[str, Any] = fit(
        [each.step for each in of_fit],
        [statistics.median(each.times_s) for each in of_fit],
        [box(each.step.layout, BOX, cores) for each in of_fit],
        FREE,
    )
    return replace(BOX, **constants)


def ideal_s(step: Step, links: Links) -> float:
    """The control: any way takes as long as an ideal all-reduce keeps a link."""
    work, nodes = step.work, step.layout.nodes
    end_s = 0.0
    for ready_s, nbytes in work.blocks:
        end_s = max(end_s, ready_s) + 2 * (nodes - 1) / nodes * nbytes / links.bytes_per_s
    return work.forward_s + max(work.backward_s, end_s) + work.optimizer_s


def compared(found: Sequence[Measured], links: Links, cores: int) -> list[dict[str, Any]]:
    """Measured and predicted, step by step."""
    rows = []
    for each in found:
        step = each.step
        predicted_s = step_s(step, box(step.layout, links, cores))
        times = harness.spread(each.times_s)
        rows.append(
            {
                "layout": str(step.layout),
                "model": each.name,
                "way": step.way,
                "set": "held out" if each.is_held_out else "fitted",
                "measured ms": round(times["median"] * 1e3, 3),
                "low": round(times["low"] * 1e3, 3),
                "high": round(times["high"] * 1e3, 3),
                "predicted ms": round(predicted_s * 1e3, 3),
                "error": round(predicted_s / times["median"] - 1, 4),
                "control's error": round(ideal_s(step, links) / times["median"] - 1, 4),
            }
        )
    return rows


def median_errors(rows: Sequence[Mapping[str, Any]], error: str = "error") -> dict[str, float]:
    """Median of the absolute relative errors of what was held out, in total and by kind."""
    held_out = [row for row in rows if row["set"] == "held out"]
    few = {str(layout) for layout in FITTED_TO}
    kinds = {
        "all": held_out,
        "fitted (for comparison)": [row for row in rows if row["set"] == "fitted"],
        "other models, 2 to 4 ranks": [row for row in held_out if row["layout"] in few],
        "6 and 8 ranks": [row for row in held_out if row["layout"] not in few],
    }
    for key in ("way", "layout", "model"):
        for value in dict.fromkeys(row[key] for row in held_out):
            kinds[f"{key} {value}"] = [row for row in held_out if row[key] == value]
    return {
        kind: statistics.median(abs(row[error]) for row in of_kind)
        for kind, of_kind in kinds.items()
        if of_kind
    }


def far_step(way: str, ranks: int, sizes: tuple[int, int]) -> Step:
    """A step of the simulation, with blocks and chunks of some sizes."""
    whole, rest = divmod(FAR_BYTES, sizes[0])
    blocks = [sizes[0]] * whole + [rest] * (rest > 0)
    return Step(
        work=Work.even(FAR_FORWARD_S, FAR_BACKWARD_S, FAR_OPTIMIZER_S, blocks),
        way=way,
        layout=Layout(nodes=ranks // FAR_RANKS_PER_NODE, ranks_per_node=FAR_RANKS_PER_NODE),
        window=Window(chunk_bytes=sizes[1]),
    )


def simulated() -> list[dict[str, Any]]:
    """SIMULATED ms of a step, by ranks and way: with hpctrain's sizes, and with the best."""
    rows = []
    for ranks in FAR_RANKS:
        row: dict[str, Any] = {"SIMULATED ranks": ranks}
        for name, (way, links) in FAR_WAYS.items():
            if way == "shared" and ranks > FAR_RANKS_PER_NODE:
                row[name] = row[f"{name}, best"] = "-"
                continue
            times = [
                step_s(far_step(way, ranks, sizes), links) * 1e3 for sizes in (SIZES, *OTHER_SIZES)
            ]
            row[name], row[f"{name}, best"] = round(times[0]), round(min(times))
        rows.append(row)
    return rows


def judged(errors: Mapping[str, float], control: Mapping[str, float], count: int) -> list[str]:
    """The target, whether it is met, and the errors by kind."""
    met = "met" if errors["all"] <= TARGET else "MISSED"
    lines = [
        f"target: median error <= {TARGET} on what was held out; "
        f"found {errors['all']:.3f} over {count} steps: {met}",
        f"control (any way takes what an ideal all-reduce needs): {control['all']:.3f}, "
        + ("worse, as it must be" if control["all"] > errors["all"] else "NOT WORSE"),
        "median error by kind:",
    ]
    return lines + [f"  {kind}: {error:.3f}" for kind, error in errors.items()]


def draw(rows: Sequence[Mapping[str, Any]], far: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Measured against predicted; and SIMULATED step times by ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for way, colour in COLOURS.items():
        for kind, face in (("fitted", "none"), ("held out", colour)):
            points = [
                (row["measured ms"], row["predicted ms"])
                for row in rows
                if row["way"] == way and row["set"] == kind
            ]
            if points:
                left.scatter(
                    *zip(*points, strict=True),
                    s=18,
                    facecolors=face,
                    edgecolors=colour,
                    label=f"{way}, {kind}",
                )
    ends = [min(row["measured ms"] for row in rows), max(row["measured ms"] for row in rows)]
    left.plot(ends, ends, color="black", linewidth=0.8)
    for factor in (1 - TARGET, 1 + TARGET):
        left.plot(ends, [end * factor for end in ends], color="gray", linewidth=0.6, linestyle=":")
    left.set(
        xscale="log",
        yscale="log",
        xlabel="measured step, ms",
        ylabel="predicted step, ms",
        title=f"Measured on 2 to 8 ranks over {RATE}; dotted: {TARGET:.0%} off",
    )
    left.legend(fontsize=7)
    for name, (way, links) in FAR_WAYS.items():
        colour = "black" if links.halving else COLOURS[way]
        for suffix, style in (("", "-"), (", best", "--")):
            points = [
                (row["SIMULATED ranks"], row[name + suffix] / 1e3)
                for row in far
                if row[name + suffix] != "-"
            ]
            label = None if suffix else name
            right.plot(*zip(*points, strict=True), style, marker=".", color=colour, label=label)
    compute_s = FAR_FORWARD_S + FAR_BACKWARD_S + FAR_OPTIMIZER_S
    right.axhline(compute_s, color="gray", linewidth=0.6, label="compute")
    right.set(
        xscale="log",
        yscale="log",
        xlabel=f"ranks, {FAR_RANKS_PER_NODE} a node",
        ylabel="step, s",
        title="SIMULATED: 400 MB, 160 ms of compute, 100 Gbit/s a node\n"
        f"solid: {SIZES_TEXT}; dashed: best sizes",
    )
    ticks = FAR_RANKS[::2]
    right.set_xticks(ticks, [f"{ranks:,}" for ranks in ticks])
    right.minorticks_off()
    right.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    if options.worker:
        harness.tell(run_worker(options.worker[0]))
        return
    cluster.exit_if_unfit("scale")
    cores = len(os.sched_getaffinity(0))
    found = measure(
        QUICK_LAYOUTS if options.quick else (*FITTED_TO, *HELD_OUT),
        QUICK_MODELS if options.quick else tuple(MODELS),
        QUICK_REPEATS if options.quick else REPEATS,
    )
    links = fitted(found, cores)
    rows = compared(found, links, cores)
    far = simulated()
    errors, control = median_errors(rows), median_errors(rows, "control's error")
    held_out = [row for row in rows if row["set"] == "held out"]
    text = "\n".join(
        [
            harness.table(rows),
            *judged(errors, control, len(held_out)),
            f"fitted: {', '.join(f'{name} = {getattr(links, name):.3g}' for name in FREE)}",
            "",
            f"SIMULATED ms of a step, never measured: {FAR_BYTES / 1e6:.0f} MB of float32, "
            f"forward {FAR_FORWARD_S * 1e3:.0f} ms, backward {FAR_BACKWARD_S * 1e3:.0f} ms, "
            f"optimizer {FAR_OPTIMIZER_S * 1e3:.0f} ms, {FAR_RANKS_PER_NODE} ranks a node, {FAR}.",
            f"With {SIZES_TEXT} as hpctrain has them, and with the best of 1 to 64 MB of both.",
            harness.table(far),
        ]
    )
    figures = {
        "target": {"figure": "median_error.all", "at_most": TARGET, "found": errors["all"]},
        "median_error": errors,
        "median_error_of_control": control,
        "fitted": {name: getattr(links, name) for name in FREE},
        "box": {"rate": RATE, "burst": BURST, "cores": cores},
        "steps": rows,
        "SIMULATED_hardware": {
            **asdict(FAR),
            "eager_bytes": None,
            "ranks_per_node": FAR_RANKS_PER_NODE,
            "model_bytes": FAR_BYTES,
            "forward_s": FAR_FORWARD_S,
            "backward_s": FAR_BACKWARD_S,
            "optimizer_s": FAR_OPTIMIZER_S,
        },
        "SIMULATED_step_ms": far,
    }
    harness.finish(text, figures, options.save, lambda path: draw(rows, far, path))


if __name__ == "__main__":
    main()
