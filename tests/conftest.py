"""One test body on any number of ranks.

Tests marked `mpi` run under mpiexec, on every rank at once. They end together: a test that
fails on one rank fails on all, so that the ranks never run different tests. A rank that hangs
ends the whole run, with the stacks of all its threads.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpctrain.world import World, join, launched_size

HANG_S = 180.0
"""A test that takes longer than this hangs."""

_, RANKS = launched_size(os.environ)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if RANKS > 1 and join().rank > 0:
        # One rank reports for all; what the others print would be mixed into it.
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter:
            reporter._tw._file = Path(os.devnull).open("w")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("mpi") and RANKS == 1 and not item.config.option.with_mpi:
            item.add_marker(pytest.mark.skip(reason="needs mpiexec and --with-mpi"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    faulthandler.dump_traceback_later(HANG_S, exit=True, file=sys.__stderr__)


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


@pytest.fixture
def on_rank(world: World) -> Callable[[int], bool]:
    """Whether this is the given rank."""
    return lambda rank: world.rank == rank
