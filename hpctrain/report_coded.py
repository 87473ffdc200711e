"""The report's section on stragglers: what coded steps took against the best they could.

Drawings and tables of what hpctrain.straggling finds in the traces.
"""

from __future__ import annotations

import html
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from hpctrain.straggling import GIVEN_UP, REDUNDANT, USED, CodedStep, Slowness, slowness

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FATE_COLORS = {USED: "#4477aa", REDUNDANT: "#ccbb44", GIVEN_UP: "#ee6677"}
TEXT_COLORS = {REDUNDANT: "#222222"}
TOOK_COLOR, BEST_COLOR = "#222222", "#228833"
SHOWN_STEPS = 3
MOST_NAMED = 8
"""Workers or data blocks that a sentence lists."""


def section(
    steps: Sequence[CodedStep], damaged: int, image: Callable[[Figure, str], str]
) -> list[str]:
    """The section's parts, as HTML.

    Args:
        steps: the coded steps, from `straggling.read_steps`.
        damaged: number of spans that were passed over.
        image: makes an element of a figure and its description.
    """
    parts = ["<h2>Stragglers</h2>"]
    if damaged:
        parts.append(f"<p>Passed over: {damaged} traced spans of coded steps make no sense.</p>")
    if not steps:
        return parts
    found = slowness(steps)
    parts += [summary(steps), *(f"<p>{html.escape(text)}</p>" for text in findings(found))]
    parts += [image(steps_figure(steps[-SHOWN_STEPS:]), "data blocks by worker"), _caption(steps)]
    if any(step.ratio for step in steps):
        parts.append(image(ratio_figure(steps), "T / T* by step"))
    return [*parts, workers_table(steps, found)]


# ---------------------------------------------------------------------- figures


def steps_figure(steps: Sequence[CodedStep]) -> Figure:
    """Who worked when on which data block: a panel a step, a row a worker."""
    from matplotlib.figure import Figure

    ranks = ranks_of(steps)
    height = min(0.27, 14 / len(ranks))
    figure = Figure(figsize=(10, 1.35 + height * len(ranks)), layout="constrained")
    panels = figure.subplots(1, len(steps), sharex=True, sharey=True, squeeze=False)[0]
    shown_ms = 1e3 * max(_shown_s(step) for step in steps)
    for axes, step in zip(panels, steps, strict=True):
        _draw_step(axes, step, ranks, inch_per_ms=8.8 / len(steps) / shown_ms, height=height)
    panels[0].set_xlim(0, shown_ms)
    panels[0].set_ylim(len(ranks) - 0.4, -0.6)
    every = math.ceil(0.13 / height)  # else names cover each other
    worked = {attempt.rank for step in steps for attempt in step.attempts}
    panels[0].set_yticks(
        range(0, len(ranks), every),
        [f"rank {r}" if r in worked else f"rank {r}, no trace" for r in ranks[::every]],
        fontsize=8,
    )
    _legend(figure)
    return figure


def _shown_s(step: CodedStep) -> float:
    """Where a step's panel ends: who works on long after the step must not squeeze it."""
    last_s = max((a.end_s - step.start_s for a in step.attempts), default=0.0)
    return 1.02 * max(min(max(last_s, step.took_s), 1.5 * step.took_s), 1e-6)


