"""What packages on the nodes save: time from submission to the first step, cold against warm.

A folder of 220 MB in 3,000 files is named by `submit.deps`, and the job imports 300 modules of it.
`cold`: no node has it. `warm`: both do, and hash every file of it. `shared`: the control, which
imports from the folder itself. All files are on one machine's disk here, in memory after the first
read, so that `shared` is what no cluster's file system is; what is sent goes over the loopback.
Needs what benchmarks/slurm_box.py needs.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import slurm_box

MODULES, MODULE_BYTES = 2_956, 4_000
LIBRARIES, LIBRARY_BYTES = 44, 4_750_000
IMPORTED = 300
NODES = 2
ARMS = ("cold", "warm", "shared")
REPEATS, QUICK_REPEATS = 7, 1
LIMIT_S = 120.0

MODULE = f"""
import importlib, os, time
import torch
for number in range({IMPORTED}):
    importlib.import_module(f"packages.m{{number}}")
def model(): return torch.nn.Linear(2, 2)
def train_data(): return [torch.ones(2)] * 8
def loss(model, batch):
    with open(os.environ["FIRST_STEP"] + os.environ["SLURM_JOB_ID"], "a") as file:
        file.write(f"{{time.time()}}\\n")
    return model(batch).square().mean()
"""
JOB = "module = 'job.py'\ntrain = { steps = 1, batch = 4 }\nrun.report = false\n"


def make_packages(folder: Path) -> None:
    """Many small modules and some large libraries."""
    (folder / "packages").mkdir(parents=True)
    for number in range(MODULES):
        text = f"value = {number}\n".ljust(MODULE_BYTES, "#")
        (folder / "packages" / f"m{number}.py").write_text(text)
    for number in range(LIBRARIES):
        (folder / "packages" / f"l{number}.so").write_bytes(os.urandom(LIBRARY_BYTES))


def run(box: slurm_box.SlurmBox, folder: Path, arm: str, turn: int) -> dict[str, float]:
    """Submit one job and wait for its end; seconds until its first step, and for staging."""
    cache = box.disk / (f"cold-{turn}" if arm == "cold" else "warm")
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(slurm_box.LAUNCHER)},
        **harness.RUNTIME,
        **box.environment,
        "PATH": f"{Path(sys.executable).parent}:{box.environment['PATH']}",
        "FIRST_STEP": f"{folder}/first-step-",
    }
    options = [f"submit.nodes={NODES}", "submit.launcher=mpirun", f"submit.cache={cache}"]
    if arm == "shared":
        environment["PYTHONPATH"] = f"{folder}/deps:{environment.get('PYTHONPATH', '')}"
    else:
        options.append("submit.deps=deps")
    begun_s = time.time()
    told = subprocess.run(
        [sys.executable, "-m", "hpctrain", "submit", "job.toml"]
        + [word for option in options for word in ("--set", option)],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    queued_s = time.time()
    number = re.search(r"job (\d+) is queued", told)
    assert number
    state = box.wait(number[1], "COMPLETED", "FAILED", limit_s=LIMIT_S)["JobState"]
    log = (folder / "runs" / "job" / f"slurm-{number[1]}.log").read_text()
    assert state == "COMPLETED", log
    first_steps = (folder / f"first-step-{number[1]}").read_text().split()
    box("srun", f"--nodes={slurm_box.NODES}", "rm", "-rf", box.disk / f"cold-{turn}")
    staged = [float(s) for s in re.findall(r"packages .*, ([0-9.]+) s", log)]
    return {
        "submit_s": queued_s - begun_s,
        "first_step_s": max(map(float, first_steps)) - queued_s,
        "on_node_s": max(staged, default=0.0),
    }


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    reason = slurm_box.why_not()
    if reason:
        sys.stderr.write(f"staging: {reason}\n")
        sys.exit(slurm_box.UNFIT)
    repeats = QUICK_REPEATS if options.quick else REPEATS
    folder = Path(tempfile.mkdtemp(prefix="staging-"))
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    try:
        make_packages(folder / "deps")
        (folder / "job.py").write_text(MODULE)
        (folder / "job.toml").write_text(JOB)
        with slurm_box.SlurmBox() as box:
            run(box, folder, "warm", 0)  # fills it, and the archive
            for turn in range(repeats):
                for arm in ARMS[turn % 3 :] + ARMS[: turn % 3]:
                    runs[arm].append(run(box, folder, arm, turn))
    finally:
        shutil.rmtree(folder)
    rows = [
        {"arm": arm, **{key: statistics.median(row[key] for row in found) for key in found[0]}}
        for arm, found in runs.items()
    ]
    cold, warm = (statistics.median(row["first_step_s"] for row in runs[arm]) for arm in ARMS[:2])
    figures = {
        "bytes": MODULES * MODULE_BYTES + LIBRARIES * LIBRARY_BYTES,
        "files": MODULES + LIBRARIES,
        "nodes": NODES,
        "repeats": repeats,
        "arms": runs,
        "saved_s": cold - warm,
        "warm_over_cold": warm / cold,
    }
    text = harness.table(rows) + f"\nto the first step: {cold:.1f} s cold, {warm:.1f} s warm"
    harness.finish(text, figures, options.save)


if __name__ == "__main__":
    main()
