"""The folder that a run leaves behind, and which earlier run a job continues.

runs/<job>/<number>/
    run.json            job, ranks, versions; whether the run is finished; earlier sessions
    run.lock            held by the launch that trains in it
    metrics.jsonl       one line a step, and one an evaluation
    logs/rank-00000.log
    trace/rank-00000.jsonl
    checkpoints/step-000000500/...
    timeline.json, report.html, sample.txt
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpctrain.comm.channel import Channel
from hpctrain.comm.collect import all_gather, broadcast
from hpctrain.config import LONGEST_S, check, option
from hpctrain.errors import ExitCode, HpctrainError, JobError, UnfitError
from hpctrain.files import anyone_may_write, others_may_write, replace_text
from hpctrain.records import read_facts
from hpctrain.train.checkpoint.manifest import step_of
from hpctrain.train.checkpoint.store import complete_names
from hpctrain.train.run_lock import RunLock, holder_of

_SESSION = ("fingerprint", "ranks", "nodes", "mpi", "torch", "threads", "resumed_at", "seconds")

KEPT_APART = ("extends", "run", "checkpoint", "inject", "submit")
"""Keys of a job that do not decide about what is trained."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run leaves behind, and where."""

    folder: str = "runs"
    """Parent of all run folders, relative to the working directory; visible to all ranks."""
    log_every: int = option(0, minimum=0)
    """Steps between two exchanges of figures among the ranks; 0 for a hundred a run."""
    line_s: float = option(10.0, minimum=0, maximum=LONGEST_S)
    """Shortest time between two lines of progress, where there is no terminal for a live bar."""
    trace_steps: int = option(50, minimum=0)
    """Steps, from the start of each session, whose spans are recorded for the timeline."""
    report: bool = True
    """Draw report.html when the run is finished; needs hpctrain[report]."""
    tensorboard: bool = False
    """Write TensorBoard events as well; needs hpctrain[tensorboard]."""
    min_ranks: int = option(1, minimum=1)
    """Where ranks survive others (mpirun --with-ft ulfm), go on with so many or more."""

    def __post_init__(self) -> None:
        check(self)


class AlreadyFinishedError(HpctrainError):
    """The chosen run has nothing left to do. Not a failure to whoever started it."""

    exit_code = ExitCode.DONE


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of all checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """Figures by step."""
        return self.path / "metrics.jsonl"

    @property
    def lock(self) -> Path:
        """Held by the launch that trains in the folder."""
        return self.path / "run.lock"

    def log(self, rank: int) -> Path:
        """Log of one rank."""
        return self.path / "logs" / f"rank-{rank:05d}.log"

    def trace(self, rank: int) -> Path:
        """Spans of one rank."""
        return self.path / "trace" / f"rank-{rank:05d}.jsonl"

    def facts(self) -> dict[str, Any]:
        """What run.json says; empty when it is missing or damaged."""
        return read_facts(self.path)

    def write_facts(self, **facts: Any) -> None:
        """Add to run.json, replacing it in one step."""
        text = json.dumps({**self.facts(), **facts}, indent=1, default=str) + "\n"
        replace_text(self.path / "run.json", text)

    def begin_session(self, facts: Mapping[str, Any]) -> None:
        """Record a new session in run.json; what it said of the last one goes to `history`.

        The job of a session is left out there when that of the next one is the same.
        """
        last = self.facts()
        session = {key: last[key] for key in _SESSION if key in last}
        if "job" in last and last["job"] != _as_read(facts.get("job")):
            session["job"] = last["job"]
        before = last.get("history")
        history = [
            *(before if isinstance(before, list) else []),
            *([session] if "ranks" in last else []),
        ]
        self.write_facts(**{**facts, "history": history, "finished": False})


