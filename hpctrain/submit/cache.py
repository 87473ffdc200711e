"""Packages that a node keeps between jobs, each folder of them once, by the hash of its content.

    CACHE/                 private to its owner
        DIGEST/files/...   what jobs import
        DIGEST/contents    what must be in there, as it was unpacked
        DIGEST.lock        held while an entry is made or looked at
        DIGEST.use         held, shared, by ranks that import from it

The batch script runs this module on each node, `check` first and `fill` where that found nothing.
An entry is made beside its place and renamed, so that jobs that begin at the same time on one node
fill it once; every file is hashed before a job may use it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from hpctrain.errors import ExitCode, HpctrainError, UnfitError
from hpctrain.submit.packages import DamagedError, contents_of, digest_of, size_of, unpack

ENTRY = "HPCTRAIN_PACKAGES"
"""In the environment of ranks: the entry that they import from."""
LEFT_S = 86_400.0
"""What is half made for so long was left by a job that was killed."""


class Cache:
    """A node's packages.

    Args:
        folder: on the node's own disk; made if need be.
        limit_bytes: most that it may hold, the packages of jobs that run excepted.

    Raises:
        UnfitError: others may write there, or it belongs to somebody else.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self._limit_bytes = limit_bytes
        _make_private(folder)

    def check(self, digest: str) -> bool:
        """Whether the packages are here, every file as it should be; else they are removed."""
        with self._locked(digest):
            return self._is_whole(digest)

    def fill(self, digest: str, archive: Path) -> bool:
        """Have the packages here, from an archive unless they already are; whether it was needed.

        Raises:
            DamagedError: the archive does not hold them.
            OSError: there is no space, for example.
        """
        with self._locked(digest):
            if self._is_whole(digest):
                return False
            self._make_room(digest, archive.stat().st_size)
            side = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.folder))
            try:
                unpack(archive, side / "files")
                contents = contents_of(side / "files")
                if digest_of(contents) != digest:
                    raise DamagedError(
                        "an archive of packages has other content than its name says",
                        where=str(archive),
                        fix="remove it, and submit the job again",
                    )
                (side / "contents").write_text(json.dumps(contents))
                side.rename(self.folder / digest)
                return True
            finally:
                shutil.rmtree(side, ignore_errors=True)

    def _is_whole(self, digest: str) -> bool:
        entry = self.folder / digest
        try:
            recorded = json.loads((entry / "contents").read_text())
            found = contents_of(entry / "files")
            is_whole = digest_of(found) == digest and recorded.items() <= found.items()
        except (OSError, ValueError, AttributeError, HpctrainError):
            is_whole = False
        if is_whole:
            os.utime(entry)
        else:
            self._remove(entry)
        return is_whole

    def _make_room(self, digest: str, bytes_: int) -> None:
        """Remove what was used longest ago, but not what a job uses, for this much more."""
        for left in (*self.folder.glob(".partial-*"), *self.folder.glob(".*.tar")):
            if time.time() - left.lstat().st_mtime > LEFT_S:
                self._remove(left)
        entries = sorted(
            (path for path in self.folder.iterdir() if path.is_dir() and path.name[0] != "."),
            key=lambda path: path.stat().st_mtime,
        )
        sizes = {entry: _recorded_bytes(entry) for entry in entries}
        for entry in entries:
            if sum(sizes.values()) + bytes_ <= self._limit_bytes:
                break
            if entry.name != digest and _is_free(self.folder / f"{entry.name}.use"):
                self._remove(entry)
                del sizes[entry]

    def _remove(self, path: Path) -> None:
        """At once, for whoever looks for it; then piece by piece."""
        if path.is_dir() and not path.is_symlink():
            aside = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.folder))
            path.rename(aside / path.name)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, digest: str) -> Iterator[None]:
        with _open_private(self.folder / f"{digest}.lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


_held: list[TextIO] = []
"""Locks of this process, until it ends."""


def hold(environment: Mapping[str, str]) -> None:
    """Keep the packages that this process imports from being removed while it lives."""
    entry = environment.get(ENTRY)
    if entry and Path(entry).is_dir():
        file = _open_private(Path(f"{entry}.use"))
        fcntl.flock(file, fcntl.LOCK_SH)
        _held.append(file)


def _recorded_bytes(entry: Path) -> int:
    try:
        return size_of(json.loads((entry / "contents").read_text()))
    except (OSError, ValueError, AttributeError, IndexError):
        return 0


def _is_free(path: Path) -> bool:
    with _open_private(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _make_private(folder: Path) -> None:
    """Make a folder for its owner alone, or make sure that it is one.

    Raises:
        UnfitError: it is not.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise UnfitError(
            f"the cache of packages cannot be made: {error}",
            where=str(folder),
            fix="set submit.cache to a folder on the nodes' own disks",
        ) from error
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not is_own or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnfitError(
            "others could put packages where this job takes them from",
            value=f"owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o}",
            allowed="a folder of your own, writable by you alone",
            where=str(folder),
            fix="chmod go-w, or set submit.cache to another folder",
        )


def _open_private(path: Path) -> TextIO:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    return os.fdopen(descriptor, "r+")


def main(arguments: Sequence[str]) -> int:
    """`check CACHE GIGABYTES DIGEST` or `fill CACHE GIGABYTES DIGEST ARCHIVE`, on one node.

    `check` prints the node's name if it has to be sent the packages. What was sent is removed.
    """
    action, folder, gigabytes, digest, *rest = arguments
    begun_s, was_needed = time.monotonic(), False
    node = os.environ.get("SLURMD_NODENAME", "this node")
    try:
        cache = Cache(Path(folder), int(float(gigabytes) * 1e9))
        if action == "check" and not cache.check(digest):
            print(node)
            return int(ExitCode.DONE)
        if action == "fill":
            sent = Path(rest[0])
            try:
                was_needed = cache.fill(digest, sent)
            finally:
                sent.unlink(missing_ok=True)
    except (HpctrainError, OSError) as error:
        sys.stderr.write(f"hpctrain: {node}: {error}\n")
        return int(ExitCode.UNFIT)
    did = "unpacked" if was_needed else "here already"
    took_s = time.monotonic() - begun_s
    sys.stderr.write(f"hpctrain: {node}: packages {digest[:12]} {did}, {took_s:.2f} s\n")
    return int(ExitCode.DONE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
