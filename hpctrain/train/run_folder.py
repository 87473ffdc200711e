"""The folder that a run leaves behind, and which earlier run a job continues.

runs/<job>/<number>/
    run.json            job, ranks, versions; whether the run is finished
    metrics.jsonl       one line a step, and one an evaluation
    logs/rank-00000.log
    trace/rank-00000.jsonl
    checkpoints/step-000000500/...
    timeline.json, report.html
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from hpctrain.comm.collect import all_gather, broadcast
from hpctrain.comm.engine import Channel
from hpctrain.config import check, option
from hpctrain.errors import HpctrainError, TrainingError, UnfitError
from hpctrain.train.checkpoint import complete_names


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run leaves behind, and where."""

    folder: str = "runs"
    """Parent of all run folders, relative to the working directory; visible to all ranks."""
    log_every: int = option(0, minimum=0)
    """Steps between two exchanges of figures among the ranks; 0 for a hundred a run."""
    line_s: float = option(10.0, minimum=0)
    """Shortest time between two lines of progress, where there is no terminal for a live bar."""
    trace_steps: int = option(50, minimum=0)
    """Steps, from the start of each session, whose spans are recorded for the timeline."""
    report: bool = True
    """Draw report.html when the run is finished; needs hpctrain[report]."""
    tensorboard: bool = False
    """Write TensorBoard events as well; needs hpctrain[tensorboard]."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of all checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """Figures by step."""
        return self.path / "metrics.jsonl"

    def log(self, rank: int) -> Path:
        """Log of one rank."""
        return self.path / "logs" / f"rank-{rank:05d}.log"

    def trace(self, rank: int) -> Path:
        """Spans of one rank."""
        return self.path / "trace" / f"rank-{rank:05d}.jsonl"

    def facts(self) -> dict[str, Any]:
        """What run.json says; empty when it is missing or cut off."""
        try:
            facts = json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def write_facts(self, **facts: Any) -> None:
        """Add to run.json, replacing it in one step."""
        side = self.path / ".run.json.partial"
        side.write_text(json.dumps({**self.facts(), **facts}, indent=1) + "\n")
        side.replace(self.path / "run.json")


def open_run(
    channel: Channel, parent: Path, fingerprint: str, chosen: Path | None, fresh: bool
) -> RunFolder:
    """The folder of this run: a new one, or an unfinished one of the same job. Collective.

    Args:
        channel: over all ranks.
        parent: folder of all runs of the job.
        fingerprint: equal for runs that may continue each other.
        chosen: use this folder, whatever it holds.
        fresh: do not continue an earlier run.

    Raises:
        UnfitError: the folder cannot be made, or some rank does not see it.
        TrainingError: `fresh`, and the chosen folder holds a run already.
    """
    answer: Path | HpctrainError | None = None
    if channel.rank == 0:
        try:
            answer = _choose(parent, fingerprint, chosen, fresh)
        except OSError as error:
            answer = UnfitError(
                f"the run folder cannot be made: {error}",
                fix="set run.folder to a place that can be written",
                everywhere=True,
            )
        except HpctrainError as error:
            answer = error
    answer = broadcast(channel, answer, label="run folder")
    if isinstance(answer, HpctrainError):
        raise answer
    assert answer is not None
    blind = [rank for rank, sees in enumerate(all_gather(channel, answer.is_dir())) if not sees]
    if blind:
        raise UnfitError(
            f"ranks {blind} do not see the run folder that rank 0 made",
            value=str(answer),
            fix="set run.folder to a file system that all nodes share",
            everywhere=True,
        )
    return RunFolder(answer)


def _choose(parent: Path, fingerprint: str, chosen: Path | None, fresh: bool) -> Path:
    if chosen is not None:
        if fresh and complete_names(chosen / "checkpoints"):
            raise TrainingError(
                "the run folder holds checkpoints of an earlier run",
                where=str(chosen),
                fix="choose another folder, or leave out --fresh to continue it",
                everywhere=True,
            )
        chosen.mkdir(parents=True, exist_ok=True)
        return chosen.resolve()
    parent.mkdir(parents=True, exist_ok=True)
    numbers = sorted(int(p.name) for p in parent.iterdir() if re.fullmatch("[0-9]+", p.name))
    for number in reversed(numbers if not fresh else []):
        run = RunFolder(parent / f"{number:03d}")
        facts = run.facts()
        if facts.get("fingerprint") == fingerprint:
            if facts.get("finished") or not complete_names(run.checkpoints):
                break
            return run.path.resolve()
    return _make_next(parent, numbers[-1] + 1 if numbers else 1)


def _make_next(parent: Path, number: int) -> Path:
    """Make the folder of this number, or of the first after it that nobody else makes."""
    while True:
        path = parent / f"{number:03d}"
        try:
            path.mkdir()
            return path.resolve()
        except FileExistsError:
            number += 1


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
        self._file.write(json.dumps({"step": step, **values}) + "\n")
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


def _reopen(path: Path, resumed_at: int) -> TextIO:
    """Open for appending, without lines of steps after `resumed_at` and without a cut-off line."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= resumed_at:
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError):
                continue
        side = path.with_name(f".{path.name}.partial")
        side.write_text("".join(kept))
        os.replace(side, path)
    return path.open("a")
