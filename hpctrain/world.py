"""Who am I among the ranks: rank, node, role, device. The sole owner of COMM_WORLD.

`join` is the first thing that a program does with hpctrain. It checks that launcher and MPI
library belong together, gives each rank its share of the cores, and makes sure that an
exception in one rank ends all of them.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Flag, auto
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from hpctrain.errors import ExitCode, HpctrainError, RankDiedError, UnfitError, shortened
from hpctrain.latecomers import told_when_late
from hpctrain.launched import launched_rank as launched_rank
from hpctrain.launched import launched_size as launched_size
from hpctrain.trace import Trace

if TYPE_CHECKING:
    from mpi4py import MPI

_log = logging.getLogger("hpctrain")

RANK_0_SPEAKS_S = 3.0
"""How long other ranks leave it to rank 0 to tell an error that all should have met."""


MOST_TRACED = 100_000
"""Characters of a traceback: messages of exceptions may be of any length."""
JOIN_S = 300.0
"""How long a rank waits for the others to join."""


FORWARD_S = 0.2
"""Time for the launcher to read what was said last: MPICH's drops the rest when it ends."""


class Role(Flag):
    """What a rank does. The root of a plain all-reduce job is a worker as well."""

    WORKER = auto()
    ROOT = auto()


@dataclass
class Position:
    """Where this rank stands, for logs, stall reports and failure messages."""

    step: int | None = None
    phase: str = "setting up"

    def __str__(self) -> str:
        return self.phase if self.step is None else f"step {self.step}, {self.phase}"


@dataclass(frozen=True)
class Seat:
    """What one rank tells all others when it joins."""

    host: str
    local_root: int
    """Smallest rank that shares memory with this one; names the node."""
    cores: tuple[int, ...]
    """Cores that the launcher lets this rank run on."""
    machine_cores: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Cores of the machine, also those that this rank may not use."""
    boot: str = field(default_factory=lambda: boot_of_machine())
    """With the host's name, tells machines apart."""
    launched_as: int = 0
    """The number by which the launcher knows this rank, also after others have died."""


