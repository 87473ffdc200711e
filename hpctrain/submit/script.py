"""The batch script: text from values, and nothing else."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from hpctrain.errors import ExitCode, JobError
from hpctrain.stop import broken_off
from hpctrain.submit.cache import ENTRY
from hpctrain.submit.config import SubmitConfig
from hpctrain.submit.launcher import Launcher
from hpctrain.submit.packages import Packages

_AGAIN = int(ExitCode.REQUEUE)
_UNFIT = int(ExitCode.UNFIT)
TOLD_EVERY_S = 5
"""How often a launcher is told to end, until it does."""
_BROKEN_OFF = [f'"1 {status}"' for status in broken_off(signal.SIGUSR1, signal.SIGTERM)]
"""Told, and a status of what a signal has ended."""
_SAFE_PATH = r"[A-Za-z0-9_.+/@:,=~ -]+"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is submitted.

    Attributes:
        name: of the job.
        job: its job file.
        folder: where it runs, and relative paths begin; None for where it is submitted.
        runs: folder of its runs and logs.
        python: interpreter with hpctrain.
        overrides: values of `--set`.
        packages: what ranks import besides, if anything.
        user: number of the user, in the name of the folder for packages.
    """

    name: str
    job: PurePosixPath
    folder: PurePosixPath | None
    runs: PurePosixPath
    python: PurePosixPath
    overrides: Sequence[str]
    config: SubmitConfig
    launcher: Launcher
    packages: Packages | None = None
    user: int = 0


def render(submission: Submission) -> str:
    """The batch script of a submission; see slurm/ for what it looks like.

    Raises:
        JobError: a path has characters that Slurm or the shell would not take for themselves.
    """
    return "\n".join((*_header(submission), "", *_body(submission), ""))


def log_of(submission: Submission) -> PurePosixPath:
    """Where Slurm writes what the job prints, with its patterns for the job's number."""
    number = "%A_%a" if submission.config.array else "%j"
    return submission.runs / f"slurm-{number}.log"


def _header(submission: Submission) -> Iterator[str]:
    config = submission.config
    for path in (submission.runs, submission.folder):
        if path is not None and not re.fullmatch(_SAFE_PATH, str(path)):
            raise JobError(
                "the batch script cannot name this folder",
                value=str(path),
                allowed="letters, digits, spaces and _ . + / @ : , = ~ -",
                fix="submit from another folder, or choose another run.folder",
            )
    options: dict[str, object] = {
        "job-name": submission.name,
        "chdir": submission.folder and f'"{submission.folder}"',
        "output": f'"{log_of(submission)}"',
        "open-mode": "append",
        "nodes": config.nodes,
        "ntasks": config.nodes * config.tasks_per_node,
        "ntasks-per-node": config.tasks_per_node,
        "cpus-per-task": config.cpus_per_task,
        "gpus-per-node": config.gpus_per_node,
        "mem": config.memory,
        "time": config.time,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint and f'"{config.constraint}"',
        "array": config.array,
        "signal": f"B:USR1@{config.warning_s}",
    }
    yield "#!/bin/bash"
    for name, value in options.items():
        if value:
            yield f"#SBATCH --{name}={value}"
    yield "#SBATCH --requeue" if config.requeue else "#SBATCH --no-requeue"
    if config.survivors:
        yield "#SBATCH --no-kill"


def _body(submission: Submission) -> Iterator[str]:
    config = submission.config
    yield _comment(f"Rendered by hpctrain submit {submission.job}")
    yield _comment(f"Launcher: {submission.launcher.reason}")
    yield _comment(f"If you submit it yourself, first: mkdir -p {_quoted(submission.runs)}")
    yield from ("", *_ending(config), "")
    for module in config.modules:
        yield f"module load {_quoted(module)} || end {_UNFIT}"
    if config.cpus_per_task:
        yield 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'
    yield (
        'echo "hpctrain: job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, '
        'on $SLURM_JOB_NODELIST"'
    )
    if submission.packages:
        yield from _stage(submission, submission.packages)
    yield from (
        f"run={_quoted(submission.runs)}/{_run_name(config)}",
        f'[ -z "$told" ] || end {_AGAIN}',
        f"{_command(submission)} &",
        "launcher=$!",
        '[ -z "$told" ] || pass_on',
        "# A signal ends `wait`, but not yet what it waits for.",
        'while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done',
        'wait "$launcher"',
        "status=$?",
        "# srun may end with 0 although it could not start ranks.",
        """[ "$status" != 0 ] || grep -qs '"finished": true' "$run/run.json" || status=1""",
        'end "$status"',
    )


