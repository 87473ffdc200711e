"""The command line: `hpctrain run | submit | keys | doctor | report`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain import __version__, streams
from hpctrain.errors import ExitCode, HpctrainError, JobError, UnfitError, shown
from hpctrain.stop import StopRequest
from hpctrain.submit import cache

if TYPE_CHECKING:
    from hpctrain.job import LoadedJob


ALONE_S = 1.5
"""A rank that has not ended by then is alone with its error; comm.watch ends the run after 2 s."""

STATUSES = """exit status:
  0    done
  1    crashed, or ended by Ctrl-C under mpirun
  2    the job or the command line is wrong
  3    the environment is unfit
  75   told to end, saved: start it again to continue
  130  ended by Ctrl-C (alone)
  137  a rank was killed, for example by the kernel when memory ran out
  143  a rank was ended by SIGTERM
  MPICH's mpiexec may give its own number when it is itself ended by a signal."""
RUN_EXAMPLES = """examples:
  hpctrain run jobs/digits.toml
  hpctrain run jobs/digits.toml --restarts 3 --launcher "mpirun -n 4"
  mpirun -n 4 hpctrain run jobs/digits.toml --set train.steps=20 --set model.width=32

`hpctrain keys` lists every key of a job file; docs/job-file.md explains them.
An unfinished run of the same job is continued; --fresh starts a new one.
"""


