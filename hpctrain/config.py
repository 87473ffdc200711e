"""Frozen dataclasses as configuration: declared once beside their owner, read from tables.

A field says what it allows in its metadata::

    @dataclass(frozen=True, kw_only=True)
    class TrainConfig:
        steps: int = option(minimum=1)
        '''Optimizer steps in the whole run.'''

`read` collects every mistake of a table instead of stopping at the first; `check` holds an
instance built in code to the same rules.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from hpctrain.errors import HpctrainError, JobError, shortened, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

LONGEST_S = 1_000_000_000
"""Of a time in a job: some thirty years, and still what clocks and locks of the system take."""
_LARGEST_INTEGER = (1 << 63) - 1
"""Of a field without a maximum: what TOML promises to keep, and all that C code takes."""
_HINTED = 50
"""Behind so many mistakes, none is told the nearest valid name, which takes time."""
_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def option(
    default: Any = dataclasses.MISSING,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    choices: Collection[str] | None = None,
    pattern: tuple[str, str] | None = None,
) -> Any:
    """A dataclass field with the values that it allows.

    Args:
        default: the value when the table does not name the field; without it the field must be set.
        minimum: smallest allowed number.
        above: allowed numbers are greater than this.
        maximum: largest allowed number.
        choices: allowed strings.
        pattern: regular expression that a string, or each of a list, matches as a whole, and what
            it allows in words; that of a field which may be a number as well says so.
    """
    rules = {
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "choices": choices,
        "pattern": pattern,
    }
    metadata = {name: rule for name, rule in rules.items() if rule is not None}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def nearest(name: str, valid: Collection[str]) -> str:
    """`; did you mean 'x'?` for the valid name closest to `name`, or the list of valid names."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid here: {', '.join(sorted(valid))}" if valid else ""


def read(cls: type[T], table: object, where: str, mistakes: list[str]) -> T | None:
    """Build `cls` from a table, adding one line to `mistakes` for each thing that is wrong.

    Args:
        cls: a frozen dataclass whose fields are plain values or such dataclasses.
        table: what the file holds at this place.
        where: dotted name of the place, empty at the top.
        mistakes: receives `where: what is wrong`.

    Returns:
        The instance, or None when a mistake of this table keeps it from being built.
    """
    if not isinstance(table, Mapping):
        mistakes.append(f"{where}: expected a table, got {shown(table)}")
        return None
    found_before = len(mistakes)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for name in table:
        if name not in fields:
            hint = nearest(str(name), fields) if len(mistakes) < _HINTED else ""
            mistakes.append(f"{_join(where, name)}: unknown key{hint}")
    for name, field in fields.items():
        place = _join(where, name)
        if name in table:
            if dataclasses.is_dataclass(hints[name]):
                values[name] = read(typing.cast(type, hints[name]), table[name], place, mistakes)
            else:
                values[name] = _value(table[name], hints[name], field, place, mistakes)
        elif _required(field):
            mistakes.append(f"{place}: missing; it must be set")
    if len(mistakes) > found_before:
        return None
    try:
        return cls(**values)
    except HpctrainError as error:
        mistakes.append(f"{where or 'job'}: {error.what}")
        return None


def check(config: Any) -> None:
    """Hold an instance to the rules of its fields.

    Raises:
        JobError: naming every field that breaks its rule.
    """
    mistakes: list[str] = []
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if not dataclasses.is_dataclass(hints[field.name]):
            value = getattr(config, field.name)
            _value(value, hints[field.name], field, field.name, mistakes)
    if mistakes:
        raise JobError(f"{type(config).__name__}: " + "; ".join(mistakes))


def _join(where: str, name: object) -> str:
    return f"{where}.{key_text(name)}" if where else key_text(name)


def key_text(name: object) -> str:
    """A key for a message: as TOML has it where it is a plain word, else in quotes."""
    text = str(name)
    return shortened(text, 60) if re.fullmatch(r"[A-Za-z0-9_-]+", text) else shown(text, 60)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(
    value: object, hint: Any, field: dataclasses.Field[Any], place: str, mistakes: list[str]
) -> Any:
    """`value` as the field's type, or a line in `mistakes`."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 1 << 1023 else math.inf
        if kind is type(None) or not _is_a(value, kind):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            break
        if isinstance(value, (Mapping, list)):
            mistakes += _unkept(value, place)
        allowed = _broken_rule(value, field.metadata)
        if allowed:
            mistakes.append(f"{place}: got {shown(value)}; allowed: {allowed}")
        return value
    expected = " or ".join(
        _NAMES.get(kind, _describe(kind)) for kind in kinds if kind is not type(None)
    )
    mistakes.append(f"{place}: expected {expected}, got {shown(value)}")
    return value


def _unkept(value: object, place: str) -> Iterator[str]:
    """Integers inside a table or list that could not even be written down again."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _unkept(inner, _join(place, key))
    elif isinstance(value, list):
        for inner in value:
            yield from _unkept(inner, place)
    elif isinstance(value, int) and value.bit_length() > 1000:
        yield f"{place}: expected an integer of 64 bits, got {shown(value)}"


def _is_a(value: object, kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    if origin is dict:
        return isinstance(value, Mapping)
    if isinstance(value, bool):
        return origin is bool
    return isinstance(value, origin)


def _describe(kind: Any) -> str:
    origin = typing.get_origin(kind) or kind
    return {dict: "a table", list: "a list"}.get(origin, f"a {origin.__name__}")


def _broken_rule(value: Any, rules: Mapping[str, Any]) -> str:
    """What the rules allow, when `value` breaks one of them; else an empty string."""
    if "choices" in rules and value not in rules["choices"]:
        close = difflib.get_close_matches(str(value), rules["choices"], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return rules_text(rules) + hint
    if isinstance(value, int) and "maximum" not in rules and abs(value) > _LARGEST_INTEGER:
        return " and ".join(filter(None, (rules_text(rules), f"at most {_LARGEST_INTEGER}")))
    if isinstance(value, (int, float)):
        broken = (
            ("minimum" in rules and value < rules["minimum"])
            or ("above" in rules and value <= rules["above"])
            or ("maximum" in rules and value > rules["maximum"])
        )
    else:
        texts = value if isinstance(value, list) else [value]
        broken = "pattern" in rules and not all(_matches(rules["pattern"][0], t) for t in texts)
    if not broken:
        return ""
    return rules_text(rules)


def _matches(pattern: str, text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(pattern, text) is not None


def rules_text(rules: Mapping[str, Any]) -> str:
    """What the rules of a field allow, in words; empty without rules."""
    if "choices" in rules:
        return ", ".join(rules["choices"])
    if "pattern" in rules:
        return str(rules["pattern"][1])
    words = {"minimum": "at least {}", "above": "more than {}", "maximum": "at most {}"}
    return " and ".join(words[rule].format(rules[rule]) for rule in words if rule in rules)
