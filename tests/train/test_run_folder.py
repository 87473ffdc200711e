from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hpctrain.comm.channel import Channel
from hpctrain.comm.engine import engine_of
from hpctrain.errors import JobError, UnfitError
from hpctrain.trace import Trace
from hpctrain.train.checkpoint.manifest import MANIFEST
from hpctrain.train.console import Console, RankLog
from hpctrain.train.metrics import Metrics
from hpctrain.train.run_folder import AlreadyFinishedError, RunFolder, files_of, open_run
from hpctrain.train.run_lock import RunLock
from hpctrain.world import World


@pytest.fixture
def channel(world: World) -> Channel:
    return engine_of(world).control


def earlier(
    path: Path, fingerprint: str = "same", finished: bool = False, saved: bool = True
) -> RunFolder:
    """A folder as an earlier run left it behind."""
    run = RunFolder(path)
    path.mkdir(parents=True)
    run.write_facts(fingerprint=fingerprint, finished=finished)
    if saved:
        (run.checkpoints / "step-000000005").mkdir(parents=True)
        (run.checkpoints / "step-000000005" / MANIFEST).touch()
    return run


FACTS = {"fingerprint": "same", "job": {"train": {"steps": 10}}}


def opened(channel: Channel, parent: Path, fresh: bool = False) -> str:
    """Name of the folder that a job with fingerprint `same` gets."""
    run = open_run(channel, parent, FACTS, None, fresh).folder
    assert run.path.is_dir() and run.path.is_absolute()
    assert run.path.parent == parent.resolve()
    return run.path.name


# ---------------------------------------------------------------------- which folder


def test_each_run_gets_the_next_number(channel: Channel, tmp_path: Path) -> None:
    assert [opened(channel, tmp_path / "new" / "job") for _ in range(3)] == ["001", "002", "003"]


@pytest.mark.parametrize(("present", "new"), [("041", "042"), ("999", "1000"), ("1000", "1001")])
def test_numbers_go_on_after_the_largest(
    channel: Channel, tmp_path: Path, present: str, new: str
) -> None:
    for name in ("002", present, "notes", ".hidden"):
        (tmp_path / name).mkdir()
    assert opened(channel, tmp_path) == new


def test_unfinished_run_of_the_same_job_goes_on(channel: Channel, tmp_path: Path) -> None:
    earlier(tmp_path / "001")
    earlier(tmp_path / "002", fingerprint="other")
    assert opened(channel, tmp_path) == "001"


def test_newest_of_several_unfinished_runs_goes_on(channel: Channel, tmp_path: Path) -> None:
    for number in ("001", "002"):
        earlier(tmp_path / number)
    assert opened(channel, tmp_path) == "002"


@pytest.mark.parametrize(
    "left", [{"finished": True}, {"fingerprint": "other"}, {"saved": False}], ids=str
)
def test_other_runs_are_not_continued(
    channel: Channel, tmp_path: Path, left: dict[str, bool]
) -> None:
    earlier(tmp_path / "001", **left)  # type: ignore[arg-type]
    assert opened(channel, tmp_path) == "002"


def test_fresh_starts_anew(channel: Channel, tmp_path: Path) -> None:
    earlier(tmp_path / "001")
    assert opened(channel, tmp_path, fresh=True) == "002"


@pytest.mark.parametrize("text", [b"", b'{"finger', b"\xff\xfe", b"[]", b"null"])
def test_garbage_in_run_json_is_no_run_to_continue(
    channel: Channel, tmp_path: Path, text: bytes
) -> None:
    (earlier(tmp_path / "001").path / "run.json").write_bytes(text)
    assert opened(channel, tmp_path) == "002"


def test_file_with_a_number_for_a_name_is_no_run(channel: Channel, tmp_path: Path) -> None:
    (tmp_path / "007").touch()
    assert opened(channel, tmp_path) == "008"


