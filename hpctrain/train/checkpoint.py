"""Checkpoints: all state of a run, complete or not there at all.

A checkpoint is a folder. It is written under another name, every file is synced, a manifest
with the size and SHA-256 of each file comes last, and a rename makes it visible. Reading starts
at the newest folder and goes back until every file of one matches its manifest, on all ranks.
Files are read with `weights_only=True`, which executes nothing from them.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hpctrain.comm.channel import Channel
from hpctrain.comm.collect import all_gather, barrier_on, broadcast
from hpctrain.config import check, option
from hpctrain.errors import CheckpointError, ExitCode

MANIFEST = "manifest.json"
FORMAT = 1
_log = logging.getLogger("hpctrain")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every: int = option(500, minimum=0)
    """Steps between two checkpoints; 0 for one at the end only."""
    keep: int = option(2, minimum=1)
    """Newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        check(self)


class UnreadableError(CheckpointError):
    """A checkpoint cannot be read, however often one tries: a relauncher need not."""

    exit_code = ExitCode.BAD_JOB


def save(
    channel: Channel,
    folder: Path,
    step: int,
    shared: Mapping[str, Any],
    own: Mapping[str, Any],
    facts: Mapping[str, Any],
    keep: int,
    read_back: bool = False,
) -> Path:
    """Write a checkpoint. Collective.

    Args:
        channel: over all ranks.
        folder: of all checkpoints of the run, visible to all ranks.
        step: number of steps done.
        shared: state that is the same on all ranks, one file a key; rank 0 writes it.
        own: state of this rank.
        facts: plain values for the manifest.
        keep: newest checkpoints that stay.
        read_back: make sure that what was written can be read.

    Raises:
        CheckpointError: on every rank, when a file cannot be written; older ones are intact.
        UnreadableError: on every rank, when `read_back` fails; names the entry.
    """
    name = f"step-{step:09d}"
    side = folder / f".{name}.partial"
    failure = _attempt(lambda: _begin(folder, side)) if channel.rank == 0 else None
    barrier_on(channel, "checkpoint begun")
    written: dict[str, dict[str, Any]] = {}

    def write() -> None:
        if channel.rank == 0:
            for key, value in shared.items():
                written[f"{key}.pt"] = _write(side / f"{key}.pt", value)
        written[_own_name(channel.rank)] = _write(side / _own_name(channel.rank), own)

    failure = failure or _attempt(write)
    everyone = all_gather(channel, (written, failure), label="checkpoint written")
    failures = [text for _, text in everyone if text]
    if read_back and not failures:
        _read_back(channel, side, shared if channel.rank == 0 else {}, own)
    if not failures:
        files = {name: entry for entries, _ in everyone for name, entry in entries.items()}
        manifest = {"format": FORMAT, "step": step, "ranks": channel.size, **facts, "files": files}
        manifest["digest"] = _digest(manifest)
        if channel.rank == 0:
            failure = _attempt(lambda: _publish(side, folder / name, manifest))
        failures = [text for text in broadcast(channel, [failure], label="checkpoint") if text]
    if failures:
        raise CheckpointError(
            "the checkpoint could not be written; the one before it is untouched",
            value=failures[0],
            where=str(folder),
            fix="free space or make the folder writable, then run the job again: it resumes",
            everywhere=True,
        )
    if channel.rank == 0:
        _prune(folder, name, keep)
    return folder / name


def complete_names(folder: Path) -> list[str]:
    """Names of the checkpoints of a folder that were finished, newest first. Reads no content."""
    if not folder.is_dir():
        return []
    names = (path.parent.name for path in folder.glob(f"step-*/{MANIFEST}"))
    return sorted((name for name in names if re.fullmatch(r"step-\d+", name)), reverse=True)


def step_of(name: str) -> int:
    """The step of a checkpoint, by its name."""
    return int(name.removeprefix("step-"))


