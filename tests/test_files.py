"""Files where others may write too: no link is followed, nothing of another user is believed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpctrain.files import (
    open_in_place,
    others_may_write,
    read_private,
    refuse_shared,
    replace_text,
)

STRANGER = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to make files of another user")


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file that somebody wants us to write into."""
    path = tmp_path / "precious"
    path.write_text("kept")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir(mode=0o700)
    return path


@pytest.mark.parametrize("name", ["report.html", ".report.html.partial"])
def test_link_is_replaced_and_not_followed(folder: Path, precious: Path, name: str) -> None:
    (folder / name).symlink_to(precious)
    replace_text(folder / "report.html", "new \udcff")
    assert (folder / "report.html").read_text() == "new \\udcff"
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    assert precious.read_text() == "kept"


@pytest.mark.parametrize("mode", ["a", "a+"])
def test_link_and_pipe_are_not_opened(folder: Path, precious: Path, mode: str) -> None:
    (folder / "link").symlink_to(precious)
    os.mkfifo(folder / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError, match=name):
            open_in_place(folder / name, mode)
    with open_in_place(folder / "new", mode) as file:
        file.write("é")
    assert (folder / "new").read_bytes() == "é".encode()


def test_private_file_is_read(folder: Path) -> None:
    (folder / "cache").write_text("mine")
    (folder / "cache").chmod(0o600)
    assert read_private(folder / "cache") == "mine"
    with pytest.raises(ValueError, match="too large"):
        read_private(folder / "cache", most_bytes=3)


@pytest.mark.parametrize("case", ["link", "pipe", "writable", "writable folder", "linked folder"])
def test_what_others_can_change_is_not_read(folder: Path, precious: Path, case: str) -> None:
    path = folder / "cache"
    if case == "link":
        path.symlink_to(precious)
    elif case == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("theirs")
        path.chmod(0o620 if case == "writable" else 0o600)
    if case == "writable folder":
        folder.chmod(0o777)
    if case == "linked folder":
        (folder.parent / "other").symlink_to(folder)
        path = folder.parent / "other" / "cache"
    with pytest.raises((OSError, PermissionError), match=r"others can|Too many levels"):
        read_private(path)


@as_root
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_belongs_to_another_user_is_not_read(folder: Path, what: str) -> None:
    (folder / "cache").write_text("theirs")
    os.chown(folder if what == "folder" else folder / "cache", STRANGER, STRANGER)
    with pytest.raises(PermissionError, match="others can write"):
        read_private(folder / "cache")
    if what == "folder":
        with pytest.raises(PermissionError):
            refuse_shared(folder)


def test_who_decides_what_is_in_a_folder(folder: Path) -> None:
    folder.chmod(0o775)
    assert not others_may_write(folder)
    folder.chmod(0o777)
    assert others_may_write(folder)


@as_root
def test_folder_of_another_user_is_theirs(folder: Path) -> None:
    os.chown(folder, STRANGER, STRANGER)
    assert others_may_write(folder)
