"""Gradients and parameters of other ranks that come late: how long a run takes, and how good it is.

- `wall`: steps of a model that sleeps while it computes, as a GPU leaves the cores free, on two
  hosts with a link of 1 Gbit/s (cluster.py). Communication is what a bandwidth-optimal all-reduce
  of all gradients takes on the wire, measured by plain TCP; compute is as long, or a quarter.
  `wall_over_sync` is over a synchronous step, one blocking all-reduce after backward;
  `wall_over_overlapped` over this project's own, whose blocks are on the wire during backward.
- `bytes`: of messages, as counted, over those of synchronous steps in float32.
- `loss`: the main job on two ranks, after fewer steps: validation loss over that of synchronous
  training, each with the learning rate that is best for it on the same grid, mean of seeds.
- `sooner`: the main job on two hosts with links of 50 Mbit/s: when Streaming DiLoCo has the
  validation loss that synchronous training has after so many seconds.

The controls are the synchronous step, and torch's averaging of parameters once a period
(torch.distributed.algorithms.model_averaging) on gloo.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cluster
import harness
import torch
from links import Bench, Stepper, Work

HERE = Path(__file__).parent
MAIN_JOB = HERE.parent / "jobs" / "stdlib_lm.toml"
AIMS = {
    "wall": {"one_late, compute 1": 0.60, "corrected, compute 0.25": 0.27},
    "loss": {"od_sgd": 1.01, "corrected": 1.05, "diloco": 1.05, "streaming_diloco_int8": 1.03},
    "bytes": {"diloco int8": 60.0, "diloco int4": 115.0},
    "sooner": 4.0,
}

# ---------------------------------------------------------------- wall and bytes

COMPUTE = (1.0, 0.25)
"""Forward and backward, over the wire time."""
PERIOD = 8
SPREAD = {"period": PERIOD, "fragments": PERIOD}
ARMS: dict[str, dict[str, Any]] = {
    "one_late": {"preset": "one_late"},
    "od_sgd": {"preset": "od_sgd"},
    "local": {"preset": "local", "period": PERIOD},
    "corrected": {"preset": "corrected", **SPREAD, "pull_lag": PERIOD},
    "overlap_local": {"preset": "overlap_local", "period": PERIOD},
    "co2": {"preset": "co2", "period": PERIOD},
    "diloco": {"preset": "diloco"},
    "streaming_diloco": {"preset": "streaming_diloco"},
    "streaming_diloco_int8": {"preset": "streaming_diloco", "wire": "int8"},
}
BYTES = {
    f"diloco {wire}": {"preset": "diloco", "period": 16, "wire": wire} for wire in ("int8", "int4")
}
ROUNDS, QUICK_ROUNDS = 7, 3
STEPS = 16
"""Of a round: whole periods."""
WIRE_RATE = "1gbit"


class PeriodStepper:
    """Steps of one arm; a round is as many as make whole periods."""

    def __init__(self, work: Work, rank: int, values: Mapping[str, Any]) -> None:
        import hpctrain

        self.model = work.model()
        self.input = work.input(rank)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, fused=True)
        self.periods = hpctrain.Periods(
            self.model,
            self.optimizer,
            hpctrain.PeriodsConfig(**values),
            exchange=hpctrain.ExchangeConfig(way="direct"),
        )

    def __call__(self) -> None:
        for _ in range(STEPS):
            self.optimizer.zero_grad()
            self.model(self.input).sum().backward()
            self.periods.step()


def repeated(step: Callable[[], object]) -> Callable[[], None]:
    """A round of synchronous steps."""

    def run() -> None:
        for _ in range(STEPS):
            step()

    return run


class TorchAverage:
    """torch's own local SGD: parameters are averaged once a period, by all ranks at once."""

    def __init__(self, work: Work, rank: int) -> None:
        from torch.distributed.algorithms.model_averaging import averagers

        self.stepper = Stepper(work, rank, work.model())
        self.averager = averagers.PeriodicModelAverager(period=PERIOD, warmup_steps=0)

    def __call__(self) -> None:
        for _ in range(STEPS):
            self.stepper()
            self.averager.average_parameters(self.stepper.parameters)


