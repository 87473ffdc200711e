"""Which calls of this MPI library take device memory: tried out in children that may crash or hang.

Names and build flags mislead: libraries that say they take device buffers crash in some calls (Open
MPI in `Iallreduce`, github.com/open-mpi/ompi/issues/9845). So each kind of call is run for real, by
two ranks in processes of their own, with a time limit. What was found is kept for the library and
its settings, the driver and the host.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from hpctrain.comm.collect import all_gather
from hpctrain.comm.engine import Engine
from hpctrain.files import read_private, refuse_shared

CALLS = ("send", "allreduce")
"""Messages between two ranks, and a collective."""
LIMIT_S = 60.0
LAUNCHERS = ("OMPI_COMM_WORLD_", "OMPI_APP_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "HYDRA_", "MPI_L")
TAKEN = "taken"

COUNTS = (1, 1024, 1 << 21)
"""Elements of a message: libraries send short, middling and long ones in different ways."""

CHILD = """
import sys, threading
sys.path = [folder for folder in sys.path if folder]  # not what lies in the working directory
import torch, mpi4py
from mpi4py import MPI
comm = MPI.COMM_WORLD
rank, size = comm.Get_rank(), comm.Get_size()
assert size == 2, "the launcher belongs to another MPI library"
def buffer(tensor):
    return MPI.buffer.fromaddress(tensor.data_ptr(), tensor.numel() * 4)
def arrives(call, count):
    mine = torch.arange(count, dtype=torch.float32, device="cuda") % 1000 + rank
    other = torch.zeros_like(mine)
    torch.cuda.synchronize()
    if call == "send":
        MPI.Request.Waitall([comm.Irecv([buffer(other), MPI.BYTE], 1 - rank),
                             comm.Isend([buffer(mine), MPI.BYTE], 1 - rank)])
        expected = mine + 1 - 2 * rank
    else:
        comm.Allreduce([buffer(mine), count, MPI.FLOAT], [buffer(other), count, MPI.FLOAT])
        expected = 2 * mine + 1 - 2 * rank
    torch.cuda.synchronize()
    return bool((other == expected).all())
def tell():
    torch.cuda.set_device(rank % torch.cuda.device_count())
    right = all([arrives(sys.argv[1], count) for count in COUNTS])
    right = comm.allreduce(right, MPI.LAND)
    if rank == 0:
        print("taken" if right else "garbled", flush=True)
# As the engine does, in a thread that is not the first.
thread = threading.Thread(target=tell)
thread.start()
thread.join()
""".replace("COUNTS", str(COUNTS))


def device_calls(library: str) -> dict[str, str]:
    """Of each kind of call, ``taken`` or a few words on how it failed. Not collective.

    Args:
        library: name and version of the MPI library.
    """
    cache = cache_file()
    probe = f"probe {zlib.crc32(CHILD.encode()):08x}"
    key = "; ".join(
        [probe, library, *_library_files(), *_settings(), _driver(), socket.gethostname()]
    )
    known = _read(cache)
    if key in known:
        return known[key]
    launcher = find_launcher()
    found = {
        call: ended([*launcher, sys.executable, "-c", CHILD, call])
        if launcher
        else "not tried: no mpiexec beside Python or on the path"
        for call in CALLS
    }
    if not any("hung" in how or how.startswith("not tried") for how in found.values()):
        _write(cache, {**known, key: found})  # the others may go better next time
    return found


def messages_take_device_memory(engine: Engine) -> bool:
    """Whether sends and receives do, between two ranks of each host. Collective."""
    world = engine.world
    how = None
    if world.local_rank == 0 and world.size > 1:
        how = device_calls(world.library)["send"]
    found = [text for text in all_gather(engine.control, how, label="device probe") if text]
    return bool(found) and all(text == TAKEN for text in found)


def find_launcher() -> list[str]:
    """The command that starts two ranks, empty if there is none."""
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    return [found, "-n", "2"] if found else []


def ended(command: Sequence[str], limit_s: float = LIMIT_S) -> str:
    """How a child that tries a call ends.

    Args:
        command: the child; prints ``taken`` when the data arrived, ``garbled`` when it did not.
        limit_s: how long it may take.

    Returns:
        ``taken``, or a few words on how it failed.
    """
    alone = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    try:
        child = subprocess.Popen(
            command,
            env=alone,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        return f"not tried: {error}"
    try:
        out, _ = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        child.terminate()  # a launcher ends its ranks
        try:
            child.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
        return f"not taken: the probe hung for {limit_s:g} s"
    if out.split()[-1:] == [TAKEN]:
        return TAKEN
    if out.split()[-1:] == ["garbled"]:
        return "not taken: the data arrived garbled"
    reason = f"signal {-child.returncode}" if child.returncode < 0 else f"status {child.returncode}"
    return f"not taken: the probe ended with {reason}"


def cache_file() -> Path | None:
    """Where findings are kept; None for a user without a home."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder / "hpctrain" / "device-calls.json"


def _read(path: Path | None) -> dict[str, dict[str, str]]:
    """What was found earlier, by this user: what others may have written is not believed."""
    if path is None:
        return {}
    try:
        found = json.loads(read_private(path))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        key: calls
        for key, calls in found.items()
        if isinstance(calls, dict)
        and set(calls) == set(CALLS)
        and all(isinstance(how, str) for how in calls.values())
    }


def _write(path: Path | None, found: Mapping[str, Mapping[str, str]]) -> None:
    """Ranks of one node may write at the same time: each writes to the side and renames."""
    if path is None:
        return
    with suppress(OSError):  # it will be tried out again next time
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        refuse_shared(path.parent)
        descriptor, side = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(found, indent=1) + "\n")
            os.replace(side, path)
        except OSError:
            os.unlink(side)
            raise


def _library_files() -> list[str]:
    """The MPI library that is loaded: builds of one version differ in what they take."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        paths = {line.split()[-1] for line in lines if "/libmpi" in line}
        return [f"{path} of {os.stat(path).st_mtime:.0f}" for path in sorted(paths)]
    except OSError:
        return []


def _settings() -> list[str]:
    """Variables that decide how the library moves messages."""
    named = ("OMPI_MCA_", "UCX_", "MPICH_", "MPIR_CVAR_", "I_MPI_", "FI_")
    return sorted(f"{key}={value}" for key, value in os.environ.items() if key.startswith(named))


def _driver() -> str:
    """Version of what torch finds below it."""
    if not torch.cuda.is_available():
        return "no driver"
    runtime = torch.version.cuda or torch.version.hip
    device = torch.cuda.get_device_name(0)
    try:
        driver = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except OSError:
        driver = "unknown driver"
    return f"{device}, {runtime}, {driver}"
