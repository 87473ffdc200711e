"""What links.py makes of its times: limits, ratios, aims that hold and aims that are missed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import links_figures
import pytest
from links_figures import Case, figures_of, judged, rows_of

CASE = Case("sleep", 1.0)
KEY = CASE.key(2, 1)
PART_S = (0.1, 0.2, 0.05)
"""Forward, backward, optimizer: a wire of 0.4 s is longer than all of them."""


def found(steps: dict[str, float], wire_s: float = 0.4, rounds: int = 4) -> dict[str, Any]:
    """What the worker tells of a case in which every round takes the same time."""
    steps = {"hpctrain": 0.6, "ddp_25mb": 0.9, "ddp_4mb": 0.75, **steps, "wire": wire_s}
    return {
        "times": {name: [seconds] * rounds for name, seconds in steps.items()},
        "parts": [list(PART_S)] * rounds,
        "wire_bytes": 50_000_000,
        "progress": {"hpctrain": "thread"},
        "ways": {"hpctrain": "16 by ring"},
        "order": [[0, 0, 8], [2, 0, 8], [1, 0, 8]],
        "batch": 1,
        "left_out": {"heat": "missing"},
    }


@pytest.mark.parametrize(
    ("wire_s", "sync_limit_s", "bf16_limit_s", "free_limit_s"),
    [
        (0.4, 0.1 + 0.4 + 0.05, 0.1 + 0.2 + 0.05, 0.4),  # the wire takes longest
        (0.1, sum(PART_S), sum(PART_S), sum(PART_S)),  # backward does
    ],
)
def test_limits(
    wire_s: float, sync_limit_s: float, bf16_limit_s: float, free_limit_s: float
) -> None:
    figures = figures_of(found({"bf16": 0.5, "next": 0.5, "naive": 1.2}, wire_s))
    assert figures["sync_limit_s"] == pytest.approx(sync_limit_s)
    assert figures["free_limit_s"] == pytest.approx(free_limit_s)
    assert figures["compute_over_wire"] == pytest.approx(0.3 / wire_s)
    assert figures["wire_gbit_per_s"] == pytest.approx(0.4 / wire_s)
    for arm, taken_s, limit_s in (
        ("over_sync_limit", 0.6, sync_limit_s),
        ("ddp_4mb_over_sync_limit", 0.75, sync_limit_s),
        ("naive_over_sync_limit", 1.2, sync_limit_s),
        ("bf16_over_sync_limit", 0.5, bf16_limit_s),
        ("next_over_free_limit", 0.5, free_limit_s),
    ):
        assert figures[arm] == pytest.approx(taken_s / limit_s, abs=1e-4)
        assert figures[f"{arm}_quartiles"] == [figures[arm], figures[arm]]
    assert "next_over_sync_limit" not in figures


def test_ratios_are_to_the_better_ddp_round_by_round() -> None:
    of_case = found({"next": 0.6})
    of_case["times"] |= {"hpctrain": [0.6, 0.6, 0.6, 6.0], "ddp_4mb": [0.75, 0.8, 1.0, 10.0]}
    figures = figures_of(of_case)
    assert figures["better_ddp"] == "ddp_25mb"
    assert figures["ratio_to_ddp"] == pytest.approx(0.6 / 0.9, abs=1e-4)
    assert figures["next_ratio_to_ddp"] == pytest.approx(0.6 / 0.9, abs=1e-4)
    assert "ddp_4mb_ratio_to_ddp" not in figures


def test_without_the_overlapped_forward_nothing_is_said_of_it() -> None:
    figures = figures_of(found({"naive": 1.0, "no exchange": 0.35}))
    assert not [name for name in figures if "next" in name]
    rows = {row["arm"]: row for row in rows_of(KEY, figures)}
    assert list(rows["hpctrain"]) == [
        "configuration",
        "arm",
        "step ms",
        "over sync limit",
        "low",
        "high",
        "over better DDP",
    ]
    assert rows["no exchange"]["over sync limit"] == rows["ddp_4mb"]["over better DDP"] == ""
    assert "aim next_over_free_limit <= 1.15: not measured" in judged({KEY: figures}, {KEY: CASE})


def test_every_row_has_its_own_limit() -> None:
    rows = rows_of(KEY, figures_of(found({"next": 0.44})))
    over = {
        row["arm"]: (row["over sync limit"], row["over free limit"], row["low"]) for row in rows
    }
    assert over["hpctrain"] == (1.0909, "", 1.0909)
    assert over["next"] == ("", 1.1, 1.1)


def test_aims_held_and_missed() -> None:
    short = Case("sleep", 0.2)
    cases = {KEY: CASE, short.key(2, 2): short}
    figures = {
        KEY: figures_of(found({"next": 0.45, "naive": 0.7, "plain": 0.5})),
        "hosts_2x2_compute_0.2_sleep": figures_of(
            found({"hpctrain": 0.7, "bf16": 0.6, "next": 0.5, "naive": 0.8})
        ),
    }
    assert list(cases) == list(figures)
    assert judged(figures, cases) == [
        "aim over_sync_limit <= 1.1: holds in 1 of 2, not in hosts_2x2_compute_0.2_sleep 1.273",
        "aim ratio_to_ddp <= 0.88: holds in 1 of 1",
        "aim bf16_ratio_to_ddp <= 0.6: holds in 0 of 1, not in hosts_2x2_compute_0.2_sleep 0.800",
        "aim next_over_free_limit <= 1.15: holds in 1 of 2, "
        "not in hosts_2x2_compute_0.2_sleep 1.250",
        "aim next_ratio_to_ddp <= 0.75: holds in 1 of 1",
        f"controls that did not lose: plain in {KEY}",
    ]


def test_plot(tmp_path: Path) -> None:
    figures = {KEY: figures_of(found({"next": 0.45, "naive": 0.7}))}
    links_figures.draw(figures, {KEY: CASE}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_better_heat_is_a_peer() -> None:
    figures = figures_of(found({"heat": 1.2, "heat_blocking": 1.0}))
    assert figures["better_heat"] == "heat_blocking"
    assert figures["ratio_to_heat"] == pytest.approx(0.6)
    assert figures["heat_ratio_to_ddp"] == pytest.approx(1.6)
    assert figures["left_out"] == {"heat": "missing"}
    assert "better_heat" not in figures_of(found({}))
