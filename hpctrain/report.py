"""What a run looked like: loss and throughput, and all ranks' timelines on one clock.

Writes, into the run folder, ``report.html`` with its plots inside, and ``timeline.json`` for
Chrome's tracing view or Perfetto. Reads only what the run left there; needs no MPI.
"""

from __future__ import annotations

import base64
import html
import io
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpctrain import report_coded, straggling, trace
from hpctrain.errors import HpctrainError, UnfitError
from hpctrain.files import replace_text
from hpctrain.records import (
    RATES,
    Damaged,
    Span,
    read_facts,
    read_metrics,
    read_spans,
    warning_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WAIT = "wait for the wire"
COLORS = {
    "data": "#bbbbbb",
    "forward": "#4477aa",
    "backward": "#66ccee",
    WAIT: "#ee6677",
    "optimizer": "#228833",
    "evaluate": "#aa3377",
    "save": "#ccbb44",
    "wait for the copy": "#ccbb44",
}
WIRE_COLORS = ("#ccbb44", "#aa9922")
STEP_PHASES = ("data", "forward", "backward", "optimizer")
SHOWN_STEPS = 3
THREADS = {
    trace.COMPUTE: 0,
    trace.WIRE: 100,
    trace.DATA_BLOCKS: 200,
    trace.CODED: 300,
    trace.CHECKPOINT: 500,
}
"""Where the threads of each track begin, in timeline.json."""


def write(run: Path, required: bool = False) -> str:
    """Write the report of a run folder; returns a line that says where it is.

    Args:
        run: the run folder.
        required: fail, rather than say so, when matplotlib is missing.

    Raises:
        JobError: the folder holds no run.
        HpctrainError: the report cannot be written.
        UnfitError: matplotlib is missing and `required`.
    """
    damaged: Damaged = {}
    try:
        metrics = read_metrics(run / "metrics.jsonl", damaged)
        spans = read_spans(run, damaged)
    except OSError as error:
        raise HpctrainError(f"the run cannot be read: {error}", everywhere=True) from error
    warning = warning_of(damaged)
    try:
        replace_text(run / "timeline.json", json.dumps(chrome_trace(spans)))
        return warning + _draw(run, metrics, spans, warning, required)
    except OSError as error:
        raise HpctrainError(
            f"the report cannot be written: {error}",
            fix="free space, or copy the run folder to a place that can be written",
            everywhere=True,
        ) from error


def _draw(
    run: Path, metrics: list[dict[str, Any]], spans: list[Span], warning: str, required: bool
) -> str:
    try:
        import matplotlib
    except ImportError as error:
        if required:
            raise UnfitError(
                "the report needs matplotlib",
                fix="pip install 'hpctrain[report]'",
                everywhere=True,
            ) from error
        return f"{run}: no report.html, which needs pip install 'hpctrain[report]'"
    matplotlib.use("Agg")
    replace_text(run / "report.html", _page(run, metrics, spans, warning))
    return f"report: {run / 'report.html'}"


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """The spans in the Trace Event Format: a process a rank, a thread a track."""
    zero_s = spans[0]["start_s"] if spans else 0.0
    events: list[dict[str, Any]] = []
    lanes = assign_lanes(spans)
    for rank in sorted({span["rank"] for span in spans}):
        events.append(_name("process_name", rank, 0, f"rank {rank}"))
    for rank, track, lane in sorted(
        {(s["rank"], *lane) for s, lane in zip(spans, lanes, strict=True)}
    ):
        events.append(
            _name("thread_name", rank, _thread(track, lane), f"{track} {lane or ''}".strip())
        )
    for span, (track, lane) in zip(spans, lanes, strict=True):
        events.append(
            {
                "name": span["name"],
                "cat": track,
                "ph": "X",
                "ts": (span["start_s"] - zero_s) * 1e6,
                "dur": (span["end_s"] - span["start_s"]) * 1e6,
                "pid": span["rank"],
                "tid": _thread(track, lane),
                "args": _facts(span),
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _facts(span: Span) -> Span:
    own = ("name", "track", "start_s", "end_s", "rank", "session")
    return {key: value for key, value in span.items() if key not in own}


def _name(kind: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": thread, "args": {"name": name}}


def _thread(track: str, lane: int) -> int:
    return THREADS.get(track, 400) + lane


def assign_lanes(spans: Sequence[Span]) -> list[tuple[str, int]]:
    """Track and lane of each span, such that operations in flight together do not cover each other.

    Args:
        spans: ordered by start.
    """
    ends: dict[tuple[int, str], list[float]] = {}
    lanes = []
    for span in spans:
        if span["track"] == trace.COMPUTE:
            lanes.append((span["track"], 0))
            continue
        busy = ends.setdefault((span["rank"], span["track"]), [])
        lane = next((i for i, end_s in enumerate(busy) if end_s <= span["start_s"]), len(busy))
        busy[lane : lane + 1] = [span["end_s"]]
        lanes.append((span["track"], lane))
    return lanes


def exposed_share(spans: Iterable[Span]) -> dict[int, float]:
    """Part of each rank's step time in which it waited for the wire."""
    waited: dict[int, float] = {}
    stepped: dict[int, float] = {}
    for span in spans:
        if span["name"] in STEP_PHASES or span["name"] == WAIT:
            target = waited if span["name"] == WAIT else stepped
            length_s = span["end_s"] - span["start_s"]
            target[span["rank"]] = target.get(span["rank"], 0.0) + length_s
    return {rank: waited.get(rank, 0.0) / total for rank, total in stepped.items() if total > 0}


def whole_steps(spans: Sequence[Span]) -> list[int]:
    """The steps that were traced on every rank, but for those that died in their first one."""
    steps: dict[int, set[int]] = {}
    for span in spans:
        if span["name"] == "optimizer" and "step" in span:
            steps.setdefault(span["step"], set()).add(span["rank"])
    ranks = {rank for seen in steps.values() for rank in seen}
    return sorted(step for step, seen in steps.items() if seen == ranks)


def shown_steps(spans: Sequence[Span]) -> list[Span]:
    """The spans of the last few steps that were traced on every rank."""
    whole = whole_steps(spans)[-SHOWN_STEPS:]
    inside = [s for s in spans if s.get("step") in whole and s["name"] in COLORS]
    if not inside:
        return []
    begin_s = min(s["start_s"] for s in inside)
    end_s = max(s["end_s"] for s in inside)
    return [s for s in spans if s["start_s"] >= begin_s and s["end_s"] <= end_s]


def draw_loss(axes: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Training loss by step, smoothed over it, and validation loss."""
    steps = [m["step"] for m in metrics if "loss" in m]
    losses = [m["loss"] for m in metrics if "loss" in m]
    window = smoothed_over(losses)
    label = "training, each step" if window > 1 else "training"
    axes.plot(steps, losses, color="#4477aa", alpha=0.3 if window > 1 else 1, lw=0.8, label=label)
    if window > 1:
        mean = f"training, mean of the last {window} steps"
        axes.plot(steps, smooth(losses), color="#4477aa", label=mean)
    checks = [m for m in metrics if "loss" in m.get("validation", {})]
    if checks:
        axes.plot(
            [m["step"] for m in checks],
            [m["validation"]["loss"] for m in checks],
            "o-",
            color="#ee6677",
            label="validation",
        )
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(frameon=False)


def smoothed_over(values: Sequence[float], part: float = 0.02) -> int:
    """Number of steps in a running mean over `part` of a run."""
    return max(1, int(len(values) * part))


def smooth(values: Sequence[float], part: float = 0.02) -> list[float]:
    """Running mean over the last `part` of the run at each point."""
    window = smoothed_over(values, part)
    return [
        statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)
    ]


def draw_throughput(axes: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Samples a second by step, and the share of the step that waited for the wire."""
    rows = [m for m in metrics if all(key in m for key in RATES) and m["step_s"] > 1e-9]
    steps = [m["step"] for m in rows]
    axes.plot(steps, smooth([m["samples_per_s"] for m in rows]), color="#228833")
    axes.set(xlabel="step", ylabel="samples/s")
    axes.set_ylim(bottom=0)
    share = axes.twinx()
    exposed = [100 * m["exposed_s"] / m["step_s"] for m in rows]
    share.plot(steps, smooth(exposed), color="#ee6677")
    share.set_ylabel("waiting for the wire, % of a step", color="#ee6677")
    share.set_ylim(0, max(5.0, *smooth(exposed)) * 1.2 if exposed else 5.0)


def draw_timeline(axes: Axes, spans: Sequence[Span]) -> None:
    """Compute and communication of all ranks, one pair of rows a rank."""
    zero_s = min((s["start_s"] for s in spans), default=0.0)
    lanes = assign_lanes(spans)
    depth = 1 + max((lane for track, lane in lanes if track == trace.WIRE), default=0)
    ranks = sorted({s["rank"] for s in spans})
    for span, (track, lane) in zip(spans, lanes, strict=True):
        base = ranks.index(span["rank"])
        begin_ms, length_ms = (
            (span["start_s"] - zero_s) * 1e3,
            (span["end_s"] - span["start_s"]) * 1e3,
        )
        if track == trace.COMPUTE:
            if span["name"] in COLORS:
                axes.broken_barh(
                    [(begin_ms, length_ms)], (base + 0.05, 0.4), color=COLORS[span["name"]]
                )
        elif track == trace.WIRE and span["name"].startswith(("block", "buffers")):
            row = (base + 0.48 + 0.42 * lane / depth, 0.42 / depth * 0.9)
            axes.broken_barh([(begin_ms, length_ms)], row, color=WIRE_COLORS[lane % 2])
    axes.set_yticks(
        [i + offset for i in range(len(ranks)) for offset in (0.25, 0.7)],
        [text for rank in ranks for text in (f"rank {rank}", "on the wire")],
    )
    axes.invert_yaxis()
    axes.set_xlabel("ms")


def _legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    names = ("data", "forward", "backward", WAIT, "optimizer")
    patches = [Patch(color=COLORS[name], label=name) for name in names]
    patches.append(Patch(color=WIRE_COLORS[0], label="block on the wire"))
    figure.legend(handles=patches, ncols=6, loc="upper center", frameon=False, fontsize=8)


def timeline_figure(spans: Sequence[Span]) -> Figure:
    """A figure of the last few traced steps of all ranks."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    ranks = len({s["rank"] for s in spans})
    figure = Figure(figsize=(10, 1.2 + 0.9 * min(ranks, 32)), layout="constrained")
    draw_timeline(figure.subplots(), spans)
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):  # leave room for the legend
        engine.set(rect=(0, 0, 1, 1 - 0.35 / figure.get_figheight()))
    _legend(figure)
    return figure


def _page(
    run: Path, metrics: Sequence[Mapping[str, Any]], spans: Sequence[Span], warning: str
) -> str:
    from matplotlib.figure import Figure

    facts = read_facts(run)
    curves = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = curves.subplots(1, 2)
    draw_loss(left, metrics)
    draw_throughput(right, metrics)
    title = html.escape(_title(run, facts))
    parts = [f"<h1>{title}</h1>", f"<p>{html.escape(warning)}</p>" if warning else ""]
    parts += [_summary(facts, metrics), _image(curves, "loss and throughput")]
    steps = shown_steps(spans)
    if steps:
        parts += ["<h2>Timeline</h2>", _caption(whole_steps(spans)), _shares(spans)]
        parts.append(_image(timeline_figure(steps), "timeline"))
    else:
        parts.append("<p>No step was traced on all ranks: no timeline.</p>")
    if any(span["track"] == trace.CODED for span in spans):
        parts += report_coded.section(*straggling.read_steps(spans), image=_image)
    parts.append(_job(facts))
    return _HTML.format(title=title, body="\n".join(parts))


def _title(run: Path, facts: Mapping[str, Any]) -> str:
    folder = run.resolve()
    return f"{facts.get('name', folder.parent.name)}, run {folder.name}"


def _summary(facts: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    job = facts.get("job")
    rows: dict[str, Any] = {
        "seed": job.get("seed") if isinstance(job, dict) else None,
        "started": facts.get("started"),
        "duration": None,
        "parameters": facts.get("parameters"),
        **{key: facts.get(key) for key in ("ranks", "nodes", "mpi", "torch", "progress")},
    }
    if trace.is_finite(facts.get("seconds")):
        rows["duration"] = str(timedelta(seconds=round(facts["seconds"])))
    elif "finished" in facts:
        rows["duration"] = "not finished"
    steps = [m for m in metrics if "step_s" in m]
    if steps:
        rows["steps"] = steps[-1]["step"]
        rows["median step"] = f"{statistics.median(m['step_s'] for m in steps) * 1e3:.1f} ms"
    losses = [m["loss"] for m in metrics if "loss" in m]
    if losses:
        rows["last training loss"] = f"{losses[-1]:.4f}"
    checks = [m["validation"] for m in metrics if "validation" in m]
    for name, value in (checks[-1] if checks else {}).items():
        rows[f"validation {name}"] = f"{value:.4f}"
    cells = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(_plain(value))}</td></tr>"
        for key, value in rows.items()
        if value is not None
    )
    return f"<table>{cells}</table>"


def _plain(value: Any) -> str:
    """A value of run.json as one would write it."""
    if isinstance(value, list):
        return ", ".join(
            f"{item} ({n} times)" if n > 1 else str(item)
            for item, n in Counter(map(str, value)).items()
        )
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def _caption(traced: Sequence[int]) -> str:
    first = traced[-SHOWN_STEPS:][0]
    return (
        f"<p>Steps {first} to {traced[-1]}, all ranks on one clock: what a rank computes and, "
        f"below it, the blocks that it has on the wire. These are the last of the steps "
        f"{traced[0]} to {traced[-1]}; the first <code>run.trace_steps</code> steps of each "
        "session are traced. <code>timeline.json</code> has them all, for Perfetto.</p>"
    )


def _job(facts: Mapping[str, Any]) -> str:
    """The whole job, defaults included, as a job file would say it."""
    if not isinstance(facts.get("job"), dict):
        return ""
    text = html.escape("\n".join(_as_toml(facts["job"])))
    return f"<details><summary>The job, with all defaults</summary><pre>{text}</pre></details>"


def _as_toml(table: Mapping[str, Any], where: str = "") -> list[str]:
    lines = []
    for key, value in table.items():
        if isinstance(value, dict):
            lines += _as_toml(value, f"{where}{key}.")
        elif value is not None:
            lines.append(f"{where}{key} = {json.dumps(value, ensure_ascii=False)}")
    return lines


def _shares(spans: Sequence[Span]) -> str:
    shares = exposed_share(spans)
    texts = [f"rank {rank}: {share:.1%}" for rank, share in sorted(shares.items())]
    return f"<p>Share of the step that waited for the wire: {'; '.join(texts)}.</p>"


def _image(figure: Figure, description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{description}" src="data:image/png;base64,{data}">'


_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em }}
img {{ max-width: 100% }}
th {{ text-align: left; padding-right: 2em; font-weight: 600; vertical-align: bottom }}
</style></head><body>
{body}
</body></html>
"""
