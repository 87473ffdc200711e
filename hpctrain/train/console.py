"""What the user sees while a job runs, and the log file of each rank."""

from __future__ import annotations

import io
import logging
import os
import stat
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from hpctrain.files import open_in_place
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


def terminal_columns(stream: TextIO, terminal: Path | None = None) -> int:
    """Width of the terminal that shows a stream; COLUMNS overrides it, as everywhere.

    Args:
        stream: what is written to.
        terminal: the terminal's device, where the stream itself is none.
    """
    if os.environ.get("COLUMNS", "").isdecimal():
        return int(os.environ["COLUMNS"])
    try:
        if terminal is None:
            return os.get_terminal_size(stream.fileno()).columns or 80
        device = os.open(terminal, os.O_RDONLY | os.O_NOCTTY)
        try:
            return os.get_terminal_size(device).columns or 80
        finally:
            os.close(device)
    except (OSError, ValueError):
        return 80


LAUNCHERS = ("mpirun", "mpiexec", "prterun", "orterun", "mpiexec.hydra", "prte")
"""Commands that read a rank's standard error from a pipe and write it to their own."""


def launcher_terminal(stream: TextIO, processes: Path = Path("/proc")) -> Path | None:
    """The terminal onto which a launcher on this machine copies what this rank writes, if any.

    No rank can tell by its own streams: under MPICH all are pipes, and Open MPI gives a rank a
    terminal of its own as standard output, also when mpirun's output goes into a file.

    Args:
        stream: a copy of standard error; only a pipe can lead to a launcher.
        processes: where the kernel tells about processes.
    """
    try:
        if not stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode):
            return None
        process = os.getppid()
        while process > 1:
            folder = processes / str(process)
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            if name in LAUNCHERS:
                shown_on = os.readlink(folder / "fd/2")
                if shown_on.startswith(("/dev/pts/", "/dev/tty")):
                    return Path(shown_on)
            process = int(rest.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None


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

    Attributes:
        speaks: whether this rank shows anything; may be set.
        live: whether there is a bar; found out, and may be set.
    """

    def __init__(self, speaks: bool, line_s: float = 0.0, stream: TextIO | None = None) -> None:
        self.speaks = speaks
        self._line_s = line_s
        self._stream = stream or sys.stderr or io.StringIO()
        is_terminal = self._stream.isatty()
        self._terminal = None if is_terminal else launcher_terminal(self._stream)
        self.live = is_terminal or self._terminal is not None
        self._bar_shown = False
        self._said_s = now_s()

    def progress(self, progress: Progress) -> None:
        """Show how far the run is."""
        if not self.speaks:
            return
        if self.live:
            bar = progress_bar(progress, terminal_columns(self._stream, self._terminal))
            self._write("\r\x1b[K" + bar)
            self._bar_shown = True
        elif now_s() - self._said_s >= self._line_s or progress.step == progress.steps:
            self._said_s = now_s()
            self._write(progress_line(progress) + "\n")

    def finish(self) -> None:
        """Leave the bar standing and go to the next line."""
        if self._bar_shown:
            self._write("\n")
            self._bar_shown = False

    def say(self, text: str) -> None:
        """Show a line, above the bar if there is one."""
        if not self.speaks:
            return
        clear = "\r\x1b[K" if self._bar_shown else ""
        self._bar_shown = False
        self._write(f"{clear}{text}\n")

    def _write(self, text: str) -> None:
        # A full disk behind it, or nobody who reads any more, does not end the run.
        with suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


class RankLog:
    """This rank's log: to a file, each line marked with rank and step; warnings to the console too.

    Receives what any part of the program logs, from `INFO` on.
    """

    def __init__(self, path: Path, world: World, console: Console) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        open_in_place(path, "a").close()
        file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        file.addFilter(_Place(world))
        file.setFormatter(
            logging.Formatter("%(asctime)s rank %(rank)s step %(step)s %(levelname)s %(message)s")
        )
        self._handlers = (file, _Warnings(console))
        root = logging.getLogger()
        root.setLevel(min(root.level or logging.INFO, logging.INFO))
        for handler in self._handlers:
            root.addHandler(handler)

    def close(self) -> None:
        """Stop logging to file and console."""
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()


class _Place(logging.Filter):
    """Marks records with where this rank stands."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def filter(self, record: logging.LogRecord) -> bool:
        step = self._world.position.step
        record.rank, record.step = self._world.rank, "-" if step is None else step
        return True


class _Warnings(logging.Handler):
    """Shows warnings on the console, unless the record says that it was shown already."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, "shown"):
            self._console.say(f"{record.levelname.lower()}: {record.getMessage()}")
