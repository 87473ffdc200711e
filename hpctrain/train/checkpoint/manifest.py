"""What a checkpoint says of itself, and what makes a reader refuse it before it reads more."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpctrain.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 2
READABLE = (1, FORMAT)
"""The first one has the whole model in model.pt."""
MODEL = "model.safetensors"
REST = "model.rest.pt"
LONGEST_MANIFEST_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.pt|" + re.escape(MODEL))
_RANK_NAME = re.compile(r"rank-[0-9]{5,}\.pt")
_HASH = re.compile(r"[0-9a-f]{64}")

Entry = dict[str, Any]
"""Of a file, in the manifest: its `bytes` and `sha256`."""


def step_of(name: str) -> int:
    """The step of a checkpoint, by the name of its folder."""
    return int(name.removeprefix("step-"))


def own_name(rank: int) -> str:
    """The file with the state of one rank."""
    return f"rank-{rank:05d}.pt"


def is_own(name: str) -> bool:
    """Whether a file has the state of one rank."""
    return _RANK_NAME.fullmatch(name) is not None


def manifest_of(step: int, ranks: int, facts: Mapping[str, Any], files: Mapping[str, Entry]) -> str:
    """The text of a manifest."""
    manifest = {"format": FORMAT, "step": step, "ranks": ranks, **facts, "files": dict(files)}
    return json.dumps({**manifest, "digest": digest_of(manifest)}, indent=1) + "\n"


def digest_of(manifest: Mapping[str, Any]) -> str:
    """The hash of all of a manifest but its own hash."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, without its hash.

    Raises:
        CheckpointError: it is damaged, of another checkpoint, or asks for files outside.
        OSError: it cannot be read.
    """
    path = folder / MANIFEST
    _require_file(path)
    with path.open("rb") as file:
        text = file.read(LONGEST_MANIFEST_BYTES + 1)
    digest, found = "", ""
    try:
        manifest = json.loads(text) if len(text) <= LONGEST_MANIFEST_BYTES else None
        if isinstance(manifest, dict):
            digest = manifest.pop("digest", None)
            found = digest_of(manifest)
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        raise CheckpointError("the manifest is damaged", where=str(path))
    if type(manifest.get("format")) is not int or manifest["format"] not in READABLE:
        raise CheckpointError(
            "unknown format of the checkpoint",
            value=manifest.get("format"),
            allowed=" and ".join(map(str, READABLE)),
            where=str(path),
        )
    if digest != found:
        raise CheckpointError("the manifest does not match its own hash", where=str(path))
    mistake = _mistake_in(manifest, folder.name)
    if mistake:
        raise CheckpointError(f"the manifest {mistake}", where=str(path))
    return manifest


def _mistake_in(manifest: Mapping[str, Any], name: str) -> str:
    """What is wrong with a manifest whose hash is right, which anyone can make."""
    ranks, files = manifest.get("ranks"), manifest.get("files")
    if type(manifest.get("step")) is not int or manifest["step"] != step_of(name):
        return "is of another checkpoint"
    if type(ranks) is not int or ranks < 1 or not isinstance(files, dict):
        return "lacks its ranks or files"
    for file, entry in files.items():
        if not _NAME.fullmatch(file):
            return f"names a file that is none of a checkpoint: {file[:80]!r}"
        if (
            not isinstance(entry, dict)
            or entry.keys() != {"bytes", "sha256"}
            or type(entry["bytes"]) is not int
            or not isinstance(entry["sha256"], str)
            or not _HASH.fullmatch(entry["sha256"])
        ):
            return f"has no size and hash of {file}"
    own = [file for file in files if _RANK_NAME.fullmatch(file)]
    if len(own) != ranks or any(own_name(rank) not in files for rank in range(ranks)):
        return "does not have one file of each rank"
    if (MODEL in files) != (REST in files):
        return "lacks a part of the model"
    return ""


def check_file(folder: Path, name: str, entry: Entry) -> None:
    """Compare a file with its entry, the size first.

    Raises:
        CheckpointError: they differ.
        OSError: it cannot be read.
    """
    path = folder / name
    if _require_file(path) != entry["bytes"]:
        raise CheckpointError("the size is not that of the manifest", where=str(path))
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(_CHUNK_BYTES), b""):
            digest.update(chunk)
    if digest.hexdigest() != entry["sha256"]:
        raise CheckpointError("content does not match its hash", where=str(path))


def is_whole(folder: Path) -> bool:
    """Whether all files are there in their sizes. Reads the manifest alone."""
    try:
        files = read_manifest(folder)["files"]
        return all(_require_file(folder / name) == files[name]["bytes"] for name in files)
    except (CheckpointError, OSError, ValueError):
        return False


def _require_file(path: Path) -> int:
    """The size of a file that is itself in the folder, and no link to somewhere else."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError("not a regular file", where=str(path))
    return found.st_size