def test_chosen_folder_is_made(
    channel: Channel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = open_run(channel, Path("unused"), FACTS, Path("a/b")).folder
    assert run.path == tmp_path.resolve() / "a" / "b"
    assert run.path.is_dir() and not Path("unused").exists()


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("finished", [False, True])
def test_chosen_run_with_steps_to_go_is_continued(
    channel: Channel, tmp_path: Path, finished: bool
) -> None:
    left = earlier(tmp_path / "mine", finished=finished)
    run = open_run(channel, tmp_path, FACTS, left.path, steps=6)
    assert run.folder.path == left.path.resolve()
    assert run.notes == ()


@pytest.mark.parametrize("fingerprint", ["same", "other"])
@pytest.mark.parametrize(("saved", "steps"), [(True, 5), (True, 4), (False, 9)])
def test_chosen_run_that_is_finished_is_left_as_it_is(
    channel: Channel, tmp_path: Path, fingerprint: str, saved: bool, steps: int
) -> None:
    left = earlier(tmp_path / "mine", fingerprint, finished=True, saved=saved)
    before = contents(left.path)
    with pytest.raises(AlreadyFinishedError, match=r"already finished.*nothing to do") as caught:
        open_run(channel, tmp_path, FACTS, left.path, steps=steps)
    assert caught.value.everywhere and caught.value.exit_code == 0
    assert ("at step 5" in str(caught.value)) == saved
    assert contents(left.path) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", ".gitignore", "checkpoints"])
@pytest.mark.parametrize("text", [b"mine", b'{"name": "of another tool"}'])
def test_chosen_folder_with_other_files_is_refused(
    channel: Channel, tmp_path: Path, name: str, text: bytes
) -> None:
    (tmp_path / name).write_bytes(text)
    with pytest.raises(JobError, match=r"no run\.json of hpctrain") as caught:
        open_run(channel, tmp_path, FACTS, tmp_path)
    assert caught.value.everywhere
    assert "choose another --run-dir" in str(caught.value)
    assert contents(tmp_path) == {name: text}


def test_chosen_run_killed_before_its_first_record_is_begun_again(
    channel: Channel, tmp_path: Path
) -> None:
    (tmp_path / "run.lock").touch()
    assert open_run(channel, tmp_path, FACTS, tmp_path).folder.path == tmp_path.resolve()


def test_changed_job_of_a_chosen_run_is_told(channel: Channel, tmp_path: Path) -> None:
    left = earlier(tmp_path / "mine", "other")
    left.write_facts(job={"train": {"steps": 8, "clip_norm": 0.5}, "run": {"folder": "a"}})
    job = {"train": {"steps": 10}, "data": {"part": "x"}, "run": {"folder": "b"}}
    (note,) = open_run(channel, tmp_path, {**FACTS, "job": job}, left.path, steps=10).notes
    assert note == (
        f"{left.path} goes on with a changed job: train.steps 8 -> 10, "
        'train.clip_norm 0.5 -> not set, data.part not set -> "x"'
    )


def test_changed_module_of_a_chosen_run_is_told(channel: Channel, tmp_path: Path) -> None:
    left = earlier(tmp_path / "mine", "other")
    left.write_facts(job=FACTS["job"])
    (note,) = open_run(channel, tmp_path, FACTS, left.path).notes
    assert "the source of its module has changed" in note


def test_fresh_run_does_not_overwrite_a_chosen_one(channel: Channel, tmp_path: Path) -> None:
    left = earlier(tmp_path / "mine")
    with pytest.raises(JobError, match="checkpoints of an earlier one") as caught:
        open_run(channel, tmp_path, FACTS, left.path, fresh=True)
    assert caught.value.everywhere
    assert caught.value.fix == "choose another --run-dir"
    without = earlier(tmp_path / "empty", saved=False)
    assert open_run(channel, tmp_path, FACTS, without.path, fresh=True).folder.path == without.path


# ---------------------------------------------------------------------- who is in it


def test_second_launch_takes_the_next_folder_and_says_so(channel: Channel, tmp_path: Path) -> None:
    earlier(tmp_path / "001")
    first = open_run(channel, tmp_path, FACTS)
    assert first.folder.path.name == "001"
    second = open_run(channel, tmp_path, FACTS)
    assert second.folder.path.name == "002"
    assert second.notes == (
        f"{tmp_path / '001'} is being trained by pid {os.getpid()} on {socket.gethostname()}; "
        "this run goes to 002",
    )
    second.release()
    first.release()
    assert opened(channel, tmp_path) == "001"


def test_run_without_a_checkpoint_does_not_hide_an_older_one(
    channel: Channel, tmp_path: Path
) -> None:
    earlier(tmp_path / "001")
    earlier(tmp_path / "002", saved=False)
    assert opened(channel, tmp_path) == "001"


def test_second_launch_in_a_chosen_folder_is_refused(channel: Channel, tmp_path: Path) -> None:
    first = open_run(channel, tmp_path, FACTS, tmp_path / "mine")
    with pytest.raises(JobError, match=f"is being trained by pid {os.getpid()} on ") as caught:
        open_run(channel, tmp_path, FACTS, tmp_path / "mine")
    assert caught.value.everywhere
    first.release()
    open_run(channel, tmp_path, FACTS, tmp_path / "mine").release()


def test_lock_of_a_killed_launch_is_free(channel: Channel, tmp_path: Path) -> None:
    earlier(tmp_path / "001")
    program = (
        "import os, pathlib, sys\n"
        "from hpctrain.train.run_lock import RunLock\n"
        "RunLock(pathlib.Path(sys.argv[1])).take()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    lock = tmp_path / "001" / "run.lock"
    subprocess.run([sys.executable, "-c", program, str(lock)], check=False)
    assert lock.read_text().startswith("pid ")
    assert opened(channel, tmp_path) == "001"


def test_file_system_without_locks_is_no_obstacle(
    channel: Channel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    for _ in range(2):
        run = open_run(channel, tmp_path, FACTS, tmp_path / "mine")
    run.release()


as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to make files of another user")


@as_root
@pytest.mark.parametrize("mode", [0o777, 0o755])
def test_run_that_another_user_may_have_made_is_not_continued(
    channel: Channel, tmp_path: Path, mode: int
) -> None:
    """In a folder where anybody may write; where only the user may, it is their own doing."""
    left = earlier(tmp_path / "001")
    os.chown(left.path, 65534, 65534)
    tmp_path.chmod(mode)
    new = open_run(channel, tmp_path, FACTS)
    if mode == 0o755:
        assert (new.folder.path.name, new.notes) == ("001", ())
    else:
        assert new.folder.path.name == "002"
        assert "may have written it" in new.notes[0] and f"--run-dir {left.path}" in new.notes[0]
        assert open_run(channel, tmp_path, FACTS, left.path).folder.path == left.path
    new.release()


def test_run_that_anyone_may_write_is_not_continued(channel: Channel, tmp_path: Path) -> None:
    left = earlier(tmp_path / "001")
    left.path.chmod(0o777)
    new = open_run(channel, tmp_path, FACTS)
    assert new.folder.path.name == "002"
    assert "may have written it" in new.notes[0]
    new.release()


def test_who_only_looks_is_in_nobody_s_way(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    RunLock(path).take()  # and lets go of it, with what it has written left behind
    looker = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import pathlib, sys\n"
            "from hpctrain.train.run_lock import holder_of\n"
            "path = pathlib.Path(sys.argv[1])\n"
            "print('ready', flush=True)\n"
            "while True: holder_of(path)",
            str(path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert looker.stdout and looker.stdout.readline() == "ready\n"
        for _ in range(200):
            lock = RunLock(path)
            assert lock.take() is None
            lock.release()
    finally:
        looker.kill()
        looker.wait()


def test_lock_that_is_a_link_is_not_followed(channel: Channel, tmp_path: Path) -> None:
    left = earlier(tmp_path / "001")
    (tmp_path / "precious").write_text("kept")
    left.lock.symlink_to(tmp_path / "precious")
    with pytest.raises(UnfitError, match=r"run\.lock"):
        open_run(channel, tmp_path, FACTS)
    assert (tmp_path / "precious").read_text() == "kept"


@as_root
def test_lock_of_another_user_is_held_by_them() -> None:
    """Somebody else's run in a folder that several people share."""
    with tempfile.TemporaryDirectory() as folder:  # others may not look into those of pytest
        os.chmod(folder, 0o777)
        path = Path(folder) / "run.lock"
        path.touch(mode=0o644)
        process = os.fork()
        if process == 0:
            try:
                os.setuid(65534)
                os._exit(0 if RunLock(path).take() == "another user" else 1)
            finally:
                os._exit(2)
        assert os.waitpid(process, 0)[1] == 0


# ---------------------------------------------------------------------- what is left behind


def test_unfinished_run_of_another_job_is_told_with_the_difference(
    channel: Channel, tmp_path: Path
) -> None:
    left = earlier(tmp_path / "001", fingerprint="other")
    left.write_facts(job={"train": {"steps": 8}})
    new = open_run(channel, tmp_path, FACTS)
    assert new.folder.path.name == "002"
    assert new.notes == (
        f"{left.path} is unfinished at step 5 but is another job (train.steps 8 -> 10); "
        f"to continue it: --run-dir {left.path}",
    )


@pytest.mark.parametrize(
    "case", ["fresh", "later one finished", "being trained", "no checkpoint", "no run"]
)
def test_unfinished_runs_that_need_no_word(channel: Channel, tmp_path: Path, case: str) -> None:
    left = earlier(tmp_path / "001", fingerprint="other", saved=case != "no checkpoint")
    if case == "later one finished":
        earlier(tmp_path / "002", fingerprint="third", finished=True)
    if case == "no run":
        (left.path / "run.json").unlink()
    lock = RunLock(left.lock)
    if case == "being trained":
        lock.take()
    assert open_run(channel, tmp_path, FACTS, None, fresh=case == "fresh").notes == ()
    lock.release()


def test_earlier_sessions_stay_in_run_json(channel: Channel, tmp_path: Path) -> None:
    run = open_run(channel, tmp_path, FACTS, tmp_path / "mine").folder
    other = {"fingerprint": "other", "job": {"train": {"steps": 20}}}
    for facts in (
        {**FACTS, "ranks": 2, "resumed_at": 0},
        {**FACTS, "ranks": 3, "resumed_at": 4},
        {**other, "ranks": 3, "resumed_at": 10},
    ):
        run.begin_session(facts)
    said = run.facts()
    assert (said["job"], said["finished"], said["resumed_at"]) == (other["job"], False, 10)
    assert said["history"] == [
        {"fingerprint": "same", "ranks": 2, "resumed_at": 0},
        {"fingerprint": "same", "ranks": 3, "resumed_at": 4, "job": FACTS["job"]},
    ]


@pytest.mark.parametrize("chosen", [False, True])
def test_place_that_is_no_folder_is_told(channel: Channel, tmp_path: Path, chosen: bool) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file"
    with pytest.raises(UnfitError, match="cannot be made") as caught:
        open_run(channel, place, FACTS, place if chosen else None)
    assert caught.value.everywhere and str(place) in str(caught.value)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_unwritable_parent_is_told(channel: Channel, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UnfitError, match="Permission denied"):
        open_run(channel, tmp_path, FACTS)


def test_facts_are_added_to(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.facts() == {}
    run.write_facts(ranks=2, finished=False)
    run.write_facts(finished=True)
    assert run.facts() == {"ranks": 2, "finished": True}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_files_of_ranks_sort_by_rank(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for files in ([run.log(r) for r in (2, 10)], [run.trace(r) for r in (2, 10)]):
        assert sorted(files) == files


# ---------------------------------------------------------------------- metrics


def recorded(run: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]


def test_metrics_are_visible_after_flush(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    metrics = Metrics(run, tensorboard=False, resumed_at=0)
    metrics.write(1, loss=0.5, validation={"accuracy": 0.9})
    metrics.flush()
    expected = {"step": 1, "loss": 0.5, "validation": {"accuracy": 0.9}}
    assert json.loads(run.metrics.read_text()) == expected
    metrics.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_null(tmp_path: Path, value: float) -> None:
    run = RunFolder(tmp_path)
    metrics = Metrics(run, tensorboard=False, resumed_at=0)
    metrics.write(1, loss=value, validation={"loss": value})
    metrics.close()
    assert run.metrics.read_text() == '{"step": 1, "loss": null, "validation": {"loss": null}}\n'


@pytest.mark.parametrize("history", [5, "x", {"a": 1}, None])
def test_damaged_history_is_begun_anew(tmp_path: Path, history: object) -> None:
    run = RunFolder(tmp_path)
    run.write_facts(ranks=2, fingerprint="a", history=history)
    run.begin_session({**FACTS, "ranks": 3})
    assert run.facts()["history"] == [{"fingerprint": "a", "ranks": 2}]


@pytest.mark.parametrize("name", ["metrics.jsonl", "logs", "trace"])
def test_something_in_the_way_of_a_file_is_told(world: World, tmp_path: Path, name: str) -> None:
    run = RunFolder(tmp_path)
    (tmp_path / name).mkdir() if "." in name else (tmp_path / name).touch()

    def opened_all() -> None:
        with files_of(run, "rank 0"):
            RankLog(run.log(0), world, Console(speaks=False)).close()
            Metrics(run, tensorboard=False, resumed_at=0).close()
            Trace().open(run.trace(0), 0)

    with pytest.raises(UnfitError, match="rank 0 cannot write into the run folder") as caught:
        opened_all()
    assert caught.value.fix


@pytest.mark.parametrize(
    "torn", ["", "\ud800", "[" * 5000 + "\n", '{"step": 2, "lo', "\0\0\0\0", "garbage\n", "{}\n"]
)
def test_resumed_run_has_each_step_once(tmp_path: Path, torn: str) -> None:
    run = RunFolder(tmp_path)
    killed = Metrics(run, tensorboard=False, resumed_at=0)
    for step in range(1, 8):
        killed.write(step, loss=0.1)
    killed.close()
    with run.metrics.open("a", errors="surrogatepass") as file:
        file.write(torn)

    resumed = Metrics(run, tensorboard=False, resumed_at=4)
    assert recorded(run) == [1, 2, 3, 4]
    resumed.write(5, loss=0.2)
    resumed.close()
    assert recorded(run) == [1, 2, 3, 4, 5]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(RunFolder(tmp_path), tensorboard=True, resumed_at=0)
    metrics.write(3, loss=0.5, validation={"accuracy": 0.25})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = {
        tag: (e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)
    }
    assert shown == {"loss": (3, 0.5), "validation/accuracy": (3, 0.25)}