def _ending(config: SubmitConfig) -> Iterator[str]:
    """Functions of the script: what it does when it is told to end, and how it ends."""
    yield from (
        f"# Slurm tells this shell ahead of the time limit; ranks save and end with {_AGAIN} then.",
        "# A launcher loses what it is told before it has started ranks, and is told repeatedly.",
        "launcher= told=",
        "pass_on() {",
        "  told=1",
        '  if [ -n "$launcher" ]; then  # else `$!` would not be that of the launcher',
        f'    (while kill -USR1 "$launcher"; do sleep {TOLD_EVERY_S}; done) 2>/dev/null &',
        "  fi",
        "}",
        "trap pass_on USR1 TERM",
        "end() {",
        "  # The signal itself ends what does not listen to it yet, and so has nothing to save.",
        f'  case "$told $1" in {" | ".join(_BROKEN_OFF)}) set -- {_AGAIN} ;; esac',
    )
    if config.requeue:
        yield from (
            "  # Back into the queue: what was told to end and has saved, and what is preempted",
            "  # but ended before Slurm ended it. Not what was cancelled, no longer RUNNING.",
            '  case "$1 $(scontrol -o show job "$SLURM_JOB_ID")" in',
            '    "0 "*) ;;',
            f'    "{_AGAIN} "*JobState=RUNNING* | *JobState=RUNNING*PreemptTime=2*)',
            '      scontrol requeue "$SLURM_JOB_ID" ;;',
            "  esac",
        )
    yield from ('  exit "$1"', "}")


def _stage(submission: Submission, packages: Packages) -> Iterator[str]:
    config = submission.config
    cache = config.cache or f"/var/tmp/hpctrain-{submission.user}"
    python, digest = _quoted(submission.python), packages.digest
    yield from (
        "",
        "# Packages: each node takes the copy that it has; where one has none, all are sent it.",
        f"cache={_quoted(cache)}",  # else the shell would see a home in /a:~me
        f"packages={digest}",
        "stage() {",
        '  srun --mpi=none --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \\',
        f'    --ntasks-per-node=1 {python} -m hpctrain.submit.cache "$1" "$cache" '
        f'{config.cache_gb:g} "$packages" "${{@:2}}"',
        "}",
        f"missing=$(stage check) || end {_UNFIT}",
        '[ -z "$missing" ] || {',
        f'  archive={_quoted(packages.archive)} sent="$cache/.$SLURM_JOB_ID.tar"',
        '  sbcast --force "$archive" "$sent" && stage fill "$sent" "$archive"',
        f"}} || end {_UNFIT}",
        f'export {ENTRY}="$cache/$packages"',
        f'export PYTHONPATH="${ENTRY}/files${{PYTHONPATH:+:$PYTHONPATH}}"',
        "",
    )


def _command(submission: Submission) -> str:
    config = submission.config
    sets = [word for text in submission.overrides for word in ("--set", _quoted(text))]
    if config.array:
        sets += ["--set", f'"{config.array_key}=$SLURM_ARRAY_TASK_ID"']
    program = f"{_quoted(submission.python)} -m hpctrain run {_quoted(submission.job)}"
    launcher = submission.launcher.words
    if config.restarts:  # one process that starts ranks, in place of the launcher itself
        words = [program, f'--restarts {config.restarts} --launcher "{" ".join(launcher)}"']
    else:
        words = [*(f'"{word}"' if word.startswith("$") else word for word in launcher), program]
    return " ".join([*words, *sets, '--run-dir "$run"', "--no-live"])


def _run_name(config: SubmitConfig) -> str:
    number = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if config.array else "$SLURM_JOB_ID"
    return f'"slurm-{number}"'


def _comment(text: str) -> str:
    """One line, whatever the text."""
    return f"# {' '.join(''.join(c if c.isprintable() else ' ' for c in text).split())}"


def _quoted(value: object) -> str:
    return shlex.quote(str(value))