@dataclass(frozen=True)
class World:
    """This rank's place among all ranks. Made by `join`, the same object for the whole process."""

    comm: MPI.Intracomm
    rank: int
    size: int
    seats: tuple[Seat, ...]
    roles: tuple[Role, ...]
    device: torch.device
    library: str
    """Name and version of the MPI library."""
    thread_level: int
    trace: Trace = field(default_factory=Trace, repr=False)
    position: Position = field(default_factory=Position, repr=False)
    numbers: tuple[int, ...] = ()
    """Of a part of the ranks: what messages call them, their numbers among all."""

    @property
    def role(self) -> Role:
        """What this rank does."""
        return self.roles[self.rank]

    @property
    def is_root(self) -> bool:
        """Whether this rank speaks for the job: console, checkpoints, reports."""
        return Role.ROOT in self.role

    @property
    def nodes(self) -> tuple[tuple[int, ...], ...]:
        """Ranks of each node; nodes are ordered by their smallest rank."""
        members: dict[int, list[int]] = {}
        for rank, seat in enumerate(self.seats):
            members.setdefault(seat.local_root, []).append(rank)
        return tuple(tuple(ranks) for _, ranks in sorted(members.items()))

    @property
    def node(self) -> int:
        """Index of this rank's node."""
        return next(index for index, ranks in enumerate(self.nodes) if self.rank in ranks)

    @property
    def local_rank(self) -> int:
        """This rank's index among the ranks of its node."""
        return self.nodes[self.node].index(self.rank)

    @property
    def local_size(self) -> int:
        """Number of ranks on this node."""
        return len(self.nodes[self.node])

    @property
    def cores_per_rank(self) -> float:
        """Cores that this rank has to itself when those of its machine are shared evenly."""
        mine = self.seats[self.rank]
        cores = [s.cores for s in self.seats if (s.host, s.boot) == (mine.host, mine.boot)]
        return core_share(mine.cores, cores)

    @property
    def split_machines(self) -> tuple[str, ...]:
        """Hosts whose ranks share no memory as far as the MPI library says: several nodes."""
        machines = {ranks[0]: self.seats[ranks[0]] for ranks in self.nodes}
        count = Counter((seat.host, seat.boot) for seat in machines.values())
        return tuple(host for (host, _), nodes in count.items() if nodes > 1)

    @property
    def oversubscribed(self) -> bool:
        """Whether ranks of this node outnumber the cores that they may run on."""
        return self.cores_per_rank < 1

    def name_of(self, rank: int) -> str:
        """`rank 3 (node-a)`, as messages name a rank."""
        number = self.numbers[rank] if self.numbers else rank
        return f"rank {number} ({self.seats[rank].host})"

    def abort(self, code: int) -> None:
        """End all ranks at once with exit status `code`. Not collective; does not return."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # closed, or a pipe that nobody reads any more
                stream.flush()
        time.sleep(FORWARD_S)
        everyone = load_mpi().COMM_WORLD  # also if this is what others have left
        if _is_left_alone(everyone):  # Open MPI 5.0.11's mpiexec would end with status 0
            os._exit(int(code))
        everyone.Abort(int(code))


_world: World | None = None
_join_lock = threading.Lock()


def join(*, device: str = "cpu", deadline_s: float = JOIN_S) -> World:
    """Join the ranks that the launcher started. Collective; later calls return the same World.

    Initialises MPI when the program has not done so, with thread support, checks that the
    launcher's idea of the number of ranks is MPI's, sets torch's number of threads to this
    rank's share of its node's cores unless OMP_NUM_THREADS is set, and installs a hook that
    ends all ranks when one ends with an uncaught exception.

    Args:
        device: torch device of this rank's model, for example "cpu" or "cuda:0".
        deadline_s: how long to wait for the others in MPI_Init. Then those that have not come are
            told, and the process ends with the status of an unfit environment.

    Raises:
        UnfitError: no MPI library, the wrong launcher, or an MPI without thread support.
    """
    global _world
    with _join_lock:
        if _world is None:
            _install_unfit_hook()
            _world = _join(torch.device(device), deadline_s)
        return _world


def current() -> World | None:
    """The World of this process, or None before `join`."""
    return _world


def _join(device: torch.device, deadline_s: float) -> World:
    MPI = load_mpi()
    library = library_name(MPI.Get_library_version())
    refuse_foreign_launcher(os.environ, "Open MPI" in library, library)
    if not MPI.Is_initialized():
        # Open MPI 5.0.11 cannot begin without one; it need not exist.
        os.environ.setdefault("HOME", os.path.expanduser("~"))
        with warnings.catch_warnings():  # of a foreign launcher, which is refused below
            warnings.simplefilter("ignore", RuntimeWarning)
            with told_when_late(deadline_s, os.environ):
                MPI.Init_thread(MPI.THREAD_MULTIPLE)
        atexit.register(_finalize, os.getpid())
    comm = MPI.COMM_WORLD
    refuse_lone_ranks(os.environ, comm.Get_size(), library)
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise UnfitError(
            "MPI was initialised without thread support, which the progress thread needs",
            value=f"thread level {MPI.Query_thread()}",
            allowed="MPI_THREAD_SERIALIZED or MPI_THREAD_MULTIPLE",
            fix="call hpctrain.join() before other code initialises MPI",
            everywhere=True,
        )
    rank, size = comm.Get_rank(), comm.Get_size()
    local = comm.Split_type(MPI.COMM_TYPE_SHARED, key=rank)
    seat = Seat(
        host=socket.gethostname(),
        local_root=local.bcast(rank, root=0),
        cores=usable_cores(),
        launched_as=rank,
    )
    local.Free()
    world = World(
        comm=comm,
        rank=rank,
        size=size,
        seats=tuple(comm.allgather(seat)),
        roles=_roles(size),
        device=device,
        library=library,
        thread_level=MPI.Query_thread(),
    )
    _share_cores(world)
    _install_abort_hook(world)
    return world


def of_part(world: World, comm: MPI.Intracomm) -> World:
    """The ranks of a communicator as a world of their own, with the same trace and position.

    Args:
        world: all ranks.
        comm: some of them.
    """
    rank, size = comm.Get_rank(), comm.Get_size()
    kept = _ranks_in(world, comm)
    seats = reseated(world.seats, kept)
    return replace(
        world,
        comm=comm,
        rank=rank,
        size=size,
        seats=seats,
        roles=_roles(size),
        numbers=tuple(kept),
    )


def _ranks_in(world: World, comm: MPI.Intracomm) -> list[int]:
    """The numbers that a communicator's ranks have in the world."""
    MPI = load_mpi()
    mine, theirs = comm.Get_group(), world.comm.Get_group()
    ranks: list[int] = MPI.Group.Translate_ranks(mine, list(range(comm.Get_size())), theirs)
    mine.Free()
    theirs.Free()
    return ranks


