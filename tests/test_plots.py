"""Plots of benchmarks can be drawn from figures that some arms are missing in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import overlap
import pytest
import step

PNG = b"\x89PNG"


def told(*arms: str) -> dict[str, Any]:
    return {key: value for arm in arms for key, value in step.told(arm, [0.8, 0.9, 1.1]).items()}


@pytest.mark.parametrize("heat", [True, False])
def test_step(tmp_path: Path, heat: bool) -> None:
    both = told("ratio_to_ddp", "plain_ratio_to_ddp")
    models = {"gpt_25mb": both | (told("heat_ratio_to_ddp") if heat else {}), "tiny": both}
    figures = {f"ranks_{ranks}": {"models": models} for ranks in step.RANKS}
    step.draw(figures, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_overlap(tmp_path: Path) -> None:
    shares = {"asleep": 0.04, "no overlap": 1.0}
    figures = {
        "exposed_share": shares,
        "exposed_share_quartiles": {arm: [share, share + 0.1] for arm, share in shares.items()},
        "targets": {"asleep": {"at_most": 0.1}, "no overlap": {"at_least": 0.8}},
    }
    overlap.draw(figures, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
