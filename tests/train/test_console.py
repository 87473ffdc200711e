from __future__ import annotations

import fcntl
import io
import logging
import os
import struct
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from hpctrain.train import console
from hpctrain.train.console import (
    Console,
    Progress,
    duration,
    launcher_terminal,
    progress_bar,
    progress_line,
    terminal_columns,
)
from hpctrain.world import World

CLEAR = "\r\x1b[K"
LINE = "step    7/1100  loss 2.3457  12,346 samples/s  exposed  5.1%  3m07s left"


def at(step: int, steps: int = 1100) -> Progress:
    return Progress(
        step=step, steps=steps, loss=2.34567, samples_per_s=12345.6, exposed=0.051, left_s=187.2
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that a console sees, as its only element."""
    now = [100.0]
    monkeypatch.setattr(console, "now_s", lambda: now[0])
    return now


# ---------------------------------------------------------------------- text


def test_line() -> None:
    assert progress_line(at(7)) == LINE


def test_lines_of_a_run_are_equally_long() -> None:
    assert len({len(progress_line(at(step))) for step in (1, 10, 999, 1100)}) == 1


def test_line_of_a_loss_that_is_not_finite() -> None:
    assert "loss nan " in progress_line(Progress(1, 2, float("nan"), 0.0, 1.0, 0.0))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0s"),
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (61, "1m01s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (3720, "1h02m"),
        (100 * 3600, "100h00m"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_bar_shows_the_part_that_is_done() -> None:
    line = progress_line(at(550))
    assert progress_bar(at(550), 200) == f"[{'#' * 15}{'.' * 15}] {line}"
    assert progress_bar(at(0), 200).startswith(f"[{'.' * 30}]")
    assert progress_bar(at(1100), 200).startswith(f"[{'#' * 30}]")
    assert progress_bar(at(1099), 200).startswith(f"[{'#' * 29}.]")


def test_narrow_terminal_gets_the_line_alone() -> None:
    assert progress_bar(at(7), len(LINE) + 8) == LINE
    assert progress_bar(at(7), len(LINE) + 9) == f"[.....] {LINE}"
    assert progress_bar(at(7), 20) == LINE[:19]


def test_bar_is_never_wider_than_the_terminal() -> None:
    """The last column stays free: some terminals wrap when it is written."""
    for columns in range(1, 200):
        assert len(progress_bar(at(7), columns)) < columns


# ---------------------------------------------------------------------- on a terminal


def test_bar_is_drawn_over_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    shown = Console(speaks=True, line_s=1000.0, stream=stream)
    for step in (1, 2):
        shown.progress(at(step))
    bars = [progress_bar(at(step), 120) for step in (1, 2)]
    assert stream.getvalue() == CLEAR + bars[0] + CLEAR + bars[1]


def test_text_clears_the_bar_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    shown = Console(speaks=True, stream=stream)
    shown.progress(at(1))
    before = stream.getvalue()
    shown.say("saved")
    shown.say("done")
    assert stream.getvalue() == f"{before}{CLEAR}saved\ndone\n"


@pytest.fixture
def narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """Both ends of a terminal of 40 columns, while standard output is none."""
    monkeypatch.delenv("COLUMNS", raising=False)
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def test_bar_fits_the_terminal_it_is_drawn_on(narrow_terminal: tuple[int, int]) -> None:
    """Standard output is piped into a file, and standard error is a terminal."""
    ours, theirs = narrow_terminal
    with open(theirs, "w", closefd=False) as stream:
        Console(speaks=True, stream=stream).progress(at(7))
    assert os.read(ours, 1000).decode() == CLEAR + progress_bar(at(7), 40)


def test_bar_may_be_asked_for_and_refused() -> None:
    stream, terminal = io.StringIO(), Terminal()
    for chosen, live in ((stream, True), (terminal, False)):
        shown = Console(speaks=True, stream=chosen)
        shown.live = live
        shown.progress(at(7))
    assert stream.getvalue().startswith(CLEAR)
    assert terminal.getvalue() == LINE + "\n"


# ---------------------------------------------------------------------- under a launcher


@pytest.fixture
def processes(tmp_path: Path) -> Path:
    """What the kernel would tell: this process was started by a shell, and that by mpirun."""
    for process, name, parent, stderr in (
        (os.getppid(), "sh", 7000001, "pipe:[5]"),
        (7000001, "pmi (odd) proxy", 7000002, "pipe:[6]"),
        (7000002, "mpirun", 1, "/dev/pts/77"),
    ):
        (tmp_path / f"{process}/fd").mkdir(parents=True)
        (tmp_path / f"{process}/stat").write_text(f"{process} ({name}) S {parent} 1 1 0\n")
        (tmp_path / f"{process}/fd/2").symlink_to(stderr)
    return tmp_path


@pytest.fixture
def pipe() -> Iterator[TextIO]:
    ours, theirs = os.pipe()
    with open(theirs, "w") as stream:
        yield stream
    os.close(ours)


def test_terminal_of_the_launcher_is_found(processes: Path, pipe: TextIO) -> None:
    assert launcher_terminal(pipe, processes) == Path("/dev/pts/77")


@pytest.mark.parametrize("shown_on", ["/home/me/log", "pipe:[9]", "/dev/null"])
def test_launcher_whose_output_is_no_terminal_shows_no_bar(
    processes: Path, pipe: TextIO, shown_on: str
) -> None:
    (processes / "7000002/fd/2").unlink()
    (processes / "7000002/fd/2").symlink_to(shown_on)
    assert launcher_terminal(pipe, processes) is None


def test_terminal_of_a_process_that_is_no_launcher_is_not_written_to(
    processes: Path, pipe: TextIO
) -> None:
    """The pipe leads to `less`, not to the terminal of the shell that started both."""
    (processes / "7000002/stat").write_text("7000002 (bash) S 1 1 1 0\n")
    assert launcher_terminal(pipe, processes) is None


def test_file_of_the_ranks_own_shows_no_bar(processes: Path, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        assert launcher_terminal(stream, processes) is None
    assert launcher_terminal(io.StringIO(), processes) is None


def test_bar_fits_the_terminal_of_the_launcher(
    narrow_terminal: tuple[int, int], pipe: TextIO
) -> None:
    assert terminal_columns(pipe, Path(os.ttyname(narrow_terminal[1]))) == 40
    assert terminal_columns(pipe, Path("/dev/pts/none")) == 80


# ---------------------------------------------------------------------- elsewhere


def test_without_a_terminal_lines_are_plain() -> None:
    stream = io.StringIO()
    shown = Console(speaks=True, stream=stream)
    shown.progress(at(7))
    shown.say("done")
    assert stream.getvalue() == f"{LINE}\ndone\n"


def test_lines_keep_their_distance_but_the_last_is_shown(clock: list[float]) -> None:
    stream = io.StringIO()
    shown = Console(speaks=True, line_s=10.0, stream=stream)
    for step, clock[0] in ((1, 109.0), (2, 110.0), (3, 119.0), (4, 120.5), (1100, 120.6)):
        shown.progress(at(step))
    steps = [line.split("/")[0] for line in stream.getvalue().splitlines()]
    assert steps == ["step    2", "step    4", "step 1100"]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_ranks_are_silent(stream: io.StringIO) -> None:
    shown = Console(speaks=False, stream=stream)
    shown.progress(at(1100))
    shown.say("done")
    assert stream.getvalue() == ""


def test_standard_output_is_left_to_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    Console(speaks=True).say("done")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "done\n")


# ---------------------------------------------------------------------- log


def test_log_lines_tell_rank_and_step(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(world.position, "step", None)
    path = tmp_path / "logs" / "rank.log"
    shown = io.StringIO()
    log = console.RankLog(path, world, console.Console(True, stream=shown))
    try:
        logging.getLogger("any").info("begun")
        world.position.step = 12
        logging.getLogger("hpctrain").warning("odd %s", "value")
    finally:
        log.close()
    logging.getLogger("any").warning("after the end")
    first, second = path.read_text().splitlines()
    assert first.endswith(f"rank {world.rank} step - INFO begun")
    assert second.endswith(f"rank {world.rank} step 12 WARNING odd value")
    assert shown.getvalue() == "warning: odd value\n"
