from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain import cli, keys
from hpctrain.job import Job

DOCS = Path(__file__).parents[1] / "docs" / "job-file.md"


def test_every_key_has_a_meaning() -> None:
    assert [key.name for key in keys.keys_of(Job) if not key.meaning] == []


def test_keys_are_those_of_the_dataclasses() -> None:
    rows = {key.name: key for key in keys.keys_of(Job)}
    assert rows["train.steps"][1:4] == ("integer", "must be set", "at least 1")
    assert rows["train.clip_norm"][1:4] == ("number", "none", "more than 0")
    assert rows["exchange.overlap"][1:3] == ("boolean", "true")
    assert rows["schedule.name"].allowed == "constant, linear, cosine"
    assert rows["optimizer"][1:3] == ("table", "empty")


def test_documentation_has_the_table_of_the_code() -> None:
    """After changing a key: `hpctrain keys --markdown` prints the new table."""
    assert keys.as_markdown(keys.keys_of(Job)) in DOCS.read_text()


def test_command_lists_all_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keys"]) == 0
    text = capsys.readouterr().out
    assert all(f"{key.name} " in text for key in keys.keys_of(Job))


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_has_an_example_and_the_exit_statuses(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(arguments)
    text = capsys.readouterr().out
    assert "mpirun -n 4 hpctrain run jobs/digits.toml" in text
    assert "143  a rank was ended" in text and "hpctrain keys" in text