def survivors_of(world: World) -> World:
    """The ranks that are left, as the World of this process from now on. Collective among them.

    Ranks that have not noticed yet that others are dead are told. Trace and position are kept.

    Args:
        world: of which ranks have died; its engine has been given up.
    """
    global _world
    leave_behind()
    comm = world.comm
    comm.Revoke()
    left = comm.Shrink()
    MPI = load_mpi()
    assert isinstance(left, MPI.Intracomm)
    left.Set_errhandler(MPI.ERRORS_RETURN)
    kept = _ranks_in(world, left)
    _world = replace(
        world,
        comm=left,
        rank=left.Get_rank(),
        size=left.Get_size(),
        seats=reseated(world.seats, kept),
        roles=_roles(left.Get_size()),
    )
    _share_cores(_world)
    return _world


def reseated(seats: Sequence[Seat], kept: Sequence[int]) -> tuple[Seat, ...]:
    """The seats of those ranks that are kept, in their order, which numbers them anew."""
    roots: dict[int, int] = {}
    for rank, old in enumerate(kept):
        roots.setdefault(seats[old].local_root, rank)
    return tuple(replace(seats[old], local_root=roots[seats[old].local_root]) for old in kept)


def _roles(size: int) -> tuple[Role, ...]:
    return (Role.ROOT | Role.WORKER, *(Role.WORKER for _ in range(size - 1)))


def _share_cores(world: World) -> None:
    """Have torch compute on this rank's share of its node's cores, unless the user has chosen."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, int(world.cores_per_rank)))


def library_name(version: str) -> str:
    """What an MPI library calls itself, in a few words of its version string's first line."""
    return " ".join(version.split("\n")[0].split(",")[0].strip("\x00").split())


def tells_of_deaths(environment: Mapping[str, str]) -> bool:
    """Whether ranks survive others and are told who is dead: Open MPI with `--with-ft ulfm`."""
    return environment.get("OMPI_MCA_mpi_ft_enable") == "1"


def _is_left_alone(comm: Any) -> bool:
    """Whether all other ranks are dead, as far as the MPI library tells."""
    with contextlib.suppress(Exception):  # a library that does not tell
        return bool(0 < comm.Get_failed().Get_size() == comm.Get_size() - 1)
    return False


_is_left_behind = False


def leave_behind() -> None:
    """Some rank is dead: end without MPI_Finalize, in which Open MPI 5.0.11 may hang then."""
    global _is_left_behind
    _is_left_behind = True


def _finalize(owner: int) -> None:
    """At interpreter exit, after what was registered later, such as the end of the engine."""
    MPI = load_mpi()
    is_fork = os.getpid() != owner  # which may exit as it likes
    if not (_is_left_behind or is_fork or MPI.Is_finalized()):
        MPI.Finalize()


