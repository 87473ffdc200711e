"""Packages are the same on a node as where they were packed, or refused."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpctrain.errors import JobError
from hpctrain.submit.packages import (
    DamagedError,
    contents_of,
    differences,
    digest_of,
    pack,
    size_of,
    unpack,
)


def make(folder: Path) -> Path:
    """Packages with all that may be in them."""
    (folder / "numbers" / "__pycache__").mkdir(parents=True)
    (folder / "numbers" / "__init__.py").write_text("one = 1\n")
    (folder / "numbers" / "__pycache__" / "x.pyc").write_bytes(b"compiled")
    (folder / "numbers" / "empty").touch()
    (folder / "bin").mkdir()
    (folder / "bin" / "tool").write_text("#!/bin/sh\n")
    (folder / "bin" / "tool").chmod(0o755)
    (folder / "bin" / "link").symlink_to("tool")
    (folder / "none").mkdir()
    (folder / "\u00fc and space").write_bytes(os.urandom(3_000_000))
    return folder


def test_what_is_unpacked_is_what_was_packed(tmp_path: Path) -> None:
    folder, archive = make(tmp_path / "deps"), tmp_path / "sub" / "x.tar"
    pack(folder, archive)
    unpack(archive, tmp_path / "there")
    contents = contents_of(tmp_path / "there")
    assert contents == contents_of(folder)
    assert digest_of(contents) == digest_of(contents_of(folder))
    assert size_of(contents) == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) - 10
    source = tmp_path / "there" / "numbers" / "__init__.py"  # by whose time Python knows its own
    assert source.stat().st_mtime == (folder / "numbers" / "__init__.py").stat().st_mtime
    assert [path.name for path in sorted(archive.parent.iterdir())] == [
        "x.tar",
        "x.tar.sha256",
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "numbers" / "__init__.py").write_text("one = 2\n"),
        lambda folder: (folder / "numbers" / "empty").unlink(),
        lambda folder: (folder / "new").touch(),
        lambda folder: (folder / "none").rename(folder / "other"),
        lambda folder: (folder / "bin" / "tool").chmod(0o644),
        lambda folder: (folder / "bin" / "link").unlink() or (folder / "bin" / "link").touch(),
    ],
)
def test_every_change_gives_another_hash(tmp_path: Path, change: object) -> None:
    folder = make(tmp_path / "deps")
    before = digest_of(contents_of(folder))
    assert callable(change)
    change(folder)
    assert digest_of(contents_of(folder)) != before


def test_times_and_what_was_compiled_do_not(tmp_path: Path) -> None:
    folder = make(tmp_path / "deps")
    before = digest_of(contents_of(folder))
    os.utime(folder / "numbers" / "__init__.py", (1, 1))
    (folder / "numbers" / "__pycache__" / "x.pyc").unlink()
    (folder / "numbers" / "__pycache__" / "y.pyc").touch()
    assert digest_of(contents_of(folder)) == before


def test_no_folder_and_links_that_lead_out(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no such folder"):
        contents_of(tmp_path / "deps")
    folder = make(tmp_path / "deps")
    (folder / "out").symlink_to("../secret")
    with pytest.raises(JobError, match="leads out of the folder"):
        contents_of(folder)
    (folder / "out").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(JobError, match="neither a file"):
        contents_of(folder)


def test_two_names_of_one_file(tmp_path: Path) -> None:
    """Installers make such links; nodes refuse them in archives, so that there are none."""
    folder = make(tmp_path / "deps")
    os.link(folder / "bin" / "tool", folder / "bin" / "second")
    pack(folder, tmp_path / "x.tar")
    unpack(tmp_path / "x.tar", tmp_path / "there")
    assert contents_of(tmp_path / "there") == contents_of(folder)


@pytest.mark.parametrize("damage", [lambda _: b"", lambda text: text[:300] + b"\1" + text[301:]])
def test_a_damaged_archive_is_made_anew(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder, archive = make(tmp_path / "deps"), tmp_path / "x.tar"
    assert pack(folder, archive)
    assert not pack(folder, archive)
    archive.write_bytes(damage(archive.read_bytes()))
    assert pack(folder, archive)
    unpack(archive, tmp_path / "there")


def test_compressed_archives_are_none_of_ours(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w:gz"):
        pass
    with pytest.raises(DamagedError, match="cannot be unpacked"):
        unpack(tmp_path / "x.tar", tmp_path / "there")


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    folder = make(tmp_path / "deps")
    (folder / os.fsdecode(b"\xff.py")).touch()
    with pytest.raises(JobError, match=r"not UTF-8(.|\n)*udcff.py\n.*rename it"):
        contents_of(folder)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """As another user's; root reads it all."""
    folder = make(tmp_path / "deps")
    secret = folder / "numbers" / ("empty" if what == "file" else "")
    owner, name = (Path, "open") if what == "file" else (os, "scandir")
    real = getattr(owner, name)

    def refuse(path: object, *arguments: Any) -> object:
        if Path(str(path)) == secret:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments)

    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(JobError, match=f"cannot be read: Permission denied(.|\n)*{secret}"):
        contents_of(folder)


def test_differences_from_what_was_recorded(tmp_path: Path) -> None:
    folder = make(tmp_path / "deps")
    recorded = contents_of(folder)
    assert differences(folder, recorded) == set()
    (folder / "none").rmdir()
    (folder / "bin" / "tool").write_text("other")
    os.mkfifo(folder / "pipe")
    (folder / os.fsdecode(b"\xff")).touch()
    odd = os.fsdecode(b"\xff")
    assert differences(folder, recorded) == {"none", "bin/tool", "pipe", odd}


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, target, 3 if kind == tarfile.REGTYPE else 0
    return made


@pytest.mark.parametrize(
    "odd",
    [
        member("../out"),
        member("/tmp/out"),
        member("a/../../out"),
        member("link", tarfile.SYMTYPE, "../out"),
        member("link", tarfile.SYMTYPE, "/etc/passwd"),
        member("hard", tarfile.LNKTYPE, "../out"),
        member("pipe", tarfile.FIFOTYPE),
        member("device", tarfile.CHRTYPE),
    ],
)
def test_archives_that_would_write_elsewhere(tmp_path: Path, odd: tarfile.TarInfo) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(odd, io.BytesIO(b"abc"))
    with pytest.raises(DamagedError, match="unexpected member"):
        unpack(tmp_path / "x.tar", tmp_path / "there")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [0, 100, 700, 5000])
def test_archives_that_are_cut_off(tmp_path: Path, kept: int) -> None:
    archive = tmp_path / "x.tar"
    pack(make(tmp_path / "deps"), archive)
    with archive.open("r+b") as file:
        file.truncate(kept)
    with pytest.raises(DamagedError, match="cannot be unpacked"):
        unpack(archive, tmp_path / "there")
