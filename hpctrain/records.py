"""What a run left in its folder, read back. Damaged lines are passed over and counted.

Needs neither torch nor MPI.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hpctrain import trace
from hpctrain.errors import JobError

STEP_MARK = "step"
"""File of a run folder that says which step the run is in."""
RATES = ("samples_per_s", "step_s", "exposed_s")

LARGEST = 1e100
"""Of figures that are taken for such: sums of them can still be made."""

DEEPEST = 64
"""Of tables and lists inside each other in run.json."""

Span = dict[str, Any]
Damaged = dict[str, int]
"""Number of lines that were passed over, by file."""


def read_metrics(path: Path, damaged: Damaged) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that make sense; counts the others in `damaged`.

    Raises:
        JobError: there is no such file.
    """
    if not path.is_file():
        folder = path.parent
        raise JobError(
            "there is no run here" if folder.is_dir() else "there is no such folder",
            where=str(folder),
            fix="name a run folder, for example runs/stdlib_lm/001",
            everywhere=True,
        )
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            entry = json.loads(line, object_hook=_with_nan)
        except (ValueError, RecursionError):
            entry = None
        if _is_metric(entry):
            entries.append(entry)
        elif line.endswith("\n"):  # else the last line of a run that was killed
            damaged[path.name] = damaged.get(path.name, 0) + 1
    return entries


def _with_nan(table: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: figures that were not finite are recorded as null."""
    return {key: float("nan") if value is None else value for key, value in table.items()}


def _is_metric(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        return False
    if not trace.is_finite(entry["step"]):
        return False
    figures = [entry.get(key, 0.0) for key in ("loss", *RATES)]
    checked = entry.get("validation", {})
    if isinstance(checked, dict):
        figures += checked.values()
    return isinstance(checked, dict) and all(map(_is_figure, figures))


def _is_figure(value: Any) -> bool:
    """A number that can be drawn, or NaN, which is left out of a drawing."""
    return isinstance(value, (int, float)) and (value != value or abs(value) < LARGEST)


def warning_of(damaged: Damaged) -> str:
    """One warning about all lines that were passed over; empty when there were none."""
    files = ", ".join(f"{count} of {name}" for name, count in sorted(damaged.items()))
    return f"warning: passed over damaged lines: {files}\n" if files else ""


def read_facts(run: Path) -> dict[str, Any]:
    """What run.json says; empty when it is missing or damaged."""
    try:
        if not (run / "run.json").is_file():  # a pipe would be waited for
            return {}
        facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) and not _is_deep(facts) else {}


def _is_deep(value: Any) -> bool:
    """Whether values lie deeper inside each other than those of any job do."""
    layer = [value]
    for _ in range(DEEPEST):
        inside = [v.values() if isinstance(v, dict) else v for v in layer]
        layer = [v for values in inside for v in values if isinstance(v, (dict, list))]
    return bool(layer)


def saved_steps(run: Path) -> list[int]:
    """Steps of the checkpoints that are complete, in order."""
    names = (path.parent.name for path in (run / "checkpoints").glob("step-*/manifest.json"))
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def step_begun(run: Path) -> int | None:
    """The last step that the run has begun, if it has come to one; see `StepMark`."""
    try:
        return int((run / STEP_MARK).read_text())
    except (OSError, ValueError):
        return None


class StepMark:
    """Writes down which step a run is in, for who finds it dead. A system call a step.

    A process that is killed leaves it as it is: the kernel has it.
    """

    def __init__(self, run: Path) -> None:
        self._file = os.open(run / STEP_MARK, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def set(self, step: int) -> None:
        """The run begins this step."""
        os.pwrite(self._file, b"%12d\n" % step, 0)

    def close(self) -> None:
        """Write no more."""
        os.close(self._file)


def read_spans(run: Path, damaged: Damaged | None = None) -> list[Span]:
    """The spans of all ranks' last session, on rank 0's clock, ordered by start."""
    ranks = read_facts(run).get("ranks")  # an earlier session may have had more
    spans: list[Span] = []
    for path in sorted((run / "trace").glob("rank-*.jsonl")):
        if not path.is_file():
            continue
        lines: list[str] = []
        last = _last_session(trace.read(path, lines))
        spans += [s for s in last if not isinstance(ranks, int) or s["rank"] < ranks]
        if lines and damaged is not None:
            damaged[f"trace/{path.name}"] = len(lines)
    return sorted(spans, key=lambda span: float(span["start_s"]))


def _last_session(spans: Iterable[Span]) -> list[Span]:
    kept: list[Span] = []
    for span in spans:
        if kept and span["session"] != kept[-1]["session"]:
            kept = []
        kept.append(span)
    return kept