def load_newest(channel: Channel, folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Read the newest checkpoint that is intact on all ranks. Collective.

    Returns:
        The state, one key a file, with this rank's own under ``own`` (None when the checkpoint
        was written by another number of ranks), and the manifest; or None if there is none.

    Raises:
        UnreadableError: there are checkpoints, but none is intact.
    """
    if channel.rank == 0:
        _attempt(lambda: _mend(folder))
    names = broadcast(channel, complete_names(folder), label="checkpoint")
    for name in names:
        read: list[tuple[dict[str, Any], dict[str, Any]]] = []
        failure = _attempt(partial(_read_into, read, folder / name, channel))
        failures = all_gather(channel, failure, label="checkpoint read")
        bad = [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text]
        if not bad:
            return read[0]
        if channel.rank == 0:
            _log.warning("checkpoint %s is damaged and passed over: %s", folder / name, bad[0])
    if names:
        raise UnreadableError(
            f"none of {len(names)} checkpoints is intact",
            where=str(folder),
            fix="choose another --run-dir, or restore this one from a copy",
            everywhere=True,
        )
    return None


def _own_name(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _attempt(action: Any) -> str | None:
    """Run `action`; what went wrong as text, so that ranks can tell each other."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _begin(folder: Path, side: Path) -> None:
    """Clear away what a kill left, and make the folder to write into."""
    folder.mkdir(parents=True, exist_ok=True)
    _mend(folder)
    for left in folder.glob(".step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    side.mkdir()


def _mend(folder: Path) -> None:
    """Finish a replacement that a kill cut off: the old one stays unless the new one is in."""
    for replaced in folder.glob(".step-*.replaced"):
        name = replaced.name.removeprefix(".").removesuffix(".replaced")
        if (folder / name / MANIFEST).exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            shutil.rmtree(folder / name, ignore_errors=True)
            replaced.rename(folder / name)


def _prune(folder: Path, saved: str, keep: int) -> None:
    """Remove old checkpoints, and those of later steps, which this run has gone back from."""
    names = [name for name in complete_names(folder) if name != saved]
    older = [name for name in names if name < saved]
    for name in {*names} - {*older[: keep - 1]}:
        shutil.rmtree(folder / name, ignore_errors=True)


def _write(path: Path, value: Any) -> dict[str, Any]:
    """Write and sync one file; its entry in the manifest."""
    with path.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    return _entry(path)


def _read_back(
    channel: Channel, side: Path, shared: Mapping[str, Any], own: Mapping[str, Any]
) -> None:
    """Read the files just written, as a resumed run will. Collective."""
    failure = None
    for file, value in {
        **{f"{key}.pt": v for key, v in shared.items()},
        _own_name(channel.rank): own,
    }.items():
        if _attempt(partial(_load, side / file)):
            failure = f"{file.removesuffix('.pt')}{_unreadable_entry(value)}"
    failures = [text for text in all_gather(channel, failure, label="checkpoint read back") if text]
    if failures:
        if channel.rank == 0:
            shutil.rmtree(side, ignore_errors=True)
        raise UnreadableError(
            "the checkpoint could be written, but not be read again",
            value=failures[0],
            allowed="tensors, numbers, text, and lists and dicts of them",
            fix="store it as one of these, in get_extra_state() for example",
            everywhere=True,
        )


def _unreadable_entry(value: Any) -> str:
    """Place and type of the innermost entry that cannot be read: `['a']['b'] (ndarray)`."""
    inner: Any = ()
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, (list, tuple)):
        inner = enumerate(value)
    for key, entry in inner:
        buffer = io.BytesIO()
        torch.save(entry, buffer)
        buffer.seek(0)
        if _attempt(partial(_load, buffer)):
            return f"[{key!r}]{_unreadable_entry(entry)}"
    return f" ({type(value).__module__}.{type(value).__name__})"


def _load(file: Any) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _publish(side: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, then make the checkpoint visible in one step."""
    with (side / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(side)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        final.rename(replaced)
    side.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_into(
    read: list[tuple[dict[str, Any], dict[str, Any]]], folder: Path, channel: Channel
) -> None:
    """Check and read the files that this rank needs; add state and manifest to `read`."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    if manifest["format"] != FORMAT:
        raise CheckpointError("unknown format", value=manifest["format"], allowed=str(FORMAT))
    if manifest.pop("digest") != _digest(manifest):
        raise CheckpointError("the manifest does not match its own hash", where=str(folder))
    state: dict[str, Any] = {"own": None}
    for name, entry in manifest["files"].items():
        is_own = name.startswith("rank-")
        if is_own and (manifest["ranks"] != channel.size or name != _own_name(channel.rank)):
            continue
        path = folder / Path(name).name
        if _entry(path) != entry:
            raise CheckpointError("content does not match its hash", where=str(path))
        value = _load(path)
        state["own" if is_own else name.removesuffix(".pt")] = value
    read.append((state, manifest))
