"""What the times of links.py mean: limits, ratios, aims, a table and a plot.

Nothing here measures or talks to other ranks. Names of figures begin with their arm's, but for the
arm `hpctrain`, which is meant where no arm is named.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from peers import DDP, HEAT

CONTROLS = ("naive", "plain")
NARROW_COMPUTE = 0.2
"""Where bfloat16 on the wire is measured too."""

# Figure, bound, and the compute at which it is to hold; 0 for all.
AIMS = (
    ("over_sync_limit", 1.10, 0.0),
    ("ratio_to_ddp", 0.88, 1.0),
    ("bf16_ratio_to_ddp", 0.60, NARROW_COMPUTE),
    ("next_over_free_limit", 1.15, 0.0),
    ("next_ratio_to_ddp", 0.75, 1.0),
)

NEXT = ("next", "next_as_backward")
"""Arms whose next forward overlaps: with blocks that overtake, and in the order of backward."""
LIMITS = {"bf16": "bf16_sync", **dict.fromkeys(NEXT, "free")}
"""Arms that have another limit than a step that ends with gradients averaged in float32."""
MARKERS = ("o-", "D", "s-", "s:", "v-", "^-", "x--", "+--")


@dataclass(frozen=True)
class Case:
    """One compute time of one kind."""

    kind: str
    compute: float

    def key(self, hosts: int, ranks: int) -> str:
        """What the figures call it on so many hosts with so many ranks each."""
        shape = f"hosts_{hosts}" if ranks == 1 else f"hosts_{hosts}x{ranks}"
        return f"{shape}_compute_{self.compute}_{self.kind}"


def figures_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Limits, and every arm against them, round by round."""
    times, parts = found["times"], found["parts"]
    rounds = list(zip(parts, times["wire"], strict=True))
    limits = {
        "sync": [f + max(b, w) + o for (f, b, o), w in rounds],
        "bf16_sync": [f + max(b, w / 2) + o for (f, b, o), w in rounds],
        "free": [max(f + b + o, w) for (f, b, o), w in rounds],
    }
    median = statistics.median
    wire_s = median(times["wire"])
    forward_s, backward_s, optimizer_s = (median(each) for each in zip(*parts, strict=True))
    figures: dict[str, Any] = {
        "wire_s": wire_s,
        "wire_gbit_per_s": found["wire_bytes"] * 8 / 1e9 / wire_s,
        "forward_s": forward_s,
        "backward_s": backward_s,
        "optimizer_s": optimizer_s,
        "compute_over_wire": (forward_s + backward_s) / wire_s,
        "sync_limit_s": median(limits["sync"]),
        "free_limit_s": median(limits["free"]),
        "step_s": {name: median(taken) for name, taken in times.items() if name != "wire"},
        "better_ddp": min(DDP, key=lambda name: median(times[name])),
    }
    for name, taken in times.items():
        if name in ("wire", "no exchange"):
            continue
        limit = limits[LIMITS.get(name, "sync")]
        over = [took / least for took, least in zip(taken, limit, strict=True)]
        figures |= _told(over_limit(name), over)
        if name not in DDP:
            figures |= _told(f"{prefix(name)}ratio_to_ddp", harness.ratios(times, name, DDP))
    if HEAT[0] in times:
        figures["better_heat"] = min(HEAT, key=lambda name: median(times[name]))
        figures |= _told("ratio_to_heat", harness.ratios(times, "hpctrain", HEAT))
    figures |= {key: found[key] for key in ("progress", "ways", "order", "batch", "left_out")}
    return rounded(figures)


def prefix(arm: str) -> str:
    """What the names of an arm's figures begin with."""
    return "" if arm == "hpctrain" else f"{arm}_"


def over_limit(arm: str) -> str:
    """The figure that says how near an arm comes to its limit."""
    return prefix(arm) + ("over_free_limit" if LIMITS.get(arm) == "free" else "over_sync_limit")


