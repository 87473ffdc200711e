"""What stragglers cost: a coded root and 8 workers against all-reduces and the classic code.

Each of 8 workers owns 4 data blocks, and holds as many of others. A data block takes 25 ms asleep,
as on a device, times the worker's factor in that iteration, and a real gradient of 1 MB. Arms take
turns in each scenario; times are the whole wall-clock of all iterations, the end included. The
classic code (fractional repetition, Tandon et al., 2017) has each worker compute all that it holds
and send one vector; the root waits for one worker of each pair. The limit, T*, is the smallest time
by which every data block could have been computed once by a holder, as fast as workers were.

In `dead`, a worker of `coded` kills itself in the third iteration, and one of `classic` does
nothing; all-reduces end with it, and are taken undisturbed. Needs Open MPI, whose survivors live.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import cluster
import harness
import torch
from torch import nn

WORKERS, BLOCKS, COPIES = 8, 4, 2
BLOCK_S = 0.025
SLICE_S = 1e-3
LAYERS, WIDTH = 3, 288
"""Layers of so many squared weights: a gradient of 1 MB."""
LINK_LAYERS, LINK_WIDTH = 8, 176
"""The same, over links: gradients travel layer by layer, and are shared out over roots."""
TORCH_PORT = 29_561
VICTIM = 2
RUNS, ITERATIONS, QUICK_ITERATIONS = 3, 200, 6

SCENARIOS: dict[str, dict[str, Any]] = {
    "none": {},
    "rotating_5x": {"kind": "rotating", "factor": 5.0},
    "persistent_5x": {"kind": "persistent", "ranks": [VICTIM], "factor": 5.0},
    "bernoulli": {"kind": "bernoulli", "factor": 5.0, "probability": 0.1, "seed": 1},
    "exponential": {"kind": "exponential", "mean": 0.5, "seed": 1},
    "two_half_speed": {"kind": "persistent", "ranks": [VICTIM, 5], "factor": 2.0},
    "dead": {},
}
"""What is injected; the last one ends with a rank missing."""
LINK_SCENARIOS = ("none", "rotating_5x", "persistent_5x")
LINK_ROOTS = (1, 4)
ON_LINKS = "{}, {} root(s)"
"""What a scenario over links is called."""
RATE = "1gbit"
ARMS = ("allreduce", "ddp", "classic", "coded")
TARGETS: dict[str, dict[str, float]] = {
    "none": {"over_allreduce": 1.05, "redundant_share": 0.02},
    "rotating_5x": {"over_allreduce": 0.30, "over_classic_code": 0.70, "over_t_star": 1.15},
    "persistent_5x": {"over_t_star": 1.15},
    "dead": {"over_t_star": 1.15},
    "bernoulli": {"over_t_star": 1.30},
    "exponential": {"over_t_star": 1.30},
    "two_half_speed": {"over_limit": 1.25},
}

Wanted = Callable[[], bool]


class Work:
    """The data blocks of one rank in one scenario: their model, their time, their data."""

    def __init__(self, scenario: str, worker: int, layers: int = LAYERS) -> None:
        from hpctrain.train.inject import InjectConfig, Injection

        self.worker = worker
        config = InjectConfig(**SCENARIOS[scenario])
        self._injection = Injection(config, max(0, worker), range(WORKERS))
        torch.manual_seed(0)
        width = WIDTH if layers == LAYERS else LINK_WIDTH
        self.model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        self._x = torch.randn(4, width)
        self.takes_time = True
        """Whether data blocks sleep; not in the steps before the measured ones."""

    def factor(self, iteration: int) -> float:
        """How many times as long this rank takes."""
        return self._injection.factor(iteration + 1)

    def loss(self, iteration: int, is_wanted: Wanted = lambda: True) -> torch.Tensor:
        """The loss of a data block, after its time; sooner if it is not wanted any more."""
        sleep_s = BLOCK_S * self.factor(iteration) if self.takes_time else 0.0
        end_s = time.perf_counter() + sleep_s
        while (left_s := end_s - time.perf_counter()) > 0 and is_wanted():
            time.sleep(min(SLICE_S, left_s))
        value: torch.Tensor = self.model(self._x).square().mean() / (WORKERS * BLOCKS)
        return value

    @torch.no_grad()
    def update(self) -> None:
        """A step of gradient descent."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-3)
        self.model.zero_grad()


