"""Reading the newest checkpoint that is good, on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hpctrain.comm.channel import Channel
from hpctrain.comm.collect import all_gather, broadcast
from hpctrain.errors import CheckpointError
from hpctrain.train.checkpoint.format import UnreadableError, read_state
from hpctrain.train.checkpoint.manifest import own_name, read_manifest, step_of
from hpctrain.train.checkpoint.store import complete_names, tidy

_log = logging.getLogger("hpctrain")


def load_newest(
    channel: Channel,
    folder: Path,
    parts: Collection[str] = (),
    below: int | None = None,
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Read the newest checkpoint that is intact on all ranks. Collective.

    Clears away what a kill left: nobody may be writing there.

    Args:
        channel: over all ranks that wrote it.
        folder: of all checkpoints.
        parts: what it must have, each a table.
        below: only of earlier steps than this.

    Returns:
        The state, one key a file, with this rank's own under ``own`` (None when the checkpoint
        was written by another number of ranks), and the manifest; or None if there is none.

    Raises:
        UnreadableError: there are checkpoints, but none is intact.
    """
    if channel.rank == 0:
        try:
            tidy(folder)
        except OSError as error:
            _log.warning("%s cannot be tidied up: %s", folder, error)
    found_names = [n for n in complete_names(folder) if below is None or step_of(n) < below]
    names = broadcast(channel, found_names, label="checkpoint")
    for name in names:
        found, failure, manifest = None, None, {}
        try:
            manifest = read_manifest(folder / name)
            own = own_name(channel.rank) if manifest["ranks"] == channel.size else None
            found = read_state(folder / name, manifest, own)
            if mistake := mistake_in(found, parts):
                raise CheckpointError(mistake)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        everyone = all_gather(channel, (failure, manifest), label="checkpoint read")
        bad = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(everyone) if text]
        if not bad and any(other != manifest for _, other in everyone):
            bad = ["ranks read different manifests"]
        if not bad and found is not None:
            return found, manifest
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


def mistake_in(state: Mapping[str, Any], parts: Collection[str]) -> str:
    """What is wrong with files whose hashes are right, which anyone can make; empty if nothing."""
    for part in parts:
        if not isinstance(state.get(part), Mapping):
            return f"it has no {part}, or something else in its place"
    if not isinstance(state.get("own", {}), Mapping | None):
        return "the state of a rank is none"
    if "optimizer" in parts:
        gathered, groups = (state["optimizer"].get(key) for key in ("state", "param_groups"))
        if not isinstance(gathered, Mapping) or not isinstance(groups, list):
            return "its optimizer has no state"
        if not all(isinstance(each, Mapping) for each in gathered.values()):
            return "the state of its optimizer is none"
    return ""
