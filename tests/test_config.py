from dataclasses import dataclass, field
from typing import Any

import pytest

from hpctrain.config import check, nearest, option, read
from hpctrain.errors import JobError


@dataclass(frozen=True, kw_only=True)
class Range:
    low: int = option(0, minimum=-5)
    high: int = option(1)

    def __post_init__(self) -> None:
        check(self)
        if self.low > self.high:
            raise JobError("low is above high")


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = option(minimum=1, maximum=10)
    ratio: float = option(0.5, above=0, maximum=1)
    limit: float | None = option(None, above=0)
    shape: str = option("linear", choices=("linear", "cosine"))
    shuffle: bool = True
    tags: list[str] = option([])
    facts: dict[str, Any] = option({})
    span: Range = field(default_factory=Range)

    def __post_init__(self) -> None:
        check(self)


def mistakes_in(table: object, where: str = "") -> list[str]:
    mistakes: list[str] = []
    assert (read(Config, table, where, mistakes) is None) == bool(mistakes)
    return mistakes


def test_a_full_table_is_read_as_it_stands() -> None:
    table = {
        "steps": 3,
        "ratio": 0.25,
        "limit": 2.0,
        "shape": "cosine",
        "shuffle": False,
        "tags": ["a"],
        "facts": {"width": 8},
        "span": {"low": -2, "high": 5},
    }
    mistakes: list[str] = []
    assert read(Config, table, "", mistakes) == Config(
        steps=3,
        ratio=0.25,
        limit=2.0,
        shape="cosine",
        shuffle=False,
        tags=["a"],
        facts={"width": 8},
        span=Range(low=-2, high=5),
    )
    assert mistakes == []


def test_what_a_table_leaves_out_has_its_default() -> None:
    assert read(Config, {"steps": 1}, "", []) == Config(
        steps=1,
        ratio=0.5,
        limit=None,
        shape="linear",
        shuffle=True,
        tags=[],
        facts={},
        span=Range(),
    )


@pytest.mark.parametrize("name", ["ratio", "limit"])
def test_a_whole_number_is_read_as_a_float_where_a_float_is_meant(name: str) -> None:
    config = read(Config, {"steps": 1, name: 1}, "", [])
    assert repr(getattr(config, name)) == "1.0"


@pytest.mark.parametrize(
    ("table", "mistake"),
    [
        ({"steps": 0}, "steps: got 0; allowed: at least 1 and at most 10"),
        ({"steps": 11}, "steps: got 11; allowed: at least 1 and at most 10"),
        ({"steps": 2.0}, "steps: expected an integer, got 2.0"),
        ({"steps": True}, "steps: expected an integer, got True"),
        ({"steps": None}, "steps: expected an integer, got None"),
        ({"ratio": 0}, "ratio: got 0.0; allowed: more than 0 and at most 1"),
        ({"ratio": "1"}, "ratio: expected a number, got '1'"),
        ({"ratio": float("nan")}, "ratio: expected a number, got nan"),
        ({"ratio": False}, "ratio: expected a number, got False"),
        ({"limit": float("inf")}, "limit: expected a number, got inf"),
        ({"limit": -1}, "limit: got -1.0; allowed: more than 0"),
        ({"shape": "sawtooth"}, "shape: got 'sawtooth'; allowed: linear, cosine"),
        (
            {"shape": "cosin"},
            "shape: got 'cosin'; allowed: linear, cosine (did you mean 'cosine'?)",
        ),
        ({"shape": 3}, "shape: expected a string, got 3"),
        ({"shuffle": 1}, "shuffle: expected true or false, got 1"),
        ({"tags": "a"}, "tags: expected a list, got 'a'"),
        ({"facts": []}, "facts: expected a table, got []"),
        ({"span": 4}, "span: expected a table, got 4"),
        ({"span": {"low": "0"}}, "span.low: expected an integer, got '0'"),
        ({"span": {"low": 3, "high": 2}}, "span: low is above high"),
        ({"span": {"hihg": 2}}, "span.hihg: unknown key; did you mean 'high'?"),
        (
            {"zzz": 2},
            "zzz: unknown key; valid here: facts, limit, ratio, shape, shuffle, span, steps, tags",
        ),
    ],
)
def test_a_mistake_names_place_value_and_what_is_allowed(
    table: dict[str, Any], mistake: str
) -> None:
    assert mistakes_in({"steps": 1} | table) == [mistake]


def test_a_number_too_large_for_a_float_is_a_mistake() -> None:
    assert len(mistakes_in({"steps": 1, "ratio": 10**400})) == 1


def test_all_mistakes_are_told_at_once_with_their_place() -> None:
    table = {"ratio": 7, "shpe": "linear", "span": {"low": -9, "x": 1}}
    places = [mistake.partition(": ")[0] for mistake in mistakes_in(table, "train")]
    assert sorted(places) == [
        "train.ratio",
        "train.shpe",
        "train.span.low",
        "train.span.x",
        "train.steps",
    ]


def test_a_missing_key_is_a_mistake() -> None:
    assert mistakes_in({}, "train") == ["train.steps: missing; it must be set"]


@pytest.mark.parametrize("table", [3, "steps", ["steps"], None])
def test_what_is_no_table_is_a_mistake(table: object) -> None:
    assert mistakes_in(table, "train") == [f"train: expected a table, got {table!r}"]


def test_mistakes_of_other_tables_do_not_keep_a_table_from_being_read() -> None:
    mistakes = ["elsewhere: wrong"]
    assert read(Config, {"steps": 1}, "", mistakes) == Config(steps=1)
    assert mistakes == ["elsewhere: wrong"]


def test_code_is_held_to_the_same_rules_and_told_all_mistakes() -> None:
    with pytest.raises(JobError) as caught:
        Config(steps=0, shape="round", shuffle="yes")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "Config: steps: got 0; allowed: at least 1 and at most 10; "
        "shape: got 'round'; allowed: linear, cosine; "
        "shuffle: expected true or false, got 'yes'"
    )


def test_instances_do_not_share_a_default_that_can_change() -> None:
    Config(steps=1).tags.append("mine")
    Config(steps=1).facts["mine"] = 1
    assert Config(steps=1).tags == []
    assert Config(steps=1).facts == {}


@pytest.mark.parametrize(
    ("name", "valid", "hint"),
    [
        ("stepz", ["steps", "batch"], "; did you mean 'steps'?"),
        ("qqq", ["steps", "batch"], "; valid here: batch, steps"),
        ("qqq", [], ""),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_or_all(
    name: str, valid: list[str], hint: str
) -> None:
    assert nearest(name, valid) == hint