def _draw_step(
    axes: Axes, step: CodedStep, ranks: Sequence[int], inch_per_ms: float, height: float
) -> None:
    from matplotlib.collections import PolyCollection

    rows = {rank: row for row, rank in enumerate(ranks)}
    bars: dict[str, list[list[tuple[float, float]]]] = {fate: [] for fate in FATE_COLORS}
    size = min(7.0, 50 * height)
    end_s = step.start_s + _shown_s(step)
    for attempt in (a for a in step.attempts if step.start_s <= a.end_s and a.start_s < end_s):
        begin_ms = 1e3 * (attempt.start_s - step.start_s)
        length_ms = 1e3 * (min(attempt.end_s, end_s) - attempt.start_s)
        row, text = rows[attempt.rank], str(attempt.block)
        fate = step.fate(attempt)
        left, right = begin_ms, begin_ms + length_ms
        corners = ((left, -0.42), (left, 0.42), (right, 0.42), (right, -0.42))
        bars[fate].append([(x, row + y) for x, y in corners])
        if length_ms * inch_per_ms > 0.0095 * size * len(text) and size > 5.5:
            axes.text(
                (left + right) / 2, row, text, color=TEXT_COLORS.get(fate, "white"),
                fontsize=size, ha="center", va="center_baseline", clip_on=True,
            )  # fmt: skip
    for fate, color in FATE_COLORS.items():  # thousands of bars, each drawn alone, take long
        axes.add_collection(
            PolyCollection(bars[fate], facecolors=color, edgecolors="white", lw=0.6)
        )
    title = f"step {step.step}: T = {1e3 * step.took_s:.3g} ms"
    if step.ratio:
        axes.axvline(1e3 * step.best_s, color=BEST_COLOR, ls="--", lw=1.4)
        title += f", T / T* = {step.ratio:.2f}"
    axes.axvline(1e3 * step.took_s, color=TOOK_COLOR, lw=1.2)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("ms", fontsize=8)
    axes.tick_params(labelsize=8)


def _legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[Any] = [Patch(color=color, label=fate) for fate, color in FATE_COLORS.items()]
    entries.append(Line2D([], [], color=BEST_COLOR, ls="--", label="T*, the best there can be"))
    entries.append(Line2D([], [], color=TOOK_COLOR, label="T, the root has the sum"))
    figure.legend(handles=entries, ncols=5, loc="outside upper center", frameon=False, fontsize=8)


