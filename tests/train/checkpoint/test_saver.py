"""Training goes on while a checkpoint is written, and what is written is that of its step."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train.checkpoint.common import begin, loaded_step, save, saver
from train.checkpoint.stand_in import alone, on_ranks

from hpctrain.comm.channel import Channel
from hpctrain.errors import CheckpointError
from hpctrain.trace import CHECKPOINT, COMPUTE, Trace
from hpctrain.train.checkpoint import copies, format, manifest
from hpctrain.train.checkpoint.config import CheckpointConfig
from hpctrain.train.checkpoint.format import UnreadableError
from hpctrain.train.checkpoint.loading import load_newest
from hpctrain.train.checkpoint.saver import Saver
from hpctrain.train.checkpoint.store import LATEST, complete_names, name_of
from hpctrain.train.checkpoint.writer import Writer

LONG_S = 30.0
"""Nothing that is waited for takes longer."""
FULL = OSError(errno.ENOSPC, "No space left on device")


class Gate:
    """Whoever calls the function waits until the gate is opened."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(LONG_S)
            return real(*args, **kwargs)

        patch.setattr(owner, name, call)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch, os, "fsync")


def told_when_waited_for(patch: pytest.MonkeyPatch, event: threading.Event) -> threading.Event:
    """Set when somebody begins to wait for the event."""
    told, wait = threading.Event(), event.wait

    def telling(timeout: float | None = None) -> bool:
        told.set()
        return wait(timeout)

    patch.setattr(event, "wait", telling)
    return told


# ---------------------------------------------------------------------- training goes on


def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    model(torch.arange(12.0).reshape(3, 4) * step).square().sum().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    backward(model, optimizer, step)
    optimizer.step()


def save_all(made: Saver, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    made.save(step, {"model": model.state_dict()}, {}, {}, optimizer)


def assert_goes_on_as_if_never_interrupted(folder: Path, step: int, last: int) -> None:
    whole, whole_optimizer = parts()
    for number in range(1, last + 1):
        train(whole, whole_optimizer, number)
    loaded = load_newest(alone(), folder)
    assert loaded and loaded[1]["step"] == step
    model, optimizer = parts()
    model.load_state_dict(loaded[0]["model"])
    optimizer.load_state_dict(loaded[0]["optimizer"])
    for number in range(step + 1, last + 1):
        train(model, optimizer, number)
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_goes_on_as_if_never_interrupted(tmp_path: Path, asynchronous: bool) -> None:
    model, optimizer = parts()
    made = saver(alone(), tmp_path, asynchronous=asynchronous)
    for step in range(1, 6):
        train(model, optimizer, step)
        save_all(made, model, optimizer, step)
    for step in (6, 7):
        train(model, optimizer, step)
    made.finish()
    assert_goes_on_as_if_never_interrupted(tmp_path, 5, 8)


def test_training_goes_on_while_the_disk_is_slow(tmp_path: Path, slow_disk: Gate) -> None:
    model, optimizer = parts()
    made = saver(alone(), tmp_path, asynchronous=True)
    train(model, optimizer, 1)
    save_all(made, model, optimizer, 1)
    for step in (2, 3, 4):
        train(model, optimizer, step)
    assert slow_disk.reached.wait(LONG_S)
    assert complete_names(tmp_path) == []
    slow_disk.opened.set()
    saved = made.finish()
    assert saved and saved.step == 1 and saved.written_s > saved.stall_s > 0
    assert_goes_on_as_if_never_interrupted(tmp_path, 1, 4)


def test_optimizers_step_waits_for_the_copy_of_its_state_and_a_forward_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = parts()
    trace = Trace()
    trace.active = True
    made = Saver(alone(), tmp_path, CheckpointConfig(), trace)
    for step in (1, 2):
        train(model, optimizer, step)
    copying = Gate(monkeypatch, copies.ctypes, "memmove")
    save_all(made, model, optimizer, 2)
    assert copying.reached.wait(LONG_S)
    backward(model, optimizer, 3)  # changes the statistics of BatchNorm
    stepped = threading.Thread(target=optimizer.step)
    before = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    assert made._making
    waiting = told_when_waited_for(monkeypatch, made._making.copied)
    stepped.start()
    assert waiting.wait(LONG_S)
    assert stepped.is_alive()
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], before)
    copying.opened.set()
    stepped.join(LONG_S)
    assert not torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], before)
    train(model, optimizer, 4)
    saved = made.finish()
    spans = {(track, name): end - begin for track, name, begin, end, _ in trace.take()}
    assert spans.keys() == {
        *((CHECKPOINT, "copy"), (CHECKPOINT, "write"), (CHECKPOINT, "publish")),
        (COMPUTE, "wait for the copy"),
    }
    assert saved and saved.stall_s >= spans[COMPUTE, "wait for the copy"] > 0
    assert_goes_on_as_if_never_interrupted(tmp_path, 2, 4)


