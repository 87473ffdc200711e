"""What a run has left behind, as tests compare it."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from pathlib import Path

import torch
from safetensors.torch import load_file


def parameters(run: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint."""
    state: dict[str, torch.Tensor] = load_file(
        max(run.glob("checkpoints/step-*")) / "model.safetensors"
    )
    return state


def losses(run: Path) -> dict[int, float]:
    """By step; each must be there once."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    pairs = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def assert_same_parameters(run: Path, expected: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    found = parameters(run)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


class Undisturbed:
    """Parameters at the end of runs that nobody disturbs, each made when it is first wanted.

    Args:
        folder: for their run folders.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[Hashable, dict[str, torch.Tensor]] = {}

    def of(self, which: Hashable, run: Callable[[Path], object]) -> dict[str, torch.Tensor]:
        """Parameters of a kind of runs; `run` makes one in a folder."""
        if which not in self._known:
            folder = self._folder / str(which)
            run(folder)
            self._known[which] = parameters(folder)
        return self._known[which]
