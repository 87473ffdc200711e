"""A folder of packages that a job needs, as it travels: the hash of its content, and an archive.

What the compiler keeps in `__pycache__` travels along, so that nodes need not compile, but is no
part of the hash: it holds times, and two installations of the same packages are the same.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hpctrain.errors import HpctrainError, JobError

CHUNK_BYTES = 1 << 20
COMPILED = "__pycache__"

REBUILD = "submit the job again, which makes the archive anew if it is damaged"

Contents = Mapping[str, str]
"""By relative path, what is there: kind, mode, size and SHA-256 of a file, target of a link."""


class DamagedError(HpctrainError):
    """An archive is not what it should be."""


@dataclass(frozen=True)
class Packages:
    """Packages that are ready to be sent to nodes.

    Attributes:
        digest: of their content.
        archive: all of them in one file, on a file system that the nodes see.
    """

    digest: str
    archive: PurePosixPath


def contents_of(folder: Path) -> dict[str, str]:
    """What is in a folder.

    Raises:
        JobError: it is no folder, something in it is neither file, folder nor a link inside it, has
            a name that not every node could write, or cannot be read.
    """
    if not folder.is_dir():
        raise JobError(
            "submit.deps: there is no such folder",
            where=str(folder),
            fix="make one, with pip install --target DIR for example",
        )
    return _read(folder, _entry)


def differences(folder: Path, contents: Contents) -> set[str]:
    """Relative paths of what is there and not as recorded, or recorded and not there.

    Raises:
        JobError: a folder cannot be read.
    """

    def entry(folder: Path, path: Path) -> str:
        try:
            return _entry(folder, path)
        except JobError as error:
            return error.what  # as no entry is

    found = _read(folder, entry)
    return {path for path in {*found, *contents} if found.get(path) != contents.get(path)}


def is_compiled(path: str) -> bool:
    """Whether a relative path is one of the compiler's."""
    return COMPILED in PurePosixPath(path).parts


def digest_of(contents: Contents) -> str:
    """The hash by which nodes know a folder's content."""
    digest = hashlib.sha256()
    for path, entry in sorted(contents.items()):
        if not is_compiled(path):
            digest.update(f"{entry} {path}\0".encode())
    return digest.hexdigest()


def size_of(contents: Contents) -> int:
    """Bytes of all files."""
    return sum(int(entry.split()[2]) for entry in contents.values() if entry[0] == "f")


def pack(folder: Path, archive: Path) -> bool:
    """Put a folder into an archive, unless that is there and whole; whether it was needed.

    The archive's own hash stands beside it.
    """
    beside = archive.with_name(f"{archive.name}.sha256")
    with suppress(OSError):
        if _sha256(archive) == beside.read_text():
            return False
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=archive.parent, prefix=".partial-", delete=False) as side:
        try:
            with tarfile.open(fileobj=side, mode="w") as tar:
                for path in sorted(_walk(folder)):
                    # Else a file's second name becomes a link to the first, which nodes refuse.
                    tar.inodes.clear()  # type: ignore[attr-defined]
                    tar.add(path, path.relative_to(folder).as_posix(), recursive=False)
            side.flush()
            os.fsync(side.fileno())
            digest = _sha256(Path(side.name))
            os.replace(side.name, archive)
        except BaseException:
            os.unlink(side.name)
            raise
    beside.write_text(digest)
    return True


def unpack(archive: Path, folder: Path, source: Path | None = None) -> None:
    """Put what is in an archive into a new folder.

    Args:
        archive: what is read.
        folder: to make.
        source: what it is a copy of, for the message.

    Raises:
        DamagedError: it is no archive, or would write elsewhere.
    """
    folder.mkdir()
    try:
        with tarfile.open(archive, "r:") as tar:
            # Newer Pythons look at members themselves as well, and want to be told so.
            tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
            for member in tar:
                _refuse_odd(member)
                tar.extract(member, folder)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DamagedError(
            f"an archive of packages cannot be unpacked: {error}",
            where=str(source or archive),
            fix=REBUILD,
        ) from error


def _read(folder: Path, entry: Callable[[Path, Path], str]) -> dict[str, str]:
    paths = sorted(_walk(folder))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(
            zip(
                (path.relative_to(folder).as_posix() for path in paths),
                pool.map(lambda path: entry(folder, path), paths),
                strict=True,
            )
        )


def _walk(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise _unreadable(error.filename, error) from None

    found: list[Path] = []
    for root, folders, files in os.walk(folder, onerror=refuse):
        found += [Path(root, name) for name in (*folders, *files)]
    return found


def _unreadable(path: object, error: OSError) -> JobError:
    return JobError(
        f"submit.deps: cannot be read: {error.strerror}",
        where=str(path),
        fix="make it readable for you, or remove it from the folder",
    )


def _entry(folder: Path, path: Path) -> str:
    try:
        entry = _looked_at(folder, path)
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        f"{entry}{path}".encode()
    except UnicodeEncodeError:
        raise JobError(
            "submit.deps: a name, or what a link leads to, is not UTF-8",
            where=str(path),
            fix="rename it",
        ) from None
    return entry


def _looked_at(folder: Path, path: Path) -> str:
    status = path.lstat()
    if stat.S_ISDIR(status.st_mode):
        return "d"
    if stat.S_ISLNK(status.st_mode):
        target = os.readlink(path)
        if _leaves(path.relative_to(folder).parent / target):
            raise JobError(
                "submit.deps: a link leads out of the folder",
                value=target,
                where=str(path),
                fix="replace it by what it leads to",
            )
        return f"l {target}"
    if not stat.S_ISREG(status.st_mode):
        raise JobError("submit.deps: neither a file nor a folder nor a link", where=str(path))
    is_program = "x" if status.st_mode & stat.S_IXUSR else "-"
    return f"f {is_program} {status.st_size} {_sha256(path)}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _refuse_odd(member: tarfile.TarInfo) -> None:
    target = os.path.join(os.path.dirname(member.name), member.linkname) if member.issym() else ""
    is_known = member.isfile() or member.isdir() or member.issym()
    if not is_known or _leaves(member.name) or (member.issym() and _leaves(target)):
        raise ValueError(f"unexpected member {member.name!r}")


def _leaves(path: str | os.PathLike[str]) -> bool:
    """Whether a relative path leads out of where it begins."""
    normal = os.path.normpath(os.fspath(path))
    return os.path.isabs(normal) or normal.split(os.sep)[0] == os.pardir