def ratio_figure(steps: Sequence[CodedStep]) -> Figure:
    """T / T* of each step."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 2.2), layout="constrained")
    axes = figure.subplots()
    known = [(step.step, step.ratio) for step in steps if step.ratio]
    axes.plot(*zip(*known, strict=True), "o-", color=FATE_COLORS[USED], ms=3, lw=0.8)
    axes.axhline(1, color=BEST_COLOR, ls="--", lw=1.2)
    axes.set(xlabel="step", ylabel="T / T*")
    axes.set_ylim(min(0.95, *(ratio for _, ratio in known)), None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


# ---------------------------------------------------------------------- tables and sentences


def ranks_of(steps: Iterable[CodedStep]) -> list[int]:
    """The ranks that hold data blocks or worked on them."""
    ranks: set[int] = set()
    for step in steps:
        ranks.update(*step.holders, step.sources, (attempt.rank for attempt in step.attempts))
    return sorted(ranks)


def summary(steps: Sequence[CodedStep]) -> str:
    """The table of all steps together."""
    busy_s = sum(step.busy_s for step in steps)
    ratios = [step.ratio for step in steps if step.ratio]
    rows = {
        "steps": f"{len(steps)} ({steps[0].step} to {steps[-1].step})",
        "data blocks": _or_more(len(step.holders) for step in steps),
        "holders of a data block": _or_more(len(ranks) for s in steps for ranks in s.holders),
        "median T": f"{1e3 * statistics.median(step.took_s for step in steps):.1f} ms",
    }
    if ratios:
        rows["median T / T*"] = f"{statistics.median(ratios):.2f}"
        if len(ratios) < len(steps):
            rows["median T / T*"] += f", of {len(ratios)} steps: T* of the others is not known"
    redundant = statistics.fmean(step.redundant_share for step in steps)
    rows["mean share of data blocks computed again"] = f"{redundant:.1%}"
    if busy_s:
        rows["share of the workers' time wasted"] = f"{sum(s.wasted_s for s in steps) / busy_s:.1%}"
    vectors = statistics.fmean(step.vectors for step in steps)
    rows["mean gradient vectors that reached the root"] = f"{vectors:.2f}"
    return _table([[key, value] for key, value in rows.items()])


def _or_more(numbers: Iterable[int]) -> str:
    seen = set(numbers)
    return f"{min(seen)} to {max(seen)}" if len(seen) > 1 else str(*seen)


def _caption(steps: Sequence[CodedStep]) -> str:
    return (
        f"<p>The last of the traced steps {steps[0].step} to {steps[-1].step}: a bar is a data "
        "block that a worker worked on. T is the time from the beginning of the step until the "
        "root has the sum of the last model block. T* is the time by which each data block could "
        "have been computed once by one of its holders, each as fast as it was in this step; a "
        "worker that finished none counts as about to finish when it gave up. T* has nothing on "
        "the wire. Wasted is the time for what was given up, or computed again and not used.</p>"
    )


def workers_table(steps: Sequence[CodedStep], found: Slowness) -> str:
    """What each worker supplied and how slow it was."""
    used = Counter(rank for step in steps for rank in step.sources)
    tries: Counter[tuple[int, str]] = Counter()
    seconds: dict[tuple[int, str], float] = defaultdict(float)
    for step in steps:
        for attempt in step.attempts:
            key = attempt.rank, step.fate(attempt)
            tries[key] += 1
            seconds[key] += attempt.duration_s
    head = [
        *("worker", "time for a sample, of the median worker's", "steps in which it was slow"),
        *("data blocks used", "redundant", "given up", "wasted time"),
    ]
    rows = []
    for rank in ranks_of(steps):
        slow = found.slow_steps.get(rank)
        row = [f"rank {rank}", _factor(found, rank), "" if slow is None else f"{slow:.0%}"]
        row.append(f"{used[rank]} ({used[rank] / used.total():.0%})")
        row += [str(tries[rank, fate]) for fate in (REDUNDANT, GIVEN_UP)]
        busy_s = sum(seconds[rank, fate] for fate in FATE_COLORS)
        wasted_s = busy_s - seconds[rank, USED]
        rows.append([*row, f"{wasted_s / busy_s:.0%}" if busy_s else "no trace"])
    return _table(rows, head)


def _factor(found: Slowness, rank: int) -> str:
    if rank in found.workers:
        return f"{found.workers[rank]:.2f}"
    bound = found.at_least.get(rank, 0.0)
    return f"at least {bound:.2f}" if bound >= 1 else ""


def findings(found: Slowness) -> list[str]:
    """What is slow, in sentences."""
    texts = []
    workers, blocks = found.slow_workers(), found.slow_blocks()
    if workers:
        names = [f"rank {rank} ({_factor(found, rank)} times)" for rank in workers]
        texts.append(
            f"Slow workers: {_listed(names)} the median worker's time for a sample. "
            "Other holders can compute their data blocks instead."
        )
        unsure = [f"rank {rank}" for rank in workers if rank in found.alone]
        if unsure:
            texts[-1] += (
                f" Unless the data is shuffled, it may also be the data of {_listed(unsure)}: no "
                "other worker tried the same positions in the batch."
            )
    if blocks:
        names = [f"{block} ({factor:.2f} times)" for block, factor in blocks.items()]
        texts.append(
            f"Slow data: data blocks {_listed(names)} the median one's time for a sample, on "
            "workers that are faster with others. These are positions in the batch, of which the "
            "samples change with each step, unless the data is not shuffled."
        )
    if found.slow_data:
        names = [f"{block} of step {step}" for step, block in found.slow_data]
        texts.append(
            f"Slow data: {len(found.slow_data)} of {found.tried} data blocks that two or more "
            f"workers tried were slow on all of them: {_listed(names)}. No other holder cures that."
        )
    texts = texts or ["No worker and no position in the batch was slow in the median."]
    if found.slow_once:
        texts.append(
            f"Slow once: {found.slow_once} data blocks were slow on the only worker that tried "
            "them, which was faster with others. It may have been disturbed, or the data be slow."
        )
    return texts


def _listed(names: Sequence[str]) -> str:
    more = [f"{len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
    return ", ".join([*names[:MOST_NAMED], *more])


def _table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """The first cell of each row names it."""
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)] if head else []
    for name, *cells in rows:
        texts = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f"<th>{html.escape(name)}</th>{texts}")
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
