"""Starts ranks by a launcher, and again from the last checkpoint when they end with a failure.

One process that is no rank, loads neither torch nor MPI, and keeps no state of the run: what is
needed to go on is in the run folder. So it is as well to start the same command again by hand.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hpctrain.errors import ExitCode, JobError
from hpctrain.launched import launched_size
from hpctrain.records import read_facts, saved_steps, step_begun
from hpctrain.stop import broken_off
from hpctrain.train.run_lock import holder_of

FINAL = (ExitCode.DONE, ExitCode.BAD_JOB, ExitCode.UNFIT, ExitCode.REQUEUE)
"""Statuses that another launch would not change, or that somebody else decides about."""
SAME_ENDS = 3
"""Launches in a row that end in the same step, with nothing saved in between: a fault of machines
moves about, and one of the job does not."""
LEFT_S = 5.0
"""How long processes that a launcher has left behind may take to end when they are told to."""
LOCKED_S = 30.0
"""How long the run folder may still be locked, by a rank on another machine."""
POLL_S = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_FROM_KERNEL = 128
"""`si_code` of a signal that a terminal sent, which its whole process group has got."""
_MEANINGS = {1: "crashed", 137: "a rank was killed", 143: "a rank was told to end"}
_FAILURE = re.compile(r"rank (\d+) step (\S+) ERROR (.*)")


@dataclass(frozen=True)
class End:
    """How a launch ended.

    Attributes:
        status: of the launcher, as a shell would give it.
        saved: step of the newest checkpoint; 0 if there is none.
        step: the last one that was begun, if that is known.
        failure: what a rank told of its own end; empty if none did.
    """

    status: int
    saved: int = 0
    step: int | None = None
    failure: str = ""

    def __str__(self) -> str:
        meaning = f" ({_MEANINGS[self.status]})" if self.status in _MEANINGS else ""
        place = "" if self.step is None else f" in step {self.step}"
        reason = f": {self.failure}" if self.failure else ""
        return f"ended with status {self.status}{meaning}{place}{reason}"


def why_not_again(ends: Sequence[End], restarts: int) -> str | None:
    """Why there is to be no other launch after these; None if there is."""
    last = ends[-SAME_ENDS:]
    if len(ends) > restarts:
        allowed = "1 restart was" if restarts == 1 else f"{restarts} restarts were"
        return f"{allowed} allowed" if restarts else ""
    if len(last) == SAME_ENDS and len({(end.saved, end.step) for end in last}) == 1:
        return f"{SAME_ENDS} launches ended at the same place, so that another would as well"
    return None


def run(
    command: Callable[[Path | None, str, bool], list[str]],
    *,
    launcher: Sequence[str],
    restarts: int,
    parent: Path,
    chosen: Path | None,
    environment: Mapping[str, str],
) -> int:
    """Start ranks, and start them again as long as that may help.

    SIGUSR1, SIGTERM and SIGINT are passed on to the launcher; whatever status ranks then end with
    is final. In a batch job, ranks that such a signal ends before they listen are to be queued
    again. No process is left on this machine when this returns.

    Args:
        command: the program of a rank, given the run folder, if it is known, a word that names the
            launch, and whether it is the first one.
        launcher: command that starts a program on all ranks.
        restarts: how many more launches there may be after the first.
        parent: folder of all runs of the job.
        chosen: run folder that the user chose.
        environment: of this process.

    Returns:
        The exit status of the last launch.

    Raises:
        JobError: this process is itself a rank, or there is no such launcher.
    """
    by, _ = launched_size(environment)
    if by != "none":
        raise JobError(
            "hpctrain run --restarts starts ranks by itself, but was itself started by a launcher",
            value=by,
            fix="start it without one, and give the launcher by --launcher 'mpirun -n 4'",
            everywhere=True,
        )
    ends: list[End] = []
    folder, saved = chosen, 0
    with _Household(environment) as household:
        while True:
            name = secrets.token_hex(8)
            words = [*launcher, *command(folder, name, not ends)]
            lengths = _log_lengths(folder)
            watched = _Watched(parent, name, folder)
            status = household.run(words, watched.look)
            watched.look()
            folder, saved = watched.folder, max(saved, watched.saved)
            if household.has_broken_off(status):
                return ExitCode.REQUEUE
            if status in FINAL or household.told:
                return status
            ends.append(_end(status, folder, lengths))
            why = why_not_again(ends, restarts)
            if saved and not ends[-1].saved:
                why = (
                    f"the checkpoint of step {saved} is gone, and the run would begin anew: look "
                    "for what has become of the run folder or its file system"
                )
            text = f"launch {len(ends)} of {restarts + 1} {ends[-1]}"
            if why is not None:
                _say(f"{text}; no other follows" + (f": {why}" if why else ""))
                return status
            _say(f"{text}; the next one goes on from {_start(ends[-1], folder)}")
            if folder is not None:
                household.wait_until(partial(_is_free, folder), LOCKED_S)
            if household.told:
                return ExitCode.REQUEUE


def default_launcher(environment: Mapping[str, str]) -> list[str]:
    """The launcher beside this interpreter or else on the path, with one rank a core.

    Raises:
        JobError: there is none.
    """
    names = ("mpirun", "mpiexec")
    beside = (Path(sys.executable).with_name(name) for name in names)
    found = next((str(path) for path in beside if path.exists()), None)
    found = found or next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise JobError(
            "there is no mpirun or mpiexec to start ranks with",
            fix="give one by --launcher, or load your site's MPI module",
            everywhere=True,
        )
    ranks = environment.get("SLURM_NTASKS") or str(len(os.sched_getaffinity(0)))
    return [found, "-n", ranks]


def words_of(launcher: str) -> list[str]:
    """The words of a launcher as the user wrote it.

    Raises:
        JobError: a quote is not closed, or there is no word.
    """
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise JobError(f"--launcher: {error}", value=launcher, everywhere=True) from None
    if not words:
        raise JobError("--launcher is empty", fix="leave it out", everywhere=True)
    return words


class _Watched:
    """The run folder of a launch, looked at while it runs.

    Attributes:
        folder: once it is known.
        saved: the latest step that a checkpoint was seen of; 0 if none was.
    """

    def __init__(self, parent: Path, name: str, folder: Path | None) -> None:
        self._parent, self._name = parent, name
        self.folder = folder
        self.saved = 0

    def look(self) -> None:
        """Look for the folder, and for checkpoints in it."""
        self.folder = self.folder or _folder_of(self._parent, self._name)
        if self.folder and (steps := saved_steps(self.folder)):
            self.saved = max(self.saved, steps[-1])


class _Household:
    """The processes of launches: started, told what this one is told, and gone at the end.

    Processes that lose their parent become children of this one, so that ranks which outlive
    their launcher are found; and the launcher is told to end if this process dies.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.told = 0
        """The signal by which this process was told to end."""
        self._is_batch = "SLURM_JOB_ID" in environment
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._waited_for = {*_SIGNALS, signal.SIGCHLD}
        self._launcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Household:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._waited_for)
        self._libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._end_all()
        finally:
            self._libc.prctl(_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def run(self, words: Sequence[str], look: Callable[[], object]) -> int:
        """Run a launcher to its end; its exit status, as a shell would give it.

        Args:
            words: its command.
            look: called now and then meanwhile.
        """
        libc, mask = self._libc, self._mask

        def prepare() -> None:
            libc.prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGTERM), 0, 0, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

        try:
            self._launcher = subprocess.Popen(words, preexec_fn=prepare)
        except OSError as error:
            raise JobError(
                f"the launcher cannot be started: {error.strerror}",
                value=words[0],
                fix="give one by --launcher, or load your site's MPI module",
                everywhere=True,
            ) from None
        while self._launcher.poll() is None:
            self._listen(POLL_S * 10)
            look()
        self._listen(0)
        status = self._launcher.returncode
        self._launcher = None
        self._end_all()
        return 128 - status if status < 0 else status

    def has_broken_off(self, status: int) -> bool:
        """Whether a launch was ended by what it was told, since nobody in it listened yet."""
        told = self._is_batch and self.told in (signal.SIGTERM, signal.SIGUSR1)
        return told and status in broken_off(signal.SIGTERM, signal.SIGUSR1)

    def wait_until(self, is_so: Callable[[], bool], limit_s: float) -> None:
        """Wait, but no longer than `limit_s` or until this process is told to end."""
        given_up_s = time.monotonic() + limit_s
        while not (is_so() or self.told or time.monotonic() > given_up_s):
            self._listen(POLL_S)

    def _listen(self, limit_s: float) -> None:
        """Wait for a signal and pass it on."""
        while (come := signal.sigtimedwait(self._waited_for, limit_s)) is not None:
            limit_s = 0
            number = come.si_signo
            if number == signal.SIGCHLD:
                continue
            self.told = number
            if self._launcher is None or self._launcher.poll() is not None:
                continue
            if number == signal.SIGINT and come.si_code == _FROM_KERNEL:
                continue  # the launcher has got it too, and would take a second one for impatience
            if number == signal.SIGTERM and self._is_batch:
                number = signal.SIGUSR1  # at the other, mpirun ends its ranks without telling them
            self._launcher.send_signal(number)

    def _end_all(self) -> None:
        """End what is left of a launch, and collect it."""
        given_up_s = time.monotonic() + LEFT_S
        told: set[int] = set()
        while left := descendants(os.getpid()):
            is_late = time.monotonic() > given_up_s
            for process in left:
                if is_late or process not in told:
                    _signal(process, signal.SIGKILL if is_late else signal.SIGTERM)
            told.update(left)
            signal.sigtimedwait([signal.SIGCHLD], POLL_S)
            _collect()
            if time.monotonic() > given_up_s + LEFT_S:
                return  # what even that does not end waits for the kernel, in a lost file system