SUBMIT_OPTIONS = {
    "nodes": ("--nodes", "-N"),
    "tasks_per_node": ("--ntasks-per-node",),
    "cpus_per_task": ("--cpus-per-task", "-c"),
    "gpus_per_node": ("--gpus-per-node",),
    "memory": ("--mem",),
    "time": ("--time", "-t"),
    "partition": ("--partition", "-p"),
    "account": ("--account", "-A"),
    "qos": ("--qos", "-q"),
    "constraint": ("--constraint", "-C"),
    "array": ("--array", "-a"),
}
"""By key of [submit]: Slurm's own names for it."""
_NUMBERS = ("nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    0 done, 1 crashed, 2 the job is wrong, 3 the environment is unfit.
    """
    streams.open_missing()
    chosen = None
    try:
        chosen = _parsed(arguments)
        status = int(chosen.command(chosen))
        streams.flush()
        return status
    except HpctrainError as error:
        alone = chosen is not None and chosen.command is _submit  # which runs in one process
        is_plain = isinstance(error, (JobError, UnfitError))  # and needs no traceback
        if not (error.everywhere or alone or is_plain):
            raise
        _say_once(error)
        return int(error.exit_code)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    try:
        return _parser().parse_args(arguments)
    except SystemExit:
        streams.flush()  # the help
        raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hpctrain",
        description="Train PyTorch models over plain MPI.",
        epilog=f"{RUN_EXAMPLES}\n{STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hpctrain {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="train what a job file describes, under mpirun or alone",
        epilog=f"{RUN_EXAMPLES}\n{STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("job", type=Path, help="the job file, TOML")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        dest="overrides",
        help="replace a value of the job file; may be repeated",
    )
    run.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="use this run folder, and continue the run in it if there is one",
    )
    run.add_argument("--fresh", action="store_true", help="do not continue an unfinished run")
    run.add_argument(
        "--live",
        action=argparse.BooleanOptionalAction,
        help="show progress as a bar or as lines, whatever the output is; "
        "by default a bar on a terminal",
    )
    run.add_argument(
        "--restarts",
        type=int,
        metavar="N",
        help="start the ranks, and start them again from the last checkpoint up to N times when "
        "they end with a failure",
    )
    run.add_argument(
        "--launcher",
        metavar="COMMAND",
        help="with --restarts: what starts the ranks, for example 'mpirun -n 4'; by default the "
        "MPI library's own, with one rank a core",
    )
    run.add_argument("--launch", default="", help=argparse.SUPPRESS)  # by a supervisor, its name
    run.set_defaults(command=_run)

    submit = commands.add_parser("submit", help="put a job into Slurm's queue")
    submit.add_argument("job", type=Path, help="the job file, TOML")
    submit.add_argument("--dry-run", action="store_true", help="print the batch script, and end")
    submit.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        dest="overrides",
        help="replace a value of the job file; may be repeated",
    )
    for key, names in SUBMIT_OPTIONS.items():
        submit.add_argument(
            *names, dest=key, metavar="VALUE", help=f"the same as --set submit.{key}=VALUE"
        )
    submit.set_defaults(command=_submit)

    keys = commands.add_parser("keys", help="list every key of a job file")
    keys.add_argument("--markdown", action="store_true", help="as the table of docs/job-file.md")
    keys.set_defaults(command=_keys)

    doctor = commands.add_parser("doctor", help="check launcher, MPI, cores and links of all ranks")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.add_argument(
        "--kill-a-rank",
        action="store_true",
        help="kill the last rank, and say whether the launcher lets the others live",
    )
    doctor.set_defaults(command=_doctor)

    report = commands.add_parser("report", help="draw loss, throughput and timeline of a run")
    report.add_argument("run", type=Path, help="the run folder")
    report.set_defaults(command=_report)
    return parser


def _run(chosen: argparse.Namespace) -> int:
    if chosen.restarts is not None or chosen.launcher is not None:
        return _supervise(chosen)
    stop = StopRequest()
    stop.listen(os.environ)
    missing = _held_packages()
    # Imported here, so that a mistyped command line is answered before torch is loaded.
    from hpctrain import report
    from hpctrain.train import recovery
    from hpctrain.world import join

    loaded = _load_together(chosen.job, chosen.overrides, missing)
    trainer = loaded.trainer(join(), chosen.run_dir, chosen.fresh, stop, chosen.launch)
    if chosen.live is not None:
        trainer.console.live = chosen.live
    recovery.run(trainer)
    if trainer.world.is_root and loaded.job.run.report:
        trainer.console.say(report.write(trainer.run_folder.path))
    trainer.show_sample()
    return ExitCode.DONE


def _supervise(chosen: argparse.Namespace) -> int:
    """Start ranks that run the job, and start them again when they fail."""
    from hpctrain import job_file, supervisor

    cache.hold(os.environ)  # between launches no rank does
    restarts = chosen.restarts or 0
    if restarts < 0:
        raise JobError("--restarts", value=restarts, allowed="0 or more", everywhere=True)
    table = job_file.read(chosen.job, chosen.overrides).table.get("run")
    runs = table.get("folder", "runs") if isinstance(table, dict) else "runs"

    def command(folder: Path | None, launch: str, is_first: bool) -> list[str]:
        words = [sys.executable, "-m", "hpctrain", "run", str(chosen.job), "--launch", launch]
        for override in chosen.overrides:
            words += ["--set", override]
        if folder is not None:
            words += ["--run-dir", str(folder)]
        if chosen.fresh and (is_first or folder is None):
            words.append("--fresh")
        if chosen.live is not None:
            words.append("--live" if chosen.live else "--no-live")
        return words

    return supervisor.run(
        command,
        launcher=(
            supervisor.default_launcher(os.environ)
            if chosen.launcher is None
            else supervisor.words_of(chosen.launcher)
        ),
        restarts=restarts,
        parent=Path(str(runs)) / chosen.job.stem,
        chosen=chosen.run_dir,
        environment=os.environ,
    )


def _held_packages() -> UnfitError | None:
    """What keeps this rank from its packages, to be told when all ranks have joined."""
    try:
        cache.hold(os.environ)
    except UnfitError as error:
        return error
    return None


def _load_together(
    path: Path, overrides: Sequence[str], missing: UnfitError | None = None
) -> LoadedJob:
    """Load the job on every rank, and have all ranks leave when one of them finds mistakes.

    Or when one of them misses its packages, without which it would find others.

    A rank that left alone would keep the others waiting for it inside MPI_Init.
    """
    from hpctrain import job
    from hpctrain.world import JOIN_S, join

    loaded, mistakes, fingerprint = None, None, ""
    kind: type[HpctrainError] = JobError
    try:
        if missing:
            raise missing
        loaded = job.load(path, overrides)
        fingerprint = loaded.fingerprint
    except (JobError, UnfitError) as error:
        mistakes, kind = str(error), type(error)
    try:
        deadline_s = loaded.job.exchange.deadline_s if loaded else JOIN_S
        everyone = join(deadline_s=deadline_s).comm.allgather((mistakes, kind, fingerprint))
    except UnfitError as error:
        raise kind(f"{mistakes}\n{error}", everywhere=True) if mistakes else error from None
    for rank, (text, its_kind, _) in enumerate(everyone):
        if text:
            raise its_kind(text if rank == 0 else f"rank {rank}: {text}", everywhere=True)
    if odd := [rank for rank, (*_, other) in enumerate(everyone) if other != everyone[0][2]]:
        raise JobError(
            "the job is not the same on all ranks",
            where=f"other than on rank 0: {shown(odd)}",
            fix="start all ranks with one command, where they read the same job file and module",
            everywhere=True,
        )
    assert loaded is not None
    return loaded


def _submit(chosen: argparse.Namespace) -> int:
    from hpctrain import job
    from hpctrain.submit import queue, script
    from hpctrain.world import library_name, load_mpi

    asked = {key: getattr(chosen, key) for key in SUBMIT_OPTIONS}
    options = [
        f"submit.{key}={value if key in _NUMBERS else json.dumps(value)}"
        for key, value in asked.items()
        if value is not None
    ]
    given = [*chosen.overrides, *options]
    loaded = job.load(chosen.job, given)
    if first := re.match("[0-9]+", loaded.job.submit.array):  # each task sets its own
        job.load(chosen.job, [*given, f"{loaded.job.submit.array_key}={first[0]}"])
    submission = queue.prepare(
        loaded.name,
        chosen.job,
        Path(loaded.job.run.folder) / loaded.name,
        chosen.overrides,
        loaded.job.submit,
        library_name(load_mpi().Get_library_version()),
    )
    if chosen.dry_run:
        streams.say(script.render(submission))
    else:
        streams.say(f"{queue.submit(submission).text}\n")
    return ExitCode.DONE


def _keys(chosen: argparse.Namespace) -> int:
    from hpctrain import keys
    from hpctrain.job import Job

    show = keys.as_markdown if chosen.markdown else keys.as_text
    streams.say(f"{show(keys.keys_of(Job))}\n")
    return ExitCode.DONE


def _doctor(chosen: argparse.Namespace) -> int:
    from hpctrain import doctor
    from hpctrain.world import join, launched_rank

    try:
        world = join()
    except UnfitError as error:
        if chosen.json and launched_rank(os.environ) == 0:
            streams.say(f"{doctor.refused(error)}\n")
        raise
    if chosen.kill_a_rank:
        return doctor.kill_a_rank(world)
    return doctor.run(world, as_json=chosen.json)


def _report(chosen: argparse.Namespace) -> int:
    from hpctrain import report

    streams.say(f"{report.write(chosen.run, required=True)}\n")
    return ExitCode.DONE


def _say_once(error: HpctrainError) -> None:
    """Show an error that every rank has met, from the first; from another if it is alone with it.

    Ranks that all end do so at once. One that may be alone ends the others. One that turns out to
    be waits for them at the exit, until they are ended because it has left: it speaks before that.
    """
    from hpctrain.world import current, launched_rank, speaker_of

    world = current()
    rank = world.rank if world else launched_rank(os.environ)
    text = f"hpctrain: {error}\n"
    if world and world.size > 1 and not error.everywhere:
        time.sleep(rank and ALONE_S + min(rank, 20) / 10)  # ranks may have met it one and all
        streams.tell(f"hpctrain: {world.name_of(rank)} at {world.position}: {error}\n")
        world.abort(error.exit_code)
    elif rank == (speaker_of(world, error) if world else 0):
        with suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()
    elif world:
        alone = threading.Timer(ALONE_S, streams.tell, [f"rank {rank}: {text}"])
        alone.daemon = True
        alone.start()


if __name__ == "__main__":
    sys.exit(main())
