from __future__ import annotations

import base64
import html
import io
import itertools
import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hpctrain import cli, report
from hpctrain.errors import ExitCode, HpctrainError, JobError, UnfitError
from hpctrain.records import read_metrics, read_spans
from hpctrain.trace import COMPUTE, WIRE, Trace

AHEAD_S = 90.0
"""How far the clock of rank 1 is ahead of that of rank 0."""
WAITS_S = {0: 0.1, 1: 0.2}
STEPS = 5


def span(name: str, start_s: float, end_s: float, **facts: Any) -> dict[str, Any]:
    track = COMPUTE if "step" in facts or name == report.WAIT else WIRE
    return {"track": track, "name": name, "start_s": start_s, "end_s": end_s, **facts}


def step_spans(rank: int, step: int, begin_s: float) -> list[dict[str, Any]]:
    """One step of one second, with three blocks of which two are on the wire at a time."""
    at = begin_s.__add__
    return [
        span("data", at(0.0), at(0.1), step=step),
        span("forward", at(0.1), at(0.3), step=step),
        span("block 0", at(0.4), at(0.6), bytes=400),
        span("block 1", at(0.5), at(0.8), bytes=800),
        span("block 2", at(0.6), at(0.7), bytes=40),
        span("backward", at(0.3), at(0.8), step=step),
        span(report.WAIT, at(0.8 - WAITS_S[rank]), at(0.8)),
        span("optimizer", at(0.8), at(1.0), step=step),
    ]


def write_lines(path: Path, entries: list[dict[str, Any]], torn: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + torn)