def measured(layers: int, rounds: int) -> dict[str, Any]:
    """The worker's figures of `wall` and `bytes`."""
    import hpctrain

    bench = Bench(layers, with_heat=False)
    rank, wire_s = bench.world.rank, bench.seconds(bench.wire)
    walls: dict[str, dict[str, list[float]]] = {}
    for compute in COMPUTE:
        work = bench.work("sleep", compute * wire_s)
        plain = work.model()
        wrapped = hpctrain.DataParallel(work.model())
        overlapped = Stepper(work, rank, wrapped)
        overlapped()
        while wrapped.exchange.is_trying:
            overlapped()
        arms: dict[str, Callable[[], object]] = {
            "sync": repeated(Stepper(work, rank, plain, bench.plain(plain))),
            "overlapped": repeated(overlapped),
            "torch local": TorchAverage(work, rank),
            "no exchange": repeated(Stepper(work, rank, work.model())),
        }
        steppers = {name: PeriodStepper(work, rank, values) for name, values in ARMS.items()}
        times = harness.take_turns(
            {**arms, **steppers}, rounds, bench.together, bench.slowest, warm_up=1
        )
        for stepper in steppers.values():
            stepper.periods.finish()
        walls[str(compute)] = {name: [s / STEPS for s in of] for name, of in times.items()}
    work = Work("sleep", layers)
    sent = {"sync": sent_by_every_step(work, rank)}
    for name, values in BYTES.items():
        stepper = PeriodStepper(work, rank, values)
        stepper()
        stepper.periods.finish()
        sent[name] = stepper.periods.sent_bytes
    everyones = bench.gather(sent)
    bench.close()
    return {"rank": rank, "wire_s": wire_s, "wall": walls, "sent": everyones}


def sent_by_every_step(work: Work, rank: int) -> int:
    stepper = PeriodStepper(work, rank, {"preset": "every_step"})
    stepper()
    return stepper.periods.sent_bytes


def wall_figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """Ratios of medians, by arm and compute."""
    figures: dict[str, Any] = {"wall_over_sync": {}, "wall_over_overlapped": {}}
    for compute, times in found["wall"].items():
        medians = {name: statistics.median(of) for name, of in times.items()}
        for name, value in medians.items():
            key = f"{name}, compute {float(compute):g}"
            figures["wall_over_sync"][key] = value / medians["sync"]
            figures["wall_over_overlapped"][key] = value / medians["overlapped"]
    sums = {name: sum(each[name] for each in found["sent"]) for name in found["sent"][0]}
    figures["bytes_below_sync"] = {
        name: sums["sync"] / value for name, value in sums.items() if name != "sync"
    }
    return figures


# ---------------------------------------------------------------- loss

LOSSES: dict[str, tuple[str, ...]] = {
    "sync": (),
    "od_sgd": ("preset='od_sgd'",),
    "one_late": ("preset='one_late'",),
    "corrected": ("preset='corrected'",),
    "diloco": ("preset='diloco'",),
    "streaming_diloco_int8": ("preset='streaming_diloco'", "wire='int8'"),
}
RATES = (2e-3, 4e-3, 8e-3)
SEEDS = (1, 2, 3)
LOSS_STEPS, QUICK_LOSS_STEPS = 400, 40


def final_loss(arm: str, rate: float, seed: int, steps: int, folder: Path) -> float:
    """Validation loss of the main job after so many steps on two ranks."""
    run = folder / f"{arm}-{rate:g}-{seed}"
    values = [f"train.steps={steps}", f"optimizer.lr={rate}", f"seed={seed}"]
    values += ["run.report=false", "checkpoint.every=0", f"schedule.warmup={steps // 10}"]
    if LOSSES[arm]:
        values += ["exchange.mode='periods'", *(f"periods.{value}" for value in LOSSES[arm])]
    train(run, values)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    told = [each["validation"]["loss"] for each in map(json.loads, lines) if "validation" in each]
    return float(told[-1])


