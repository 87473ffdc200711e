"""Packages that a node keeps between jobs, each folder of them once, by the hash of its content.

    CACHE/                 private to its owner
        DIGEST/files/...   what jobs import
        DIGEST/contents    what must be in there, as it was unpacked
        DIGEST.lock        held while an entry is made or looked at
        DIGEST.use         held, shared, by ranks that import from it, and by what starts them
        all.lock           held while room is made, and while anything is removed

Locks are taken in this order: of an entry, of all, of its use.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from hpctrain.errors import ExitCode, HpctrainError, UnfitError
from hpctrain.submit.packages import (
    REBUILD,
    DamagedError,
    contents_of,
    differences,
    digest_of,
    is_compiled,
    size_of,
    unpack,
)

ENTRY = "HPCTRAIN_PACKAGES"
"""In the environment of ranks: the entry that they import from."""
LEFT_S = 86_400.0
"""What is half made for so long was left by a job that was killed."""
GRACE_S = 900.0
"""For so long what was looked at stays, since its job may not have started ranks yet."""
_ALL = "all"


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
        """Whether the packages are here, every file as it should be; else they are removed.

        Raises:
            UnfitError: a running job uses them, and has changed them.
        """
        with self._locked(digest):
            return self._is_whole(digest)

    def fill(self, digest: str, archive: Path, source: Path | None = None) -> bool:
        """Have the packages here, from an archive unless they already are; whether it was needed.

        Args:
            digest: of the packages.
            archive: what is unpacked.
            source: what that is a copy of, for messages.

        Raises:
            DamagedError: the archive does not hold them.
            UnfitError: a running job uses them, and has changed them.
            OSError: there is no space, for example.
        """
        with self._locked(digest):
            if self._is_whole(digest):
                return False
            with self._locked(_ALL):
                self._make_room(digest, archive.stat().st_size)
            side = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.folder))
            try:
                unpack(archive, side / "files", source)
                contents = contents_of(side / "files")
                if digest_of(contents) != digest:
                    raise DamagedError(
                        "an archive of packages has other content than its name says",
                        where=str(source or archive),
                        fix=REBUILD,
                    )
                (side / "contents").write_text(json.dumps(contents))
                side.rename(self.folder / digest)
                return True
            finally:
                shutil.rmtree(side, ignore_errors=True)

    def _is_whole(self, digest: str) -> bool:
        entry = self.folder / digest
        with suppress(FileNotFoundError):
            os.utime(entry)  # so that nobody makes room here from now on
        try:
            recorded = json.loads((entry / "contents").read_text())
            changed = differences(entry / "files", recorded)
            is_damaged = digest_of(recorded) != digest or any(
                path in recorded and not is_compiled(path) for path in changed
            )
        except (OSError, ValueError, AttributeError, TypeError, HpctrainError):
            is_damaged = True
        if not is_damaged:
            # What programs have left there is not recorded; what Python compiled, it may again.
            left = [path for path in changed if path in recorded or not is_compiled(path)]
            with self._locked(_ALL):
                self._tidy(digest, left)
            return True
        with self._locked(_ALL):
            if not self._remove_unused(digest):
                raise UnfitError(
                    "packages on this node are damaged, and a running job uses them",
                    where=str(entry),
                    fix="have no program write into its packages; wait until its job has ended, or "
                    "set submit.cache to another folder",
                )
        return False

    def _tidy(self, digest: str, left: Iterable[str]) -> None:
        """Remove what is not recorded from an entry, unless a job that runs may have made it."""
        with _unused(self.folder / f"{digest}.use") as is_unused:
            for path in left:
                if is_unused or is_compiled(path):
                    self._remove(self.folder / digest / "files" / path)

    def _make_room(self, digest: str, bytes_: int) -> None:
        """Remove what was used longest ago, but not what a job uses, for this much more."""
        for left in (*self.folder.glob(".partial-*"), *self.folder.glob(".*.tar")):
            if _age_s(left) > LEFT_S:
                self._remove(left)
        entries = sorted(
            (path for path in self.folder.iterdir() if path.is_dir() and path.name[0] != "."),
            key=_age_s,
            reverse=True,
        )
        sizes = {entry: _recorded_bytes(entry) for entry in entries}
        for entry in entries:
            if sum(sizes.values()) + bytes_ <= self._limit_bytes or _age_s(entry) < GRACE_S:
                break
            if entry.name != digest and self._remove_unused(entry.name):
                del sizes[entry]

    def _remove_unused(self, digest: str) -> bool:
        """Remove an entry unless a job uses it; whether it is gone."""
        with _unused(self.folder / f"{digest}.use") as is_unused:
            if is_unused:
                self._remove(self.folder / digest)
        return is_unused

    def _remove(self, path: Path) -> None:
        """At once, for whoever looks for it; then piece by piece. It may be gone already."""
        if path.is_dir() and not path.is_symlink():
            aside = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.folder))
            with suppress(FileNotFoundError):
                path.rename(aside / path.name)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with _open_private(self.folder / f"{name}.lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


_held: list[TextIO] = []
"""Locks of this process, until it ends."""


def hold(environment: Mapping[str, str]) -> None:
    """Keep the packages that this process imports from being removed while it lives.

    Raises:
        UnfitError: they are not here.
    """
    if not (entry := environment.get(ENTRY)):
        return
    try:
        file = _open_private(Path(f"{entry}.use"))
        _held.append(file)
        fcntl.flock(file, fcntl.LOCK_SH)
        os.utime(entry)
    except OSError as error:
        raise UnfitError(
            f"the packages of this job cannot be used: {error.strerror}",
            where=f"{entry} on {os.environ.get('SLURMD_NODENAME', 'this node')}",
            fix="submit the job again, with more submit.cache_gb if they were removed for others",
        ) from None


def _recorded_bytes(entry: Path) -> int:
    try:
        return size_of(json.loads((entry / "contents").read_text()))
    except (OSError, ValueError, AttributeError, IndexError):
        return 0


def _age_s(path: Path) -> float:
    """Since it was used; 0 if it is gone."""
    try:
        return time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


@contextmanager
def _unused(path: Path) -> Iterator[bool]:
    """Whether nobody uses an entry, by the lock of that; nobody begins to meanwhile."""
    with _open_private(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


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
    """`check CACHE GIGABYTES DIGEST` or `fill CACHE GIGABYTES DIGEST SENT ARCHIVE`, on one node.

    `check` prints the node's name if it has to be sent the packages. What was sent is removed.
    ARCHIVE, which it is a copy of, is for messages.
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
                was_needed = cache.fill(digest, sent, Path(rest[-1]))
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
