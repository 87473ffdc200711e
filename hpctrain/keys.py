"""Every key of a job file as a table, taken from the dataclasses that declare them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hpctrain.config import rules_text

HEADINGS = ("key", "type", "default", "allowed", "meaning")
_KINDS: dict[object, str] = {
    int: "integer",
    float: "number",
    bool: "boolean",
    str: "string",
    list[int]: "integers",
    list[str]: "strings",
}


class Key(NamedTuple):
    """One row of the table."""

    name: str
    kind: str
    default: str
    allowed: str
    meaning: str


def keys_of(cls: type, where: str = "") -> Iterator[Key]:
    """The keys of a dataclass and of those inside it, in the order of their declaration."""
    hints, texts = typing.get_type_hints(cls), docstrings(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], f"{where}{field.name}"
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from keys_of(hint, f"{name}.")
            continue
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kind = " or ".join(_KINDS.get(k, "table") for k in kinds if k is not type(None))
        yield Key(
            name, kind, _default(field), rules_text(field.metadata), texts.get(field.name, "")
        )


def docstrings(cls: type) -> Mapping[str, str]:
    """The text below each field of a class and of those it inherits from, in one line."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            texts |= _own_docstrings(base)
    return texts


def _own_docstrings(cls: type) -> Mapping[str, str]:
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return "none" if field.default is None else json.dumps(field.default)
    return "must be set" if field.default_factory is dataclasses.MISSING else "empty"


def as_text(keys: Iterator[Key]) -> str:
    """The keys for a terminal, the meaning below each."""
    rows = list(keys)
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False))
        lines.append("  ".join((*cells, row.allowed)).rstrip())
        lines += textwrap.wrap(row.meaning, 96, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def as_markdown(keys: Iterator[Key]) -> str:
    """The keys as a table for docs/job-file.md."""
    rows = [HEADINGS, ("---",) * len(HEADINGS)]
    for key in keys:
        cells = (f"`{key.name}`", key.kind, key.default, key.allowed, key.meaning)
        rows.append(tuple(cell.replace("|", r"\|") for cell in cells))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
