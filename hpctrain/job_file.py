"""The text of a job: a TOML file and what the command line puts in its place.

Knows, for each value, where it was written, so that a mistake can be told with its line.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpctrain.errors import JobError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass
class JobFile:
    """A job file that was read, with `--set` applied.

    Attributes:
        path: of the file.
        table: all values.
        mistakes: of the overrides, each with its place.
    """

    path: Path
    table: dict[str, Any]
    mistakes: list[str]
    _lines: dict[str, int] = field(default_factory=dict)
    _overrides: dict[str, str] = field(default_factory=dict)

    def origin(self, place: str) -> str:
        """Where the value at a dotted place comes from: `--set ...`, `line 3`, or unknown, empty.

        A place that is not written anywhere, as a missing one, is looked for in its table.
        """
        inside = [name for name in self._overrides if name.startswith(f"{place}.")]
        if inside and place not in self._lines:
            place = inside[-1]
        while place:
            if place in self._overrides:
                return f"--set {self._overrides[place]}"
            if place in self._lines:
                return f"line {self._lines[place]}"
            place = place.rpartition(".")[0]
        return ""

    def mistake(self, lines: Sequence[str]) -> JobError:
        """One error for mistakes in the form `place: what is wrong`."""
        told, sources = [], set()
        for line in lines:
            place = line.partition(":")[0]
            is_option = place.startswith("--set ")
            # What is wrong in the module names its own file and line.
            is_module = place == "module" and place not in self._overrides
            origin = "" if is_option or is_module else self.origin(place)
            sources.add("set" if is_option or origin.startswith("--set") else "file")
            told.append(f"{line} ({origin})" if origin else line)
        count = f"{len(lines)} mistakes" if len(lines) > 1 else "a mistake"
        who = {"file": f"{self.path} has", "set": "the command line has"}
        both = f"{self.path} and the command line have"
        subject = both if len(sources) > 1 else who[sources.pop()]
        return JobError(f"{subject} {count}:\n  " + "\n  ".join(told), everywhere=True)


def read(path: Path, overrides: Sequence[str] = ()) -> JobFile:
    """Read a job file and apply overrides.

    Args:
        path: the TOML file.
        overrides: `table.key=value`, where the value is TOML or else a string.

    Raises:
        JobError: the file cannot be read or is not TOML.
    """
    text, table = _parse(path)
    file = JobFile(path, table, [], _key_lines(text))
    for override in overrides:
        _override(file, override)
    return file


def _parse(path: Path) -> tuple[str, dict[str, Any]]:
    fix = "check the path; a job file is TOML, see docs/job-file.md"
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except OSError as error:
        what = f"the job file cannot be read: {error.strerror}"
        found = sorted(str(p) for p in _listed(path))
        if found:
            fix = f"name a job file; there are {', '.join(found[:5])}"
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        what = f"the job file is not TOML: {error}"
        fix = "mend that line; `hpctrain keys` shows what a job file may hold"
    if path.suffix == ".py":
        fix = f"give the .toml whose `module` is {path.name}, not the module itself"
    raise JobError(what, where=str(path), fix=fix, everywhere=True)


def _listed(path: Path) -> list[Path]:
    """Job files that may have been meant, beside a path that cannot be read."""
    try:
        return list((path if path.is_dir() else path.parent).glob("*.toml"))
    except OSError:
        return []


_HEADER = re.compile(r"\s*\[([^\[\]=]+)\]\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\.[\w-]+)*)\s*=""")
_INLINE = re.compile(r"[{,]\s*([\w-]+)\s*=")


def _key_lines(text: str) -> dict[str, int]:
    """Line of each dotted key, for the usual ways to write TOML; exotic ones are passed over."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = re.sub(r"[\s\"']", "", header[1])
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            place = f"{table}.{key[1]}" if table else key[1]
            place = re.sub("[\"']", "", place)
            lines.setdefault(place, number)
            for inner in _INLINE.finditer(line, key.end()):
                lines.setdefault(f"{place}.{inner[1]}", number)
    return lines


def _override(file: JobFile, text: str) -> None:
    """Put one `table.key=value` into the table."""
    place, equals, written = text.partition("=")
    keys = place.strip().split(".")
    if not equals or not all(keys):
        file.mistakes.append(f"--set {text}: expected table.key=value")
        return
    try:
        parsed = tomllib.loads(f"value = {written}")
        value = parsed["value"]
        if len(parsed) > 1:
            more = "holds more than one value; repeat --set for each"
            file.mistakes.append(f"--set {text!r}: {more}")
            return
    except tomllib.TOMLDecodeError:
        value = written.strip()
    table = file.table
    for key in keys[:-1]:
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            file.mistakes.append(f"--set {text}: {key} is a value and not a table")
            return
        table = inner
    table[keys[-1]] = value
    file._overrides[".".join(keys)] = text
