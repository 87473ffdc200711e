"""When checkpoints are written, and how."""

from __future__ import annotations

from dataclasses import dataclass

from hpctrain.config import check, option


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every: int = option(500, minimum=0)
    """Steps between two checkpoints; 0 for one at the end only."""
    keep: int = option(2, minimum=1)
    """Newest checkpoints that are kept."""
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written, from a copy in the root's memory."""

    def __post_init__(self) -> None:
        check(self)
