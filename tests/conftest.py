"""One test body on any number of ranks.

Tests marked `mpi` run under mpiexec, on every rank at once. They end together: a test that
fails on one rank fails on all, so that the ranks never run different tests. A rank that hangs
ends the whole run, with the stacks of all its threads.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hpctrain.world import World, join, launched_size

HANG_S = 120.0
"""A test that takes longer than this hangs."""
QUEUE_HANG_S = 300.0
"""The same where jobs wait in a queue, and are started several times."""

_, RANKS = launched_size(os.environ)


STDERR = pytest.StashKey[int]()
"""The stderr that tests do not capture."""


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)
    if "PYTEST_XDIST_WORKER" in os.environ:  # as many run as there are cores
        torch.set_num_threads(1)
    if RANKS > 1 and join().rank > 0:
        # One rank reports for all; what the others print would be mixed into it.
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter:
            reporter._tw._file = io.StringIO()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("mpi") and RANKS == 1 and not item.config.option.with_mpi:
            item.add_marker(pytest.mark.skip(reason="needs mpiexec and --with-mpi"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit_s = QUEUE_HANG_S if "slurm" in getattr(item, "fixturenames", ()) else HANG_S
    faulthandler.dump_traceback_later(limit_s, exit=True, file=item.config.stash[STDERR])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, Any, None]:
    outcome = yield
    if RANKS == 1:
        return
    from hpctrain.comm.collect import all_gather
    from hpctrain.comm.engine import engine_of

    report = outcome.get_result()
    mine = str(report.longrepr) if report.failed else None
    if mine:  # at once: the others may be hanging in the test
        os.write(2, f"{item.nodeid} failed on rank {join().rank}:\n{mine}\n".encode())
    for rank, text in enumerate(all_gather(engine_of(join()).control, mine, label=item.nodeid)):
        if text and not report.failed:
            report.outcome = "failed"
            report.longrepr = f"failed on rank {rank}:\n{text}"


@pytest.fixture(scope="session")
def world() -> World:
    return join()


@pytest.fixture
def shared_folder(world: World) -> Iterator[Path]:
    """An empty folder, the same on all ranks."""
    path = world.comm.bcast(tempfile.mkdtemp() if world.rank == 0 else None)
    yield Path(path)
    world.comm.Barrier()
    if world.rank == 0:
        shutil.rmtree(path)


LAUNCHER = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_")
# As the Makefile sets them: Open MPI refuses root and more ranks than cores otherwise.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_osc": "^ucx",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


@dataclass(frozen=True)
class Ended:
    """How a launched command ended."""

    status: int
    out: str
    err: str
    took_s: float


@functools.cache
def _scratch() -> str:
    """Where launchers keep their files, which a killed one leaves to the next of its number."""
    folder = tempfile.mkdtemp(prefix="launch-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Launch:
    """Starts commands on several ranks, in a folder of their own, and waits for their end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER)}
        self.environment = {**inherited, **OPEN_MPI, "TMPDIR": _scratch()}

    def start(
        self, ranks: int, *command: str | Path, options: Sequence[str] = (), **environment: str
    ) -> subprocess.Popen[str]:
        """Start Python on `ranks` ranks; 0 for a process without a launcher, which has options."""
        python = Path(sys.executable)
        launcher = [python.with_name("mpiexec"), *options, "-n", str(ranks)] if ranks else []
        return subprocess.Popen(
            [*map(str, launcher), str(python), *map(str, command)],
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(
        self,
        ranks: int,
        *command: str | Path,
        limit_s: float = 120,
        options: Sequence[str] = (),
        **environment: str,
    ) -> Ended:
        """Run Python on `ranks` ranks to its end, or kill it at the limit and fail."""
        begun_s = time.monotonic()
        process = self.start(ranks, *command, options=options, **environment)
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its ranks, which are in groups of their own
            try:
                out, err = process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, err = process.communicate()
            pytest.fail(f"no end after {limit_s} s:\n{out}\n{err}")
        return Ended(process.returncode, out, err, time.monotonic() - begun_s)

    def script(self, text: str) -> Path:
        """A Python file with this text."""
        path = self.folder / "script.py"
        path.write_text(text)
        return path

    def job(self, module: str, keys: str, name: str = "odd") -> str:
        """A job of this module and these keys; returns the job file, as `run` takes it."""
        (self.folder / f"{name}.py").write_text(module)
        (self.folder / f"{name}.toml").write_text(f'module = "{name}.py"\n{keys}')
        return f"{name}.toml"


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    return Launch(tmp_path)