# ---------------------------------------------------------------------- arms


def run_synchronous(arm: str, work: Work, iterations: int, world: Any, group: Any) -> float:
    """All-reduce of hpctrain, or torch DDP on gloo; rank 0, the root, has no data blocks."""
    import hpctrain
    from hpctrain.comm.channel import barrier
    from hpctrain.comm.collect import barrier_on
    from hpctrain.comm.engine import engine_of

    engine = engine_of(world)
    synchronized: Any
    if arm == "ddp":
        if work.worker < 0:  # MPI's own barrier would take a core meanwhile
            barrier_on(engine.control)
            ends = engine.control.post(barrier, "the end of DDP")
            engine.drive(lambda: ends.done, WORKERS * BLOCK_S)
            return 0.0
        synchronized = nn.parallel.DistributedDataParallel(
            work.model, gradient_as_bucket_view=True, process_group=group
        )
    else:
        synchronized = hpctrain.DataParallel(work.model)
    own_loss, work_model = work.loss, work.model
    work.model = synchronized

    def step(iteration: int) -> None:
        if work.worker < 0:
            synchronized.exchange.finish()
        else:
            for place in range(BLOCKS):
                last: AbstractContextManager[Any] = nullcontext()
                with last if place == BLOCKS - 1 else synchronized.no_sync():
                    own_loss(iteration).backward()
        work.update()

    work.takes_time = False
    for _ in range(8 if arm == "allreduce" else 2):  # the exchange tries its ways out
        step(0)
    work.takes_time = True
    barrier_on(engine.control)
    begun_s = time.perf_counter()
    for iteration in range(iterations):
        step(iteration)
    took_s = time.perf_counter() - begun_s
    barrier_on(engine.control)
    work.model = work_model
    return took_s


