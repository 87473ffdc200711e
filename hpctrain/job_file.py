"""The text of a job: TOML files and what the command line puts in their place.

Knows, for each value, where it was written, so that a mistake can be told with its line. Nothing
that is written in a file, or is in its place, does more than make an error.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpctrain.config import key_text
from hpctrain.errors import JobError, shortened, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXTENDS = "extends"
"""The key that names another job file, whose values hold where this one says nothing."""
MOST_BYTES = 1 << 20
"""Of a job file. What is larger is something else, given by mistake."""
MOST_FILES = 8
"""That extend each other."""
MOST_DEPTH = 32
"""Of tables and lists inside each other."""
MOST_TOLD = 30
"""Mistakes in one message."""


@dataclass(frozen=True)
class Line:
    """A line of a job file."""

    path: Path
    number: int


@dataclass
class JobFile:
    """A job file that was read, with what it extends, and with `--set` applied.

    Attributes:
        path: of the file.
        table: all values.
        mistakes: of the overrides, each with its place.
    """

    path: Path
    table: dict[str, Any]
    mistakes: list[str]
    _lines: dict[str, Line] = field(default_factory=dict)
    _overrides: dict[str, str] = field(default_factory=dict)

    def origin(self, place: str) -> str:
        """Where the value at a dotted place comes from: `--set ...`, `line 3`, or unknown, empty.

        A place that is not written anywhere, as a missing one, is looked for in its table.
        """
        place = _plain(place)
        inside = [name for name in self._overrides if name.startswith(f"{place}.")]
        if inside and place not in self._lines:
            place = inside[-1]
        while place:
            if place in self._overrides:
                return f"--set {_in_one_line(self._overrides[place])}"
            if place in self._lines:
                line = self._lines[place]
                other = "" if line.path == self.path else f" of {line.path}"
                return f"line {line.number}{other}"
            place = place.rpartition(".")[0]
        return ""

    def folder_of(self, place: str) -> Path:
        """Where paths begin that are the value at a dotted place: beside the file that says it."""
        if place in self._lines and place not in self._overrides:
            return self._lines[place].path.parent
        return self.path.parent

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
        if len(told) > MOST_TOLD:
            told[MOST_TOLD:] = [f"and {len(told) - MOST_TOLD} more"]
        return JobError(f"{subject} {count}:\n  " + "\n  ".join(told), everywhere=True)


def read(path: Path, overrides: Sequence[str] = ()) -> JobFile:
    """Read a job file and those that it extends, and apply overrides.

    Args:
        path: the TOML file.
        overrides: `table.key=value`, where the value is TOML or else a string.

    Raises:
        JobError: a file cannot be read or is not TOML, or files extend each other in a circle.
    """
    table, lines = _read_all(path)
    file = JobFile(path, table, [], lines)
    for override in overrides:
        _override(file, override)
    return file


def _read_all(path: Path) -> tuple[dict[str, Any], dict[str, Line]]:
    """The values of a file over those of the file that it extends, and so on."""
    chain = [path]
    read_files: list[tuple[int, int]] = []
    table: dict[str, Any] = {}
    lines: dict[str, Line] = {}
    while True:
        text, more, identity = _parse(chain)
        if identity in read_files:
            first = chain[read_files.index(identity)]
            raise _chain_error(chain, f"job files extend each other in a circle, through {first}")
        read_files.append(identity)
        lines = {k: Line(chain[-1], n) for k, n in _key_lines(text).items()} | lines
        table = _merged(more, table)
        name = more.get(EXTENDS)
        if not isinstance(name, str):  # if it is anything else, that is told with all mistakes
            return table, lines
        if len(chain) == MOST_FILES:
            raise _chain_error(chain, "too many job files extend each other", f"{MOST_FILES} files")
        chain.append(chain[-1].parent / name)


def _chain_error(chain: Sequence[Path], what: str, allowed: str | None = None) -> JobError:
    return JobError(
        what,
        allowed=allowed,
        where=" -> ".join(_in_one_line(str(path)) for path in chain),
        fix=f"leave out `{EXTENDS}` in one of them",
        everywhere=True,
    )


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Tables put together key by key; what is no table in both is that of `above`."""
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _merged(below[key], above[key])
    return merged


