"""The report of runs with coded steps: eight workers, one of them slow, one of them dying."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hpctrain import report, report_coded
from hpctrain.records import read_spans
from hpctrain.straggling import read_steps
from hpctrain.trace import CODED, COMPUTE, DATA_BLOCKS, WIRE

WORKERS, OWNED, STEPS = 8, 4, 5
SLOW, DEAD = 3, 6
LEFT_BY_SLOW = [SLOW * OWNED + place for place in (3, 2, 1)]
HOLDERS = [[block // OWNED, (block // OWNED + 1) % WORKERS] for block in range(WORKERS * OWNED)]


def span(track: str, name: str, start_s: float, end_s: float, **facts: Any) -> dict[str, Any]:
    return {"track": track, "name": name, "start_s": start_s, "end_s": end_s, **facts}


def worked(at_s: float, step: int, block: int, length_s: float, computed: bool) -> dict[str, Any]:
    facts = {"step": step, "block": block, "computed": computed}
    return span(DATA_BLOCKS, f"data block {block}", at_s, at_s + length_s, **facts)


def rank_spans(rank: int, step: int, begin_s: float) -> list[dict[str, Any]]:
    """The slow one does one of its own data blocks; the next does what it and the dead leave."""
    own = [rank * OWNED + place for place in range(OWNED)]
    if rank == SLOW:
        tries = [(own[0], 0.125, True), (own[1], 0.05, False)]
    else:
        tries = [(block, 0.025, True) for block in own]
    if rank - 1 == SLOW:
        tries += [(block, 0.025, True) for block in LEFT_BY_SLOW]
    if rank - 1 == DEAD:
        tries += [(DEAD * OWNED + place, 0.025, True) for place in range(OWNED)]
    spans = []
    at_s = begin_s
    for block, length_s, computed in tries:
        spans.append(worked(at_s, step, block, length_s, computed))
        at_s += length_s
    spans.append(span(WIRE, "block 0", begin_s + 0.1, begin_s + 0.15, bytes=4))
    spans.append(span(COMPUTE, "forward", begin_s, begin_s + 0.2, step=step))
    if rank != DEAD:
        spans.append(span(COMPUTE, "optimizer", begin_s + 0.2, begin_s + 0.21, step=step))
    return spans


def root_span(step: int, begin_s: float) -> dict[str, Any]:
    sources = [owner for owner, _ in HOLDERS]
    for block in LEFT_BY_SLOW:
        sources[block] = SLOW + 1
    if step > 1:
        sources[DEAD * OWNED : (DEAD + 1) * OWNED] = [DEAD + 1] * OWNED
    return span(
        CODED, "step", begin_s, begin_s + 0.2, step=step, holders=HOLDERS, sources=sources,
        redundant=[], vectors=7.5, samples=[8] * len(HOLDERS),
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run in the first step of which a worker died, before it ended."""
    pytest.importorskip("matplotlib")
    run = tmp_path / "job" / "001"
    (run / "trace").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    for rank in range(WORKERS):
        entries: list[dict[str, Any]] = [{"rank": rank, "offset_s": 0.0}]
        for step in range(1, 2 if rank == DEAD else STEPS + 1):
            entries += rank_spans(rank, step, begin_s=float(step))
            entries += [root_span(step, float(step))] if rank == 0 else []
        write(run, rank, entries)
    return run


def path_of(run: Path, rank: int) -> Path:
    return run / "trace" / f"rank-{rank:05d}.jsonl"


def write(run: Path, rank: int, entries: list[dict[str, Any]]) -> None:
    path_of(run, rank).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def page_of(run: Path) -> str:
    assert report.write(run, required=True) == f"report: {run / 'report.html'}"
    return (run / "report.html").read_text()


def pictures(page: str) -> list[str]:
    return re.findall('<img alt="([^"]*)"', page)


def rows(page: str) -> dict[str, list[str]]:
    cells = re.findall("<tr><th>([^<]*)</th>((?:<td>[^<]*</td>)+)</tr>", page)
    return {name: re.findall("<td>([^<]*)</td>", rest) for name, rest in cells}


ALL = ["loss and throughput", "timeline", "data blocks by worker", "T / T* by step"]


def test_page_has_a_section_on_stragglers(run: Path) -> None:
    page = page_of(run)
    assert pictures(page) == ALL
    shown = rows(page[page.index("<h2>Stragglers</h2>") :])
    assert shown["steps"] == ["5 (1 to 5)"]
    assert shown["data blocks"] == ["32"] and shown["holders of a data block"] == ["2"]
    assert shown["median T"] == ["200.0 ms"]
    # By 125 ms six workers do five each and the slow one does one, 31 of 32 in all.
    assert shown["median T / T*"] == ["1.33"]
    assert shown["mean share of data blocks computed again"] == ["2.5%"]
    assert shown["mean gradient vectors that reached the root"] == ["7.50"]
    assert shown["rank 3"][:2] == ["5.00", "100%"]
    assert shown["rank 4"][2] == "35 (22%)" and shown["rank 6"][2] == "4 (2%)"
    assert "Slow workers: rank 3 (5.00 times)" in page


