"""Peers of the benchmarks: one that is missing is told, not fatal."""

from __future__ import annotations

import sys

import harness
import peers
import pytest


def test_missing_heat_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "heat", None)
    reason = peers.without_heat()
    assert reason.startswith("ModuleNotFoundError: ")
    assert harness.left_out({"heat": reason}) == [f"left out: heat ({reason})"]


def test_a_reason_is_told_once() -> None:
    assert harness.left_out({"a": "old", "b": "missing", "c": "old"}) == [
        "left out: a, c (old)",
        "left out: b (missing)",
    ]
    assert harness.left_out({}) == []


def test_an_error_is_one_line() -> None:
    assert peers.in_a_line(RuntimeError("it\nfailed")) == "RuntimeError: it"
    assert peers.in_a_line(KeyError()) == "KeyError: "