_SET_PARENT_DEATH_SIGNAL = 1
_SET_CHILD_SUBREAPER = 36


def descendants(ancestor: int, processes: Path = Path("/proc")) -> list[int]:
    """Living processes that descend from one on this machine."""
    parents: dict[int, int] = {}
    for folder in processes.iterdir():
        if folder.name.isdigit():
            try:
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            except (OSError, ValueError):
                continue
            if state not in "ZX" or int(parent) == ancestor:
                parents[int(folder.name)] = int(parent)
    found: list[int] = []
    wanted = {ancestor}
    while wanted:
        wanted = {process for process, parent in parents.items() if parent in wanted}
        found += wanted
    return sorted(found)


def _collect() -> None:
    """Take the statuses of children that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _signal(process: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def _end(status: int, folder: Path | None, lengths: Mapping[Path, int]) -> End:
    if folder is None:
        return End(status)
    saved = saved_steps(folder)
    failures = _failures(folder, lengths)
    return End(status, saved[-1] if saved else 0, step_begun(folder), next(iter(failures), ""))


def _failures(folder: Path, lengths: Mapping[Path, int]) -> Iterable[str]:
    """What ranks wrote of their own ends, the first one first."""
    found = []
    for log in _logs(folder):
        with suppress(OSError), log.open(errors="replace") as file:
            file.seek(lengths.get(log, 0))
            found += [(line, match) for line in file if (match := _FAILURE.search(line))]
    return [f"rank {m[1]} {m[3]}" for _, m in sorted(found, key=lambda each: each[0])]


def _log_lengths(folder: Path | None) -> dict[Path, int]:
    return {log: log.stat().st_size for log in _logs(folder)} if folder else {}


def _logs(folder: Path) -> Collection[Path]:
    return list((folder / "logs").glob("rank-*.log"))


def _folder_of(parent: Path, name: str) -> Path | None:
    """The run folder of a launch, if it has come that far."""
    for folder in parent.glob("[0-9]*"):
        if read_facts(folder).get("launch") == name:
            return folder
    return None


def _is_free(folder: Path) -> bool:
    try:
        return holder_of(folder / "run.lock") is None
    except OSError:  # it is none; the next launch tells
        return True


def _start(end: End, folder: Path | None) -> str:
    """Where the next launch begins."""
    place = f", in {folder}" if folder else ""
    return (f"the checkpoint of step {end.saved}" if end.saved else "the beginning") + place


def _say(text: str) -> None:
    sys.stderr.write(f"hpctrain: {text}\n")
    sys.stderr.flush()