def metrics(step: int) -> dict[str, Any]:
    figures = {"loss": 3.0 / step, "samples_per_s": 64.0, "step_s": 1.0, "exposed_s": 0.1}
    return {"step": step, **figures}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two ranks that was resumed after three steps, and killed after five."""
    run = tmp_path / "job" / "002"
    checked = {"step": 3, "validation": {"loss": 1.5, "accuracy": 0.875}}
    lines = [*map(metrics, (1, 2, 3)), checked, *map(metrics, (4, 5))]
    write_lines(run / "metrics.jsonl", lines, torn='{"step": 6, "lo')
    (run / "run.json").write_text(json.dumps({"ranks": 2, "nodes": ["a", "b"], "mpi": "Some MPI"}))
    for rank, ahead_s in enumerate((0.0, AHEAD_S)):
        entries: list[dict[str, Any]] = []
        for session_s, first, last in ((100.0, 1, 3), (500.0, 4, 3 + STEPS)):
            ahead_s += session_s / 100  # a session's offset is its own
            entries.append({"rank": rank, "offset_s": -ahead_s})
            for step in range(first, last + 1):
                entries += step_spans(rank, step, session_s + step + ahead_s)
        write_lines(run / "trace" / f"rank-{rank:05d}.jsonl", entries, torn='{"track": "comp')
    return run


# ---------------------------------------------------------------------- spans


def test_spans_of_all_ranks_are_on_one_clock(run: Path) -> None:
    starts: dict[tuple[str, int], list[float]] = {}
    for s in read_spans(run):
        if s["name"] in ("forward", "optimizer"):
            starts.setdefault((s["name"], s["step"]), []).append(s["start_s"])
    assert len(starts) == 2 * STEPS
    for first, second in starts.values():
        assert first == pytest.approx(second)


def test_spans_are_of_the_last_session_and_in_order(run: Path) -> None:
    spans = read_spans(run)
    assert {s["step"] for s in spans if "step" in s} == set(range(4, 4 + STEPS))
    assert min(s["start_s"] for s in spans) == pytest.approx(504.0)
    assert spans == sorted(spans, key=lambda s: s["start_s"])


def test_session_after_a_torn_line_has_its_own_clock(run: Path) -> None:
    trace = Trace()
    trace.offset_s = 1000.0
    trace.open(run / "trace" / "rank-00001.jsonl", rank=1)
    trace.add(COMPUTE, "forward", 1.0, 2.0, step=9)
    trace.flush()
    spans = [s for s in read_spans(run) if s["rank"] == 1]
    assert [(s["name"], s["start_s"]) for s in spans] == [("forward", 1001.0)]


def test_ranks_that_an_earlier_session_had_are_left_out(run: Path) -> None:
    """The run was begun with three ranks and resumed with two."""
    spans = [{"rank": 2, "offset_s": 0.0}, *step_spans(0, 1, begin_s=100.0)]
    write_lines(run / "trace" / "rank-00002.jsonl", spans)
    assert {s["rank"] for s in read_spans(run)} == {0, 1}


def test_operations_in_flight_together_get_lanes_of_their_own(run: Path) -> None:
    spans = read_spans(run)
    rows: dict[tuple[int, str, int], list[dict[str, Any]]] = {}
    for s, (track, lane) in zip(spans, report.assign_lanes(spans), strict=True):
        assert track == s["track"]
        if track == WIRE:
            rows.setdefault((s["rank"], track, lane), []).append(s)
    assert {lane for _, _, lane in rows} == {0, 1}
    for row in rows.values():
        for before, after in itertools.pairwise(row):
            assert before["end_s"] <= after["start_s"]


def test_exposed_share_is_the_wait_over_the_step(run: Path) -> None:
    spans = read_spans(run)
    expected = {rank: pytest.approx(share) for rank, share in WAITS_S.items()}
    assert report.exposed_share(spans) == expected
    assert report.exposed_share([]) == {}


def test_evaluation_and_checkpoints_are_no_part_of_the_step(run: Path) -> None:
    spans = read_spans(run)
    around = [span(name, 600.0, 700.0, step=8) | {"rank": 0} for name in ("evaluate", "save")]
    assert report.exposed_share([*spans, *around]) == report.exposed_share(spans)


def test_shown_steps_are_the_last_that_all_ranks_traced(run: Path) -> None:
    spans = read_spans(run)
    cut = [s for s in spans if s["rank"] == 0 or s["start_s"] < 500.0 + 3 + STEPS]
    shown = report.shown_steps(cut)
    assert {s["step"] for s in shown if "step" in s} == {5, 6, 7}
    assert Counter(s["name"] for s in shown)["block 1"] == 2 * report.SHOWN_STEPS
    assert report.shown_steps([]) == []


def test_smoothing_is_a_running_mean() -> None:
    assert report.smooth([1.0, 3.0, 5.0, 7.0], part=0.5) == [1.0, 2.0, 4.0, 6.0]
    assert report.smooth([1.0, 2.0]) == [1.0, 2.0]
    assert report.smooth([]) == []


# ---------------------------------------------------------------------- timeline.json


def test_chrome_trace_has_a_process_a_rank_and_times_in_microseconds(run: Path) -> None:
    report.write(run)
    events = json.loads((run / "timeline.json").read_text())["traceEvents"]
    complete = [e for e in events if e["ph"] == "X"]
    names = {(e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M"}

    assert len(complete) == len(read_spans(run))
    assert min(e["ts"] for e in complete) == 0.0
    assert {round(e["dur"]) for e in complete if e["name"] == "forward"} == {200_000}
    assert {e["pid"] for e in complete} == {0, 1}
    assert {n for (kind, *_), n in names.items() if kind == "process_name"} == {"rank 0", "rank 1"}
    assert {n for (kind, *_), n in names.items() if kind == "thread_name"} == {
        *("compute", "wire", "wire 1")
    }
    for event in complete:
        assert names["thread_name", event["pid"], event["tid"]].startswith(event["cat"])
    assert {e["args"]["bytes"] for e in complete if e["name"] == "block 1"} == {800}


def test_events_of_a_thread_do_not_cross(run: Path) -> None:
    """Chrome draws spans of a thread as a stack: each is inside another or beside it."""
    events = report.chrome_trace(read_spans(run))["traceEvents"]
    rows: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for e in (e for e in events if e["ph"] == "X"):
        rows.setdefault((e["pid"], e["tid"]), []).append((e["ts"], e["ts"] + e["dur"]))
    for row in rows.values():
        row.sort(key=lambda times: (times[0], -times[1]))
        for (_, end), (start, other_end) in itertools.pairwise(row):
            assert start >= end - 1e-3 or other_end <= end + 1e-3


# ---------------------------------------------------------------------- report.html


def page_of(run: Path) -> str:
    pytest.importorskip("matplotlib")
    assert report.write(run, required=True) == f"report: {run / 'report.html'}"
    return (run / "report.html").read_text()


def images(page: str) -> list[Any]:
    """The pictures inside a page, decoded."""
    from matplotlib.image import imread

    sources = re.findall(r'<img [^>]*src="([^"]*)"', page)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    data = [base64.b64decode(source.partition(",")[2], validate=True) for source in sources]
    return [imread(io.BytesIO(picture), format="png") for picture in data]


def test_page_holds_all_that_it_shows(run: Path) -> None:
    page = page_of(run)
    pictures = images(page)
    assert len(pictures) == 2 and all(picture.std() > 0 for picture in pictures)
    text = re.sub(r'src="data:[^"]*"', "", page)
    for reference in ("http", "src=", "href=", "url(", "<script", "@import"):
        assert reference not in text
    assert "<title>job, run 002</title>" in page and "<h1>job, run 002</h1>" in page
    for shown in ("Some MPI", "1000.0 ms", "0.6000", "1.5000", "0.8750"):
        assert shown in text
    assert "rank 0: 10.0%; rank 1: 20.0%" in text


def test_page_says_what_was_run(run: Path) -> None:
    job = {"seed": 7, "model": {"width": 8, "name": "<x>"}, "train": {"steps": 5, "clip": None}}
    facts = {
        "name": "digits", "started": "2026-11-22T10:00:00+00:00", "seconds": 133.4, "job": job,
        "parameters": 66122, "ranks": 2, "nodes": ["vm", "vm"], "finished": True,
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(facts))
    page = page_of(run)
    assert "<h1>digits, run 002</h1>" in page
    rows = dict(re.findall("<tr><th>(.*?)</th><td>(.*?)</td></tr>", page))
    assert rows == {
        "seed": "7", "started": "2026-11-22T10:00:00+00:00", "duration": "0:02:13",
        "parameters": "66,122", "ranks": "2", "nodes": "vm (2 times)", "steps": "5",
        "median step": "1000.0 ms", "last training loss": "0.6000",
        "validation loss": "1.5000", "validation accuracy": "0.8750",
    }  # fmt: skip
    (text,) = re.findall("<pre>(.*?)</pre>", page, re.DOTALL)
    assert html.unescape(text).splitlines() == [
        *("seed = 7", "model.width = 8", 'model.name = "<x>"', "train.steps = 5"),
    ]


def test_page_says_which_steps_the_timeline_shows(run: Path) -> None:
    page = page_of(run)
    assert "Steps 6 to 8, all ranks" in page and "the last of the steps 4 to 8" in page
    assert "run.trace_steps" in page


def test_legend_tells_single_steps_from_their_mean(run: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    report.draw_loss(axes, [metrics(step) for step in range(1, 201)])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["training, each step", "training, mean of the last 4 steps"]


def test_untraced_run_has_a_report_without_timeline(run: Path) -> None:
    shutil.rmtree(run / "trace")
    page = page_of(run)
    assert len(images(page)) == 1 and "no timeline" in page
    assert json.loads((run / "timeline.json").read_text())["traceEvents"] == []


def test_run_killed_before_its_first_step_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert len(images(page_of(tmp_path))) == 1


def test_loss_that_is_not_finite_is_reported(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [metrics(1), metrics(2) | {"loss": float("nan")}])
    assert "nan" in page_of(run)


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b'{"ranks', b"\xff\xfe", b"[]", b"null", b'{"ranks": "two"}', b'{"ranks": null}'),
        b'{"job": 3, "seconds": "x", "nodes": {"a": 1}, "name": [1], "parameters": {}}',
    ],
)
def test_garbage_in_run_json_does_not_hide_the_rest(run: Path, text: bytes) -> None:
    (run / "run.json").write_bytes(text)
    assert "0.6000" in page_of(run)


def test_names_are_escaped(run: Path) -> None:
    odd = run.rename(run.with_name("<b>&"))
    (odd / "run.json").write_text('{"mpi": "<i>MPI</i>"}')
    page = page_of(odd)
    assert "<b>" not in page and "<i>" not in page
    assert "job, run &lt;b&gt;&amp;" in page


# ---------------------------------------------------------------------- what is damaged


DAMAGED = {
    "metrics.jsonl": [
        *(b"3", b"\xff\xfe\x00", b'{"loss": 1.0}', b'{"step": 2, "loss": "two"}', b"null", b"[]"),
        *(b'{"step": "2"}', b'{"step": 2, "validation": 3}', b'{"step": 2, "step_s": "1"}'),
        b'{"step": 2, "validation": {"loss": "two"}}',
        b"[" * 100_000,
        *(b'{"step": 1%s}' % (b"0" * 400), b'{"step": 2, "loss": 1%s}' % (b"0" * 400)),
        *(b'{"step": 2, "loss": 1e308}', b'{"step": 2, "loss": Infinity}', b'{"step": 1e3}'),
    ],
    "trace/rank-00001.jsonl": [
        *(b"3", b"\xff\xfe", b"{}", b'{"track": "wire", "name": "block 0"}', b'{"offset_s": "x"}'),
        b'{"track": "compute", "name": "optimizer", "start_s": 1, "end_s": 2, "step": [1]}',
        b'{"track": "compute", "name": 5, "start_s": 1, "end_s": 2}',
        b'{"track": "compute", "name": "x", "start_s": NaN, "end_s": 2}',
        b"[" * 100_000,
        b'{"track": "compute", "name": "x", "start_s": 1, "end_s": 1%s}' % (b"0" * 400),
        b'{"track": "compute", "name": "x", "start_s": 1, "end_s": 1e308}',
        b'{"track": "compute", "name": "x", "start_s": 1, "end_s": 2, "step": 1%s}' % (b"0" * 40),
        b'{"rank": 1%s, "offset_s": 0}' % (b"0" * 40),
    ],
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_damaged_lines_are_passed_over_and_counted_once(run: Path, name: str, first: bool) -> None:
    pytest.importorskip("matplotlib")
    expected = read_spans(run), len(read_metrics(run / "metrics.jsonl", {}))
    bad, good = b"".join(line + b"\n" for line in DAMAGED[name]), (run / name).read_bytes()
    (run / name).write_bytes(bad + good if first else good + b"\n" + bad)
    count = len(DAMAGED[name]) + (not first)  # with the torn line, which now has an end
    text = report.write(run, required=True)
    assert text.startswith(f"warning: passed over damaged lines: {count} of {name}\n")
    assert f"{count} of {name}" in (run / "report.html").read_text()
    assert (read_spans(run), len(read_metrics(run / "metrics.jsonl", {}))) == expected


def test_torn_end_of_a_killed_run_is_no_damage(run: Path) -> None:
    assert "warning" not in report.write(run)


def test_trace_without_a_header_is_passed_over(run: Path) -> None:
    path = run / "trace" / "rank-00001.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:9]))
    assert report.write(run).startswith("warning: passed over damaged lines: 8 of trace/rank-00001")
    assert {s["rank"] for s in read_spans(run)} == {0}


def test_steps_without_all_rates_are_drawn_without_them(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [{"step": 1, "loss": 2.0}, metrics(2) | {"step_s": 0}])
    assert len(images(page_of(run))) == 2


FACTS = {
    "deep": b'{"job": ' + b'{"a": ' * 900 + b"1" + b"}" * 901,
    "deeper": b"[" * 100_000,
    "types": b'{"ranks": "two", "seconds": 1e300, "job": [1], "nodes": {"a": 1}, "name": [2]}',
    "numbers": b'{"ranks": 1%s, "seconds": 1%s, "parameters": -0.0}' % (b"0" * 400, b"0" * 400),
    "surrogates": b'{"name": "\\ud800", "job": {"x": "\\ud800<script>"}}',
    "bytes": bytes(range(256)),
}


@pytest.mark.parametrize("content", FACTS.values(), ids=FACTS)
def test_report_bears_any_run_json(run: Path, content: bytes) -> None:
    (run / "run.json").write_bytes(content)
    assert len(images(page_of(run))) == 2


def test_pipes_in_the_run_folder_are_not_waited_for(run: Path) -> None:
    for name in ("run.json", "trace/rank-00000.jsonl"):
        (run / name).unlink()
        os.mkfifo(run / name)
    assert len(images(page_of(run))) == 2
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(JobError, match="there is no run here"):
        report.write(run)


def test_links_in_the_run_folder_are_not_written_through(run: Path, tmp_path: Path) -> None:
    """Reports of other people's runs are drawn, too."""
    precious = tmp_path / "precious"
    precious.write_text("kept")
    for name in ("report.html", "timeline.json", ".report.html.partial"):
        (run / name).symlink_to(precious)
    report.write(run, required=True)
    assert precious.read_text() == "kept"


def test_folder_that_cannot_be_written_is_told(run: Path) -> None:
    (run / "timeline.json").mkdir()
    with pytest.raises(HpctrainError, match="the report cannot be written") as caught:
        report.write(run)
    assert caught.value.everywhere


# ---------------------------------------------------------------------- what is missing


@pytest.mark.parametrize("made", [False, True])
def test_folder_without_a_run_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made: bool
) -> None:
    folder = tmp_path / "003"
    if made:
        folder.mkdir()
    told = "there is no run here" if made else "there is no such folder"
    with pytest.raises(JobError, match=told):
        report.write(folder)
    assert cli.main(["report", str(folder)]) == ExitCode.BAD_JOB
    error = capsys.readouterr().err
    assert error.startswith(f"hpctrain: {told}") and str(folder) in error
    assert "Traceback" not in error


def test_without_matplotlib_the_timeline_is_written(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'hpctrain[report]'" in report.write(run)
    assert (run / "timeline.json").is_file() and not (run / "report.html").exists()
    with pytest.raises(UnfitError, match="needs matplotlib"):
        report.write(run, required=True)
