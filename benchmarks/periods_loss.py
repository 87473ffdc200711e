"""How good the main job becomes where gradients and parameters come late; a part of periods.py.

- `loss`: the main job as it is, on two ranks: validation loss over that of synchronous training,
  each with the learning rate that is best for it on the same grid, mean of seeds.
- `sooner`: the main job on two hosts with links of 50 Mbit/s and a constant learning rate: when
  Streaming DiLoCo has the validation loss that synchronous training has after so many seconds
  of training, median of seeds. Evaluations are how that is found out: their time counts for
  neither, and for both in `sooner_with_evaluations`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import cluster
import harness

MAIN_JOB = Path(__file__).parent.parent / "jobs" / "stdlib_lm.toml"

LOSS_AIMS = {"od_sgd": 1.01, "corrected": 1.05, "diloco": 1.05, "streaming_diloco_int8": 1.03}
SOONER_AIM = 4.0

WARMUP, LONG_WARMUP = "warmup=100", "warmup=200"
"""Late arms begin together for as long as the learning rate of the main job rises; or twice that,
a fifth of the run, where ranks take so many steps apart (DiLoCo's paper: a quarter of the run)."""
LOSS_ARMS: dict[str, tuple[str, ...]] = {
    "sync": (),
    "streaming_diloco_int8": ("preset='streaming_diloco'", "wire='int8'", "outer_rate=0.7", WARMUP),
    "diloco": ("preset='diloco'", LONG_WARMUP),
    "corrected": ("preset='corrected'", WARMUP),
    "od_sgd": ("preset='od_sgd'", WARMUP),
    "local": ("preset='local'", WARMUP),
    "overlap_local": ("preset='overlap_local'", WARMUP),
    "co2": ("preset='co2'", WARMUP),
    "one_late": ("preset='one_late'", WARMUP),
}
QUICK_LOSS_ARMS = ("sync", "diloco")
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (1, 2, 3)
STEPS, QUICK_STEPS = 1100, 20
"""As in the job file."""

SLOW_RATE = "50mbit"
SYNC_S, QUICK_SYNC_S = 600.0, 10.0
SOONER_RATE = 2e-3
"""Learning rate: the best of 0.001 to 0.004 for synchronous training after 1,000 steps."""
SOONER_METHOD = (
    *("preset='streaming_diloco'", "wire='int8'", "period=4"),
    *("outer_rate=0.9", "outer_momentum=0.3", "mix=0.25"),
)
"""The link has room for a shorter period than the preset's, which then wants less momentum."""
SOONER_WARMUP = 20
"""Iterations together: few, since each takes half a second there."""
SOONER_EVERY, QUICK_SOONER_EVERY = 100, 5
"""Steps from one evaluation to the next."""

# ---------------------------------------------------------------- loss


def loss_figures(quick: bool, arms: Sequence[str], folder: Path) -> dict[str, Any]:
    """Each arm with its best rate, over synchronous training with its best."""
    steps = QUICK_STEPS if quick else STEPS
    found: dict[str, Any] = {"losses": {}, "rates": {}, "tried": {}}
    for arm in ("sync", *(arm for arm in arms if arm != "sync")):

        def run(rate: float, seed: int = SEEDS[0], arm: str = arm) -> float:
            return final_loss(arm, rate, seed, steps, folder)

        tried = {RATES[2]: run(RATES[2])} if quick else downhill(run, RATES)
        best = min(tried, key=lambda rate: tried[rate])
        seeds = () if quick else SEEDS[1:]
        losses = [tried[best], *(run(best, seed) for seed in seeds)]
        sys.stderr.write(f"{arm}: tried {tried}, losses {losses}\n")
        found["losses"][arm], found["rates"][arm] = losses, best
        found["tried"][arm] = tried
    means = {arm: statistics.mean(losses) for arm, losses in found["losses"].items()}
    return {"loss_over_sync": {arm: mean / means["sync"] for arm, mean in means.items()}, **found}


def downhill(run: Callable[[float], float], rates: Sequence[float]) -> dict[float, float]:
    """What was found at rates of a grid, among which is the best: both its neighbours are worse."""
    place = len(rates) // 2
    tried: dict[float, float] = {}
    while True:
        near = rates[max(0, place - 1) : place + 2]
        for rate in (rates[place], *near):
            if rate not in tried:
                tried[rate] = run(rate)
        best = min(near, key=lambda rate: tried[rate])
        if best == rates[place]:
            return tried
        place = rates.index(best)


def final_loss(arm: str, rate: float, seed: int, steps: int, folder: Path) -> float:
    """Validation loss of the main job after so many steps on two ranks."""
    run = folder / f"{arm}-{rate:g}-{seed}-{steps}"
    values = [f"optimizer.lr={rate}", f"seed={seed}", "run.report=false", "checkpoint.every=0"]
    if steps != STEPS:
        values += [f"train.steps={steps}", f"schedule.warmup={steps // 10}"]
    if LOSS_ARMS[arm]:
        late = [each for each in LOSS_ARMS[arm] if steps == STEPS or not each.startswith("warmup")]
        values += ["exchange.mode='periods'", *(f"periods.{each}" for each in late)]
    if steps not in dict(validations(run)):
        harness.run_job(MAIN_JOB, 2, run, values)
    return dict(validations(run))[steps]


def validations(run: Path) -> list[tuple[int, float]]:
    """Steps and losses of a run's evaluations."""
    lines = [line for line in told(run) if "validation" in line]
    return [(int(line["step"]), float(line["validation"]["loss"])) for line in lines]


def told(run: Path) -> list[dict[str, Any]]:
    """What a run has written down."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


# ---------------------------------------------------------------- sooner


@dataclass(frozen=True)
class Evaluated:
    """Seconds of training until an evaluation, seconds with all evaluations so far, the loss."""

    training_s: float
    wall_s: float
    loss: float


def sooner_figures(quick: bool, folder: Path) -> dict[str, Any]:
    """How much sooner Streaming DiLoCo has the loss that synchronous training reaches in time."""
    limit_s = QUICK_SYNC_S if quick else SYNC_S
    every = QUICK_SOONER_EVERY if quick else SOONER_EVERY
    common = ["train.steps=100000", "run.report=false", "checkpoint.every=0"]
    common += ["schedule.name='constant'", "exchange.way='direct'"]  # of two, no other is better
    common += [f"train.eval_every={every}", f"run.log_every={every}"]
    common += [f"optimizer.lr={SOONER_RATE}"]
    streaming = ["exchange.mode='periods'", *(f"periods.{each}" for each in SOONER_METHOD)]
    streaming += [f"periods.warmup={0 if quick else SOONER_WARMUP}"]
    found: dict[str, Any] = {"sooner_by_seed": [], "with_evaluations_by_seed": [], "curves": []}
    for seed in SEEDS[:1] if quick else SEEDS:
        seeded = [*common, f"seed={seed}"]
        sync = curve(folder / f"sync-{seed}", seeded, limit_s)
        loss = min(each.loss for each in sync if each.training_s <= limit_s)
        ours = curve(folder / f"streaming-{seed}", [*seeded, *streaming], limit_s, until=loss)
        of_training = sooner(sync, ours, limit_s, lambda each: each.training_s)
        of_all = sooner(sync, ours, limit_s, lambda each: each.wall_s)
        sys.stderr.write(f"seed {seed}: {of_training:.2f} times sooner, {of_all:.2f} with all\n")
        found["sooner_by_seed"].append(of_training)
        found["with_evaluations_by_seed"].append(of_all)
        found["curves"].append({"sync": [*map(astuple, sync)], "streaming": [*map(astuple, ours)]})
    return {
        "sooner": statistics.median(found["sooner_by_seed"]),
        "sooner_with_evaluations": statistics.median(found["with_evaluations_by_seed"]),
        **found,
    }


def sooner(
    sync: Sequence[Evaluated],
    ours: Sequence[Evaluated],
    limit_s: float,
    clock: Callable[[Evaluated], float],
) -> float:
    """How much sooner one has the best loss that the other reaches within the limit."""
    best = min((each for each in sync if clock(each) <= limit_s), key=lambda each: each.loss)
    reached_s = next((clock(each) for each in ours if each.loss <= best.loss), float("inf"))
    return clock(best) / reached_s


def curve(run: Path, values: list[str], limit_s: float, until: float = 0.0) -> list[Evaluated]:
    """Evaluations until the limit of training, or until a loss is reached."""
    sets = [word for value in values for word in ("--set", value)]
    words = [sys.executable, "-m", "hpctrain", "run", str(MAIN_JOB), "--run-dir", str(run), *sets]
    found: list[Evaluated] = []
    begun_s: float | None = None
    with cluster.Cluster(2, SLOW_RATE) as made:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        one_core = ("-x", "OMP_NUM_THREADS=1")  # is what each of the two has
        process = made.start("head", [*made.launcher(1), *one_core, *words], **quiet)
        while process.poll() is None:
            time.sleep(0.5)
            if begun_s is None and (run / "step").exists():
                begun_s = time.monotonic()
            for training_s, loss in trained(run)[len(found) :]:
                assert begun_s is not None
                found.append(Evaluated(training_s, time.monotonic() - begun_s, loss))
            if found and (found[-1].training_s > limit_s or found[-1].loss <= until):
                process.kill()  # the job itself ends with the cluster
                process.wait()
    return found


def trained(run: Path) -> list[tuple[float, float]]:
    """Seconds that a run's steps have taken until each of its evaluations, and the loss then."""
    found, training_s = [], 0.0
    for line in told(run):
        if "validation" in line:
            found.append((training_s, float(line["validation"]["loss"])))
        else:
            training_s += float(line.get("step_s", 0.0))
    return found
