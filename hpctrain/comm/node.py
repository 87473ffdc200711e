"""Memory that all ranks of a node share: slabs of gradients, and arenas for what is lent.

One MPI window holds, for each rank of the node, its counters and its slabs. The memory is taken
when it is allocated, not when it is first touched: where ``/dev/shm`` is too small, as in many
containers, a rank would otherwise die of SIGBUS in the middle of a step. What cannot be had is told
in one line, and slabs are made in memory of each process instead.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import logging
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from mpi4py import MPI

from hpctrain.comm.collect import all_gather
from hpctrain.comm.engine import Engine
from hpctrain.comm.memory import Counters, Place, Slab, aligned, chunk_cuts
from hpctrain.world import World

_log = logging.getLogger("hpctrain")

SHARED_FILES = "/dev/shm"
"""Where MPI libraries on Linux keep the files behind shared windows."""
SPARE = 1.1
"""Free space to ask for, over what is needed."""
PAGE_BYTES = 4096
COUNTER_BYTES = 8
KEPT_WINDOWS = 4
"""More windows than these are searched for unused ones with the help of the garbage collector."""
_MADV_POPULATE_WRITE = 23


@dataclass
class _Window:
    """An MPI window, and what tells whether any tensor still lies in it."""

    win: MPI.Win
    parts: list[weakref.ref[ctypes.Array[ctypes.c_char]]]

    @property
    def unused(self) -> bool:
        return all(part() is None for part in self.parts)


@dataclass
class _Kept:
    """What the ranks of an engine, which are all or a part, have on this node.

    Attributes:
        windows: by number, which is the same on all of these ranks.
        made: windows so far.
        comms: of the ranks on this node, by how ranks lie on nodes.
    """

    windows: dict[int, _Window] = field(default_factory=dict)
    made: int = 0
    comms: dict[tuple[tuple[int, ...], ...], MPI.Intracomm] = field(default_factory=dict)


_kept: dict[Engine, _Kept] = {}
_left: list[_Window] = []
"""Windows that ranks which are dead by now had a part in. They cannot be freed."""


def shared_slabs(
    engine: Engine,
    counts: Sequence[int],
    dtypes: Sequence[torch.dtype],
    chunk_bytes: int | None = None,
) -> list[Slab] | None:
    """Slabs of zeros in node-shared memory, or None with a line in the log. Collective.

    Args:
        engine: the process's engine, with no operation in flight.
        counts: elements of each slab, the same on all ranks.
        dtypes: real dtype of each slab.
        chunk_bytes: size of a slab's chunks, or None for none.
    """
    world = engine.world
    if not counts or max(len(ranks) for ranks in world.nodes) == 1:
        return None
    _free_unused(engine)
    kinds = list(zip(counts, dtypes, strict=True))
    cuts = [chunk_cuts(count, dtype.itemsize, chunk_bytes) for count, dtype in kinds]
    row_bytes = aligned(2 * COUNTER_BYTES * sum(1 + len(cut) for cut in cuts))
    nbytes = row_bytes + sum(aligned(count * dtype.itemsize) for count, dtype in kinds)
    window = _allocate(engine, [nbytes] * world.local_size, ", or choose way = 'direct'")
    if window is None:
        return None
    parts, fence = window
    layout = _Layout(world, [part[:row_bytes] for part in parts], fence)
    slabs = []
    start = row_bytes
    for (count, dtype), cut in zip(kinds, cuts, strict=True):
        end = start + count * dtype.itemsize
        views = [part[start:end].view(dtype) for part in parts]
        chunks = tuple(layout.slab([view[piece] for view in views]) for piece in cut)
        slabs.append(replace(layout.slab(views), chunks=chunks))
        start = aligned(end)
    return slabs


def shared_arenas(engine: Engine, sizes: Sequence[int]) -> dict[int, torch.Tensor] | None:
    """Bytes of each rank of this node that all of them may use, by rank. Collective.

    Args:
        engine: the process's engine, with no operation in flight.
        sizes: bytes of each rank of the run.

    Returns:
        Their arenas, or None, with a line in the log if the memory cannot be had.
    """
    if not any(sizes):
        return None
    _free_unused(engine)
    world = engine.world
    here = world.nodes[world.node]
    window = _allocate(engine, [aligned(sizes[rank]) for rank in here])
    return dict(zip(here, window[0], strict=True)) if window else None


class _Layout:
    """Gives each slab its counters and its place among the ranks of this node and of others."""

    def __init__(
        self, world: World, rows: Sequence[torch.Tensor], fence: Callable[[], None]
    ) -> None:
        self._rows = [memoryview(row.numpy().data).cast("q") for row in rows]
        self._fence = fence
        self._here = world.local_rank
        self._lanes = min(len(ranks) for ranks in world.nodes)
        self._across = [ranks[self._here] for ranks in world.nodes if self._here < self._lanes]
        self._next = 0

    def slab(self, views: Sequence[torch.Tensor]) -> Slab:
        """The slab of which `views` are the parts on each rank of the node."""
        ready, done = self._counters(), self._counters()
        place = Place(views, self._here, self._lanes, self._across, ready, done)
        return Slab(views[self._here], place)

    def _counters(self) -> Counters:
        cells = [row[self._next : self._next + 1] for row in self._rows]
        self._next += 1
        return Counters(cells, self._here, self._fence)


def lacking_room(local_ranks: int, nbytes: int, folder: str = SHARED_FILES) -> str:
    """Why `local_ranks` shared segments of `nbytes` cannot be had on this node; empty if they can.

    The MPI library itself would notice when a page is touched, by SIGBUS.
    """
    needed = int(local_ranks * nbytes * SPARE)
    try:
        files = os.statvfs(folder)
    except OSError:
        return ""  # the library keeps them elsewhere; populating the memory will tell
    free = files.f_bavail * files.f_frsize
    if free >= needed:
        return ""
    return f"{folder} has {free / 1e6:.0f} MB free of the {needed / 1e6:.0f} MB that are needed"


def populate(address: int, nbytes: int) -> str:
    """Take the pages of a mapping now; why they cannot be had, or empty."""
    start = -(-address // PAGE_BYTES) * PAGE_BYTES
    length = (address + nbytes - start) // PAGE_BYTES * PAGE_BYTES
    if length <= 0:
        return ""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE)
    if failed and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):  # kernels before 5.14
        return f"its memory cannot be had ({os.strerror(ctypes.get_errno())})"
    return ""


def _allocate(
    engine: Engine, sizes: Sequence[int], otherwise: str = ""
) -> tuple[list[torch.Tensor], Callable[[], None]] | None:
    """A window: the bytes of each rank of the node, and a memory fence.

    Args:
        engine: the process's engine.
        sizes: bytes of each rank of the node.
        otherwise: what else the user may do if it cannot be had.
    """
    world, kept = engine.world, _kept_of(engine)
    reason = lacking_room(1, sum(sizes))
    if kept.windows and any(all_gather(engine.control, reason, label="node-shared memory")):
        gc.collect()  # models are full of reference cycles
        _free_unused(engine)
        reason = lacking_room(1, sum(sizes))
    if not _agreed(engine, reason, otherwise):
        return None
    win: MPI.Win | None = None
    tensors: list[torch.Tensor] = []
    reason = ""
    with engine.exclusive():
        try:
            mine = sizes[world.local_rank]
            win, arrays = _open_window(_node_comm_of(engine), sizes)
            reason = populate(ctypes.addressof(arrays[world.local_rank]), mine)
            tensors = [
                torch.frombuffer(a, dtype=torch.uint8) if len(a) else torch.empty(0).byte()
                for a in arrays
            ]
        except MPI.Exception as error:
            reason = f"MPI gives no shared window ({error})"
    if not reason:
        tensors[world.local_rank].zero_()
    if not _agreed(engine, reason, otherwise) or win is None:
        return None
    kept.made += 1
    kept.windows[kept.made] = _Window(win, [weakref.ref(array) for array in arrays])
    return tensors, win.Sync


def _agreed(engine: Engine, reason: str, otherwise: str) -> bool:
    """Whether no rank has a reason not to share memory; the first one is told."""
    reasons = all_gather(engine.control, reason, label="node-shared memory")
    found = [(rank, text) for rank, text in enumerate(reasons) if text]
    if found and engine.world.rank == 0:
        rank, text = found[0]
        _log.warning(
            "gradients go by messages, not through node-shared memory: %s on %s; "
            "give the container more shared memory (--shm-size)%s",
            *(text, engine.world.name_of(rank), otherwise),
        )
    return not found


def _open_window(
    comm: MPI.Intracomm, sizes: Sequence[int]
) -> tuple[MPI.Win, list[ctypes.Array[ctypes.c_char]]]:
    info = MPI.Info.Create({"alloc_shared_noncontig": "true"})  # each rank's pages near its core
    win = MPI.Win.Allocate_shared(sizes[comm.Get_rank()], 1, info, comm)
    info.Free()
    win.Lock_all(MPI.MODE_NOCHECK)  # Sync, the fence, is only allowed between locks
    segments = [win.Shared_query(rank)[0] for rank in range(comm.Get_size())]
    return win, [
        (ctypes.c_char * size).from_address(segment.address or 0)
        for size, segment in zip(sizes, segments, strict=True)
    ]


def _kept_of(engine: Engine) -> _Kept:
    return _kept.setdefault(engine, _Kept())


def _node_comm_of(engine: Engine) -> MPI.Intracomm:
    """The ranks of this node, by rank. Collective at the first call."""
    comms, world = _kept_of(engine).comms, engine.world
    if world.nodes not in comms:
        comm = world.comm.Split(world.node, world.rank)
        assert isinstance(comm, MPI.Intracomm)
        comms[world.nodes] = comm
    return comms[world.nodes]


def leave_windows() -> None:
    """Some rank is dead: forget all windows, which can only be freed by all. Not collective.

    What lies in them stays readable for whoever still holds it.
    """
    for kept in _kept.values():
        _left.extend(kept.windows.values())
    _kept.clear()


def _free_unused(engine: Engine) -> None:
    """Free the windows in which no rank has a tensor any more. Collective."""
    windows = _kept_of(engine).windows
    if not windows:
        return
    if len(windows) > KEPT_WINDOWS:
        gc.collect()  # models are full of reference cycles
    mine = {number for number, window in windows.items() if window.unused}
    everyones = all_gather(engine.control, mine, label="node-shared memory")
    with engine.exclusive():
        for number in sorted(set.intersection(*everyones)):
            win = windows.pop(number).win
            win.Unlock_all()
            win.Free()