def test_state_that_is_loaded_into_the_optimizer_waits_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = parts()
    train(model, optimizer, 1)
    other, other_optimizer = parts()
    train(other, other_optimizer, 9)
    made = saver(alone(), tmp_path, asynchronous=True)
    copying = Gate(monkeypatch, copies.ctypes, "memmove")
    save_all(made, model, optimizer, 1)
    state = other_optimizer.state_dict()
    loads = threading.Thread(target=optimizer.load_state_dict, args=(state,))
    loads.start()
    copying.opened.set()
    loads.join(LONG_S)
    made.finish()
    assert_goes_on_as_if_never_interrupted(tmp_path, 1, 2)


def test_state_that_is_about_to_be_put_back_waits_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = parts()
    train(model, optimizer, 1)
    made = saver(alone(), tmp_path, asynchronous=True)
    copying = Gate(monkeypatch, copies.ctypes, "memmove")
    save_all(made, model, optimizer, 1)
    assert copying.reached.wait(LONG_S)

    def put_back() -> None:
        made.before_change()
        with torch.no_grad():
            optimizer.state_dict()["state"][0]["exp_avg"].zero_()

    changes = threading.Thread(target=put_back)
    assert made._making
    waiting = told_when_waited_for(monkeypatch, made._making.copied)
    changes.start()
    assert waiting.wait(LONG_S)
    assert optimizer.state_dict()["state"][0]["exp_avg"].any()
    copying.opened.set()
    changes.join(LONG_S)
    assert not optimizer.state_dict()["state"][0]["exp_avg"].any()
    made.finish()
    assert_goes_on_as_if_never_interrupted(tmp_path, 1, 2)


def test_steps_that_are_taken_in_the_forward_find_everything_copied(tmp_path: Path) -> None:
    model, optimizer = parts()
    train(model, optimizer, 1)
    made = saver(alone(), tmp_path, asynchronous=True)
    made.save(1, {"model": model.state_dict()}, {}, {}, optimizer, updates_in_forward=True)
    assert made._making and not made._making.held
    assert not optimizer._optimizer_step_pre_hooks
    made.finish()