def load_mpi() -> Any:
    """The module mpi4py.MPI, loaded but not initialised.

    Raises:
        UnfitError: mpi4py finds no MPI library.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False  # `_finalize` does it, unless ranks are dead
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UnfitError(
            f"no MPI library can be loaded: {error}",
            fix="pip install 'hpctrain[mpi]', or load your site's MPI module and "
            "pip install --no-binary mpi4py mpi4py against it",
            everywhere=True,
        ) from error
    return MPI


def refuse_foreign_launcher(
    environment: Mapping[str, str], is_open_mpi: bool, library: str
) -> None:
    """Refuse Open MPI's mpirun around another MPI, which would die in MPI_Init without a word.

    Raises:
        UnfitError: the launcher and the library do not belong together.
    """
    if "OMPI_COMM_WORLD_SIZE" in environment and not is_open_mpi:
        raise UnfitError(
            "the processes were started by Open MPI's mpirun but use another MPI library",
            value=library,
            fix="start them with the mpiexec that belongs to that library, or install "
            "an mpi4py built for Open MPI",
            everywhere=True,
        )


def refuse_lone_ranks(environment: Mapping[str, str], size: int, library: str) -> None:
    """Refuse a launcher that MPI does not recognise: each process would be rank 0 of 1.

    Raises:
        UnfitError: the launcher started another number of processes than MPI sees.
    """
    launcher, launched = launched_size(environment)
    torchrun = environment.get("WORLD_SIZE", "")
    if "TORCHELASTIC_RUN_ID" in environment and torchrun.isdecimal() and launcher == "none":
        launcher, launched = "torchrun", int(torchrun)
    if launched != size:
        raise UnfitError(
            f"{launcher} started {launched} processes, but {library} sees a world of {size}",
            fix="use the mpirun or mpiexec that belongs to this MPI library "
            "(or the srun --mpi=... type that it was built for; srun --mpi=list shows them)",
            everywhere=True,
        )


def boot_of_machine() -> str:
    """What is the same for all processes of a machine until it is started anew."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def usable_cores() -> tuple[int, ...]:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def core_share(mine: Sequence[int], node: Sequence[Sequence[int]]) -> float:
    """Cores that a rank may use when every core is shared evenly by the ranks that may run on it.

    Args:
        mine: cores that this rank may run on.
        node: the same for every rank of the node, this one included.
    """
    users = Counter(core for cores in node for core in cores)
    return float(sum(Fraction(1, users[core]) for core in mine))


def describe_failure(world: World, error: BaseException, trace: TracebackType | None) -> str:
    """What an uncaught exception of this rank looks like on the console."""
    place = f"hpctrain: {world.name_of(world.rank)} of {world.size} failed at {world.position}"
    lines = traceback.format_exception(type(error), error, trace)
    return place + "\n" + shortened("".join(lines), MOST_TRACED)


def _install_unfit_hook() -> None:
    """Tell an unfit environment in plain words, once, and end with its own exit status."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, UnfitError):
            previous(kind, error, trace)
            return
        if launched_rank(os.environ) == 0:
            _write(f"hpctrain: {error}\n")
        os._exit(error.exit_code)  # an excepthook cannot choose the status in another way

    sys.excepthook = hook


def _install_abort_hook(world: World) -> None:
    """End all ranks when this one ends with an uncaught exception."""
    previous = sys.excepthook
    owner = os.getpid()

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if world.size == 1 or os.getpid() != owner:  # a forked child is no rank
            previous(kind, error, trace)
            return
        fail(_world or world, error, trace)

    sys.excepthook = hook


def fail(world: World, error: BaseException, trace: TracebackType | None = None) -> None:
    """Show this rank's failure in one write, so that ranks do not mix, and end all ranks.

    An error that every rank is expected to raise is shown by the first one, which ends the others
    with itself; a rank that is still alive after `RANK_0_SPEAKS_S` was alone with it.
    """
    code = ExitCode.CRASH
    if isinstance(error, HpctrainError):
        code = error.exit_code
    line = f"{type(error).__name__}: {error}".split("\n")[0]
    _log.error("failed at %s: %s", world.position, line, extra={"shown": True})
    if isinstance(error, HpctrainError) and error.everywhere:
        text = f"hpctrain: {error}\n"
        if world.rank != speaker_of(world, error):
            time.sleep(RANK_0_SPEAKS_S)
            text = f"hpctrain: {world.name_of(world.rank)}: {error}\n"
        _write(text)
    else:
        _write(describe_failure(world, error, trace))
    world.abort(code)


def speaker_of(world: World, error: BaseException) -> int:
    """The rank that tells an error which all meet: the first one that lives."""
    dead = error.ranks if isinstance(error, RankDiedError) else ()
    return next(rank for rank in range(world.size) if rank not in dead)


def _write(text: str) -> None:
    """To standard error, in one piece, even if Python's own stream is closed."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))
