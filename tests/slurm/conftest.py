"""A real Slurm on this machine, for as long as tests need it; without one they are skipped."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import slurm_box

if TYPE_CHECKING:
    from conftest import Launch

POLL_S = 0.1


@dataclass(frozen=True)
class Job:
    """A job of hpctrain in the queue.

    Attributes:
        number: its id.
        log: what it prints.
        run: its run folder; that of a task of an array ends with _TASK.
    """

    number: str
    log: Path
    run: Path

    def wait_for(self, text: str, limit_s: float = 120.0) -> None:
        """Until the log has the text."""
        limit = time.monotonic() + limit_s
        while text not in self.told:
            assert time.monotonic() < limit, f"no {text!r} in {self.told}"
            time.sleep(POLL_S)

    @property
    def told(self) -> str:
        """What it has printed so far."""
        return self.log.read_text() if self.log.exists() else ""


class Submitter:
    """`hpctrain submit`, as its user calls it."""

    def __init__(self, slurm: slurm_box.SlurmBox, launch: Launch) -> None:
        self._launch = launch
        self._launch.environment |= slurm.environment
        # A program finds its MPI's launcher on the path, as where a module was loaded.
        python = Path(sys.executable).parent
        self._launch.environment["PATH"] = f"{python}:{slurm.environment['PATH']}"
        self.jobs: list[Job] = []

    def __call__(self, job: str | Path, *options: str) -> Job:
        ended = self._launch(0, "-m", "hpctrain", "submit", str(job), *options)
        assert ended.status == 0, ended.err
        found = re.search(r"job (\d+) is queued", ended.out)
        assert found, ended.out
        number = found[1]
        folder = self._launch.folder / "runs" / Path(job).stem
        made = Job(number, folder / f"slurm-{number}.log", folder / f"slurm-{number}")
        self.jobs.append(made)
        return made


@pytest.fixture(scope="session")
def slurm() -> Iterator[slurm_box.SlurmBox]:
    """The cluster; started when the first test needs it."""
    reason = slurm_box.why_not()
    if reason:
        pytest.skip(reason)
    with slurm_box.SlurmBox() as box:
        yield box


@pytest.fixture
def submitted(slurm: slurm_box.SlurmBox, launch: Launch) -> Iterator[Submitter]:
    """Submits jobs; what is left of them is cancelled after the test."""
    submitter = Submitter(slurm, launch)
    yield submitter
    for job in submitter.jobs:
        slurm("scancel", job.number, check=False)
