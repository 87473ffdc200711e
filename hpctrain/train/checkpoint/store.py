"""The folder of a run's checkpoints: one rename makes one visible, and what is old goes.

step-000000500/     checkpoints
latest              the name of the newest one, for people and tools
.step-*.partial     in the making
.step-*.replaced    an earlier one of the same step, until the new one is in
.step-*.removed     on its way out
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from hpctrain.train.checkpoint.manifest import MANIFEST, is_whole, step_of

LATEST = "latest"
_log = logging.getLogger("hpctrain")


def name_of(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:09d}"


def complete_names(folder: Path) -> list[str]:
    """Names of the checkpoints of a folder that were finished, newest first. Reads no content."""
    if not folder.is_dir():
        return []
    names = (path.parent.name for path in folder.glob(f"step-*/{MANIFEST}"))
    found = [name for name in names if re.fullmatch(r"step-[0-9]{1,18}", name)]
    return sorted(found, key=step_of, reverse=True)


def tidy(folder: Path) -> None:
    """Clear away what a kill left. Nobody may be writing.

    A replacement that was cut off is finished: the old one stays unless the new one is in.
    """
    for replaced in folder.glob(".step-*.replaced"):
        name = replaced.name.removeprefix(".").removesuffix(".replaced")
        if (folder / name / MANIFEST).exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            shutil.rmtree(folder / name, ignore_errors=True)
            replaced.rename(folder / name)
    for left in (*folder.glob(".step-*.partial"), *folder.glob(".step-*.removed")):
        shutil.rmtree(left, ignore_errors=True)
    (folder / f".{LATEST}.partial").unlink(missing_ok=True)


def publish(side: Path, final: Path, manifest: str) -> None:
    """Write the manifest, then make the checkpoint visible in one step.

    Raises:
        OSError: something could not be written. What was there before is there still, but for one
            of the same step whose place the new one has taken.
    """
    _write(side / MANIFEST, manifest)
    _sync_folder(side)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    try:
        side.rename(final)
    except OSError:
        if not is_whole(final):  # else a rank that rescues what a dead root left was faster
            if replaced.exists():
                replaced.rename(final)
            raise
        shutil.rmtree(side, ignore_errors=True)
    _sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def settle(folder: Path, saved: str, keep: int, gone_back_from: Collection[str]) -> None:
    """Point `latest` at the checkpoint just published, and remove those that are not needed.

    Never the last one that is whole: as long as the new one is not, all stay.

    Args:
        folder: of all checkpoints.
        saved: name of the new one.
        keep: how many to keep, the new one among them.
        gone_back_from: names of later steps, which this run has passed over.
    """
    try:
        side = folder / f".{LATEST}.partial"
        if side.is_dir() and not side.is_symlink():
            shutil.rmtree(side)
        _write(side, f"{saved}\n")
        side.rename(folder / LATEST)
        _sync_folder(folder)
    except OSError as error:
        _log.warning("%s does not name %s: %s", folder / LATEST, saved, error)
        return
    if not is_whole(folder / saved):
        _log.warning("checkpoint %s is not what was written; older ones stay", folder / saved)
        return
    others = [name for name in complete_names(folder) if name != saved]
    older = [name for name in others if step_of(name) < step_of(saved)]
    kept = [name for name in older if is_whole(folder / name)][: keep - 1]
    for name in others:
        if name not in kept and (name in older or name in gone_back_from):
            _remove(folder, name)


def _remove(folder: Path, name: str) -> None:
    """Remove a checkpoint, which is none any more from the first moment."""
    gone = folder / f".{name}.removed"
    try:
        (folder / name).rename(gone)
    except OSError as error:
        _log.warning("checkpoint %s is no longer needed, but stays: %s", folder / name, error)
        return
    shutil.rmtree(gone, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
