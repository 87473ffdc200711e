"""A node's copies of packages: made once, looked at before use, private, and not too many."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpctrain import cli
from hpctrain.errors import UnfitError
from hpctrain.submit.cache import Cache, hold, main
from hpctrain.submit.packages import DamagedError, contents_of, digest_of, pack

if TYPE_CHECKING:
    from conftest import Launch

LIMIT_BYTES = 1 << 20


def packed(folder: Path, text: str = "one = 1", bytes_: int = 1000) -> tuple[str, Path]:
    """Hash and archive of some packages."""
    deps = folder / f"deps-{text}"
    (deps / "numbers" / "__pycache__").mkdir(parents=True)
    (deps / "numbers" / "__init__.py").write_text(f"# {text}\n".ljust(bytes_, "#"))
    (deps / "numbers" / "__pycache__" / "x.pyc").write_bytes(b"compiled")
    digest = digest_of(contents_of(deps))
    pack(deps, folder / f"{digest}.tar")
    return digest, folder / f"{digest}.tar"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_filled_once_and_taken_from_then_on(tmp_path: Path) -> None:
    digest, archive = packed(tmp_path)
    cache = Cache(tmp_path / "cache", LIMIT_BYTES)
    assert not cache.check(digest)
    assert cache.fill(digest, archive)
    archive.unlink()
    assert cache.check(digest)
    assert not cache.fill(digest, archive)  # it is there, and needs no archive
    assert (tmp_path / "cache" / digest / "files" / "numbers" / "__init__.py").exists()
    assert names(tmp_path / "cache") == {digest}


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "files" / "numbers" / "__init__.py").write_text("import evil"),
        lambda entry: (entry / "files" / "numbers" / "__init__.py").unlink(),
        lambda entry: (entry / "contents").write_text("{"),
        lambda entry: (entry / "contents").write_text("[]"),
        lambda entry: (entry / "contents").unlink(),
    ],
)
def test_damaged_copies_are_made_anew(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    digest, archive = packed(tmp_path)
    cache = Cache(tmp_path / "cache", LIMIT_BYTES)
    cache.fill(digest, archive)
    damage(tmp_path / "cache" / digest)
    assert not cache.check(digest)
    assert names(tmp_path / "cache") == set()
    cache.fill(digest, archive)
    assert cache.check(digest)


def left_by_programs(files: Path) -> tuple[Path, ...]:
    """Files of all kinds in a copy that are not recorded."""
    (files / "results" / "deep").mkdir(parents=True)
    (files / "results" / "deep" / "x.json").touch()
    (files / "numbers" / "more.py").touch()
    (files / "out").symlink_to("/etc")
    os.mkfifo(files / "pipe")
    return files / "results", files / "numbers" / "more.py", files / "out", files / "pipe"


def test_what_programs_leave_in_a_copy_goes(tmp_path: Path) -> None:
    digest, archive = packed(tmp_path)
    cache = Cache(tmp_path / "cache", LIMIT_BYTES)
    cache.fill(digest, archive)
    files = tmp_path / "cache" / digest / "files"
    left = left_by_programs(files)
    (files / "numbers" / "__pycache__" / "x.pyc").write_bytes(b"evil")
    assert cache.check(digest)
    assert not any(os.path.lexists(path) for path in left)
    assert list((files / "numbers" / "__pycache__").iterdir()) == []
    assert names(tmp_path / "cache") == {digest}
    assert Path("/etc").exists() and cache.check(digest)


def test_nothing_is_removed_under_a_job_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, archive = packed(tmp_path)
    cache = Cache(tmp_path / "cache", LIMIT_BYTES)
    cache.fill(digest, archive)
    monkeypatch.setattr("hpctrain.submit.cache._held", [])
    hold({"HPCTRAIN_PACKAGES": str(tmp_path / "cache" / digest)})
    files = tmp_path / "cache" / digest / "files"
    left = left_by_programs(files)
    assert cache.check(digest)
    assert all(os.path.lexists(path) for path in left)
    (files / "numbers" / "__init__.py").write_text("changed")
    for action in (lambda: cache.check(digest), lambda: cache.fill(digest, archive)):
        with pytest.raises(UnfitError, match="damaged, and a running job uses them"):
            action()
    assert files.exists()


def test_what_python_compiles_later_is_no_damage(tmp_path: Path) -> None:
    digest, archive = packed(tmp_path)
    cache = Cache(tmp_path / "cache", LIMIT_BYTES)
    cache.fill(digest, archive)
    path = tmp_path / "cache" / digest / "files"
    (path / "numbers" / "__pycache__" / "y.pyc").touch()
    assert cache.check(digest)


def test_an_archive_of_other_packages_fills_nothing(tmp_path: Path) -> None:
    _, archive = packed(tmp_path)
    other, _ = packed(tmp_path, "two = 2")
    cache = Cache(tmp_path / "cache", LIMIT_BYTES)
    with pytest.raises(DamagedError, match="other content"):
        cache.fill(other, archive)
    assert names(tmp_path / "cache") == set()


def test_many_jobs_at_once_fill_it_once(tmp_path: Path) -> None:
    digest, archive = packed(tmp_path, bytes_=200_000)
    sent = [tmp_path / f"sent-{job}.tar" for job in range(8)]
    for copy in sent:
        copy.write_bytes(archive.read_bytes())

    def run(copy: Path) -> int:
        arguments = ["fill", str(tmp_path / "cache"), "1", digest, str(copy)]
        return subprocess.run(
            [sys.executable, "-m", "hpctrain.submit.cache", *arguments], capture_output=True
        ).returncode

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(run, sent)) == {0}
    assert Cache(tmp_path / "cache", LIMIT_BYTES).check(digest)
    assert names(tmp_path / "cache") == {digest}
    assert not any(copy.exists() for copy in sent)


ANY = """
import random, sys
from pathlib import Path
from hpctrain.submit import cache
cache.GRACE_S = -1.0
folder, seed, *made = sys.argv[1:]
mine = cache.Cache(Path(folder, "cache"), 60_000)
draw = random.Random(int(seed))
for _ in range(40):
    digest = draw.choice(made)
    mine.check(digest) or mine.fill(digest, Path(folder, digest + ".tar"))
