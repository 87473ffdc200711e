from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hpctrain.comm.engine import Channel, engine_of
from hpctrain.errors import TrainingError, UnfitError
from hpctrain.train.checkpoint import MANIFEST
from hpctrain.train.run_folder import Metrics, RunFolder, open_run
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


def opened(channel: Channel, parent: Path, fresh: bool = False) -> str:
    """Name of the folder that a job with fingerprint `same` gets."""
    run = open_run(channel, parent, "same", None, fresh)
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
    run = open_run(channel, Path("unused"), "same", Path("a/b"), fresh=False)
    assert run.path == tmp_path.resolve() / "a" / "b"
    assert run.path.is_dir() and not Path("unused").exists()


@pytest.mark.parametrize("finished", [False, True])
def test_chosen_folder_is_taken_whatever_it_holds(
    channel: Channel, tmp_path: Path, finished: bool
) -> None:
    left = earlier(tmp_path / "mine", fingerprint="other", finished=finished)
    assert open_run(channel, tmp_path, "same", left.path, fresh=False).path == left.path.resolve()


def test_fresh_run_does_not_overwrite_a_chosen_one(channel: Channel, tmp_path: Path) -> None:
    left = earlier(tmp_path / "mine")
    with pytest.raises(TrainingError, match="checkpoints of an earlier run") as caught:
        open_run(channel, tmp_path, "same", left.path, fresh=True)
    assert caught.value.everywhere
    without = earlier(tmp_path / "empty", saved=False)
    assert open_run(channel, tmp_path, "same", without.path, fresh=True).path == without.path


@pytest.mark.parametrize("chosen", [False, True])
def test_place_that_is_no_folder_is_told(channel: Channel, tmp_path: Path, chosen: bool) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file"
    with pytest.raises(UnfitError, match="cannot be made") as caught:
        open_run(channel, place, "same", place if chosen else None, fresh=False)
    assert caught.value.everywhere and str(place) in str(caught.value)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_unwritable_parent_is_told(channel: Channel, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UnfitError, match="Permission denied"):
        open_run(channel, tmp_path, "same", None, fresh=False)


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


@pytest.mark.parametrize("torn", ["", '{"step": 2, "lo', "\0\0\0\0", "garbage\n", "{}\n"])
def test_resumed_run_has_each_step_once(tmp_path: Path, torn: str) -> None:
    run = RunFolder(tmp_path)
    killed = Metrics(run, tensorboard=False, resumed_at=0)
    for step in range(1, 8):
        killed.write(step, loss=0.1)
    killed.close()
    with run.metrics.open("a") as file:
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
