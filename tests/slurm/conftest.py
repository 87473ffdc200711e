"""A real Slurm on this machine: one controller and four nodes, for as long as tests need it.

Daemons are those of Debian's packages slurm-wlm and munge; where they are missing, tests say so and
are skipped. They run on the loopback interface, with state, keys and sockets in a folder of theirs.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Launch

NODES = 4
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SBIN = "/usr/sbin:/sbin"
UP_LIMIT_S = 30.0
POLL_S = 0.1

CONFIG = """
ClusterName=box
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is requeued waits for as long as its credentials are valid.
AuthInfo=socket={folder}/munge.socket,cred_expire=1
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
NodeName=n[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4
PartitionName=main Nodes=ALL Default=YES MaxTime=10 State=UP PriorityTier=10
PartitionName=scavenge Nodes=ALL MaxTime=10 State=UP PriorityTier=1 GraceTime=60
"""


@dataclass(frozen=True)
class Slurm:
    """A cluster that is up."""

    environment: dict[str, str]

    def __call__(self, *command: str | Path, check: bool = True) -> str:
        """What one of Slurm's commands prints."""
        ended = subprocess.run(
            [*map(str, command)],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not check or ended.returncode == 0, ended.stderr
        return ended.stdout

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str, limit_s: float = 120.0) -> dict[str, str]:
        """Facts of a job once it is in one of the states."""
        limit = time.monotonic() + limit_s
        while (facts := self.facts(job))["JobState"] not in states:
            assert time.monotonic() < limit, f"job {job} is {facts['JobState']}, not {states}"
            time.sleep(POLL_S)
        return facts


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
        while not self.log.exists() or text not in self.log.read_text():
            assert time.monotonic() < limit, f"no {text!r} in {self.told}"
            time.sleep(POLL_S)

    @property
    def told(self) -> str:
        """What it has printed so far."""
        return self.log.read_text() if self.log.exists() else ""


def _why_not() -> str | None:
    path = f"{os.environ['PATH']}:{SBIN}"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "daemons of Slurm start jobs of others: needs root"


def _free_ports(count: int) -> list[int]:
    """Consecutive ports that nobody listens on."""
    while True:
        with closing(socket.create_server(("127.0.0.1", 0))) as any_port:
            first = any_port.getsockname()[1]
        ports = list(range(first, first + count))
        try:
            for port in ports:
                socket.create_server(("127.0.0.1", port)).close()
        except (OSError, OverflowError):
            continue
        return ports


class _Daemons:
    """Processes that are ended in the order in which they were started, last first."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder = folder
        self._environment = environment
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *options: str | Path) -> None:
        program = shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}")
        assert program
        with (self._folder / f"{name}-{len(self._running)}.out").open("wb") as out:
            self._running.append(
                subprocess.Popen(
                    [program, *map(str, options)],
                    env=self._environment,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def end(self) -> None:
        while self._running:
            process = self._running.pop()
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """The cluster; started once, when the first test needs it."""
    reason = _why_not()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets are in it
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    controller, first, *_, last = _free_ports(NODES + 1)
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(folder=folder, controller=controller, first=first, last=last, nodes=NODES)
    )
    # Slurm passes the environment of whoever submits on to jobs; a launcher's is none of theirs.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "SLURM_"))}
    daemons = _Daemons(folder, kept | {"SLURM_CONF": str(config)})
    cluster = Slurm({"SLURM_CONF": str(config), "PATH": f"{os.environ['PATH']}:{SBIN}"})
    try:
        daemons.start(
            *("munged", "--foreground", "--force", f"--key-file={key}"),
            *(f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"),
            *(f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"),
        )
        _wait_until((folder / "munge.socket").exists, "munged")
        daemons.start("slurmctld", "-D", "-f", config)
        for node in range(1, NODES + 1):
            daemons.start("slurmd", "-D", "-N", f"n{node}", "-f", config)
        _wait_until(
            lambda: re.fullmatch(
                rf"idle {NODES}\n", cluster("sinfo", "-h", "-p", "main", "-o", "%T %D", check=False)
            ),
            "slurmctld with its nodes",
        )
        yield cluster
        cluster("scancel", "--full", "-u", "root", check=False)
        _wait_until(lambda: not cluster("squeue", "-h", check=False), "the end of all jobs")
    finally:
        daemons.end()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until(is_so: object, what: str) -> None:
    assert callable(is_so)
    limit = time.monotonic() + UP_LIMIT_S
    while not is_so():
        assert time.monotonic() < limit, f"waited {UP_LIMIT_S:.0f} s for {what}"
        time.sleep(POLL_S)


@pytest.fixture
def submitted(slurm: Slurm, launch: Launch) -> Iterator[Submitter]:
    """Submits jobs; what is left of them is cancelled after the test."""
    submitter = Submitter(slurm, launch)
    yield submitter
    for job in submitter.jobs:
        slurm("scancel", job.number, check=False)


class Submitter:
    """`hpctrain submit`, as its user calls it."""

    def __init__(self, slurm: Slurm, launch: Launch) -> None:
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