def train(run: Path, values: list[str]) -> None:
    sets = [word for value in values for word in ("--set", value)]
    mpiexec = Path(sys.executable).with_name("mpiexec")
    words = [str(mpiexec), "-n", "2", sys.executable, "-m", "hpctrain", "run", str(MAIN_JOB)]
    ended = subprocess.run(
        [*words, "--run-dir", str(run), *sets],
        env=os.environ | harness.RUNTIME | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        sys.exit(f"the main job ended with {ended.returncode}:\n{ended.stderr}")


def loss_figures(quick: bool, folder: Path) -> dict[str, Any]:
    """Each arm with its best rate, over synchronous training with its best."""
    steps = QUICK_LOSS_STEPS if quick else LOSS_STEPS
    arms = ["sync", "diloco"] if quick else list(LOSSES)
    rates, seeds = (RATES[1:2], SEEDS[:1]) if quick else (RATES, SEEDS)
    best, losses = {}, {}
    for arm in arms:
        tried = {rate: final_loss(arm, rate, seeds[0], steps, folder) for rate in rates}
        best[arm] = min(tried, key=lambda rate: tried[rate])
        losses[arm] = [tried[best[arm]]]
        losses[arm] += [final_loss(arm, best[arm], seed, steps, folder) for seed in seeds[1:]]
        sys.stderr.write(f"{arm}: rate {best[arm]:g}, losses {losses[arm]}\n")
    means = {arm: statistics.mean(values) for arm, values in losses.items()}
    return {
        "loss_over_sync": {arm: mean / means["sync"] for arm, mean in means.items()},
        "losses": losses,
        "rates": best,
    }


# ---------------------------------------------------------------- sooner

SLOW_RATE = "50mbit"
SYNC_S, QUICK_SYNC_S = 600.0, 30.0
EVAL_EVERY = 50


def sooner_figures(quick: bool, folder: Path) -> dict[str, Any]:
    """How much sooner Streaming DiLoCo has the loss that synchronous training reaches in time."""
    limit_s = QUICK_SYNC_S if quick else SYNC_S
    common = [f"train.eval_every={5 if quick else EVAL_EVERY}", "train.steps=100000"]
    common += ["run.report=false", "checkpoint.every=0", "schedule.name='constant'"]
    sync = curve(folder / "sync", common, limit_s)
    streaming = ["exchange.mode='periods'", "periods.preset='streaming_diloco'"]
    streaming += ["periods.wire='int8'", "periods.pull_lag=8"]
    loss = min(loss for _, loss in sync)
    ours = curve(folder / "streaming", [*common, *streaming], limit_s, until=loss)
    reached_s = next((s for s, value in ours if value <= loss), float("inf"))
    sync_s = next(s for s, value in sync if value <= loss)
    return {"sooner": sync_s / reached_s, "loss": loss, "sync": sync, "streaming": ours}


def curve(
    run: Path, values: list[str], limit_s: float, until: float = 0.0
) -> list[tuple[float, float]]:
    """Seconds since the first step, and the validation loss then."""
    sets = [word for value in values for word in ("--set", value)]
    words = [sys.executable, "-m", "hpctrain", "run", str(MAIN_JOB), "--run-dir", str(run), *sets]
    found: list[tuple[float, float]] = []
    metrics, begun_s, seen = run / "metrics.jsonl", 0.0, 0
    with cluster.Cluster(2, SLOW_RATE) as made:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = made.start("head", [*made.launcher(1), *words], **quiet)
        while process.poll() is None:
            time.sleep(0.05)
            if not begun_s and (run / "step").exists():
                begun_s = time.monotonic()
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            for line in lines[seen:]:
                told = json.loads(line).get("validation")
                if told:
                    found.append((time.monotonic() - begun_s, told["loss"]))
            seen = len(lines)
            is_over = begun_s and time.monotonic() - begun_s > limit_s
            if is_over or (found and found[-1][1] <= until):
                process.kill()  # the job itself ends with the cluster
                process.wait()
    return found


# ---------------------------------------------------------------- parent


def judged(figures: Mapping[str, Any]) -> list[str]:
    """Aims, and whether they are met."""
    lines = []
    for name, key, is_least in (
        ("wall", "wall_over_sync", False),
        ("loss", "loss_over_sync", False),
        ("bytes", "bytes_below_sync", True),
    ):
        for arm, aim in AIMS[name].items():  # type: ignore[attr-defined]
            value = figures.get(key, {}).get(arm)
            if value is not None:
                is_met = value >= aim if is_least else value <= aim
                lines.append(_line(f"{key}, {arm}", value, aim, is_met))
    if "sooner" in figures:
        aim = float(AIMS["sooner"])  # type: ignore[arg-type]
        lines.append(_line("sooner", figures["sooner"], aim, figures["sooner"] >= aim))
    return lines


def _line(what: str, value: float, aim: float, is_met: bool) -> str:
    return f"{what}: {value:.3f}, aim {aim:g}: {'met' if is_met else 'MISSED'}"


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=("wall", "loss", "sooner"))
    options = parser.parse_args()
    if options.worker:
        layers, rounds = map(int, options.worker)
        harness.tell(measured(layers, rounds))
        return
    wanted = options.only or ("wall", "loss", "sooner")
    folder = Path(tempfile.mkdtemp(prefix="periods-"))
    figures: dict[str, Any] = {}
    try:
        if "wall" in wanted:
            cluster.exit_if_unfit("periods")
            sizes = (6, QUICK_ROUNDS) if options.quick else (12, ROUNDS)
            with cluster.Cluster(2, WIRE_RATE) as made:
                found = harness.launch(1, *map(str, sizes), on=made)
            figures |= wall_figures(found) | {"wire_s": found["wire_s"]}
        if "loss" in wanted:
            figures |= loss_figures(options.quick, folder)
        if "sooner" in wanted:
            figures |= sooner_figures(options.quick, folder)
    finally:
        shutil.rmtree(folder)
    rows = [
        {"arm": name, "over sync": value, "over overlapped": figures["wall_over_overlapped"][name]}
        for name, value in figures.get("wall_over_sync", {}).items()
    ]
    table = [harness.table(rows)] if rows else []
    harness.finish("\n".join([*table, *judged(figures)]), figures, options.save)


if __name__ == "__main__":
    main()