class Classic:
    """Whole-worker fractional repetition over a mailbox: one vector a worker, one of each pair."""

    def __init__(self, world: Any, work: Work) -> None:
        from hpctrain.comm.engine import engine_of
        from hpctrain.comm.mailbox import Mailbox
        from hpctrain.grad.coded.cells import HEADER_BYTES, Kind, Pool

        self._header, self._kind = HEADER_BYTES, Kind
        self._world, self._work = world, work
        self._first = world.size - WORKERS  # the first worker's rank; rank 0 is the root
        self._engine = engine_of(world)
        self._pool = Pool()
        self._parameters = list(work.model.parameters())
        self._nbytes = 4 * sum(p.numel() for p in self._parameters)
        self.iteration = -1
        self._groups: dict[int, Any] = {}
        self.result: Any = None
        self.mailbox = Mailbox(self._engine, self)
        self.mailbox.open()

    def room(self, source: int, nbytes: int) -> Any:
        return self._pool.take(nbytes - self._header)

    def sent(self, letter: Any) -> None:
        self._pool.drop(letter)

    def died(self, rank: int) -> None:
        pass

    def tick(self, now: float) -> None:
        pass

    def came(self, source: int, letter: Any) -> None:
        if letter.round != self.iteration:
            self._pool.drop(letter)
        elif self._world.rank == 0:
            group = (source - self._first) // COPIES
            if group in self._groups:
                self._pool.drop(letter)
            else:
                self._groups[group] = letter
        else:
            self.result = letter

    def root_step(self, iteration: int) -> None:
        """Wait for one worker of each pair, add up, send the sum to all."""
        self._engine.drive(lambda: len(self._groups) == WORKERS // COPIES, SLICE_S)
        letters = [self._groups[group] for group in sorted(self._groups)]
        total, *others = letters
        for other in others:
            total.numbers(torch.float32).add_(other.numbers(torch.float32))
            self._pool.drop(other)
        self._groups = {}
        self.iteration += 1
        total.write(self._kind.RESULT, iteration)
        self._pool.hold(total, WORKERS - 1)
        for rank in range(self._first, self._world.size):
            self.mailbox.send(rank, total)

    def worker_step(self, iteration: int, is_dead: bool) -> None:
        """Compute all that this worker holds, unless the sum comes first, and send it."""
        self.iteration, self.result = iteration, None
        for _ in range(BLOCKS * COPIES):
            if self.result is None and not is_dead:
                self._work.loss(iteration, lambda: self.result is None).backward()
        if self.result is None and not is_dead:
            letter = self._pool.take(self._nbytes).write(self._kind.CELL, iteration)
            flat = letter.numbers(torch.float32)
            torch.cat([p.grad.flatten() for p in self._parameters if p.grad is not None], out=flat)
            self.mailbox.send(0, letter)
        self._engine.drive(lambda: self.result is not None, SLICE_S)
        parts = self.result.numbers(torch.float32).split([p.numel() for p in self._parameters])
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        self._work.update()
        self._pool.drop(self.result)


def run_classic(work: Work, iterations: int, world: Any, dead: bool) -> float:
    """The classic code: the whole wall-clock on the root."""
    from hpctrain.comm.collect import barrier_on
    from hpctrain.comm.engine import engine_of

    classic = Classic(world, work)
    if world.rank == 0:
        classic.iteration = 0
    control = engine_of(world).control
    barrier_on(control)
    begun_s = time.perf_counter()
    for iteration in range(iterations):
        if world.rank == 0:
            classic.root_step(iteration)
        elif work.worker >= 0:
            classic.worker_step(iteration, dead and work.worker == VICTIM)
    barrier_on(control)
    took_s = time.perf_counter() - begun_s
    classic.mailbox.abandon()
    return took_s


def run_coded(
    work: Work, iterations: int, world: Any, dead: bool, aggregators: int, folder: Path
) -> tuple[float, list[dict[str, Any]]]:
    """Ours: its time, and the spans of all ranks, on rank 0."""
    from hpctrain.comm.collect import all_gather, barrier_on
    from hpctrain.comm.engine import engine_of
    from hpctrain.grad.coded.config import CodedConfig
    from hpctrain.grad.coded.exchange import Coded

    optimizer = torch.optim.SGD(work.model.parameters(), lr=1e-3)
    config = CodedConfig(
        blocks=WORKERS * BLOCKS, copies=COPIES, root="dedicated", aggregators=aggregators
    )
    coded = Coded(work.model, optimizer, config, world=world)
    control = engine_of(world).control

    def loss(_: None) -> torch.Tensor:
        if dead and work.worker == VICTIM and coded.step_number == 2 and coded.worked_on == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return work.loss(coded.step_number, lambda: coded.is_wanted)

    world.trace.take()
    world.trace.active = True
    barrier_on(control)
    begun_s = time.perf_counter()
    while coded.step_number < iterations and not coded.is_over:
        if coded.step(lambda block: [None], loss):
            work.update()
    coded.end()
    took_s = time.perf_counter() - begun_s
    spans = [
        {"track": t, "name": n, "start_s": s, "end_s": e, "rank": world.rank, "session": 0, **f}
        for t, n, s, e, f in world.trace.take()
        if t in ("data blocks", "coded")
    ]
    world.trace.active = False
    if not dead:
        everyones = all_gather(control, spans)
        coded.mailbox.abandon()
        return took_s, [span for spans in everyones for span in spans]
    # Collectives would wait for the dead.
    (folder / f".{world.rank}").write_text(json.dumps(spans))
    (folder / f".{world.rank}").rename(folder / f"{world.rank}.json")
    if world.rank == 0:
        while len(files := list(folder.glob("*.json"))) < world.size - 1:
            time.sleep(0.01)
        spans = [span for file in files for span in json.loads(file.read_text())]
        shutil.rmtree(folder)
    return took_s, spans


# ---------------------------------------------------------------------- one launch


def measure(
    iterations: int, first_arm: int, aggregators: int, layers: int, only: Sequence[str]
) -> None:
    """All scenarios, each with all arms in turn. Rank 0 tells the figures."""
    import torch.distributed as dist

    import hpctrain

    world = hpctrain.join()
    torch.set_num_threads(1)
    worker = world.rank - aggregators
    assert world.size == WORKERS + aggregators
    group = None
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    store = dist.TCPStore(address, TORCH_PORT, is_master=world.rank == 0, wait_for_workers=False)
    if worker >= 0:
        dist.init_process_group("gloo", store=store, rank=worker, world_size=WORKERS)
        group = dist.group.WORLD
    folder = Path(world.comm.bcast(tempfile.mkdtemp() if world.rank == 0 else None))
    arms = ARMS[first_arm:] + ARMS[:first_arm]
    figures: dict[str, Any] = {}
    for scenario in only:
        dead = scenario == "dead"
        times: dict[str, float] = {}
        for arm in ("classic", "coded") if dead else arms:
            work = Work(scenario, worker, layers)
            if arm == "classic":
                times[arm] = run_classic(work, iterations, world, dead)
            elif arm == "coded":
                times[arm], spans = run_coded(work, iterations, world, dead, aggregators, folder)
            else:
                took_s = run_synchronous(arm, work, iterations, world, group)
                times[arm] = max(world.comm.allgather(took_s))
        if world.rank == 0:
            figures[scenario] = {"times": times, **coded_figures(spans, dead)}
    if world.rank == 0:
        print(json.dumps(figures), flush=True)
    if group is not None:
        dist.destroy_process_group()
    if "dead" in only:
        time.sleep(0.5)
        os._exit(0)  # nobody waits for the dead


def coded_figures(spans: list[dict[str, Any]], dead: bool) -> dict[str, float]:
    """What the traces of a run of ours say. T is from the begin of a step to that of the next."""
    from hpctrain.straggling import read_steps

    steps, _ = read_steps(spans)
    first = 1 if not dead else 3
    periods = [
        (after.start_s - step.start_s, step.best_s)
        for step, after in zip(steps[first:-1], steps[first + 1 :], strict=True)
    ]
    usable = [(took_s, best_s) for took_s, best_s in periods if 0 < best_s < 1e6]
    return {
        "t_star_s": statistics.fmean(best_s for _, best_s in usable),
        "over_t_star": statistics.fmean(took_s / best_s for took_s, best_s in usable),
        "learned_s": statistics.median(
            took_s for took_s, _ in periods[min(20, len(periods) // 2) :]
        ),
        "redundant_share": statistics.fmean(step.redundant_share for step in steps),
        "root_ingress_vectors": statistics.fmean(step.vectors for step in steps),
    }


# ---------------------------------------------------------------------- figures


def combine(runs: Sequence[dict[str, Any]], iterations: int) -> dict[str, dict[str, float]]:
    """Medians over runs, by scenario."""
    found: dict[str, dict[str, float]] = {}
    for scenario in runs[0]:
        rows = defaultdict(list)
        for run in runs:
            times = run[scenario]["times"]
            undisturbed = run["none"]["times"]["allreduce"]
            reference = times.get("allreduce", undisturbed)
            rows["coded_ms"].append(times["coded"] / iterations * 1e3)
            for arm, seconds in times.items():
                rows[f"{arm}_ms"].append(seconds / iterations * 1e3)
            rows["over_allreduce"].append(times["coded"] / reference)
            rows["over_ddp"].append(times["coded"] / times.get("ddp", run["none"]["times"]["ddp"]))
            rows["over_classic_code"].append(times["coded"] / times["classic"])
            if scenario == "two_half_speed":  # 1.14 of T0, an undisturbed iteration of all-reduces
                limit_s = 8 / 7 * undisturbed / iterations
                rows["over_limit"].append(run[scenario]["learned_s"] / limit_s)
            for key in ("t_star_s", "over_t_star", "redundant_share", "root_ingress_vectors"):
                rows[key].append(run[scenario][key])
        found[scenario] = {key: statistics.median(values) for key, values in rows.items()}
    return found


def misses(found: dict[str, dict[str, float]]) -> Iterator[str]:
    """Targets that are not met. Over links it is that several roots are faster than one."""
    for scenario, limits in TARGETS.items():
        for key, limit in limits.items():
            value = found.get(scenario, {}).get(key)
            if value is not None and value > limit:
                yield f"{scenario}: {key} {value:.3f}, aim {limit}"
    one, several = LINK_ROOTS
    for scenario in LINK_SCENARIOS:
        of_one, of_several = (found.get(ON_LINKS.format(scenario, n)) for n in (one, several))
        if of_one and of_several and of_several["coded_ms"] >= of_one["coded_ms"]:
            yield (
                f"{scenario}: {several} roots take {of_several['coded_ms']:.1f} ms, aim less than "
                f"one root, {of_one['coded_ms']:.1f} ms"
            )


def draw(found: dict[str, dict[str, float]], file: Path) -> None:
    """Time of an iteration by scenario and arm, and the limit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axis = figure.subplots()
    for place, arm in enumerate(ARMS):
        values = [row.get(f"{arm}_ms", 0.0) for row in found.values()]
        axis.bar([i + (place - 1.5) * 0.2 for i in range(len(values))], values, 0.19, label=arm)
    for i, row in enumerate(found.values()):
        axis.plot([i - 0.4, i + 0.4], [row["t_star_s"] * 1e3] * 2, color="black", linewidth=1.2)
    axis.plot([], [], color="black", label="T*, the limit of coded")
    axis.set_xticks(range(len(found)), [name.replace(", ", "\n") for name in found])
    axis.set(ylabel="ms an iteration")
    axis.legend(ncols=5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.16))
    figure.savefig(file, dpi=150)


def launch(
    iterations: int, turn: int, roots: int, only: Sequence[str], on_links: bool
) -> dict[str, Any]:
    """One run of all arms, which take turns in being the first."""
    layers = LINK_LAYERS if on_links else LAYERS
    arguments = (str(iterations), str(turn % len(ARMS)), str(roots), str(layers), *only)
    if on_links:
        with cluster.Cluster(WORKERS + roots, RATE) as hosts:
            return harness.launch(1, *arguments, on=hosts)
    return harness.launch(WORKERS + roots, *arguments, options=("--with-ft", "ulfm"))


def main() -> None:
    made = harness.parser(__doc__)
    made.add_argument("--iterations", type=int, help="of each arm and scenario")
    made.add_argument("--runs", type=int, help="launches, over which medians are taken")
    made.add_argument(
        "--links", action="store_true", help="on hosts of their own, with links of 1 Gbit/s"
    )
    made.add_argument("--only", nargs="+", choices=tuple(SCENARIOS), help="scenarios, with 'none'")
    options = made.parse_args()
    if options.worker:
        measure(*map(int, options.worker[:4]), only=options.worker[4:])
        return
    iterations = options.iterations or (QUICK_ITERATIONS if options.quick else ITERATIONS)
    launches = options.runs or (1 if options.quick else RUNS)
    if options.links:
        cluster.exit_if_unfit("straggler")
    found = {}
    for roots in LINK_ROOTS if options.links else (1,):
        only = list(LINK_SCENARIOS if options.links else SCENARIOS)
        if options.only:
            only = [s for s in only if s in (*options.only, "none")]
        runs = [launch(iterations, turn, roots, only, options.links) for turn in range(launches)]
        name = ON_LINKS if options.links else "{}"
        found |= {name.format(s, roots): row for s, row in combine(runs, iterations).items()}
    rows = [{"scenario": scenario, **row} for scenario, row in found.items()]
    shown = [
        *("scenario", "allreduce_ms", "ddp_ms", "classic_ms", "coded_ms", "over_allreduce"),
        *("over_classic_code", "over_t_star", "redundant_share", "root_ingress_vectors"),
    ]
    text = harness.table([{key: row.get(key, "") for key in shown} for row in rows])
    missed = list(misses(found))
    text += "\n" + ("\n".join(f"missed: {line}" for line in missed) or "all targets met")
    figures = {
        "iterations": iterations,
        "runs": launches,
        "targets": TARGETS,
        "missed": missed,
        "scenarios": {s: {k: round(v, 4) for k, v in row.items()} for s, row in found.items()},
    }
    harness.finish(text, figures, options.save, partial(draw, found))


if __name__ == "__main__":
    sys.exit(main())
