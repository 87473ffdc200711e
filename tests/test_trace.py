from pathlib import Path

import pytest

from hpctrain.trace import COMPUTE, WIRE, Trace, now_s, read


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace" / "rank-3.jsonl"


def session(path: Path, offset_s: float, *names: str) -> None:
    trace = Trace()
    trace.offset_s = offset_s
    trace.open(path, rank=3)
    for name in names:
        trace.add(WIRE, name, 1.0, 2.0)
    trace.flush()


def cut_off_the_last_line(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def test_spans_come_back_with_their_facts_on_the_clock_of_rank_0(path: Path) -> None:
    trace = Trace()
    trace.offset_s = -10.0
    trace.open(path, rank=3)
    trace.add(WIRE, "block 0", 11.5, 12.0, bytes=64, step=2)
    trace.flush()
    assert list(read(path)) == [
        {
            "rank": 3,
            "session": 0,
            "track": WIRE,
            "name": "block 0",
            "start_s": 1.5,
            "end_s": 2.0,
            "bytes": 64,
            "step": 2,
        }
    ]


def test_nothing_is_recorded_before_a_file_is_open_or_when_switched_off(path: Path) -> None:
    trace = Trace()
    trace.add(WIRE, "early", 0.0, 1.0)
    with trace.span("early"):
        pass
    trace.open(path, rank=0)
    trace.active = False
    trace.add(WIRE, "late", 0.0, 1.0)
    with trace.span("late"):
        pass
    trace.flush()
    assert list(read(path)) == []


def test_what_was_recorded_is_flushed_after_recording_ended(path: Path) -> None:
    trace = Trace()
    trace.open(path, rank=0)
    trace.add(WIRE, "block 0", 0.0, 1.0)
    trace.active = False
    trace.flush()
    assert [span["name"] for span in read(path)] == ["block 0"]


def test_a_span_covers_its_with_block(path: Path) -> None:
    trace = Trace()
    trace.open(path, rank=0)
    before_s = now_s()
    with trace.span("step", step=1), trace.span("wait", WIRE):
        pass
    after_s = now_s()
    inner, outer = trace.take()
    assert (outer[:2], outer[4]) == ((COMPUTE, "step"), {"step": 1})
    assert inner[:2] == (WIRE, "wait")
    assert before_s <= outer[2] <= inner[2] <= inner[3] <= outer[3] <= after_s


def test_a_span_that_fails_is_recorded_and_the_error_passes(path: Path) -> None:
    trace = Trace()
    trace.open(path, rank=0)
    with pytest.raises(KeyError), trace.span("forward"):
        raise KeyError
    assert [span[1] for span in trace.take()] == ["forward"]


def test_each_span_is_written_once(path: Path) -> None:
    trace = Trace()
    trace.open(path, rank=0)
    for name in ("a", "b"):
        trace.add(WIRE, name, 0.0, 1.0)
        trace.flush()
        trace.flush()
    assert [span["name"] for span in read(path)] == ["a", "b"]
    assert trace.take() == []


def test_a_resumed_run_adds_a_session_with_a_clock_of_its_own(path: Path) -> None:
    session(path, 10.0, "a")
    session(path, 20.0, "b")
    spans = [(span["name"], span["session"], span["start_s"]) for span in read(path)]
    assert spans == [("a", 0, 11.0), ("b", 1, 21.0)]


def test_a_line_cut_off_by_a_kill_is_passed_over(path: Path) -> None:
    session(path, 0.0, "a", "b")
    cut_off_the_last_line(path)
    assert [span["name"] for span in read(path)] == ["a"]


def test_a_run_resumed_after_a_kill_keeps_its_clock(path: Path) -> None:
    """Its header must not be glued to the line that the kill cut off."""
    session(path, 10.0, "a", "b")
    cut_off_the_last_line(path)
    session(path, 20.0, "c")
    spans = [(span["name"], span["session"], span["start_s"]) for span in read(path)]
    assert spans == [("a", 0, 11.0), ("c", 1, 21.0)]
