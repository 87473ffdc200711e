"""Who has not come to MPI_Init, in which the others wait for it?

MPI_Init returns when all ranks have called it, and keeps the interpreter's lock until then: no
thread of Python can say that a rank is missing. So a child process waits beside it, and looks at
the processes of this machine when it has taken too long.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from hpctrain.errors import ExitCode
from hpctrain.launched import launched_rank, launched_size

WAITING = "hpctrain-join"
"""Name, as the kernel shows it, of a process that waits in MPI_Init; at most 15 characters."""
OTHERS_SPEAK_S = 1.0
"""How long a rank leaves it to the first one that waits on its machine to tell who is missing."""
_LAUNCH = ("PMIX_NAMESPACE", "SLURM_JOB_ID", "SLURM_STEP_ID")
"""What names a launch, as far as its launcher sets it."""
_ENDS_AS_UNFIT = signal.SIGQUIT
"""Its number is the exit status; see `_end_by_signal`."""
_PROCESSES = Path("/proc")


@contextmanager
def told_when_late(limit_s: float, environment: Mapping[str, str]) -> Iterator[None]:
    """End this process, with the status of an unfit environment, if the block takes too long.

    What is told then is which ranks have not come. Does nothing without a launcher.

    Args:
        limit_s: how long the block may take.
        environment: tells what launcher started this process.
    """
    if launched_size(environment)[1] == 1 or not (_PROCESSES / "self" / "comm").exists():
        yield
        return
    mine = os.getpid()
    name = _rename(WAITING)
    reading, writing = os.pipe()
    with _end_by_signal(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch has threads; the child has none
        child = os.fork()
        if child == 0:
            try:
                os.close(writing)
                if not select.select([reading], [], [], limit_s)[0]:
                    _end(mine, limit_s, environment, reading)
            finally:
                os._exit(0)
        os.close(reading)
        try:
            yield
        finally:
            os.close(writing)
            with suppress(ChildProcessError):  # who started this process ignores SIGCHLD
                os.waitpid(child, 0)
            _rename(name)


def _end(mine: int, limit_s: float, environment: Mapping[str, str], come: int) -> None:
    """In the child: tell who is missing, and end the rank."""
    waits = {rank: waiting for rank, (_, waiting) in ranks_here(environment, mine).items()}
    first = min((rank for rank, waiting in waits.items() if waiting), default=0)
    if launched_rank(environment) != first:
        time.sleep(OTHERS_SPEAK_S)
    if select.select([come], [], [], 0)[0]:  # the last one has come after all
        return
    if launched_rank(environment) == first:
        text = describe(ranks_here(environment, mine), limit_s, environment)
        os.write(2, f"hpctrain: {text}\n".encode())
        time.sleep(0.2)  # for the launcher to read it
    os.kill(mine, _ENDS_AS_UNFIT)


def ranks_here(
    environment: Mapping[str, str], mine: int, processes: Path = _PROCESSES
) -> dict[int, tuple[int, bool]]:
    """Ranks of this launch on this machine: process, and whether it waits in MPI_Init.

    Args:
        environment: of a rank of the launch.
        mine: process of that rank.
        processes: where the kernel tells about processes.
    """
    key = [environment.get(name) for name in _LAUNCH]
    parent = _parent(processes / str(mine))
    found: dict[int, tuple[int, bool]] = {}
    for folder in sorted((p for p in processes.iterdir() if p.name.isdigit()), key=_number):
        try:
            lines = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            theirs = dict(line.split("=", 1) for line in lines if "=" in line)
            is_ours = [theirs.get(name) for name in _LAUNCH] == key
            if key[0] is None:  # MPICH names its launches nowhere: all ranks have one parent
                is_ours &= _parent(folder) == parent
            if not is_ours or launched_size(theirs) != launched_size(environment):
                continue
            rank, waits = launched_rank(theirs), (folder / "comm").read_text().strip() == WAITING
        except (OSError, ValueError):  # of another user, or gone meanwhile
            continue
        if rank not in found or waits:
            found[rank] = _number(folder), waits
    return found


def describe(
    ranks: Mapping[int, tuple[int, bool]], limit_s: float, environment: Mapping[str, str]
) -> str:
    """What is told of ranks that have not come."""
    launcher, size = launched_size(environment)
    host = socket.gethostname()
    lines = [f"MPI_Init has not finished for {limit_s:.0f} s; {launcher} started {size} processes"]
    lines += [
        f"  missing: rank {rank} ({host}), process {process}, has not come to hpctrain.join()"
        for rank, (process, waits) in sorted(ranks.items())
        if not waits
    ]
    waiting = [rank for rank, (_, waits) in sorted(ranks.items()) if waits]
    elsewhere = [rank for rank in range(size) if rank not in ranks]
    if elsewhere:
        lines.append(f"  not on {host}, or never started: {_named(elsewhere)}")
    if len(waiting) == size:
        lines.append("  all ranks have come: the MPI library cannot connect them")
    lines.append(f"  waiting in it: {_named(waiting)}")
    return "\n".join(lines)


def _named(ranks: list[int]) -> str:
    shown = ", ".join(f"rank {rank}" for rank in ranks[:8])
    return shown + (f" and {len(ranks) - 8} more" if ranks[8:] else "")


def _number(folder: Path) -> int:
    return int(folder.name)


def _parent(folder: Path) -> int:
    return int((folder / "stat").read_text().rpartition(")")[2].split()[1])


def _rename(name: str) -> str:
    """Give this process another name; returns the one before."""
    comm = _PROCESSES / "self" / "comm"
    before = comm.read_text().strip()
    comm.write_text(name)
    return before


@contextmanager
def _end_by_signal() -> Iterator[None]:
    """Have a signal end this process with the status of an unfit environment, inside MPI too.

    A handler of Python's would wait for the interpreter's lock. The C library's own function for
    ending a process takes one number, which is the status, and so does a handler, which is the
    signal: 3 for both.
    """
    assert int(_ENDS_AS_UNFIT) == ExitCode.UNFIT
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    before = libc.signal(_ENDS_AS_UNFIT, ctypes.cast(libc._exit, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(_ENDS_AS_UNFIT, before)
