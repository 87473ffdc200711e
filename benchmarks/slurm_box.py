"""A Slurm cluster in one box: one controller and four nodes, for as long as they are needed.

    python benchmarks/slurm_box.py -- sbatch --wait --wrap hostname

Daemons are those of Debian's packages slurm-wlm and munge, started as root. They listen on the
loopback interface, with state, keys and sockets in a folder of their own. Nodes share the machine,
its files and its cores, but for `disk`: a folder that is another file system on each node.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import TracebackType

NODES = 4
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "unshare", "setpriv")
SBIN = "/usr/sbin:/sbin"
UP_LIMIT_S = 30.0
POLL_S = 0.1
UNFIT = 3  # as hpctrain.errors.ExitCode
LAUNCHER = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_")

CONFIG = """
ClusterName=box
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is requeued waits for as long as its credentials are valid.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
# Not /tmp: what another cluster left there has the names of jobs of this one.
TmpFS={folder}
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


def why_not() -> str | None:
    """Why there can be no such cluster here, if so."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install slurm-wlm munge util-linux"
    if os.geteuid() != 0:
        return "daemons of Slurm start jobs of others: needs root"
    mounts = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True)
    return mounts.stderr.strip() or None


class SlurmBox:
    """A cluster that is up inside a `with` block.

    Attributes:
        environment: with which Slurm's commands find it.
        disk: a folder that each node has for itself.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets are in it
        self._running: list[subprocess.Popen[bytes]] = []
        config = self._folder / "slurm.conf"
        self.disk = self._folder / "disk"
        self.environment = {"SLURM_CONF": str(config), "PATH": _path()}

    def __enter__(self) -> SlurmBox:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self("scancel", "--full", "-u", "root", check=False)
        try:
            _wait_until(lambda: not self("squeue", "-h", check=False), "the end of all jobs")
        finally:
            self._end()

    def __call__(self, *command: str | Path, check: bool = True) -> str:
        """What one of Slurm's commands prints."""
        ended = subprocess.run(
            [*map(str, command)],
            env=_without_launcher() | self.environment,
            capture_output=True,
            text=True,
            timeout=600,
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

    def _start(self) -> None:
        folder, config = self._folder, Path(self.environment["SLURM_CONF"])
        folder.chmod(0o755)
        (folder / "state").mkdir()
        self.disk.mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        controller, first, *_, last = _free_ports(NODES + 1)
        config.write_text(
            CONFIG.format(folder=folder, controller=controller, first=first, last=last, nodes=NODES)
        )
        self._daemon(
            *("munged", "--foreground", "--force", f"--key-file={key}"),
            *(f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"),
            *(f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"),
        )
        _wait_until((folder / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D", "-f", config)
        own_disk = 'mount -t tmpfs tmpfs "$0" && exec slurmd -D -N "$1" -f "$2"'
        for node in range(1, NODES + 1):
            self._daemon("unshare", "--mount", "sh", "-c", own_disk, self.disk, f"n{node}", config)
        _wait_until(
            lambda: re.fullmatch(
                rf"idle {NODES}\n", self("sinfo", "-h", "-p", "main", "-o", "%T %D", check=False)
            ),
            "slurmctld with its nodes",
        )

    def _daemon(self, *command: str | Path) -> None:
        """Start one that ends with this process, however that ends."""
        with (self._folder / f"{len(self._running)}.out").open("wb") as out:
            self._running.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "TERM", *map(str, command)],
                    env=_without_launcher() | self.environment,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _end(self) -> None:
        """End daemons, the last one first."""
        while self._running:
            process = self._running.pop()
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _path() -> str:
    return f"{os.environ['PATH']}:{SBIN}"


def _without_launcher() -> dict[str, str]:
    """The environment; what a launcher left in it is none of the jobs', which inherit it."""
    return {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER)}


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


def _wait_until(is_so: Callable[[], object], what: str) -> None:
    limit = time.monotonic() + UP_LIMIT_S
    while not is_so():
        assert time.monotonic() < limit, f"waited {UP_LIMIT_S:.0f} s for {what}"
        time.sleep(POLL_S)


def main() -> int:
    """Run a command in a cluster."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", nargs="+")
    command = parser.parse_args().command
    reason = why_not()
    if reason:
        sys.stderr.write(f"slurm_box: {reason}\n")
        return UNFIT
    with SlurmBox() as box:
        return subprocess.run(command, env=_without_launcher() | box.environment).returncode


if __name__ == "__main__":
    sys.exit(main())
