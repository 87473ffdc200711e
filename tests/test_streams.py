"""Commands whose standard streams are closed, full, or read by nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The command line without torch: keys are listed without it being used, but they import it.
PROGRAM = """
import sys
from hpctrain import cli, streams
cli._keys = lambda chosen: streams.say(chr(233) * 100_000) or 0
cli._report = lambda chosen: print(open("new", "w").fileno(), file=sys.stderr) or 0
sys.exit(cli.main())
"""


def ended(folder: Path, shell: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the program as a shell does; `run` in the text stands for it."""
    (folder / "program.py").write_text(PROGRAM)
    command = shell.replace("run", f"{sys.executable} {folder / 'program.py'}")
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("command", ["keys", "--help"])
def test_full_disk_behind_standard_output(tmp_path: Path, command: str) -> None:
    result = ended(tmp_path, f"run {command} >/dev/full")
    assert result.returncode == 1
    assert result.stderr.startswith(b"hpctrain: standard output cannot be written: [Errno 28]")
    assert b"Traceback" not in result.stderr and b"Exception" not in result.stderr


def test_pipe_that_nobody_reads_any_more(tmp_path: Path) -> None:
    result = ended(tmp_path, "run keys | true; echo ${PIPESTATUS[0]}")
    assert (result.stdout, result.stderr) == (b"1\n", b"")


def test_full_disk_behind_standard_error(tmp_path: Path) -> None:
    assert ended(tmp_path, "run nonsense 2>/dev/full").returncode == 2


def test_closed_streams_are_no_files_of_ours(tmp_path: Path) -> None:
    """Else the log would get number 2, and messages of the MPI library go into it."""
    result = ended(tmp_path, "run report x <&- >&- 2>err")
    assert (result.returncode, (tmp_path / "err").read_text()) == (0, "3\n")
    result = ended(tmp_path, "run report x 2>&- >&-; run keys >&-; run keys 2>&- >out")
    assert (result.returncode, result.stderr) == (0, b"")
    assert (tmp_path / "out").stat().st_size == 200_000


def test_terminal_without_the_letters(tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    result = ended(tmp_path, "run keys", **plain)
    assert result.returncode == 0 and result.stdout.startswith(rb"\xe9")
