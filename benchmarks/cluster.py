"""A cluster in one box: hosts that are Linux namespaces, joined by links of limited rate.

    python benchmarks/cluster.py --hosts 2 --ranks 1 --rate 1gbit -- python script.py

On one machine the cores that compute also move the messages, so that hiding one behind the other
cannot be shown. Here every host has a network, a name, a /dev/shm and an IPC namespace of its own,
and one full-duplex link to a switch. MPI and hpctrain take the hosts for separate machines; only
the cores are shared. Needs root, iproute2 and util-linux.

    head (the switch; mpirun runs here)
     ├─ tbf ── veth ── tbf ─ host1
     └─ tbf ── veth ── tbf ─ host2

Nothing outlives its owner. All processes of a cluster are in one PID namespace, whose first process
reads from a pipe that only the owner can write to: when the owner ends, by kill -9 too, the pipe
closes, that process ends, the kernel kills the rest, and namespaces without processes are gone.
No namespace has a name and no link touches the machine's own network, so that any number of
clusters can run side by side.
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import harness

TOOLS = ("unshare", "nsenter", "mount", "ip", "tc")
UNFIT = 3  # as hpctrain.errors.ExitCode; this module can be used without torch
NETWORK = "10.77.0"
HEAD_ADDRESS = f"{NETWORK}.254"
LINK = "eth0"
"""What each host calls its end of the link."""
TORCH_PORT = 29_541
MOST_HOSTS = 64
AGENT = "/dev/shm/agent"
"""Stands in for ssh: runs a command on a host. Lies in memory that only the head sees."""

# The machine may prefer another congestion control than the usual one; a route may name cubic where
# the machine's settings keep namespaces from choosing it.
# Arguments: rate, burst, queueing time, name and address of each host. PID namespaces nest, so
# that the first process has another number outside, which the machine's own /proc knows.
HEAD = f"""
set -eu
read -r outside rest </proc/self/stat
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
cd /dev/shm
rate=$1 burst=$2 latency=$3
shift 3
limit() {{ tc qdisc add dev "$1" root tbf rate "$rate" burst "$burst" latency "$latency"; }}

cat >agent <<'END'
#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1
shift
exec nsenter --target "$(cat "/dev/shm/$host.pid")" --net --uts --ipc --mount \\
  "--wd=$PWD" /bin/sh -c "$*"
END
chmod +x agent

echo 127.0.0.1 localhost >hosts
echo {HEAD_ADDRESS} head >>hosts
for host; do echo "${{host#*=}} ${{host%=*}}" >>hosts; done
mount --bind hosts /etc/hosts
echo head >/proc/sys/kernel/hostname
ip link set lo up
ip link add {LINK} type bridge
ip addr add {HEAD_ADDRESS}/24 dev {LINK}
ip link set {LINK} up

