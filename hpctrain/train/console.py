"""What the user sees while a job runs, and the log file of each rank."""

from __future__ import annotations

import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from hpctrain.trace import now_s
from hpctrain.world import World


@dataclass(frozen=True)
class Progress:
    """How far a run is, for display."""

    step: int
    steps: int
    loss: float
    samples_per_s: float
    exposed: float
    """Part of the step time in which computation waited for the wire, 0 to 1."""
    left_s: float


def progress_line(progress: Progress) -> str:
    """One line of progress."""
    width = len(str(progress.steps))
    return (
        f"step {progress.step:>{width}}/{progress.steps}  loss {progress.loss:.4f}  "
        f"{progress.samples_per_s:,.0f} samples/s  exposed {progress.exposed:5.1%}  "
        f"{duration(progress.left_s)} left"
    )


def progress_bar(progress: Progress, columns: int) -> str:
    """A bar of what is done in front of the progress line, cut to the terminal's width."""
    line = progress_line(progress)
    room = min(30, columns - len(line) - 4)
    if room < 5:
        return line[: columns - 1]
    done = room * progress.step // max(1, progress.steps)
    return f"[{'#' * done}{'.' * (room - done)}] {line}"


def duration(seconds: float) -> str:
    """`1h02m`, `3m07s` or `12s`."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    if whole >= 60:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole}s"


class Console:
    """Shows progress on one rank: a live bar on a terminal, one line an interval elsewhere.

    Args:
        speaks: whether this rank shows anything.
        line_s: shortest time between two lines where there is no terminal.
        stream: where to; standard error by default, so that output can be piped away.
    """

    def __init__(self, speaks: bool, line_s: float = 0.0, stream: TextIO | None = None) -> None:
        self._speaks = speaks
        self._line_s = line_s
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._bar_shown = False
        self._said_s = now_s()

    def progress(self, progress: Progress) -> None:
        """Show how far the run is."""
        if not self._speaks:
            return
        if self._live:
            bar = progress_bar(progress, shutil.get_terminal_size().columns)
            self._stream.write("\r\x1b[K" + bar)
            self._bar_shown = True
        elif now_s() - self._said_s >= self._line_s or progress.step == progress.steps:
            self._said_s = now_s()
            self._stream.write(progress_line(progress) + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """Show a line, above the bar if there is one."""
        if not self._speaks:
            return
        if self._bar_shown:
            self._stream.write("\r\x1b[K")
            self._bar_shown = False
        self._stream.write(text + "\n")
        self._stream.flush()


def open_log(path: Path, world: World) -> logging.Handler:
    """Send this rank's log to `path`, each line marked with rank and step."""

    class Place(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            record.rank = world.rank
            record.step = "-" if world.position.step is None else world.position.step
            return True

    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.addFilter(Place())
    handler.setFormatter(
        logging.Formatter("%(asctime)s rank %(rank)s step %(step)s %(levelname)s %(message)s")
    )
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(min(root.level, logging.INFO) if root.level else logging.INFO)
    return handler