@contextmanager
def files_of(run: RunFolder, who: str) -> Iterator[None]:
    """Tell what keeps a rank from opening its files in the run folder.

    Raises:
        UnfitError: a file or folder cannot be made, or is something else.
    """
    try:
        yield
    except OSError as error:
        raise UnfitError(
            f"{who} cannot write into the run folder: {error}",
            where=str(run.path),
            fix="remove what is in the way, free space, or choose another --run-dir",
        ) from error


@dataclass(frozen=True)
class OpenedRun:
    """A run folder that this launch may train in.

    Attributes:
        folder: its files.
        notes: what the user should know about the choice, on the root.
        lock: held on the root.
    """

    folder: RunFolder
    notes: tuple[str, ...] = ()
    lock: RunLock | None = None

    def taken_over(self) -> OpenedRun:
        """The same for a new root, after the death of the one that held the lock."""
        lock = RunLock(self.folder.lock)
        lock.take()  # unless a child of the dead one still has it, which is no other launch
        return replace(self, lock=lock)

    def release(self) -> None:
        """Let other launches have the folder."""
        if self.lock:
            self.lock.release()


def open_run(
    channel: Channel,
    parent: Path,
    facts: Mapping[str, Any],
    chosen: Path | None = None,
    fresh: bool = False,
    steps: int = 0,
) -> OpenedRun:
    """The folder of this run: a new one, or an unfinished one of the same job. Collective.

    Args:
        channel: over all ranks.
        parent: folder of all runs of the job.
        facts: of the job, for run.json; `fingerprint` is equal for runs that may continue each
            other.
        chosen: use this folder, new, empty or an earlier run.
        fresh: do not continue an earlier run.
        steps: of the whole run; a finished run is continued only if it has fewer.

    Raises:
        UnfitError: the folder cannot be made, or some rank does not see it.
        JobError: the chosen folder is not a run, is being trained, or is not `fresh`.
        AlreadyFinishedError: the chosen run has been trained to its end.
    """
    opened: OpenedRun | None = None
    answer: Path | HpctrainError | None = None
    if channel.rank == 0:
        try:
            opened = (
                _open_number(parent, facts, fresh)
                if chosen is None
                else _open_chosen(chosen, facts, fresh, steps)
            )
            answer = opened.folder.path
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            answer = UnfitError(
                f"the run folder cannot be made: {error}",
                fix="set run.folder, or --run-dir, to a place that can be written",
                everywhere=True,
            )
        except HpctrainError as error:
            answer = error
    answer = broadcast(channel, answer, label="run folder")
    if isinstance(answer, HpctrainError):
        raise answer
    assert answer is not None
    blind = [rank for rank, sees in enumerate(all_gather(channel, answer.is_dir())) if not sees]
    if blind:
        raise UnfitError(
            f"ranks {blind} do not see the run folder that rank 0 made",
            value=str(answer),
            fix="set run.folder to a file system that all nodes share",
            everywhere=True,
        )
    return opened or OpenedRun(RunFolder(answer))


def _open_chosen(chosen: Path, facts: Mapping[str, Any], fresh: bool, steps: int) -> OpenedRun:
    run = RunFolder(chosen.resolve())
    earlier = run.facts()
    names = complete_names(run.checkpoints)
    if fresh and names:
        raise _refusal(
            "--fresh starts a run anew, but the run folder holds checkpoints of an earlier one",
            chosen,
            "choose another --run-dir",
        )
    # A launch that was killed at once may have left its lock alone.
    if run.path.is_dir() and any(p != run.lock for p in run.path.iterdir()):
        if not {"fingerprint", "finished"} <= earlier.keys():
            raise _refusal(
                "the run folder holds other files and no run.json of hpctrain",
                chosen,
                "choose another --run-dir: one that is new, empty or an earlier run",
            )
    done = step_of(names[0]) if names else 0
    if earlier.get("finished") and (done >= steps or not names):
        raise AlreadyFinishedError(
            f"{chosen} is already finished" + (f" at step {done}" if names else "") + ", "
            "nothing to do",
            fix="to train on, raise train.steps; to train anew, choose another --run-dir",
            everywhere=True,
        )
    run.path.mkdir(parents=True, exist_ok=True)
    lock = RunLock(run.lock)
    holder = lock.take()
    if holder:
        raise _refusal(
            f"the run folder is being trained by {holder}",
            chosen,
            "wait for its end, or choose another --run-dir",
        )
    if not earlier:
        run.write_facts(**facts, finished=False)
    notes: tuple[str, ...] = ()
    if earlier and earlier["fingerprint"] != facts.get("fingerprint"):
        notes = (f"{chosen} goes on with a changed job: {_changes(earlier, facts)}",)
    return OpenedRun(run, notes, lock)


