"""Puts a job into Slurm's queue, and says how to follow and end it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hpctrain.errors import HpctrainError, JobError, UnfitError
from hpctrain.submit.config import SubmitConfig
from hpctrain.submit.launcher import choose, srun_types
from hpctrain.submit.packages import Packages, contents_of, digest_of, pack
from hpctrain.submit.script import Submission, log_of, render

SUBMIT_LIMIT_S = 60.0
ARCHIVES = ".packages"
"""Where archives of packages are kept, beside the runs of a job."""


class RefusedError(HpctrainError):
    """Slurm does not take the job."""


@dataclass(frozen=True)
class Queued:
    """A job in the queue.

    Attributes:
        number: its id.
        script: the batch script, as it was submitted.
        log: what it prints, with Slurm's patterns filled in but for tasks of an array.
    """

    number: str
    script: Path
    log: Path

    @property
    def text(self) -> str:
        """For whoever submitted it."""
        return (
            f"job {self.number} is queued\n"
            f"  script: {self.script}\n"
            f"  log:    {self.log}\n"
            f"  follow: squeue -j {self.number}; tail -F {self.log}\n"
            f"  cancel: scancel {self.number}"
        )


def prepare(
    name: str,
    job: Path,
    runs: Path,
    overrides: Sequence[str],
    config: SubmitConfig,
    library: str,
) -> Submission:
    """What is to be submitted from the working directory.

    Args:
        name: of the job.
        job: its job file.
        runs: folder of its runs.
        overrides: values of `--set` that ranks are started with.
        config: what to ask for.
        library: version string of the MPI library.

    Raises:
        UnfitError: this cluster cannot start ranks as asked.
        JobError: the packages cannot be read.
    """
    needs_probe = config.launcher != "mpirun" and not config.survivors
    launcher = choose(
        library, srun_types() if needs_probe else (), config.launcher, config.survivors
    )
    packages = None
    if config.deps:
        digest = digest_of(contents_of(Path(config.deps)))
        packages = Packages(digest, PurePosixPath(runs, ARCHIVES, f"{digest}.tar"))
    return Submission(
        name=re.sub(r"[^A-Za-z0-9_.-]", "_", name),
        job=PurePosixPath(job),
        folder=PurePosixPath(_here()),
        runs=PurePosixPath(runs),
        python=PurePosixPath(sys.executable),
        overrides=tuple(overrides),
        config=config,
        launcher=launcher,
        packages=packages,
        user=os.getuid(),
    )


def _here() -> str:
    try:
        return os.getcwd()
    except OSError as error:
        raise UnfitError(
            f"the working directory cannot be used: {error}", fix="submit from another folder"
        ) from None


def submit(submission: Submission) -> Queued:
    """Keep the script beside the runs, and give it to Slurm.

    Raises:
        UnfitError: there is no Slurm here.
        RefusedError: Slurm does not take it, with what it says.
        JobError: the packages cannot be read, or are being changed.
    """
    if shutil.which("sbatch") is None:
        raise UnfitError(
            "there is no sbatch here",
            fix="submit from a login node of a Slurm cluster, or look at --dry-run",
        )
    text = render(submission)
    name = f"submit-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.sh"
    script = Path(submission.runs) / name
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        if submission.packages:
            _pack(Path(submission.config.deps), submission.packages)
        # Made here and by nobody else, who could change it before Slurm reads it.
        with open(script, "x", encoding="utf-8", opener=_private) as file:
            file.write(text)
    except OSError as error:
        raise UnfitError(
            f"the batch script, or the packages, cannot be written: {error}",
            fix="submit from a folder that you can write to, or set run.folder to one",
        ) from None
    try:
        told = subprocess.run(
            ["sbatch", "--parsable", str(script)],
            capture_output=True,
            text=True,
            timeout=SUBMIT_LIMIT_S,
        )
    except OSError as error:
        raise UnfitError(f"sbatch cannot be started: {error}") from None
    except subprocess.TimeoutExpired:
        raise RefusedError(
            f"sbatch did not answer within {SUBMIT_LIMIT_S:.0f} s",
            fix="look whether the job is there with squeue --me, before you submit again",
        ) from None
    if told.returncode:
        raise RefusedError(
            "Slurm does not take the job",
            value=told.stderr.strip() or told.stdout.strip(),
            where=str(script),
            fix="change [submit] of the job file, or the options of hpctrain submit",
        )
    number = told.stdout.strip().partition(";")[0]
    log = str(log_of(submission)).replace("%j", number).replace("%A", number).replace("%a", "*")
    return Queued(number, script, Path(log))


def _pack(folder: Path, packages: Packages) -> None:
    archive = Path(packages.archive)
    if pack(folder, archive) and digest_of(contents_of(folder)) != packages.digest:
        archive.unlink()  # its name says that it holds something else
        raise JobError(
            "submit.deps: changed while it was packed", where=str(folder), fix="submit again"
        )


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
