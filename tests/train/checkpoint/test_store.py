"""The folder of checkpoints: what is kept, what goes, and what points at the newest."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from train.checkpoint.common import loaded_step, save
from train.checkpoint.stand_in import alone

from hpctrain.train.checkpoint import store
from hpctrain.train.checkpoint.manifest import MANIFEST, MODEL
from hpctrain.train.checkpoint.store import LATEST, complete_names, name_of


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_only_the_newest_are_kept_and_latest_names_the_last(tmp_path: Path) -> None:
    for step in (8, 9, 10, 1000):
        save(alone(), tmp_path, step, keep=2)
        assert (tmp_path / LATEST).read_text() == f"{name_of(step)}\n"
    assert complete_names(tmp_path) == ["step-000001000", "step-000000010"]
    assert left_in(tmp_path) == {LATEST, "step-000001000", "step-000000010"}


def test_names_are_ordered_by_step_also_beyond_nine_digits(tmp_path: Path) -> None:
    for step in (999_999_999, 1_000_000_000):
        save(alone(), tmp_path, step)
    assert complete_names(tmp_path) == ["step-1000000000", "step-999999999"]
    assert loaded_step(alone(), tmp_path) == 1_000_000_000


def test_what_lies_in_the_way_of_latest_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / f".{LATEST}.partial").mkdir()
    for step in (1, 2, 3):
        save(alone(), tmp_path, step, keep=1)
    assert left_in(tmp_path) == {LATEST, name_of(3)}


def test_same_step_again_replaces_the_first(tmp_path: Path) -> None:
    save(alone(), tmp_path, 5)
    before = (tmp_path / name_of(5) / MANIFEST).stat().st_ino
    save(alone(), tmp_path, 5)
    assert (tmp_path / name_of(5) / MANIFEST).stat().st_ino != before
    assert left_in(tmp_path) == {LATEST, name_of(5)}


def test_what_a_damaged_one_stands_for_is_not_removed(tmp_path: Path) -> None:
    """With two to keep: the older good one stays, not the newer damaged one."""
    for step in (1, 2):
        save(alone(), tmp_path, step, keep=2)
    os.truncate(tmp_path / name_of(2) / MODEL, 9)
    save(alone(), tmp_path, 3, keep=2)
    assert complete_names(tmp_path) == [name_of(3), name_of(1)]


def test_nothing_is_removed_while_the_new_one_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where a disk loses what it said was written."""
    save(alone(), tmp_path, 1, keep=1)
    publish = store.publish

    def lossy(side: Path, final: Path, manifest: str) -> None:
        publish(side, final, manifest)
        os.truncate(final / MODEL, 9)

    monkeypatch.setattr("hpctrain.train.checkpoint.writer.publish", lossy)
    save(alone(), tmp_path, 2, keep=1)
    assert "older ones stay" in caplog.text
    assert loaded_step(alone(), tmp_path) == 1


def test_nothing_is_removed_while_latest_cannot_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(alone(), tmp_path, 1, keep=1)
    rename = Path.rename

    def full(self: Path, target: Path) -> Any:
        if target.name == LATEST:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    save(alone(), tmp_path, 2, keep=1)
    assert "No space left" in caplog.text
    assert (tmp_path / LATEST).read_text() == f"{name_of(1)}\n"
    assert complete_names(tmp_path) == [name_of(2), name_of(1)]


@pytest.mark.parametrize("text", ["step-000000009", "../elsewhere", "\0", ""])
def test_latest_is_not_trusted(tmp_path: Path, text: str) -> None:
    save(alone(), tmp_path, 1)
    (tmp_path / LATEST).write_text(text)
    assert loaded_step(alone(), tmp_path) == 1


def test_a_rank_that_was_faster_with_the_same_step_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look for an earlier one and the rename, another process puts its own there."""
    folder = tmp_path / "own"
    save(alone(), tmp_path / "other", 3)
    rename = Path.rename

    def late(self: Path, target: Path) -> Any:
        if target.name == name_of(3) and not target.exists():
            shutil.copytree(tmp_path / "other" / name_of(3), target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    save(alone(), folder, 3)
    monkeypatch.undo()
    assert loaded_step(alone(), folder) == 3
    assert left_in(folder) == {LATEST, name_of(3)}