def _refusal(what: str, chosen: Path, fix: str) -> JobError:
    return JobError(what, where=str(chosen), fix=fix, everywhere=True)


def _open_number(parent: Path, facts: Mapping[str, Any], fresh: bool) -> OpenedRun:
    parent.mkdir(parents=True, exist_ok=True)
    numbers = sorted(int(p.name) for p in parent.iterdir() if re.fullmatch("[0-9]+", p.name))
    busy: str | None = None
    left: str | None = None
    for number in reversed(numbers if not fresh else []):
        run = RunFolder(parent / f"{number:03d}")
        earlier = run.facts()
        finished, names = earlier.get("finished"), complete_names(run.checkpoints)
        if earlier and earlier.get("fingerprint") == facts.get("fingerprint"):
            if finished:
                break
            if anyone_may_write(run.path) or (
                others_may_write(run.path) and others_may_write(parent)
            ):
                left = left or (
                    f"{run.path} is not continued, as other users may have written it; "
                    f"if you trust it: --run-dir {run.path}"
                )
                continue
            lock = RunLock(run.lock)
            busy = lock.take()
            if busy:
                break
            if names:
                return OpenedRun(RunFolder(run.path.resolve()), (), lock)
            lock.release()  # it ended before its first checkpoint: an older one may have got on
            continue
        if finished:
            left = left or ""  # the user has gone on since: older ones were told of then
        elif earlier and left is None and names and not holder_of(run.lock):
            left = (
                f"{run.path} is unfinished at step {step_of(names[0])} but is another job "
                f"({_changes(earlier, facts)}); to continue it: --run-dir {run.path}"
            )
    path = _make_next(parent, numbers[-1] + 1 if numbers else 1)
    lock = RunLock(path / "run.lock")
    lock.take()
    made = RunFolder(path.resolve())
    made.write_facts(**facts, finished=False)
    note = f"{run.path} is being trained by {busy}; this run goes to {path.name}" if busy else left
    return OpenedRun(made, (note,) if note else (), lock)


def _make_next(parent: Path, number: int) -> Path:
    """Make the folder of this number, or of the first after it that nobody else makes."""
    while True:
        path = parent / f"{number:03d}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def _changes(earlier: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """`train.steps 300 -> 310, seed 1 -> 2`: what decides about the result and has changed."""
    old, new = _flat(_as_read(earlier.get("job"))), _flat(_as_read(facts.get("job")))
    changed = [
        f"{key} {_shown(old, key)} -> {_shown(new, key)}"
        for key in [*old, *(key for key in new if key not in old)]
        if _shown(old, key) != _shown(new, key) and key.split(".")[0] not in KEPT_APART
    ]
    return ", ".join(changed) or "the source of its module has changed"


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "not set"


def _flat(table: Any, place: str = "") -> dict[str, Any]:
    """Values of nested tables by dotted key."""
    if not isinstance(table, dict):
        return {place.rstrip("."): table} if place else {}
    return {k: v for key in table for k, v in _flat(table[key], f"{place}{key}.").items()}


def _as_read(value: Any) -> Any:
    """A value as it comes back from run.json."""
    return json.loads(json.dumps(value, default=str))
