"""Is this job's environment fit to train? Launcher, MPI, threads, cores, links, device buffers.

Run it the way the job is run: ``mpirun -n 4 hpctrain doctor``. The findings are *ok*, *warning*
(it works, but not as fast or as safely as it could) or *unfit* (it would fail).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mpi4py
import numpy
import torch

from hpctrain import __version__
from hpctrain.comm.collect import all_gather, barrier_on
from hpctrain.comm.device_probe import TAKEN, device_calls
from hpctrain.comm.engine import Engine, engine_of
from hpctrain.comm.measure import Link, measure_all_reduce, measure_links, progress_trial
from hpctrain.errors import ExitCode, JobError, UnfitError
from hpctrain.streams import say
from hpctrain.submit.launcher import choose, srun_types
from hpctrain.world import FORWARD_S, Seat, World, launched_size, tells_of_deaths

OK, WARNING, UNFIT = "ok", "warning", "unfit"
KILL_S = 2.0
"""How long ranks must live after the death of one."""
REDUCED_BYTES = (1 << 12, 1 << 20, 1 << 24)

_LEVELS = ("single", "funneled", "serialized", "multiple")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    verdict: str
    text: str
    fix: str = ""


def run(world: World, as_json: bool) -> int:
    """Check the environment and print the findings on rank 0. Collective.

    Returns:
        The exit status: 0 when fit, 3 when not.
    """
    engine = engine_of(world)
    facts = all_gather(engine.control, _facts())
    findings = [
        _launcher(world),
        *_batch_launcher(world),
        _threads(world),
        *same_everywhere([world.name_of(rank) for rank in range(world.size)], facts),
        *binding(world.seats, world.nodes),
        _torch_threads(world, all_gather(engine.control, torch.get_num_threads())),
        *_progress(engine),
        *_links(engine),
        _device_buffers(world),
        _deaths(world, os.environ),
    ]
    fit = all(finding.verdict != UNFIT for finding in findings)
    if world.is_root:
        say(f"{_as_json(world, findings, fit) if as_json else _as_text(findings, fit)}\n")
    return ExitCode.DONE if fit else ExitCode.UNFIT


def refused(error: UnfitError) -> str:
    """The JSON report of ranks that could not even join."""
    text = f"{error.what}: {error.value}" if error.value is not None else error.what
    _, ranks = launched_size(os.environ)
    report = {
        "fit": False,
        "ranks": ranks,
        "nodes": [],
        "seats": [],
        "mpi": None,
        "findings": [asdict(Finding("launcher", UNFIT, text, error.fix or ""))],
    }
    return json.dumps(report, indent=1)


def _facts() -> dict[str, str]:
    """Versions that must be the same on all ranks."""
    return {
        "hpctrain": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "mpi4py": mpi4py.__version__,
        "numpy": numpy.__version__,
    }


def _launcher(world: World) -> Finding:
    # A launcher that MPI does not recognise was refused when the ranks joined.
    launcher, _ = launched_size(os.environ)
    if world.split_machines:
        return Finding(
            "launcher",
            WARNING,
            f"{world.library} says that ranks on {', '.join(world.split_machines)} share no memory",
            "start ranks with the library's own mpirun, or by another type of srun's --mpi",
        )
    started = "started by hand" if launcher == "none" else f"started by {launcher}"
    return Finding(
        "launcher",
        OK,
        f"{world.size} rank(s) on {len(world.nodes)} node(s), {started}, {world.library}",
    )


def _batch_launcher(world: World) -> list[Finding]:
    """How `hpctrain submit` would start ranks here; nothing where there is no Slurm.

    Looked at on the root's host alone.
    """
    if not world.is_root or shutil.which("srun") is None:
        return []
    types = srun_types()
    chosen = choose(world.library, types, "auto", survivors=False)
    listed = f"srun's types that load: {', '.join(types) or 'none'}"
    return [Finding("Slurm", OK, f"`{' '.join(chosen.words)}`, since {chosen.reason}; {listed}")]


def kill_a_rank(world: World) -> int:
    """Have the last rank kill itself, and say whether the others live. Collective.

    Returns:
        The exit status: 0 when they do. If they do not, the launcher ends this program.
    """
    if world.size < 2:
        raise JobError("--kill-a-rank needs several ranks", value=world.size, everywhere=True)
    engine = engine_of(world)
    engine.tolerate_deaths()
    engine.leave_behind()
    victim = world.name_of(world.size - 1)
    if world.is_root:
        text = f"killing {victim}; if no more follows, the launcher ends all ranks with it"
        print(text, flush=True)
    barrier_on(engine.control, "before the kill")
    if world.rank == world.size - 1:
        time.sleep(FORWARD_S)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(KILL_S)
    if world.is_root:
        print(f"the others live {KILL_S:.0f} s after the death of {victim}", flush=True)
    return ExitCode.DONE


def _deaths(world: World, environment: Mapping[str, str]) -> Finding:
    """Whether survivors of a dead rank live, as far as the environment tells."""
    if "Open MPI" not in world.library:
        text = "all ranks end when one dies, as far as is known of this library"
        return Finding("deaths", OK, text)
    if tells_of_deaths(environment):
        return Finding("deaths", OK, "survivors live and know who is dead (--with-ft ulfm)")
    return Finding(
        "deaths",
        OK,
        "all ranks end when one dies; mpirun --with-ft ulfm lets the others live, for "
        "exchange.mode = 'coded' (--kill-a-rank tries it)",
    )


def _threads(world: World) -> Finding:
    return Finding("thread level", OK, f"MPI_THREAD_{_LEVELS[world.thread_level].upper()}")


def same_everywhere(names: Sequence[str], facts: Sequence[dict[str, str]]) -> list[Finding]:
    """Versions that differ between ranks are unfit: the ranks would compute different things."""
    findings = []
    for key in facts[0]:
        versions = Counter(fact[key] for fact in facts)
        if len(versions) == 1:
            continue
        usual = versions.most_common(1)[0][0]
        odd = [
            f"{name} has {fact[key]}"
            for name, fact in zip(names, facts, strict=True)
            if fact[key] != usual
        ]
        findings.append(
            Finding(
                "versions",
                UNFIT,
                f"{key} is {usual} on most ranks, but {', '.join(odd)}",
                "use one environment on all nodes",
            )
        )
    return findings or [Finding("versions", OK, ", ".join(f"{k} {v}" for k, v in facts[0].items()))]


def binding(seats: Sequence[Seat], nodes: Sequence[Sequence[int]]) -> list[Finding]:
    """Whether ranks of one machine share cores that they need not share.

    Nodes of the same host name count as one machine: several daemons on one machine each bind
    their ranks from the first core up.
    """
    machines: dict[str, list[int]] = {}
    for ranks in nodes:
        machines.setdefault(seats[ranks[0]].host, []).extend(ranks)
    findings = []
    for host, ranks in machines.items():
        masks = {rank: seats[rank].cores for rank in ranks}
        cores = set().union(*masks.values())
        of_machine = max(seats[rank].machine_cores for rank in ranks)
        if len(ranks) > len(cores) and len(cores) < of_machine:
            findings.append(
                Finding(
                    "binding",
                    WARNING,
                    f"{host}: {len(ranks)} ranks may run on {len(cores)} of {of_machine} core(s)",
                    "start with --bind-to none, bind each rank to cores of its own, "
                    "or ask for more cores",
                )
            )
        elif len(ranks) > len(cores):
            findings.append(
                Finding(
                    "binding",
                    WARNING,
                    f"{host}: {len(ranks)} ranks share {len(cores)} core(s): oversubscribed",
                    "start at most one rank a core; timings will be poor",
                )
            )
        else:
            findings += _overlap(host, masks)
    return findings or [Finding("binding", OK, "every rank has cores of its own or a fair share")]


def _overlap(host: str, masks: dict[int, tuple[int, ...]]) -> list[Finding]:
    """Ranks pinned onto the same cores although the machine has cores for all."""
    for mask in masks.values():
        sharing = [other for other in masks if set(masks[other]) <= set(mask)]
        if len(sharing) > len(mask):
            return [
                Finding(
                    "binding",
                    WARNING,
                    f"{host}: ranks {sharing} are bound to core(s) {list(mask)}, "
                    "each slows the others down",
                    "start with --bind-to none, or bind each rank to cores of its own",
                )
            ]
    return []


def _torch_threads(world: World, threads: Sequence[int]) -> Finding:
    own = f"{min(threads)} to {max(threads)}" if min(threads) < max(threads) else str(threads[0])
    for rank, count in enumerate(threads):
        if count > max(1, len(world.seats[rank].cores)):
            return Finding(
                "torch threads",
                WARNING,
                f"{world.name_of(rank)} computes with {count} threads on "
                f"{len(world.seats[rank].cores)} core(s)",
                "unset OMP_NUM_THREADS, or set it to the cores of a rank",
            )
    return Finding("torch threads", OK, f"{own} a rank")


def _progress(engine: Engine) -> list[Finding]:
    if engine.world.size == 1:
        return []
    times = ", ".join(f"{mode} {s * 1e3:.2f} ms" for mode, s in progress_trial(engine).items())
    return [Finding("progress", OK, f"6 blocks of 1 MB beside small kernels: {times}")]


def _links(engine: Engine) -> list[Finding]:
    """Latency and bandwidth from rank 0, and what an all-reduce takes."""
    if engine.world.size == 1:
        return [Finding("links", OK, "a single rank has none")]
    links = measure_links(engine.control)
    slowest: Link = min(links, key=lambda link: link.bytes_per_s)
    text = (
        f"latency {min(link.latency_s for link in links) * 1e6:.1f} to "
        f"{max(link.latency_s for link in links) * 1e6:.1f} µs, "
        f"bandwidth at least {slowest.bytes_per_s / 1e9:.2f} GB/s "
        f"(rank 0 to {engine.world.name_of(slowest.rank)})"
    )
    sums = "; ".join(map(str, measure_all_reduce(engine, REDUCED_BYTES)))
    return [Finding("links", OK, text), Finding("all-reduce", OK, sums)]


def _device_buffers(world: World) -> Finding:
    """What MPI takes out of device memory, found by trying it in children that may crash or hang.

    Looked at on the root's host alone.
    """
    name = "device buffers"
    if not torch.cuda.is_available():
        return Finding(name, OK, "no GPU is visible; gradients are in host memory")
    if not world.is_root:
        return Finding(name, OK, "")
    calls = device_calls(world.library)
    text = ", ".join(f"{call} {how}" for call, how in calls.items())
    if calls["send"] == TAKEN:
        return Finding(name, OK, text)
    return Finding(name, WARNING, f"{text}; gradients are copied to the host and back")


def _as_text(findings: Sequence[Finding], fit: bool) -> str:
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.name:<{width}}  {finding.verdict:<7}  {finding.text}")
        if finding.fix:
            lines.append(f"{'':<{width}}  {'':<7}  fix: {finding.fix}")
    lines.append("fit" if fit else "unfit: see above")
    return "\n".join(lines)


def _as_json(world: World, findings: Sequence[Finding], fit: bool) -> str:
    report: dict[str, Any] = {
        "fit": fit,
        "ranks": world.size,
        "nodes": [list(ranks) for ranks in world.nodes],
        "seats": [asdict(seat) for seat in world.seats],
        "mpi": world.library,
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(report, indent=1)
