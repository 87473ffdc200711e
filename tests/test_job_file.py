"""The text of a job: what is no job file is told in one message, whatever it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpctrain import job_file
from hpctrain.errors import ExitCode, JobError


def refused(path: Path) -> str:
    with pytest.raises(JobError) as caught:
        job_file.read(path)
    assert caught.value.everywhere and caught.value.exit_code == ExitCode.BAD_JOB
    assert caught.value.where and caught.value.fix
    text = str(caught.value)
    assert len(text) < 2000, "no message prints what was put into the file"
    return text


CONTENTS = {
    "NUL": (b"seed\0 = 1", "is not TOML"),
    "latin-1": (b'a = 1\nb = "\xe9"', "byte 0xe9 in line 2 is not UTF-8"),
    "UTF-16": ("seed = 1".encode("utf-16"), "byte 0xff in line 1 is not UTF-8"),
    "lists": (b"a = " + b"[" * 100_000, "more than 32 deep inside each other"),
    "tables": (b"a = " + b"{b = " * 10_000, "more than 32 deep inside each other"),
    "dotted": (b"a." * 40 + b"b = 1", "more than 32 deep inside each other"),
    "many dots": (b"a." * 200_000 + b"b = 1", "a key of more than 64 parts"),
    "many quoted dots": (b'"a" . ' * 100_000 + b"b = 1", "a key of more than 64 parts"),
    "digits": (b"a = " + b"9" * 5000, "is not TOML"),
    "long line": (b"a = " + b"x" * 900_000, "is not TOML"),
    "long key twice": ((b"k" * 100_000 + b" = 1\n") * 2, "is not TOML"),
    "twice": (b"[train]\nsteps = 1\nsteps = 2", "is not TOML"),
    "table twice": (b"[train]\nsteps = 1\n[train]\nbatch = 2", "is not TOML"),
    "ten megabytes": (bytes(range(256)) * 40_000, "it has 10240000 bytes, and a job file at most"),
}


@pytest.mark.parametrize(("content", "expected"), CONTENTS.values(), ids=CONTENTS)
def test_content_that_is_no_job(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "odd.toml"
    path.write_bytes(content)
    assert expected in refused(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfseed = 1", b"seed = 1\r\n"], ids=["BOM", "CRLF"])
def test_files_of_other_editors_are_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    assert job_file.read(path).table == {"seed": 1}


def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "it is a device or a pipe, and not a file" in refused(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/dev/zero", "it is a device or a pipe"),
        ("/dev/null", "it is a device or a pipe"),
        ("/", "Is a directory"),
        ("a\0b", "embedded null byte"),
        ("x" * 5000, "File name too long"),
        ("nowhere\x1b[2J.toml", "No such file"),
    ],
)
def test_path_that_is_no_file(path: str, expected: str) -> None:
    text = refused(Path(path))
    assert expected in text and text.replace("\n", "").isprintable()


@pytest.mark.skipif(os.getuid() == 0, reason="root may read anything")
def test_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").touch(mode=0)
    assert "Permission denied" in refused(tmp_path / "mine.toml")


# ---------------------------------------------------------------------- extends


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return folder / f"{next(iter(files))}.toml"


def test_tables_are_put_together_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write(
        tmp_path / "below",
        base='extends = "../root.toml"\n[train]\nsteps = 1\nbatch = 2\n[model]\nsizes = [1, 2]\n',
    )
    write(tmp_path, root="seed = 7\ntrain = { steps = 9, micro_batch = 3 }\ndata = 5\n")
    text = 'extends = "below/base.toml"\ntrain.steps = 5\nmodel = { sizes = [3] }\ndata.count = 1\n'
    file = job_file.read(write(tmp_path, mine=text), ["train.batch=8"])
    assert file.table == {
        "extends": "below/base.toml",
        "seed": 7,
        "train": {"steps": 5, "batch": 8, "micro_batch": 3},
        "model": {"sizes": [3]},
        "data": {"count": 1},
    }
    base, root = tmp_path / "below" / "base.toml", tmp_path / "below" / "../root.toml"
    assert file.origin("train.steps") == "line 2"
    assert file.origin("train.batch") == "--set train.batch=8"
    assert file.origin("model") == "line 3"
    assert file.origin("train") == f"line 2 of {base}"
    assert file.origin("train.micro_batch") == f"line 2 of {root}"
    assert file.folder_of("seed") == root.parent and file.folder_of("model") == tmp_path


CIRCLES = {
    "itself": {"a": 'extends = "a.toml"'},
    "two": {"a": 'extends = "b.toml"', "b": 'extends = "./a.toml"'},
    "later": {"a": 'extends = "b.toml"', "b": 'extends = "c.toml"', "c": 'extends = "b.toml"'},
}


@pytest.mark.parametrize("files", CIRCLES.values(), ids=CIRCLES)
def test_circle_is_told_with_its_chain(tmp_path: Path, files: dict[str, str]) -> None:
    text = refused(write(tmp_path, **files))
    assert "extend each other in a circle" in text
    assert text.count(" -> ") == len(files)


def test_circle_through_a_link_is_one(tmp_path: Path) -> None:
    path = write(tmp_path, a='extends = "link.toml"')
    (tmp_path / "link.toml").symlink_to(path)
    assert "in a circle" in refused(path)


def test_long_chain_is_refused(tmp_path: Path) -> None:
    files = {f"n{i}": f'extends = "n{i + 1}.toml"' for i in range(20)}
    text = refused(write(tmp_path, **files))
    assert "allowed: 8 files" in text and text.count(" -> ") == 7


@pytest.mark.parametrize(
    ("name", "expected"),
    [("none.toml", "No such file"), ("", "Is a directory"), ("bad.toml", "is not TOML")],
)
def test_mistake_of_an_extended_file_names_both(tmp_path: Path, name: str, expected: str) -> None:
    path = write(tmp_path, mine=f'extends = "{name}"', bad="seed = ")
    text = refused(path)
    assert expected in text and f"where: {path} -> {tmp_path / name}" in text


def test_command_line_extends_nothing(tmp_path: Path) -> None:
    file = job_file.read(write(tmp_path, mine="seed = 1"), ["extends=other.toml"])
    assert file.mistakes == ["--set extends=other.toml: only a job file can say what it extends"]
    assert file.table == {"seed": 1}


# ---------------------------------------------------------------------- messages


def test_messages_are_short_and_have_no_control_characters(tmp_path: Path) -> None:
    path = write(tmp_path, mine="seed = 1")
    overrides = [
        f"{'k' * 100_000}",
        "a\x1b[2J\n",
        "a=" + "{c=" * 1000,
        "x." * 100 + "y=1",
        "seed.a=1",
    ]
    file = job_file.read(path, overrides)
    assert len(file.mistakes) == len(overrides)
    for line in file.mistakes:
        assert line.isprintable() and len(line) < 400


def test_thousands_of_mistakes_are_counted(tmp_path: Path) -> None:
    file = job_file.read(write(tmp_path, mine="seed = 1"))
    lines = str(file.mistake([f"k{i}: unknown key" for i in range(5000)])).splitlines()
    assert lines[0].endswith("has 5000 mistakes:")
    assert len(lines) == 32 and lines[-1] == "  and 4970 more"
