"""Small checkpoints, of which every part says of which step it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hpctrain.comm.channel import Channel
from hpctrain.trace import Trace
from hpctrain.train.checkpoint.config import CheckpointConfig
from hpctrain.train.checkpoint.loading import load_newest
from hpctrain.train.checkpoint.saver import Saver
from hpctrain.train.checkpoint.store import name_of

VALUES = 100


def state_of(step: int) -> dict[str, Any]:
    model = {"weight": torch.full((VALUES,), float(step)), "_extra_state": {"step": step}}
    return {"model": model, "exchange": {"order": [step]}}


def saver(
    channel: Channel, folder: Path, keep: int = 5, asynchronous: bool = False, resumed_at: int = 0
) -> Saver:
    config = CheckpointConfig(keep=keep, asynchronous=asynchronous)
    return Saver(channel, folder, config, Trace(), resumed_at)


def begin(made: Saver, step: int) -> None:
    """Save, without an end."""
    own = {"step": step, "rank": made._channel.rank}
    made.save(step, state_of(step), own, {"samples": 3})


def save(channel: Channel, folder: Path, step: int, keep: int = 5) -> Path:
    """A checkpoint that is written when this returns."""
    made = saver(channel, folder, keep, resumed_at=step)
    begin(made, step)
    return folder / name_of(step)


def loaded_step(channel: Channel, folder: Path) -> int | None:
    """The step whose state is loaded; all of its parts must be of that step and rank."""
    loaded = load_newest(channel, folder, ("model", "exchange"))
    if loaded is None:
        return None
    state, manifest = loaded
    step = int(manifest["step"])
    assert state["model"]["weight"].tolist() == [step] * VALUES
    assert state["model"]["_extra_state"] == {"step": step}
    assert state["exchange"] == {"order": [step]}
    if manifest["ranks"] == channel.size:
        assert state["own"] == {"step": step, "rank": channel.rank}
    else:
        assert state["own"] is None
    return step
