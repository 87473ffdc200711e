"""What is recorded of steps and evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from hpctrain.files import open_in_place, replace_text
from hpctrain.train.run_folder import RunFolder


@dataclass(frozen=True)
class StepFigures:
    """Figures of one step: of one rank, or added up over ranks."""

    loss: float
    gradient_norm: float
    exposed_s: float
    """Time in which computation waited for the wire."""
    step_s: float


@dataclass
class Figures:
    """What this rank knows of the steps that it has taken.

    Attributes:
        reported_at: the step up to which figures were brought together.
        pending: its own, of the steps after that.
        losses: over all ranks, of those among them of which it knows.
        reported: means over ranks of what was brought together last, but the loss, which is whole.
    """

    reported_at: int
    pending: list[StepFigures] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    reported: list[StepFigures] = field(default_factory=list)

    def by_step(self) -> dict[int, StepFigures]:
        """What is pending."""
        return dict(enumerate(self.pending, self.reported_at + 1))

    def report(self, step: int, sums: np.ndarray, ranks: int) -> None:
        """All up to `step` were brought together: a row a step, added up over so many ranks."""
        self.reported_at = step
        self.pending, self.losses = [], {}
        self.reported = [
            StepFigures(loss, *(value / ranks for value in values))
            for loss, *values in sums.tolist()
        ]


class Metrics:
    """Appends to metrics.jsonl, and to TensorBoard if asked to. For the root alone.

    A resumed run may repeat steps that a killed one had recorded: they are cut off first.

    Args:
        run: the run folder.
        tensorboard: whether to write events as well.
        resumed_at: the last step that stays.
        evaluates_again: whether the evaluation after that step does not stay.

    Attributes:
        recorded: steps whose figures are there already.
        evaluated: steps whose evaluation is.
    """

    def __init__(
        self, run: RunFolder, tensorboard: bool, resumed_at: int, evaluates_again: bool = False
    ) -> None:
        kept = _kept(run.metrics, resumed_at, evaluates_again)
        self.recorded = {entry["step"] for entry in kept.values() if "loss" in entry}
        self.evaluated = {entry["step"] for entry in kept.values() if "validation" in entry}
        self._file: TextIO = _reopen(run.metrics, kept)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run.path / "tensorboard"), purge_step=resumed_at)

    def write(self, step: int, **values: Any) -> None:
        """Record values of a step; nested tables become `table/name` in TensorBoard."""
        line = json.dumps({"step": step, **_as_json(values)}, allow_nan=False)
        self._file.write(line + "\n")
        if self._board:
            for name, value in values.items():
                for tag, number in value.items() if isinstance(value, dict) else [("", value)]:
                    self._board.add_scalar(f"{name}/{tag}".rstrip("/"), number, step)

    def flush(self) -> None:
        """Make what was written visible to readers."""
        self._file.flush()
        if self._board:
            self._board.flush()

    def close(self) -> None:
        """Stop writing."""
        self._file.close()
        if self._board:
            self._board.close()


def _as_json(value: Any) -> Any:
    """The value with null for numbers that JSON does not have: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: _as_json(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _kept(path: Path, resumed_at: int, evaluates_again: bool) -> dict[str, dict[str, Any]]:
    """Lines that stay, with what they say: of steps up to `resumed_at`, and not cut off."""
    kept: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return kept
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
            is_again = evaluates_again and "validation" in entry and entry["step"] == resumed_at
            if entry["step"] <= resumed_at and not is_again:
                kept[line] = entry
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return kept


def _reopen(path: Path, lines: Iterable[str]) -> TextIO:
    """Open for appending, with these lines alone."""
    if path.is_file():
        replace_text(path, "".join(f"{line}\n" for line in lines))
    return open_in_place(path, "a")