def _told(name: str, values: list[float]) -> dict[str, Any]:
    found = harness.spread(values)
    return {name: found["median"], f"{name}_quartiles": [found["low"], found["high"]]}


def rounded(value: Any) -> Any:
    """The same with 4 digits after the point."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def rows_of(key: str, figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A configuration's lines of the table; low and high belong to the limit told before them."""
    columns = ["over sync limit", *(["over free limit"] if "next" in figures["step_s"] else [])]
    rows = []
    for name, seconds in figures["step_s"].items():
        of_arm = {column: prefix(name) + column.replace(" ", "_") for column in columns}
        over = {column: figures.get(which, "") for column, which in of_arm.items()}
        low, high = figures.get(f"{over_limit(name)}_quartiles", ("", ""))
        row = {"configuration": key, "arm": name, "step ms": seconds * 1e3, **over}
        against = figures.get(f"{prefix(name)}ratio_to_ddp", "")
        rows.append({**row, "low": low, "high": high, "over better DDP": against})
    return rows


def judged(figures: Mapping[str, Mapping[str, Any]], cases: Mapping[str, Case]) -> list[str]:
    """Each aim: where it holds and where not; and whether the controls lost."""
    lines = []
    for name, bound, compute in AIMS:
        found = {
            key: figures[key][name]
            for key, case in cases.items()
            if name in figures[key] and compute in (0.0, case.compute)
        }
        missed = [f"{key} {value:.3f}" for key, value in found.items() if value > bound]
        held = f"holds in {len(found) - len(missed)} of {len(found)}" if found else "not measured"
        held += f", not in {', '.join(missed)}" if missed else ""
        lines.append(f"aim {name} <= {bound}: {held}")
    won = [
        f"{name} in {key}"
        for key, of_key in figures.items()
        for name in CONTROLS
        if of_key.get(over_limit(name), float("inf")) <= of_key["over_sync_limit"]
    ]
    lines.append(f"controls that did not lose: {', '.join(won) or 'none'}")
    return lines


def draw(figures: Mapping[str, Mapping[str, Any]], cases: Mapping[str, Case], path: Path) -> None:
    """Each arm's time over the limit, by compute, a panel for every shape and kind."""
    from matplotlib.figure import Figure

    panels: dict[str, list[str]] = {}
    for key, case in cases.items():
        hosts, _, ranks = key.split("_")[1].partition("x")
        each = f" of {ranks} ranks" if ranks else ""
        panels.setdefault(f"{hosts} hosts{each}, {case.kind}", []).append(key)
    arms = {
        "hpctrain": "hpctrain",
        "hpctrain, bf16, over its own limit": "bf16",
        "hpctrain, next forward too, over its own limit": "next",
        "the same in the order of backward": "next_as_backward",
        "better DDP": "better_ddp",
        "better Heat": "better_heat",
        "naive": "naive",
        "plain": "plain",
    }
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 0.8 + 3 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    drawn = {}
    for axis, (title, keys) in zip(axes.flat, panels.items(), strict=False):
        axis.axhline(1.0, color="black", linewidth=0.8)
        for number, (label, arm) in enumerate(arms.items()):
            points = [
                (cases[key].compute, figures[key][name])
                for key in keys
                if (name := over_limit(figures[key].get(arm, arm))) in figures[key]
            ]
            if points:
                x, y = zip(*sorted(points), strict=True)
                look = {"color": f"C{number}", "zorder": 3 - number / 10}  # the first on top
                (drawn[label],) = axis.plot(x, y, MARKERS[number], alpha=0.8, **look)
        axis.set(title=title, xlabel="compute / wire", ylabel="step / limit", xscale="log")
        ticks = sorted({cases[key].compute for key in keys})
        axis.set_xticks(ticks, [str(compute) for compute in ticks])
        axis.minorticks_off()
    place = {"loc": "outside upper left", "ncols": 2, "fontsize": "small"}
    figure.legend(drawn.values(), drawn.keys(), **place)
    figure.savefig(path, dpi=110)
