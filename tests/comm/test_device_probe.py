"""Trying out which MPI calls take device memory, in children that may do anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain.comm import device_probe
from hpctrain.comm.device_probe import CALLS, TAKEN, device_calls, ended


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('taken')", "taken"),
        ("print('a banner of the library'); print('taken')", "taken"),
        ("print('garbled')", "not taken: the data arrived garbled"),
        ("", "not taken: the probe ended with status 0"),
        ("import sys; sys.exit(3)", "not taken: the probe ended with status 3"),
        ("import os; os.abort()", "not taken: the probe ended with signal 6"),
        ("import os; os.kill(os.getpid(), 11)", "not taken: the probe ended with signal 11"),
    ],
)
def test_end_of_the_probe_is_told(code: str, expected: str) -> None:
    assert ended([sys.executable, "-c", code]) == expected


def test_probe_that_hangs_is_ended() -> None:
    hanging = [sys.executable, "-c", "import time; time.sleep(1000)"]
    assert ended(hanging, limit_s=0.3).startswith("not taken: the probe hung")


def test_probe_that_cannot_be_started_is_told(tmp_path: Path) -> None:
    assert ended([str(tmp_path / "none")]).startswith("not tried: ")


def test_probe_is_no_rank_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_FD", "SLURM_PROCID"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("UNRELATED", "kept")
    code = """
import os
left = [n for n in os.environ if n.startswith(("OMPI_COMM", "PMIX_", "PMI_", "SLURM_"))]
print("taken" if not left and os.environ["UNRELATED"] == "kept" else left)
"""
    assert ended([sys.executable, "-c", code]) == "taken"


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls that were tried, by children that succeed in messages alone."""
    calls: list[str] = []

    def stand_in(command: list[str], limit_s: float = 1.0) -> str:
        calls.append(command[-1])
        return TAKEN if command[-1] == "send" else "not taken: the probe ended with signal 11"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(device_probe, "ended", stand_in)
    monkeypatch.setattr(device_probe, "find_launcher", lambda: ["mpiexec", "-n", "2"])
    return calls


def test_each_call_is_tried_once_for_a_library_driver_and_host(
    tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = device_calls("Open MPI v5")
    assert first["send"] == TAKEN and first["allreduce"].endswith("signal 11")
    assert device_calls("Open MPI v5") == first
    assert tried == list(CALLS)
    device_calls("MPICH 5")
    monkeypatch.setattr(device_probe, "_driver", lambda: "newer")
    device_calls("MPICH 5")
    assert len(tried) == 3 * len(CALLS)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', '{"x": {"send": "taken"}}'])
def test_damaged_cache_is_made_anew(tried: list[str], content: str) -> None:
    path = device_probe.cache_file()
    assert path is not None
    path.parent.mkdir(mode=0o700)
    path.touch(mode=0o600)
    path.write_text(content)
    device_calls("MPICH 5")
    assert tried == list(CALLS)
    assert len(json.loads(path.read_text())) == 1


def test_no_cache_can_be_written(tried: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert device_calls("MPICH 5")["send"] == TAKEN


def test_without_a_launcher_nothing_is_tried(
    tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_probe, "find_launcher", list)
    assert set(device_calls("MPICH 5").values()) == {
        "not tried: no mpiexec beside Python or on the path"
    }
    assert not tried
    monkeypatch.setattr(device_probe, "find_launcher", lambda: ["mpiexec"])
    assert device_calls("MPICH 5")["send"] == TAKEN, "what was not tried is not kept"


def test_other_settings_of_the_library_are_tried_anew(
    tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    device_calls("MPICH 5")
    monkeypatch.setenv("UCX_TLS", "tcp")
    device_calls("MPICH 5")
    assert len(tried) == 2 * len(CALLS)


def test_what_is_kept_is_private(tried: list[str]) -> None:
    device_calls("MPICH 5")
    path = device_probe.cache_file()
    assert path is not None
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("case", ["writable", "writable folder", "link", "linked folder", "pipe"])
def test_what_others_may_have_written_is_not_believed(
    tried: list[str], tmp_path: Path, case: str
) -> None:
    device_calls("MPICH 5")
    path = device_probe.cache_file()
    assert path is not None
    if case == "writable":
        path.chmod(0o666)
    elif case == "writable folder":
        path.parent.chmod(0o777)
    elif case == "linked folder":
        path.parent.rename(tmp_path / "elsewhere")
        path.parent.symlink_to(tmp_path / "elsewhere")
    else:
        path.rename(tmp_path / "elsewhere")
        os.mkfifo(path) if case == "pipe" else path.symlink_to(tmp_path / "elsewhere")
    device_calls("MPICH 5")
    assert tried == 2 * list(CALLS)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to make files of another user")
def test_cache_that_another_user_has_made_is_left_alone(tried: list[str]) -> None:
    path = device_probe.cache_file()
    assert path is not None
    path.parent.mkdir(mode=0o777)
    os.chown(path.parent, 65534, 65534)
    device_calls("MPICH 5")
    assert list(path.parent.iterdir()) == []


def test_user_without_a_home_keeps_nothing(
    tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert device_probe.cache_file() is None
    for _ in range(2):
        assert device_calls("MPICH 5")["send"] == TAKEN
    assert len(tried) == 2 * len(CALLS)


def test_probe_imports_nothing_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mpi4py.py").write_text("print('taken'); raise SystemExit")
    monkeypatch.chdir(tmp_path)
    head = device_probe.CHILD.split("import torch")[0] + "import mpi4py; print(mpi4py.__file__)"
    out = subprocess.run([sys.executable, "-c", head], capture_output=True, text=True, check=True)
    assert "mpi4py" in out.stdout and str(tmp_path) not in out.stdout