def _parse(chain: Sequence[Path]) -> tuple[str, dict[str, Any], tuple[int, int]]:
    """Text and values of the last file of a chain, and what the system knows it by."""
    path = chain[-1]
    fix = "check the path; a job file is TOML, see docs/job-file.md"
    if len(chain) > 1:
        fix = f"mend `{EXTENDS}` of {chain[-2]}: it is relative to that file"
    try:
        data, identity = _bytes_of(path)
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
        if _MANY_DOTS.search(text):  # which would take the parser minutes
            raise ValueError(f"a key of more than {_DOTS} parts")
        table = tomllib.loads(text)
        if _is_too_deep(table):
            raise RecursionError
        return text, table, identity
    except OSError as error:
        what = f"the job file cannot be read: {error.strerror}"
        found = sorted(str(p) for p in _listed(path))
        if found and len(chain) == 1:
            fix = f"name a job file; there are {', '.join(found[:5])}"
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        what = f"the job file is not TOML: byte 0x{byte:02x} in line {line} is not UTF-8"
        fix = "save it as UTF-8 text"
    except RecursionError:
        what = f"the job file has tables or lists more than {MOST_DEPTH} deep inside each other"
        fix = "write them flatter"
    except ValueError as error:  # TOMLDecodeError, and what Python has against huge integers
        what = f"the job file is not TOML: {shortened(str(error), 400)}"
        fix = "mend that line; `hpctrain keys` shows what a job file may hold"
    if path.suffix == ".py":
        fix = f"give the .toml whose `module` is {path.name}, not the module itself"
    where = " -> ".join(_in_one_line(str(each)) for each in chain)
    raise JobError(what, where=where, fix=fix, everywhere=True)


def _bytes_of(path: Path) -> tuple[bytes, tuple[int, int]]:
    """What a regular file holds, and its device and number; waits for nobody to write into it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        raise OSError(0, str(error)) from None  # a NUL in the path
    try:
        facts = os.fstat(descriptor)
        if stat.S_ISDIR(facts.st_mode):
            raise OSError(0, "Is a directory")
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(0, "it is a device or a pipe, and not a file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(MOST_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > MOST_BYTES:
        raise OSError(0, f"it has {facts.st_size} bytes, and a job file at most {MOST_BYTES}")
    return data, (facts.st_dev, facts.st_ino)


def _listed(path: Path) -> list[Path]:
    """Job files that may have been meant, beside a path that cannot be read."""
    try:
        return list((path if path.is_dir() else path.parent).glob("*.toml"))
    except (OSError, ValueError):
        return []


def _is_too_deep(value: object) -> bool:
    """Whether tables and lists lie too deep inside each other for what is to be done with them."""
    left = [(value, 0)]
    while left:
        value, depth = left.pop()
        if depth > MOST_DEPTH:
            return True
        if isinstance(value, (dict, list)):
            inside: Iterable[object] = value.values() if isinstance(value, dict) else value
            left += [(inner, depth + 1) for inner in inside]
    return False


_DOTS = 64
_MANY_DOTS = re.compile(r"(?:\.[ \t]*[\w\"'-][^.=,\[\]{}\n#]*)" + f"{{{_DOTS}}}")
_HEADER = re.compile(r"\s*\[([^\[\]=]+)\]\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\.[\w-]+)*)\s*=""")
_INLINE = re.compile(r"[{,]\s*([\w-]+)\s*=")


def _key_lines(text: str) -> dict[str, int]:
    """Line of each dotted key, for the usual ways to write TOML; exotic ones are passed over."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.split("\n"), 1):
        if header := _HEADER.match(line):
            table = re.sub(r"[\s\"']", "", header[1])
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            place = f"{table}.{key[1]}" if table else key[1]
            place = _plain(place)
            lines.setdefault(place, number)
            for inner in _INLINE.finditer(line, key.end()):
                lines.setdefault(f"{place}.{inner[1]}", number)
    return lines


def _in_one_line(text: str) -> str:
    """What the user has written, for a message."""
    return shortened(text) if text.isprintable() else shown(text)


def _override(file: JobFile, text: str) -> None:
    """Put one `table.key=value` into the table."""
    place, equals, written = text.partition("=")
    keys = place.strip().split(".")
    told = f"--set {_in_one_line(text)}"
    if not equals or not all(keys) or len(keys) > MOST_DEPTH:
        file.mistakes.append(f"{told}: expected table.key=value")
        return
    if keys[0] == EXTENDS:
        file.mistakes.append(f"{told}: only a job file can say what it extends")
        return
    try:
        if _MANY_DOTS.search(written):
            raise ValueError
        parsed = tomllib.loads(f"value = {written}")
        value = parsed["value"]
        if len(parsed) > 1:
            file.mistakes.append(f"{told}: holds more than one value; repeat --set for each")
            return
        if _is_too_deep(parsed):
            raise RecursionError
    except RecursionError:
        file.mistakes.append(f"{told}: more than {MOST_DEPTH} tables or lists inside each other")
        return
    except ValueError:
        value = written.strip()
    table = file.table
    for key in keys[:-1]:
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            file.mistakes.append(f"{told}: {key_text(key)} is a value and not a table")
            return
        table = inner
    table[keys[-1]] = value
    file._overrides[_plain(".".join(map(key_text, keys)))] = text


def _plain(place: str) -> str:
    """A dotted place as it is looked up: the same for `"a".b` and `a.b`."""
    return re.sub("[\"']", "", place)
