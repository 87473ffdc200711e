"""Files in places that others may write to as well.

Where many users share a machine, a name that can be guessed may be there already: a link to another
file, a pipe that nobody writes into, or a file that its owner changes later.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TextIO, cast

_CAREFUL = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Not through a link, and without waiting for the other end of a pipe."""


def replace_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it: readers see the old one or the new one.

    What is at the place is replaced and not written into, also when it is a link.
    """
    side = path.with_name(f".{path.name}.partial")
    side.unlink(missing_ok=True)
    with side.open("x", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
    side.replace(path)


def open_in_place(path: Path, mode: str) -> TextIO:
    """Open a text file to be written at its end, made if it is missing, and not through a link.

    Args:
        path: of the file.
        mode: `a` or `a+`.

    Raises:
        OSError: what is there is no file, or is a link.
    """

    way = os.O_RDWR if "+" in mode else os.O_WRONLY
    descriptor = os.open(path, way | os.O_CREAT | os.O_APPEND | _CAREFUL, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no file")
    file = os.fdopen(descriptor, mode, encoding="utf-8", errors="backslashreplace")
    return cast(TextIO, file)


def others_may_write(path: Path) -> bool:
    """Whether users other than this process's own, and root, decide what is at a path.

    Of a folder: what is in it. A group that may write is trusted: somebody has let it in.
    """
    facts = path.stat()
    return facts.st_uid not in (os.geteuid(), 0) or bool(facts.st_mode & stat.S_IWOTH)


def anyone_may_write(path: Path) -> bool:
    """Whether every user of the machine may."""
    return bool(path.stat().st_mode & stat.S_IWOTH)


def read_private(path: Path, most_bytes: int = 1 << 20) -> str:
    """The text of a file that nobody else can have written.

    Raises:
        OSError: it cannot be read, is a link or no file, or others can write it or its folder.
        ValueError: it is no text, or too large.
    """
    refuse_shared(path.parent)
    descriptor = os.open(path, os.O_RDONLY | _CAREFUL)
    with os.fdopen(descriptor, encoding="utf-8") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or _is_shared(facts):
            raise PermissionError(f"others can write {path}")
        text = file.read(most_bytes + 1)
    if len(text) > most_bytes:
        raise ValueError(f"{path} is too large")
    return text


def refuse_shared(folder: Path) -> None:
    """Make sure that nobody else can write into a folder.

    Raises:
        OSError: it is missing, is a link, or others can.
    """
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or _is_shared(facts):
        raise PermissionError(f"others can write into {folder}")


def _is_shared(facts: os.stat_result) -> bool:
    return facts.st_uid != os.geteuid() or bool(facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
