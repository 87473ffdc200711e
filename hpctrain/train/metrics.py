"""What is recorded of steps and evaluations."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

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


class Metrics:
    """Appends to metrics.jsonl, and to TensorBoard if asked to. For the root alone.

    A resumed run may repeat steps that a killed one had recorded: they are cut off first.
    """

    def __init__(self, run: RunFolder, tensorboard: bool, resumed_at: int) -> None:
        self._file: TextIO = _reopen(run.metrics, resumed_at)
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


def _reopen(path: Path, resumed_at: int) -> TextIO:
    """Open for appending, without lines of steps after `resumed_at` and without a cut-off line."""
    kept = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                if json.loads(line)["step"] <= resumed_at:
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
        replace_text(path, "".join(kept))
    return open_in_place(path, "a")
