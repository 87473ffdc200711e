"""The cluster in one box: separate hosts, links of the asked rate, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cluster
import pytest
from cluster import Cluster, ClusterError

pytestmark = [pytest.mark.launch, pytest.mark.any_mpi, pytest.mark.alone]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LIMIT_S = 60.0
BAND = (0.5, 1.1)
"""Of the link's rate, decided before measuring; other programs use the same cores."""


@pytest.fixture
def possible() -> None:
    if cluster.why_not():
        pytest.skip(cluster.why_not())


def objects(text: str) -> list[dict[str, object]]:
    """What the ranks printed, one JSON object a line; libraries print as well."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def run(made: Cluster, ranks_per_host: int, script: Path) -> list[dict[str, object]]:
    ended = made.run(ranks_per_host, [sys.executable, str(script)], timeout_s=LIMIT_S)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return objects(ended.stdout)


def namespaces_of(made: Cluster) -> list[str]:
    """Namespaces of the head and of a host, as links under /proc/*/ns name them."""
    kinds = ("net", "uts", "ipc", "mnt", "pid")
    found = []
    for host in ("head", "host1"):
        command = ["readlink", *(f"/proc/self/ns/{kind}" for kind in kinds)]
        with made.start(host, command, stdout=subprocess.PIPE) as started:
            found += started.communicate(timeout=LIMIT_S)[0].split()
    assert len(found) == 2 * len(kinds)
    return found


def users_of(namespaces: list[str]) -> list[str]:
    """Processes that are still in one of the namespaces."""
    users = []
    for link in Path("/proc").glob("[0-9]*/ns/*"):
        try:
            if os.readlink(link) in namespaces:
                users.append(str(link))
        except OSError:
            continue  # the process has just ended
    return users


def links() -> list[str]:
    """Network interfaces of the machine itself."""
    return sorted(line.split(":")[0] for line in Path("/proc/net/dev").read_text().splitlines()[2:])


SEATS = """
import json, os, socket, sys
import torch, hpctrain
world = hpctrain.join()
torch.distributed.init_process_group("gloo", rank=world.rank, world_size=world.size)
total = torch.ones(1)
torch.distributed.all_reduce(total)
torch.distributed.destroy_process_group()
sys.stdout.write(json.dumps({
    "rank": world.rank, "nodes": world.nodes, "host": socket.gethostname(), "total": total.item()
}) + "\\n")
"""


@pytest.mark.usefixtures("possible")
def test_hosts_are_nodes_of_hpctrain_and_peers_of_torch(tmp_path: Path) -> None:
    script = tmp_path / "seats.py"
    script.write_text(SEATS)
    with Cluster(hosts=2) as made:
        found = run(made, 2, script)
    hosts = ["host1", "host1", "host2", "host2"]
    assert sorted(found, key=lambda seat: int(str(seat["rank"]))) == [
        {"rank": rank, "nodes": [[0, 1], [2, 3]], "host": host, "total": 4}
        for rank, host in enumerate(hosts)
    ]


BANDWIDTH = """
import json, statistics, time
import numpy as np
from mpi4py import MPI
comm = MPI.COMM_WORLD
other, nbytes, piece = 1 - comm.rank, 8 << 20, 1 << 20
sent, got = np.ones(nbytes, np.uint8), np.empty(nbytes, np.uint8)
cuts = [slice(start, start + piece) for start in range(0, nbytes, piece)]
times = []
for _ in range(5):
    comm.Barrier()
    begun = time.perf_counter()
    receives = [comm.Irecv(got[cut], other) for cut in cuts]
    MPI.Request.Waitall(receives + [comm.Isend(sent[cut], other) for cut in cuts])
    times.append(comm.allreduce(time.perf_counter() - begun, MPI.MAX))
if comm.rank == 0:
    print(json.dumps({"gbit_per_s": nbytes * 8 / 1e9 / statistics.median(times)}))
"""


@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize(("rate", "gbit_per_s"), [("1gbit", 1.0), ("200mbit", 0.2)])
def test_bandwidth_between_hosts_is_the_rate(tmp_path: Path, rate: str, gbit_per_s: float) -> None:
    script = tmp_path / "bandwidth.py"
    script.write_text(BANDWIDTH)
    with Cluster(hosts=2, rate=rate) as made:
        (found,) = run(made, 1, script)
    assert BAND[0] <= float(str(found["gbit_per_s"])) / gbit_per_s <= BAND[1]


@pytest.mark.usefixtures("possible")
def test_hosts_share_neither_names_nor_memory() -> None:
    with Cluster(hosts=2) as made:
        look = "echo $(cat /proc/sys/kernel/hostname) $(ls /dev/shm)"
        assert made.start("host1", ["sh", "-c", "echo x >/dev/shm/mine"]).wait(LIMIT_S) == 0
        for host, expected in (("host1", "host1 mine"), ("host2", "host2")):
            with made.start(host, ["sh", "-c", look], stdout=subprocess.PIPE) as started:
                assert started.communicate(timeout=LIMIT_S)[0].strip() == expected


@pytest.mark.usefixtures("possible")
def test_leaves_nothing_behind() -> None:
    before = links()
    with Cluster(hosts=2) as made:
        namespaces = namespaces_of(made)
        assert users_of(namespaces)
        left = made.start("host2", ["sleep", "1000"])
        assert links() == before
    assert not users_of(namespaces)
    assert left.wait(LIMIT_S) != 0
    assert links() == before


OWNER = """
import json, sys
sys.path[:0] = [{benchmarks!r}, {tests!r}]
from cluster import Cluster
from test_cluster import namespaces_of
with Cluster(hosts=2) as made:
    namespaces = namespaces_of(made)
    print(json.dumps(namespaces), flush=True)
    made.run(1, ["sh", "-c", "echo running; exec sleep 1000"], stdout=None)
"""


@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_owner_that_dies_leaves_nothing_behind(sent: signal.Signals) -> None:
    text = OWNER.format(benchmarks=str(BENCHMARKS), tests=str(Path(__file__).parent))
    owner = subprocess.Popen(
        [sys.executable, "-c", text],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert owner.stdout
    namespaces = json.loads(owner.stdout.readline())
    assert owner.stdout.readline() == "running\n"
    assert users_of(namespaces)
    owner.send_signal(sent)
    assert owner.wait(LIMIT_S) != 0
    owner.stdout.close()
    limit_s = time.monotonic() + 10
    while users_of(namespaces) and time.monotonic() < limit_s:
        time.sleep(0.02)
    assert not users_of(namespaces)


@pytest.mark.usefixtures("possible")
def test_two_at_once_do_not_meet(tmp_path: Path) -> None:
    script = tmp_path / "who.py"
    script.write_text(
        "import json\nfrom mpi4py import MPI\n"
        "size = MPI.COMM_WORLD.allreduce(1)\n"
        "if MPI.COMM_WORLD.rank == 0: print(json.dumps({'size': size}))\n"
    )
    with Cluster(hosts=2) as one, Cluster(hosts=3) as other:
        jobs = [
            made.start(
                "head",
                [*made.launcher(1), sys.executable, str(script)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
            )
            for made in (one, other)
        ]
        sizes = [objects(job.communicate(timeout=LIMIT_S)[0])[0]["size"] for job in jobs]
    assert sizes == [2, 3]


@pytest.mark.usefixtures("possible")
def test_command_passes_on_output_and_status() -> None:
    command = ["sh", "-c", "echo on $(cat /proc/sys/kernel/hostname); exit 7"]
    ended = subprocess.run(
        [sys.executable, str(BENCHMARKS / "cluster.py"), "--rate", "100mbit", "--", *command],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ended.returncode == 7
    assert re.findall("on host.", ended.stdout)


@pytest.mark.usefixtures("possible")
def test_refused_part_is_told_with_the_tools_words() -> None:
    with pytest.raises(ClusterError, match=r'refused a part of the cluster: .*"rate"'):
        Cluster(rate="much").__enter__()


def test_other_users_are_told_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["cluster.py", "--", "true"])
    with pytest.raises(SystemExit) as ended:
        cluster.main()
    assert ended.value.code == 3
    assert "need root, and this is user 1000" in capsys.readouterr().err


def test_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(cluster.shutil, "which", lambda tool: None if tool == "tc" else tool)
    with pytest.raises(ClusterError, match="tc not found; install iproute2"):
        Cluster().__enter__()
