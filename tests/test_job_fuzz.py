"""Whatever a job file holds, it is a job or a `JobError`, at once."""

from __future__ import annotations

import json
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpctrain import job, keys
from hpctrain.errors import JobError

MODULE = """
from torch import nn
def model(width=4, sizes=(), name=""): return nn.Linear(width, 1)
def train_data(count=8, path=None): return range(count)
def loss(model, batch): return model(batch).mean()
"""
VALID = """\
module = "work.py"   # a remark
seed = 3
model = { width = 8, sizes = [1, 2] }
optimizer = { name = "adamw", lr = 0.01, betas = [0.9, 0.99] }

[train]
steps = 10
batch = 4
clip_norm = 1.0

[data]
count = 8
path = "a/b"
[exchange]
wire = "bfloat16"
[run]
folder = "runs"
"""
ODD = (
    *("1e400", "-0", "nan", "-inf", "1" * 31, "0x" + "f" * 2000, "9" * 5000, "1979-05-27", "true"),
    *(
        "[[",
        "]",
        "{",
        "}",
        '"',
        "'''",
        '"""',
        "=",
        ".",
        "#",
        "\n",
        ",",
        "\0",
        "\ufeff",
        "\x1b",
        "é",
    ),
    *(
        "extends = 'mine.toml'\n",
        "[train]\n",
        "seed = 1\n",
        "\\u0000",
        "a." * 70,
        "[" * 300,
        "work",
    ),
)

few = partial(
    settings,
    database=None,
    deadline=timedelta(seconds=20),  # a hang, and no measure of speed
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
quick = few(derandomize=True, max_examples=40)
thorough = few(max_examples=3000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "work.py").write_text(MODULE)
    return tmp_path / "mine.toml"


def tried(path: Path, *overrides: str) -> str | None:
    """The message of a refused job; None of one that can be kept."""
    try:
        loaded = job.load(path, overrides)
    except JobError as error:
        refused = error
    else:
        assert loaded.fingerprint
        json.dumps({"job": loaded.job.settings.optimizer}, default=str)
        return None
    assert refused.everywhere and len(str(refused)) < 20_000
    return str(refused)


def mutated(text: str, changes: list[tuple[int, int, str]]) -> str:
    for place, length, new in changes:
        place %= len(text) + 1
        text = text[:place] + new + text[place + length :]
    return text


garbage = st.binary(max_size=400) | st.text(alphabet="[]{}=.,\"'#\n ab1-+_e", max_size=200).map(
    str.encode
)
changes = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(0, 12), st.sampled_from(ODD) | st.text(max_size=3)),
    min_size=1,
    max_size=4,
)
plain: st.SearchStrategy[Any] = st.one_of(
    st.booleans(),
    st.integers(),
    st.integers(-(10**40), 10**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(alphabet=st.characters(codec="utf-8"), max_size=12),
)
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(alphabet="abc-_", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = [key.name for key in keys.keys_of(job.Job) if key.name != "extends"]


def as_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {as_toml(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    text = json.dumps(value) if isinstance(value, (bool, str)) else repr(value)
    return text.replace("\x7f", "\\u007f")


def any_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert tried(path), "no garbage has steps and a batch"


def any_mutation(path: Path, changed: list[tuple[int, int, str]]) -> None:
    path.write_text(mutated(VALID, changed), encoding="utf-8", errors="replace", newline="")
    text = tried(path)
    assert text is None or str(path) in text


def any_value(path: Path, key: str, value: Any) -> None:
    path.write_text(VALID)
    text = tried(path, f"{key}={as_toml(value)}")
    assert text is None or key.split(".")[0] in text


@quick
@given(content=garbage)
def test_any_bytes(path: Path, content: bytes) -> None:
    any_bytes(path, content)


@quick
@given(changed=changes)
def test_any_mutation_of_a_job(path: Path, changed: list[tuple[int, int, str]]) -> None:
    any_mutation(path, changed)


@quick
@given(key=st.sampled_from(KEYS), value=values)
def test_any_value_of_any_key(path: Path, key: str, value: Any) -> None:
    any_value(path, key, value)


@pytest.mark.parametrize("value", ["-1", "10000000000000000000000000000000", "nan", "'x'", "[{}]"])
def test_absurd_values_of_every_key(path: Path, value: str) -> None:
    path.write_text(VALID)
    text = tried(path, *(f"{key}={value}" for key in KEYS))
    assert text is not None and "mistakes" in text


@pytest.mark.slow
@thorough
@given(content=garbage)
def test_many_bytes(path: Path, content: bytes) -> None:
    any_bytes(path, content)


@pytest.mark.slow
@thorough
@given(changed=changes)
def test_many_mutations_of_a_job(path: Path, changed: list[tuple[int, int, str]]) -> None:
    any_mutation(path, changed)


@pytest.mark.slow
@thorough
@given(key=st.sampled_from(KEYS), value=values)
def test_many_values_of_any_key(path: Path, key: str, value: Any) -> None:
    any_value(path, key, value)
