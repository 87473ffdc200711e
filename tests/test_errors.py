import pickle
from typing import Any

import pytest

from hpctrain import errors
from hpctrain.errors import ExitCode, HpctrainError, JobError, UnfitError


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({}, "it is wrong"),
        ({"value": "x"}, "it is wrong: got 'x'"),
        ({"value": 0}, "it is wrong: got 0"),
        ({"value": ""}, "it is wrong: got ''"),
        ({"allowed": "1 to 3"}, "it is wrong; allowed: 1 to 3"),
        ({"where": "job.toml"}, "it is wrong\n  where: job.toml"),
        ({"fix": "mend it"}, "it is wrong\n  fix: mend it"),
        (
            {"fix": "mend it", "where": "job.toml", "allowed": "1 to 3", "value": 4},
            "it is wrong: got 4; allowed: 1 to 3\n  where: job.toml\n  fix: mend it",
        ),
    ],
)
def test_message_has_its_parts_in_one_order(parts: dict[str, Any], text: str) -> None:
    assert str(HpctrainError("it is wrong", **parts)) == text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (JobError, 2),
        (UnfitError, 3),
        (errors.MismatchError, 1),
        (errors.ExchangeError, 1),
        (errors.StallError, 1),
        (errors.CheckpointError, 1),
        (errors.TrainingError, 1),
    ],
)
def test_each_error_ends_a_command_with_its_code(error: type[HpctrainError], code: int) -> None:
    assert issubclass(error, HpctrainError)
    assert error("it is wrong").exit_code == code


def test_exit_codes_are_what_shells_and_slurm_scripts_were_told() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "DONE": 0,
        "CRASH": 1,
        "BAD_JOB": 2,
        "UNFIT": 3,
        "REQUEUE": 75,
    }


def test_an_error_survives_the_way_to_another_rank() -> None:
    error = UnfitError("it is wrong", value=4, where="job.toml", fix="mend it", everywhere=True)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is UnfitError
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


class Odd:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        if not self.text:
            raise OSError("gone")
        return self.text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\n\x1b[2J", r"'a\n\x1b[2J'"),
        (Odd("Net(\n  \x1b[2J)"), "Net( [2J)"),
        (Odd(""), "a Odd that cannot be shown (OSError)"),
        ([1 << 20_000], "a list that cannot be shown (ValueError)"),
        (-(1 << 20_000), "an integer of 20001 bits"),
    ],
    ids=["control", "lines", "fails", "inside", "bits"],
)
def test_any_value_can_be_shown_in_one_line(value: object, text: str) -> None:
    assert errors.shown(value) == text
    assert str(HpctrainError("it is wrong", value=value)) == f"it is wrong: got {text}"


def test_long_values_are_cut_in_the_middle() -> None:
    text = errors.shown("a" * 10_000 + "end")
    assert text.startswith("'aaa") and text.endswith("end' (10005 characters)")
    assert len(text) < 250
    assert errors.told(ValueError("b" * 10_000)).startswith("ValueError: bbb")
    assert errors.told(SystemExit()) == "SystemExit"


def test_message_holds_nothing_that_a_terminal_obeys() -> None:
    error = HpctrainError("no x\x1b[2J", where="a\rb\udcff", fix="mend it")
    assert str(error) == "no x\\x1b[2J\n  where: a\\rb\\udcff\n  fix: mend it"
