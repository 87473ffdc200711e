from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpctrain.comm.channel import Channel
from hpctrain.comm.engine import engine_of
from hpctrain.data.generators import generator_state, restore_generators, seed_generators
from hpctrain.errors import CheckpointError
from hpctrain.train import checkpoint
from hpctrain.world import World


@pytest.fixture
def channel(world: World) -> Channel:
    return engine_of(world).control


def save(channel: Channel, folder: Path, step: int, keep: int = 5) -> Path:
    shared = {"model": {"weight": torch.full((100,), float(step))}, "exchange": {}}
    return checkpoint.save(channel, folder, step, shared, {"step": step}, {"samples": 3}, keep)


def loaded_step(channel: Channel, folder: Path) -> int | None:
    """The step whose state is loaded; all of its parts must be of the same step."""
    loaded = checkpoint.load_newest(channel, folder)
    if loaded is None:
        return None
    state, manifest = loaded
    assert state["model"]["weight"].tolist() == [manifest["step"]] * 100
    assert state["own"] == {"step": manifest["step"]}
    return int(manifest["step"])


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / checkpoint.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------- what is kept


def train_a_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    model(torch.arange(4.0) * step).square().sum().backward()
    optimizer.step()


def test_training_goes_on_as_if_never_interrupted(channel: Channel, tmp_path: Path) -> None:
    def parts() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))

    model, optimizer = parts()
    for step in (1, 2):
        train_a_step(model, optimizer, step)
    shared = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    path = checkpoint.save(channel, tmp_path, 2, shared, {}, {"samples": 8}, keep=1)
    train_a_step(model, optimizer, 3)

    loaded = checkpoint.load_newest(channel, tmp_path)
    assert loaded and path.is_dir()
    state, manifest = loaded
    other, other_optimizer = parts()
    other.load_state_dict(state["model"])
    other_optimizer.load_state_dict(state["optimizer"])
    train_a_step(other, other_optimizer, 3)

    assert (manifest["step"], manifest["ranks"], manifest["samples"]) == (2, 1, 8)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


DRAWS: dict[str, Callable[[], float]] = {
    "python": random.random,
    "python gauss": lambda: random.gauss(0, 1),
    "numpy": np.random.random,
    "numpy gauss": np.random.standard_normal,
    "torch": lambda: float(torch.rand(())),
}


@pytest.mark.parametrize("warm_up", [0, 1])  # gauss makes two numbers and keeps the second
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_generators_draw_the_same_after_restore(
    channel: Channel, tmp_path: Path, draw: Callable[[], float], warm_up: int
) -> None:
    seed_generators(7)
    for _ in range(warm_up):
        draw()
    state = generator_state()
    checkpoint.save(channel, tmp_path, 1, {}, {"generators": state}, {}, keep=1)
    drawn = [draw() for _ in range(5)]
    loaded = checkpoint.load_newest(channel, tmp_path)
    assert loaded
    restore_generators(loaded[0]["own"]["generators"])
    assert [draw() for _ in range(5)] == drawn


def test_state_of_other_ranks_is_not_taken_for_ones_own(channel: Channel, tmp_path: Path) -> None:
    folder = save(channel, tmp_path, 1)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text()) | {"ranks": 2}
    del manifest["digest"]
    edit_manifest(folder, ranks=2, digest=checkpoint._digest(manifest))
    loaded = checkpoint.load_newest(channel, tmp_path)
    assert loaded
    assert loaded[0]["own"] is None and "model" in loaded[0]


def test_no_folder_no_checkpoint(channel: Channel, tmp_path: Path) -> None:
    assert checkpoint.load_newest(channel, tmp_path / "none") is None
    assert checkpoint.complete_names(tmp_path / "none") == []


def test_only_the_newest_are_kept(channel: Channel, tmp_path: Path) -> None:
    for step in (8, 9, 10, 1000):
        save(channel, tmp_path, step, keep=2)
    assert checkpoint.complete_names(tmp_path) == ["step-000001000", "step-000000010"]
    assert len(list(tmp_path.iterdir())) == 2


def test_checkpoint_just_written_is_never_pruned(channel: Channel, tmp_path: Path) -> None:
    """A damaged one with a higher step is passed over; the run repeats steps and saves again."""
    for step in (10, 20):
        save(channel, tmp_path, step)
    truncate(tmp_path / "step-000000020")
    assert loaded_step(channel, tmp_path) == 10
    assert save(channel, tmp_path, 15, keep=1).is_dir()
    assert loaded_step(channel, tmp_path) == 15


