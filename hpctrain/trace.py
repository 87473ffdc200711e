"""What happened when, on this rank: spans and counters, written as one JSON object a line.

Times are seconds of this process's monotonic clock. `offset_s`, measured once against rank 0,
brings the files of all ranks onto one clock: time on rank 0 = own time + offset.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpctrain.files import open_in_place

now_s = time.perf_counter
_log = logging.getLogger("hpctrain")

LARGEST = 1e12
"""Of numbers in a trace that are taken for such: in seconds, some 30,000 years."""
COMPUTE = "compute"
"""Track of what the main thread does: data, forward, backward, optimizer."""
WIRE = "wire"
"""Track of operations in flight, from their start to their end."""
DATA_BLOCKS = "data blocks"
"""Track of data blocks that a rank computed, in the coded mode."""
CODED = "coded"
"""Track of steps as the root sees them, in the coded mode."""
CHECKPOINT = "checkpoint"
"""Track of the thread that writes checkpoints."""


class Trace:
    """Collects spans in memory and appends them to a file when told to.

    Recording costs one tuple and one list append; while `active` is false it costs one test.
    Appends come from several threads, which is safe for a list; `flush` belongs to one thread.
    """

    def __init__(self) -> None:
        self.active = False
        self.offset_s = 0.0
        self._path: Path | None = None
        self._rank = 0
        self._spans: list[tuple[str, str, float, float, dict[str, Any]]] = []

    def open(self, path: Path, rank: int) -> None:
        """Write to `path` from now on, appending to what an earlier session wrote there."""
        self.take()  # what an earlier run of this process did not flush
        self._path, self._rank = path, rank
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_in_place(path, "a") as file:
            if file.tell():
                file.write("\n")
            file.write(json.dumps({"rank": rank, "offset_s": self.offset_s}) + "\n")
        self.active = True

    def add(self, track: str, name: str, start_s: float, end_s: float, **facts: Any) -> None:
        """Record one span; `facts` must be plain JSON values."""
        if self.active:
            self._spans.append((track, name, start_s, end_s, facts))

    @contextmanager
    def span(self, name: str, track: str = COMPUTE, **facts: Any) -> Iterator[None]:
        """Record the time spent inside a `with` block."""
        if not self.active:
            yield
            return
        start_s = now_s()
        try:
            yield
        finally:
            self._spans.append((track, name, start_s, now_s(), facts))

    def take(self) -> list[tuple[str, str, float, float, dict[str, Any]]]:
        """Hand over, and forget, what was recorded since the last call."""
        spans, self._spans = self._spans, []
        return spans

    def flush(self) -> None:
        """Append what was recorded to the file."""
        if self._path is None or not self._spans:
            return
        lines = [
            json.dumps({"track": track, "name": name, "start_s": start_s, "end_s": end_s, **facts})
            for track, name, start_s, end_s, facts in self.take()
        ]
        try:
            with open_in_place(self._path, "a") as file:
                file.write("\n".join(lines) + "\n")
        except OSError as error:  # a run need not end for want of a picture
            self._path, self.active = None, False
            _log.warning("no more spans are recorded: %s", error)

    def close(self) -> None:
        """Write what was recorded, and record nothing more."""
        self.flush()
        self._path, self.active = None, False


def read(path: Path, damaged: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The spans of one rank's file, with times moved onto the clock of rank 0.

    A resumed run appends a header and spans to the same file; a line cut off by a kill is
    passed over, as is any other that makes no sense.

    Args:
        path: the file.
        damaged: receives the lines that make no sense, other than a last one without an end.

    Yields:
        Dicts with `rank`, `session` (0 for the first), `track`, `name`, `start_s`, `end_s` and
        the span's own facts.
    """
    header: dict[str, Any] | None = None
    session = -1
    with path.open(errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if _is_header(entry):
                header = entry
                session += 1
                continue
            if header is None or not _is_span(entry):
                if damaged is not None and line.strip() and line.endswith("\n"):
                    damaged.append(line)
                continue
            entry["rank"], entry["session"] = header["rank"], session
            entry["start_s"] += header["offset_s"]
            entry["end_s"] += header["offset_s"]
            yield entry


def _is_header(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("rank"), int)
        and is_finite(entry["rank"])
        and is_finite(entry.get("offset_s"))
    )


def _is_span(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("track"), str)
        and isinstance(entry.get("name"), str)
        and is_finite(entry.get("start_s"))
        and is_finite(entry.get("end_s"))
        and isinstance(entry.get("step", 0), int)
        and is_finite(entry.get("step", 0))
    )


def is_finite(value: Any) -> bool:
    """Whether a value read from JSON is a number that can be drawn and, in seconds, told."""
    return isinstance(value, (int, float)) and abs(value) < LARGEST
