"""Memory that the ranks of a node share: had, refused in one line, and given back."""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from hpctrain import World
from hpctrain.comm import node
from hpctrain.comm.collect import barrier_on
from hpctrain.comm.engine import Engine, engine_of
from hpctrain.comm.memory import ALIGN_BYTES, Counters

if TYPE_CHECKING:
    from conftest import Launch

Files = namedtuple("Files", ["f_bavail", "f_frsize"])


@pytest.mark.parametrize(
    ("free_mb", "ranks", "mb_a_rank", "fits"),
    [(1000, 4, 100, True), (64, 2, 25, True), (64, 2, 32, False), (0, 1, 1, False)],
)
def test_room_is_asked_for_before_memory_is_touched(
    monkeypatch: pytest.MonkeyPatch, free_mb: int, ranks: int, mb_a_rank: int, fits: bool
) -> None:
    monkeypatch.setattr(node.os, "statvfs", lambda path: Files(free_mb * 1000, 1000))
    reason = node.lacking_room(ranks, mb_a_rank * 1_000_000)
    assert (reason == "") == fits
    if not fits:
        assert reason.startswith(f"/dev/shm has {free_mb} MB free of the")


def test_a_system_without_that_folder_is_not_refused() -> None:
    assert node.lacking_room(2, 1 << 40, folder="/no/such/folder") == ""


def test_memory_is_taken_without_touching_it() -> None:
    memory = mmap.mmap(-1, 10 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert node.populate(start + 1, 9 * mmap.PAGESIZE) == ""
    assert node.populate(start, 1) == ""


def test_memory_that_is_not_there_is_told_and_does_not_kill() -> None:
    memory = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    far_beyond = start + (1 << 40)
    assert "cannot be had" in node.populate(far_beyond, 4 * mmap.PAGESIZE)


def test_counters_are_reached_when_the_last_rank_has_announced() -> None:
    fences: list[int] = []
    row = memoryview(bytearray(24)).cast("q")
    cells = [row[i : i + 1] for i in range(3)]
    ranks = [Counters(cells, mine, lambda: fences.append(1)) for mine in range(3)]
    ranks[0].announce(1)
    ranks[2].announce(2)
    assert len(fences) == 2
    assert not ranks[0].reached(1)
    ranks[1].announce(1)
    assert all(counters.reached(1) for counters in ranks)
    assert not ranks[0].reached(2)


def may_mount() -> bool:
    tried = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/dev/shm"],
        capture_output=True,
        check=False,
    )
    return tried.returncode == 0


@pytest.mark.launch
def test_small_shared_memory_costs_speed_and_one_line(launch: Launch) -> None:
    """As in a container: 64 MB of /dev/shm, and gradients of 36 MB on each of two ranks."""
    if not shutil.which("unshare") or not may_mount():
        pytest.skip("mounting a small /dev/shm needs root")
    script = launch.script(
        "import logging, torch, hpctrain\n"
        "logging.basicConfig(level=logging.WARNING)\n"
        "model = hpctrain.DataParallel(torch.nn.Linear(3000, 3000))\n"
        "for _ in range(2): model(torch.ones(1, 3000)).sum().backward()\n"
        "assert set(model.exchange.reducer.ways) == {'direct'}\n"
    )
    mpiexec = str(Path(sys.executable).with_name("mpiexec"))
    small = 'mount -t tmpfs -o size=64m none /dev/shm && exec "$@"'
    ended = subprocess.run(
        ["unshare", "-m", "sh", "-c", small, "sh", mpiexec, "-n", "2", sys.executable, str(script)],
        env=launch.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("not through node-shared memory: /dev/shm has") == 1


# ------------------------------------------------------------------ on real ranks


@pytest.fixture
def engine(world: World) -> Engine:
    if world.size == 1:
        pytest.skip("a single rank shares memory with nobody")
    return engine_of(world)


@pytest.mark.mpi
def test_ranks_see_what_others_write(engine: Engine, world: World) -> None:
    counts = [5, 1000, 0, 17]
    dtypes = [torch.float32, torch.float64, torch.float32, torch.bfloat16]
    slabs = node.shared_slabs(engine, counts, dtypes, chunk_bytes=1024)
    assert slabs is not None
    for slab, count, dtype in zip(slabs, counts, dtypes, strict=True):
        assert (slab.tensor.numel(), slab.tensor.dtype) == (count, dtype)
        assert not slab.tensor.any()
        assert count == 0 or slab.tensor.data_ptr() % ALIGN_BYTES == 0
    assert sum(chunk.tensor.numel() for chunk in slabs[1].chunks) == 1000
    barrier_on(engine.control)
    slabs[1].chunks[3].tensor.fill_(world.rank + 1)
    barrier_on(engine.control)
    place = slabs[1].place
    assert place is not None
    assert [int(part[3 * 128]) for part in place.parts] == list(range(1, world.size + 1))
    assert [int(part.count_nonzero()) for part in place.parts] == [128] * world.size
    barrier_on(engine.control)


@pytest.mark.mpi
def test_memory_of_a_node_is_closed_to_other_users(engine: Engine) -> None:
    slabs = node.shared_slabs(engine, [1000], [torch.float32])
    assert slabs is not None
    mapped = {
        line.split()[5]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "rw-s" in line
    }
    files = [Path(name) for name in mapped if name.startswith(("/dev/shm/", "/tmp/"))]
    for path in filter(Path.exists, files):  # those that are deleted have no name to open
        facts = path.stat()
        assert facts.st_uid == os.geteuid()
        assert facts.st_mode & 0o077 == 0 or is_closed(path.parent), path
    barrier_on(engine.control)


def is_closed(folder: Path) -> bool:
    return any(each.stat().st_mode & 0o001 == 0 for each in [folder, *folder.parents])


@pytest.mark.mpi
def test_windows_are_freed_when_no_rank_uses_them(engine: Engine, world: World) -> None:
    gc.collect()
    others = set(node._kept_of(engine).windows)
    assert node.shared_slabs(engine, [10], [torch.float32])
    kept = node.shared_slabs(engine, [10], [torch.float32])
    mine = set(node._kept_of(engine).windows) - others
    held = kept if world.rank == 1 else None  # rank 1 alone still uses the second one
    del kept
    assert node.shared_slabs(engine, [10], [torch.float32])
    assert len(mine & set(node._kept_of(engine).windows)) == 1
    assert held is None or not held[0].tensor.any()
    del held
    assert node.shared_slabs(engine, [10], [torch.float32])
    assert not mine & set(node._kept_of(engine).windows)


@pytest.mark.mpi
def test_one_rank_without_room_is_enough_to_refuse(
    engine: Engine, world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if world.rank == world.size - 1:
        monkeypatch.setattr(node, "lacking_room", lambda *_: "/dev/shm has 1 MB free")
    with caplog.at_level(logging.WARNING, "hpctrain"):
        assert node.shared_slabs(engine, [10], [torch.float32]) is None
    expected = f"/dev/shm has 1 MB free on {world.name_of(world.size - 1)}"
    assert (expected in caplog.text) == (world.rank == 0)


@pytest.mark.mpi
def test_memory_that_cannot_be_populated_is_refused_by_all(
    engine: Engine, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    if world.rank == 0:
        monkeypatch.setattr(node, "populate", lambda *_: "its memory cannot be had")
    assert node.shared_slabs(engine, [10], [torch.float32]) is None
