"""A lock on a run folder: one launch trains in it at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from hpctrain.errors import shortened
from hpctrain.files import open_in_place

LOOK_S = 0.3
"""How long one waits for those that only look who holds a lock."""
POLL_S = 0.01


class RunLock:
    """Held by the root of the launch that trains in a folder.

    The system takes it back when the process ends, however it ends. On a file system without
    locks, every launch gets it: nothing is known there about the others.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def take(self) -> str | None:
        """Take the lock. Returns None, or who holds it: `pid 4711 on node-a`.

        Raises:
            OSError: there cannot be a lock.
        """
        try:
            file = open_in_place(self._path, "a+")
        except PermissionError:
            if not self._path.exists() or self._path.stat().st_uid == os.geteuid():
                raise
            return "another user"
        given_up_s = time.monotonic() + LOOK_S
        while not _locked(file, fcntl.LOCK_EX):
            if time.monotonic() > given_up_s:  # whoever only looks has let go by then
                return _holder_in(file)
            time.sleep(POLL_S)
        self._file = file
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return None

    def release(self) -> None:
        """Let others have it."""
        if self._file is None:
            return
        file, self._file = self._file, None
        file.truncate(0)
        with suppress(OSError):
            # Closing is not enough: workers of a data loader, forked, have the file open too.
            fcntl.flock(file, fcntl.LOCK_UN)
        file.close()


def holder_of(path: Path) -> str | None:
    """Who holds the lock at a path, or None. Takes it from nobody, nor for long."""
    try:
        file = open_in_place(path, "a+")
    except PermissionError:
        return "another user" if path.stat().st_uid != os.geteuid() else None
    except FileNotFoundError:
        return None
    if not _locked(file, fcntl.LOCK_SH):
        return _holder_in(file)
    file.close()
    return None


def _locked(file: TextIO, kind: int) -> bool:
    """Whether the lock was to be had at once, or this file system has none."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _holder_in(file: TextIO) -> str:
    """What the holder has written; the file is closed."""
    file.seek(0)
    with file:
        return shortened(file.read(1000).strip()) or "another process"