def test_same_step_again_replaces_the_first(channel: Channel, tmp_path: Path) -> None:
    for value in (1, 2):
        checkpoint.save(channel, tmp_path, 5, {"model": value}, {}, {}, keep=2)
    loaded = checkpoint.load_newest(channel, tmp_path)
    assert loaded and loaded[0]["model"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000005"]


# ---------------------------------------------------------------------- damage


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.pt", 50)


def empty_own(folder: Path) -> None:
    (folder / "rank-00000.pt").write_bytes(b"")


def flip_bit(folder: Path) -> None:
    data = bytearray((folder / "model.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.pt").write_bytes(data)


def remove_model(folder: Path) -> None:
    (folder / "model.pt").unlink()


def remove_own(folder: Path) -> None:
    (folder / "rank-00000.pt").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / checkpoint.MANIFEST).unlink()


def other_format(folder: Path) -> None:
    edit_manifest(folder, format=checkpoint.FORMAT + 1)


def other_step(folder: Path) -> None:
    """One flipped bit in the manifest, which stays valid JSON."""
    edit_manifest(folder, step=3)


def manifest_says(text: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / checkpoint.MANIFEST).write_bytes(text)

    damage.__name__ = f"manifest {text!r}"
    return damage


DAMAGES = [
    *(truncate, empty_own, flip_bit, remove_model, remove_own, other_format, other_step),
    *map(manifest_says, (b"", b'{"format"', b"\xff\x00", b"[]", b"null", b"{}")),
]


@pytest.mark.parametrize("damage", [*DAMAGES, remove_manifest], ids=lambda d: d.__name__)
def test_damaged_checkpoint_is_passed_over(
    channel: Channel, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    save(channel, tmp_path, 1)
    damage(save(channel, tmp_path, 2))
    assert loaded_step(channel, tmp_path) == 1


def test_damage_is_told_with_its_place(
    channel: Channel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(channel, tmp_path, 1)
    flip_bit(save(channel, tmp_path, 2))
    with caplog.at_level(logging.WARNING, "hpctrain"):
        checkpoint.load_newest(channel, tmp_path)
    (record,) = caplog.records
    for part in ("step-000000002", "rank 0", "model.pt", "hash"):
        assert part in record.getMessage()


def test_intact_checkpoint_gives_no_warning(
    channel: Channel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(channel, tmp_path, 1)
    checkpoint.load_newest(channel, tmp_path)
    assert not caplog.records


def test_all_damaged_is_an_error_and_not_a_new_start(channel: Channel, tmp_path: Path) -> None:
    for step in (1, 2):
        truncate(save(channel, tmp_path, step))
    with pytest.raises(CheckpointError, match="none of 2 checkpoints") as caught:
        checkpoint.load_newest(channel, tmp_path)
    assert caught.value.everywhere
    assert str(tmp_path) in str(caught.value)


def test_unfinished_folder_is_ignored(channel: Channel, tmp_path: Path) -> None:
    shutil.copytree(save(channel, tmp_path, 1), tmp_path / ".step-000000009.partial")
    (tmp_path / "step-000000008").mkdir()
    assert checkpoint.complete_names(tmp_path) == ["step-000000001"]
    assert loaded_step(channel, tmp_path) == 1


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_executed(channel: Channel, tmp_path: Path) -> None:
    save(channel, tmp_path, 1)
    folder, proof = save(channel, tmp_path, 2), tmp_path / "executed"
    torch.save(Evil(proof), folder / "model.pt")
    data = (folder / "model.pt").read_bytes()
    files = json.loads((folder / checkpoint.MANIFEST).read_text())["files"]
    files["model.pt"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(folder, files=files)
    assert loaded_step(channel, tmp_path) == 1
    assert not proof.exists()


# ---------------------------------------------------------------------- writing fails


class Killed(BaseException):
    """What ends a process in the middle of a line."""


@contextmanager
def broken(owner: Any, name: str, nth: int, error: BaseException) -> Iterator[None]:
    """The `nth` call of a function fails."""
    real, calls = getattr(owner, name), itertools.count()

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == nth:
            raise error
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield


def killed(channel: Channel, folder: Path, step: int, call: tuple[Any, str, int]) -> None:
    """A process that dies while it saves."""
    with broken(*call, Killed()), pytest.raises(Killed):
        save(channel, folder, step, keep=1)


CALLS = [
    *((torch, "save", nth) for nth in range(3)),
    *((os, "fsync", nth) for nth in range(6)),
    (json, "dump", 0),
    (Path, "mkdir", 0),
    (Path, "rename", 0),
]
WRITES = pytest.mark.parametrize("call", CALLS, ids=lambda c: f"{c[0].__name__}.{c[1]} {c[2]}")


@WRITES
def test_failed_write_leaves_a_checkpoint_and_the_next_succeeds(
    channel: Channel, tmp_path: Path, call: tuple[Any, str, int]
) -> None:
    save(channel, tmp_path, 1)
    full = OSError(errno.ENOSPC, "No space left on device")
    with broken(*call, full), pytest.raises(CheckpointError, match="No space left") as caught:
        save(channel, tmp_path, 2)
    assert caught.value.everywhere
    assert loaded_step(channel, tmp_path) in (1, 2)
    save(channel, tmp_path, 2)
    assert loaded_step(channel, tmp_path) == 2


@WRITES
def test_kill_while_writing_leaves_a_checkpoint(
    channel: Channel, tmp_path: Path, call: tuple[Any, str, int]
) -> None:
    save(channel, tmp_path, 1)
    killed(channel, tmp_path, 2, call)
    assert loaded_step(channel, tmp_path) in (1, 2)
    save(channel, tmp_path, 2)
    assert loaded_step(channel, tmp_path) == 2


@pytest.mark.parametrize("call", [(Path, "rename", 0), (Path, "rename", 1), (os, "fsync", 5)])
def test_kill_while_replacing_the_only_checkpoint_leaves_one(
    channel: Channel, tmp_path: Path, call: tuple[Any, str, int]
) -> None:
    save(channel, tmp_path, 1)
    killed(channel, tmp_path, 1, call)
    assert loaded_step(channel, tmp_path) == 1


def test_step_can_be_saved_again_after_a_kill_while_replacing_it(
    channel: Channel, tmp_path: Path
) -> None:
    save(channel, tmp_path, 1)
    killed(channel, tmp_path, 1, (os, "fsync", 5))
    save(channel, tmp_path, 1)
    assert loaded_step(channel, tmp_path) == 1


def test_next_save_clears_away_what_a_kill_left(channel: Channel, tmp_path: Path) -> None:
    killed(channel, tmp_path, 1, (os, "fsync", 2))
    save(channel, tmp_path, 2, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000002"]


def test_unwritable_place_is_told(channel: Channel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        save(channel, tmp_path / "file", 1)
