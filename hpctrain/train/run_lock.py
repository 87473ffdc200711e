"""A lock on a run folder: one launch trains in it at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from hpctrain.errors import shortened
from hpctrain.files import open_in_place


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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                holder = shortened(file.read(1000).strip()) or "another process"
                file.close()
                return holder
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
    """Who holds the lock at a path, or None."""
    if not path.exists():
        return None
    lock = RunLock(path)
    holder = lock.take()
    lock.release()
    return holder