def test_timeline_shows_the_ranks_that_live(run: Path) -> None:
    spans = read_spans(run)
    assert report.whole_steps(spans) == [1, 2, 3, 4, 5]
    shown = report.shown_steps(spans)
    assert {s["step"] for s in shown if "step" in s} == {3, 4, 5}
    assert report.exposed_share(spans).keys() == set(range(WORKERS))


def test_tracks_do_not_share_threads(run: Path) -> None:
    events = report.chrome_trace(read_spans(run))["traceEvents"]
    named = [e for e in events if e["name"] == "thread_name"]
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in named}
    assert len(threads) == len(named)
    for event in (e for e in events if e["ph"] == "X"):
        assert threads[event["pid"], event["tid"]] == event["cat"]


@pytest.mark.parametrize("rank", [1, SLOW, DEAD])
def test_trace_of_a_rank_may_be_missing(run: Path, rank: int) -> None:
    path_of(run, rank).unlink()
    page = page_of(run)
    unknown = {1: STEPS, SLOW: STEPS, DEAD: 1}[rank]
    assert pictures(page) == (ALL if unknown < STEPS else ALL[:3])
    told = rows(page).get("median T / T*", [""])[0]
    assert ("T* of the others is not known" in told) == (unknown == 1)
    assert rows(page)[f"rank {rank}"][-1] == "no trace"


def test_without_the_roots_trace_there_is_no_section(run: Path) -> None:
    path_of(run, 0).unlink()
    page = page_of(run)
    assert "Stragglers" not in page and pictures(page) == ALL[:2]


def test_run_that_was_not_coded_has_no_section(run: Path) -> None:
    for rank in range(WORKERS):
        lines = path_of(run, rank).read_text().splitlines(keepends=True)
        path_of(run, rank).write_text("".join(line for line in lines if CODED not in line))
    assert "Stragglers" not in page_of(run)


GARBAGE = [
    None, True, -1, 3, 1e300, "x", [], [[]], [None], [[None]], {}, [[0, 1]], [-1] * 32, [99] * 32,
    [[99]] * 32, [[]] * 32, [0] * 32, [1e9] * 32, [[0, 10**30]], 10**400,
]  # fmt: skip


@pytest.mark.parametrize("track", [CODED, DATA_BLOCKS])
def test_damaged_facts_do_not_fail_the_report(run: Path, track: str) -> None:
    """Each fact in turn is garbage; steps of their own, so that no other span hides the damage."""
    spans, lines = [], path_of(run, 0).read_text().splitlines()
    (good,) = (s for s in map(json.loads, lines) if s.get("track") == track and s["step"] == 2
               if s.get("block", 0) == 0)  # fmt: skip
    for key in {*good} - {"track", "name", "start_s", "end_s"}:
        spans += [good | {"step": 100 + len(spans)} | {key: value} for value in GARBAGE]
        spans.append({k: value for k, value in good.items() if k != key})
    path_of(run, 0).write_text("\n".join([*lines, *map(json.dumps, spans)]) + "\n")
    report.write(run)
    page = (run / "report.html").read_text()
    assert pictures(page)[:3] == ALL[:3]
    assert re.search(r"Passed over: \d+ traced spans", page)


def test_steps_that_are_all_damaged_are_told(run: Path) -> None:
    text = path_of(run, 0).read_text().replace('"vectors"', '"victors"')
    path_of(run, 0).write_text(text)
    page = page_of(run)
    assert "Passed over: 5 traced spans" in page and pictures(page) == ALL[:2]


def test_panels_are_of_the_last_steps(run: Path) -> None:
    steps, _ = read_steps(read_spans(run))
    figure = report_coded.steps_figure(steps[-2:])
    first, last = figure.axes
    assert first.get_title() == "step 4: T = 200 ms, T / T* = 1.33"
    assert [text.get_text() for text in first.get_yticklabels()][5:] == [
        *("rank 5", "rank 6, no trace", "rank 7"),
    ]
    bars = [text.get_text() for text in last.texts]
    assert sorted(map(int, bars)) == sorted(a.block for a in steps[-1].attempts)
    assert len(report_coded.steps_figure(steps[:1]).axes) == 1


def test_many_ranks_can_be_drawn(run: Path) -> None:
    holders = [[rank] for rank in range(300)]
    root = root_span(1, 0.0) | {"holders": holders, "sources": list(range(300)), "rank": 0}
    spans = [worked(0.0, 1, rank, 0.1, True) | {"rank": rank} for rank in range(300)]
    (step,), damaged = read_steps([root | {"samples": [1] * 300}, *spans])
    figure = report_coded.steps_figure([step])
    assert damaged == 0 and figure.get_figheight() < 20
    figure.savefig(run / "picture.png")