"""


def test_jobs_of_different_packages_at_once(tmp_path: Path) -> None:
    """Each makes room while others look at, make and remove theirs."""
    made = [packed(tmp_path, f"x = {number}", 20_000)[0] for number in range(6)]

    def run(seed: int) -> str:
        words = [sys.executable, "-c", ANY, str(tmp_path), str(seed), *made]
        return subprocess.run(words, capture_output=True, text=True).stderr

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(run, range(4))) == {""}


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 250_000)
    made = [packed(tmp_path, f"x = {number}", 100_000) for number in range(3)]
    for age, (digest, archive) in zip((30, 20), made, strict=False):
        cache.fill(digest, archive)
        os.utime(tmp_path / "cache" / digest, (age, age))
    (first, _), (second, _), (third, archive) = made
    assert cache.check(first)  # and so was used just now
    cache.fill(third, archive)
    assert names(tmp_path / "cache") == {first, third}
    assert not cache.check(second)


def test_what_a_job_uses_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache", 1000)
    (first, archive), (second, other) = packed(tmp_path), packed(tmp_path, "two = 2")
    cache.fill(first, archive)
    held: list[object] = []
    monkeypatch.setattr("hpctrain.submit.cache._held", held)
    hold({"HPCTRAIN_PACKAGES": str(tmp_path / "cache" / first)})
    cache.fill(second, other)
    assert names(tmp_path / "cache") == {first, second}
    held.clear()
    for entry in (first, second):
        os.utime(tmp_path / "cache" / entry, (1, 1))
    third, archive = packed(tmp_path, "three = 3")
    cache.fill(third, archive)
    assert names(tmp_path / "cache") == {third}
    hold({})


def test_packages_of_a_job_that_is_about_to_start_stay(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1000)
    (first, archive), (second, other) = packed(tmp_path), packed(tmp_path, "two = 2")
    cache.fill(first, archive)
    os.utime(tmp_path / "cache" / first, (1, 1))
    assert cache.check(first)
    cache.fill(second, other)
    assert names(tmp_path / "cache") == {first, second}


@pytest.mark.parametrize("where", ["cache", "gone"])
def test_packages_that_are_not_there(tmp_path: Path, where: str) -> None:
    (tmp_path / "cache").mkdir()
    with pytest.raises(UnfitError, match=f"cannot be used(.|\n)*{where}/d(.|\n)*fix: submit"):
        hold({"HPCTRAIN_PACKAGES": str(tmp_path / where / "d")})


def test_what_a_killed_job_left_goes(tmp_path: Path) -> None:
    digest, archive = packed(tmp_path)
    folder = tmp_path / "cache"
    cache = Cache(folder, LIMIT_BYTES)
    (folder / ".partial-old").mkdir()
    (folder / ".17.tar").touch()
    for left in (".partial-old", ".17.tar"):
        os.utime(folder / left, (1, 1))
    (folder / ".partial-new").mkdir()
    cache.fill(digest, archive)
    assert {path.name for path in folder.glob(".*")} == {".partial-new"}


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    Cache(tmp_path / "own", 1)
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    (tmp_path / "file").touch()
    for name in ("open", "link", "file"):
        with pytest.raises(UnfitError):
            Cache(tmp_path / name, 1)
    if os.geteuid() == 0:
        (tmp_path / "theirs").mkdir(mode=0o700)
        os.chown(tmp_path / "theirs", 65_534, 65_534)
        with pytest.raises(UnfitError, match="others could put packages"):
            Cache(tmp_path / "theirs", 1)


def test_locks_are_not_followed_elsewhere(tmp_path: Path) -> None:
    digest, archive = packed(tmp_path)
    cache = Cache(tmp_path / "cache", LIMIT_BYTES)
    (tmp_path / "cache" / f"{digest}.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        cache.fill(digest, archive)
    assert not (tmp_path / "elsewhere").exists()


def test_on_a_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest, archive = packed(tmp_path)
    where = (str(tmp_path / "cache"), "0.5", digest)
    assert main(["check", *where]) == 0
    assert capsys.readouterr().out == "this node\n"
    assert main(["fill", *where, str(archive)]) == 0
    assert not archive.exists()
    assert main(["check", *where]) == 0
    said = capsys.readouterr()
    assert not said.out and "here already" in said.err
    archive.write_bytes(b"damaged")
    sent = ["fill", str(tmp_path / "cache"), "1", "0" * 64, str(archive)]
    assert main([*sent, "runs/x/.packages/0.tar"]) == 3
    said = capsys.readouterr().err
    assert "this node" in said and "where: runs/x/.packages/0.tar\n  fix: submit" in said
    recorded = json.loads((tmp_path / "cache" / digest / "contents").read_text())
    assert "numbers/__init__.py" in recorded
    with (tmp_path / "cache" / f"{digest}.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.launch
@pytest.mark.any_mpi
def test_a_rank_without_its_packages_is_named(launch: Launch) -> None:
    """Whichever it is, and before it misses a module of them."""
    launch.job(
        "import torch\ndef model(): return torch.nn.Linear(2, 2)\n"
        "def train_data(): return [torch.ones(2)] * 8\n"
        "def loss(model, batch): return model(batch).square().mean()\n",
        "train = { steps = 1, batch = 4 }\n",
        name="job",
    )
    code = (
        "import os, runpy, sys\nfrom hpctrain.world import launched_rank\n"
        "if launched_rank(os.environ) == 1: os.environ['HPCTRAIN_PACKAGES'] = '/gone/d'\n"
        "sys.argv = ['hpctrain', 'run', 'job.toml']\n"
        "runpy.run_module('hpctrain', run_name='__main__')"
    )
    ended = launch(2, "-c", code)
    assert ended.status == 3, ended.err
    assert "rank 1: the packages of this job cannot be used" in ended.err
    assert "/gone/d on this node" in ended.err and "Traceback" not in ended.err


def test_what_starts_ranks_again_keeps_their_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No rank does, between two launches."""
    cache = Cache(tmp_path / "cache", 1000)
    (first, archive), (second, other) = packed(tmp_path), packed(tmp_path, "two = 2")
    cache.fill(first, archive)
    (tmp_path / "job.toml").touch()

    def between_launches(*_: object, **__: object) -> int:
        os.utime(tmp_path / "cache" / first, (1, 1))
        cache.fill(second, other)
        return 0

    monkeypatch.setattr("hpctrain.supervisor.run", between_launches)
    monkeypatch.setattr("hpctrain.submit.cache._held", [])
    monkeypatch.setenv("HPCTRAIN_PACKAGES", str(tmp_path / "cache" / first))
    run = ["run", str(tmp_path / "job.toml"), "--restarts", "1"]
    assert cli.main(run) == 0
    assert names(tmp_path / "cache") == {first, second}
    monkeypatch.setenv("HPCTRAIN_PACKAGES", str(tmp_path / "cache" / "gone"))
    assert cli.main(run) == 3
    assert "the packages of this job cannot be used" in capsys.readouterr().err