mkfifo arrived
for host; do
  name=${{host%=*}} address=${{host#*=}}
  unshare --net --uts --ipc --mount /bin/sh -euc '
    exec 3>arrived
    echo "$1" >/proc/sys/kernel/hostname
    mount -t tmpfs tmpfs /dev/shm
    if [ -e /proc/sys/net/ipv6 ]; then echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6; fi
    echo yes >&3
    exec sleep infinity 3>&-
  ' sh "$name" </dev/null >/dev/null &
  echo $! >"$name.pid"
  read -r answer <arrived || {{ echo "$name did not start" >&2; exit 1; }}
  ip link add "to-$name" type veth peer name {LINK} netns $!
  ip link set "to-$name" master {LINK} up
  limit "to-$name"
  ./agent "$name" "set -e
    ip link set lo up
    ip addr add $address/24 dev {LINK}
    ip link set {LINK} up
    ip route change {NETWORK}.0/24 dev {LINK} src $address congctl cubic
    tc qdisc add dev {LINK} root tbf rate $rate burst $burst latency $latency"
done
echo "$outside"
read -r rest || true
"""


class ClusterError(Exception):
    """A cluster cannot be made here."""


class Cluster:
    """Hosts `host1`, `host2`, ... from entering the context to leaving it.

        with Cluster(hosts=2, rate="1gbit") as cluster:
            cluster.run(1, [sys.executable, "script.py"])

    Args:
        hosts: how many.
        rate: of every link, in each direction, in tc's words; it counts whole Ethernet frames.
        burst: what may pass at once after a pause.
        latency: longest time in a link's queue.
    """

    def __init__(
        self, hosts: int = 2, rate: str = "1gbit", burst: str = "256kb", latency: str = "100ms"
    ) -> None:
        if not 1 <= hosts <= MOST_HOSTS:
            raise ValueError(f"hosts = {hosts}: allowed are 1 to {MOST_HOSTS}")
        self.rate = rate
        self.addresses = {f"host{i}": f"{NETWORK}.{i}" for i in range(1, hosts + 1)}
        self._shape = (rate, burst, latency)
        self._first: subprocess.Popen[str] | None = None
        self._enter: list[str] = []

    def __enter__(self) -> Cluster:
        refuse_unfit()
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def _open(self) -> None:
        namespaces = ("--net", "--uts", "--ipc", "--mount", "--pid")
        hosts = (f"{name}={address}" for name, address in self.addresses.items())
        unshare = ["unshare", *namespaces, "--fork", "--kill-child"]
        self._first = subprocess.Popen(
            [*unshare, "/bin/sh", "-c", HEAD, "sh", *self._shape, *hosts],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the owner; the cluster ends with it
        )
        assert self._first.stdout and self._first.stderr
        outside = self._first.stdout.readline().strip()
        if not outside:
            said = "; ".join(self._first.stderr.read().split("\n")).strip("; ")
            raise ClusterError(f"the kernel or a tool refused a part of the cluster: {said}")
        self._enter = ["nsenter", "--target", outside, *namespaces]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes of the cluster, and with them its namespaces."""
        if self._first is None:
            return
        first, self._first = self._first, None
        for pipe in (first.stdin, first.stdout, first.stderr):
            assert pipe
            pipe.close()
        first.wait()  # the kernel ends it after the last process of its PID namespace

    def start(
        self, host: str, command: Sequence[str], env: Mapping[str, str] | None = None, **popen: Any
    ) -> subprocess.Popen[str]:
        """Start a command on one host, or on the head.

        Args:
            host: `host1`, `host2`, ..., or `head`.
            command: what to run, in this process's folder.
            env: added to this process's environment.
            popen: more options of subprocess.Popen.
        """
        if host != "head":
            command = [AGENT, host, shlex.join(command)]
        return subprocess.Popen(
            [*self._enter, f"--wd={os.getcwd()}", *command],
            env=self.environment() | dict(env or {}),
            text=True,
            **popen,
        )

    def run(
        self,
        ranks_per_host: int,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        timeout_s: float | None = None,
        **popen: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command under mpirun on every host, and wait for its end.

        The ranks of a host follow one another, and torch's peers find each other in the same
        environment: MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME are set.

        Args:
            ranks_per_host: on each host.
            command: every rank's.
            env: added to this process's environment.
            timeout_s: raise subprocess.TimeoutExpired after it; the job ends with the cluster.
            popen: more options of subprocess.Popen; by default output is kept, not passed on.
        """
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        job = [*self.launcher(ranks_per_host), *command]
        started = self.start("head", job, env, **(pipes | popen))
        with started:
            try:
                out, err = started.communicate(timeout=timeout_s)
            except BaseException:
                started.kill()  # of nsenter only: the job itself ends with the cluster
                raise
        return subprocess.CompletedProcess(started.args, started.returncode, out, err)

    def launcher(self, ranks_per_host: int) -> list[str]:
        """The mpiexec of this Python's MPI library, told about the hosts."""
        mpiexec = str(Path(sys.executable).with_name("mpiexec"))
        count = ["-n", str(ranks_per_host * len(self.addresses))]
        hosts = ",".join(f"{name}:{ranks_per_host}" for name in self.addresses)
        if not is_open_mpi(mpiexec):
            agent = ["-launcher", "ssh", "-launcher-exec", AGENT]
            return [mpiexec, *agent, "-iface", LINK, "-hosts", hosts, *count]
        # Daemons do not know that they share the cores: each would bind its ranks from core 0 up,
        # and have them spin where they should let others run.
        # They have no agent to start further daemons with, and crash when they look for it.
        agent = ["--prtemca", "plm_ssh_agent", AGENT, "--prtemca", "plm_ssh_no_tree_spawn", "1"]
        wires = ["--mca", "pml", "ob1", "--mca", "btl", "tcp,self,sm"]
        wires += ["--mca", "btl_tcp_if_include", f"{NETWORK}.0/24"]
        cores = ["--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
        return [mpiexec, "--host", hosts, *count, *cores, *agent, *wires]

    def environment(self) -> dict[str, str]:
        """This process's environment, and what the programs on the hosts need."""
        return {
            **os.environ,
            **harness.RUNTIME,
            # MPI names its folders by host and PID, which are the same in every cluster.
            "TMPDIR": "/dev/shm",
            "MASTER_ADDR": next(iter(self.addresses.values())),
            "MASTER_PORT": str(TORCH_PORT),
            "GLOO_SOCKET_IFNAME": LINK,
        }


@functools.cache
def is_open_mpi(mpiexec: str) -> bool:
    """Whether an mpiexec is Open MPI's."""
    said = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False)
    return "Open MPI" in said.stdout


def refuse_unfit() -> None:
    """Raise ClusterError where a cluster cannot be made, as far as can be seen without trying."""
    if sys.platform != "linux":
        raise ClusterError(f"network namespaces need Linux, and this is {sys.platform}")
    if os.geteuid() != 0:
        raise ClusterError(f"network namespaces need root, and this is user {os.geteuid()}")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise ClusterError(f"{', '.join(missing)} not found; install iproute2 and util-linux")


@functools.cache
def exit_if_unfit(program: str) -> None:
    """Where a cluster cannot be made, end a program with the reason and the status for that."""
    if reason := why_not():
        print(f"{program}: {reason}", file=sys.stderr)
        sys.exit(UNFIT)


def why_not() -> str:
    """Why a cluster cannot be made here; empty if it can. Tries it."""
    try:
        with Cluster(hosts=1):
            return ""
    except ClusterError as error:
        return str(error)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="on each host")
    parser.add_argument("--rate", default="1gbit", help="of every link, as tc writes it")
    parser.add_argument("command", nargs="+", help="what every rank runs, after --")
    options = parser.parse_args()
    try:
        with Cluster(options.hosts, options.rate) as cluster:
            ended = cluster.run(options.ranks, options.command, stdout=None, stderr=None)
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        sys.exit(UNFIT)
    sys.exit(ended.returncode)


if __name__ == "__main__":
    main()