def test_next_save_waits_for_the_one_before(tmp_path: Path, slow_disk: Gate) -> None:
    made = saver(alone(), tmp_path, asynchronous=True)
    begin(made, 1)
    second = threading.Thread(target=begin, args=(made, 2))
    second.start()
    assert slow_disk.reached.wait(LONG_S)
    second.join(0.05)
    assert second.is_alive()
    assert [p.name.split(".")[1] for p in tmp_path.glob(".*")] == [name_of(1)]
    slow_disk.opened.set()
    second.join(LONG_S)
    made.finish()
    assert complete_names(tmp_path) == [name_of(2), name_of(1)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_checkpoint_is_visible_though_nobody_asks(tmp_path: Path, size: int) -> None:
    """While ranks train, their threads need none of them; also right before a rank ends all."""

    def rank(channel: Channel) -> bool:
        made = saver(channel, tmp_path, asynchronous=True)
        begin(made, 7)
        return made.wait(LONG_S)

    assert on_ranks(size, rank) == [True] * size
    assert on_ranks(size, lambda channel: loaded_step(channel, tmp_path)) == [7] * size
    assert not list((tmp_path / name_of(7)).glob("receipt*"))


def test_whoever_cannot_wait_longer_learns_that_it_is_not_written(
    tmp_path: Path, slow_disk: Gate
) -> None:
    made = saver(alone(), tmp_path, asynchronous=True)
    assert made.wait(0)
    begin(made, 1)
    assert not made.wait(0.01)
    slow_disk.opened.set()
    assert made.wait(LONG_S)


def test_ranks_that_go_on_without_another_let_go_of_its_checkpoint(tmp_path: Path) -> None:
    """Rank 1 has died and leaves no receipt: that checkpoint will never be whole."""

    def rank(channel: Channel) -> None:
        made = saver(channel, tmp_path, asynchronous=True)
        begin(made, 1)
        made.finish()
        if channel.rank == 0:
            begin(made, 2)
            made.let_go(0.05)

    on_ranks(2, rank)
    assert complete_names(tmp_path) == [name_of(1)]
    assert loaded_step(alone(), tmp_path) == 1
    save(alone(), tmp_path, 2)
    assert loaded_step(alone(), tmp_path) == 2


# ---------------------------------------------------------------------- failures


@contextmanager
def broken(owner: Any, name: str, nth: int, error: BaseException) -> Iterator[None]:
    """The `nth` call of a function fails."""
    real, lock, calls = getattr(owner, name), threading.Lock(), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        with lock:
            calls += 1
            if calls == nth + 1:
                raise error
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield


def written(made: Saver, step: int) -> None:
    """Save, to the end."""
    begin(made, step)
    made.finish()


def two_saves(made: Saver, step: int) -> None:
    begin(made, step)
    assert made.wait(LONG_S)
    begin(made, step + 1)


CALLS = [
    *((torch, "save", nth) for nth in range(3)),
    *((os, "fsync", nth) for nth in range(7)),
    *((format.HashedFile, "close", nth) for nth in range(4)),
    *((Path, "mkdir", nth) for nth in range(2)),
    (Path, "rename", 0),
]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("call", CALLS, ids=lambda c: f"{c[0].__name__}.{c[1]} {c[2]}")
def test_failed_write_is_told_and_leaves_the_last_good_one(
    tmp_path: Path,
    call: tuple[Any, str, int],
    asynchronous: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save(alone(), tmp_path, 1)
    made = saver(alone(), tmp_path, asynchronous=asynchronous)
    with broken(*call, FULL), pytest.raises(CheckpointError, match="No space left") as caught:
        two_saves(made, 2)
    assert ("step 2 could not be written: OSError" in caplog.text) == asynchronous
    assert caught.value.everywhere and caught.value.exit_code == 1
    after = call in ((os, "fsync", 6),)  # of the folder, behind the rename: may be there or not
    last = name_of(2) if after else name_of(1)
    assert f"step 2 could not be written; the last good one is {last}" in str(caught.value)
    assert not list(tmp_path.glob(".step*"))
    begin(made, 4)
    made.finish()
    assert loaded_step(alone(), tmp_path) == 4


def test_the_first_one_of_all_fails(tmp_path: Path) -> None:
    made = saver(alone(), tmp_path, asynchronous=True)
    with broken(os, "fsync", 0, FULL), pytest.raises(CheckpointError, match="there is no other"):
        written(made, 1)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_failure_of_one_rank_is_raised_on_all(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bad: int,
    asynchronous: bool,
    silent: bool,
) -> None:
    """Also of one whose disk is too full for a receipt."""
    on_ranks(3, lambda channel: save(channel, tmp_path, 1))
    write = format.write_object

    def full(path: Path, value: Any) -> Any:
        if path.name == manifest.own_name(bad):
            raise FULL
        return write(path, value)

    monkeypatch.setattr("hpctrain.train.checkpoint.writer.write_object", full)
    if silent:
        monkeypatch.setattr(Writer, "_leave_receipt", lambda *_: None)

    def rank(channel: Channel) -> str:
        made = saver(channel, tmp_path, asynchronous=asynchronous)
        with pytest.raises(CheckpointError) as caught:
            written(made, 2)
        return str(caught.value)

    texts = on_ranks(3, rank)
    assert len(set(texts)) == 1
    assert f"rank {bad}: OSError" in texts[0] and name_of(1) in texts[0]
    assert not list(tmp_path.glob(".step*"))
    assert on_ranks(3, lambda channel: loaded_step(channel, tmp_path)) == [1] * 3


def test_what_cannot_be_read_again_is_named_and_not_published(tmp_path: Path) -> None:
    made = saver(alone(), tmp_path, asynchronous=True)
    made.save(1, {"model": {"a": {"b": [1, {2: object}]}}}, {}, {})
    with pytest.raises(UnreadableError, match=r"model\['a'\]\['b'\]\[1\]\[2\] \(builtins.type\)"):
        made.finish()
    assert complete_names(tmp_path) == []
    made.save(2, {}, {"x": {3}}, {})
    made.finish()
    assert complete_names(tmp_path) == [name_of(2)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_cannot_be_saved_at_all(tmp_path: Path, asynchronous: bool) -> None:
    made = saver(alone(), tmp_path, asynchronous=asynchronous)

    def save_lock() -> None:
        made.save(1, {"exchange": [threading.Lock()]}, {}, {})
        made.finish()

    with pytest.raises(CheckpointError, match="lock"):
        save_lock()
    assert not list(tmp_path.glob("*"))


def test_folder_that_vanished_is_not_made_again(tmp_path: Path) -> None:
    """That of the run: checkpoints without it would be another run."""
    run = tmp_path / "run"
    run.mkdir()
    made = saver(alone(), run / "checkpoints", asynchronous=True)
    begin(made, 1)
    assert made.finish()
    shutil.rmtree(run / "checkpoints")
    begin(made, 2)
    assert made.finish()
    shutil.rmtree(run)
    begin(made, 3)
    with pytest.raises(CheckpointError, match="No such file"):
        made.finish()
    assert not run.exists()


def test_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    made = saver(alone(), tmp_path / "file", asynchronous=True)
    begin(made, 1)
    with pytest.raises(CheckpointError, match="could not be written"):
        made.finish()


Mount = Callable[[str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a file system in memory."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mounted(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs root, and the right to mount")
        return folder

    yield mounted
    # Lazily: tensors that were read may still map a file in it.
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def test_real_full_disk(mount: Mount) -> None:
    folder = mount("size=600k")
    weights = {"weight": torch.rand(60_000)}
    made = saver(alone(), folder, keep=1, asynchronous=True)
    made.save(1, {"model": weights}, {}, {})
    made.finish()
    for step in (2, 3):
        made.save(step, {"model": weights, "exchange": [torch.rand(60_000)]}, {}, {})
        with pytest.raises(CheckpointError, match="No space left"):
            made.finish()
    assert complete_names(folder) == [name_of(1)]
    made.save(4, {"model": weights}, {}, {})
    made.finish()
    assert complete_names(folder) == [name_of(4)]


def test_real_read_only_file_system(mount: Mount) -> None:
    folder = mount("size=600k")
    made = saver(alone(), folder, asynchronous=True)
    begin(made, 1)
    made.finish()
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    begin(made, 2)
    with pytest.raises(CheckpointError, match="Read-only"):
        made.finish()
    assert loaded_step(alone(), folder) == 1


def test_read_only_folder(tmp_path: Path) -> None:
    if not os.geteuid():
        pytest.skip("root may write everywhere")
    save(alone(), tmp_path, 1)
    tmp_path.chmod(0o500)
    made = saver(alone(), tmp_path, asynchronous=True)
    begin(made, 2)
    with pytest.raises(CheckpointError, match="Permission denied"):
        made.finish()
    tmp_path.chmod(0o700)


def test_log_is_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = saver(alone(), tmp_path, asynchronous=True)
    with caplog.at_level(logging.ERROR, "hpctrain"), broken(os, "fsync", 0, FULL):
        begin(made, 1)
        assert made.wait(LONG_S)
        (record,) = caplog.records
    assert "next save" in record.getMessage()
    with pytest.raises(CheckpointError):
        made.finish()
    assert not (tmp_path / LATEST).exists()
