"""One encoder for three tasks against one for each: jobs/stdlib_tasks.toml.

Every run is the job as users start it: shared on a root and three children, alone on a root and
one. Figures are of validation data with the last encoder, `shared` and `alone` by task, means over
seeds; `shared_over_alone` is over the losses. What may be expected: tasks with few labels gain from
what the others teach the encoder, and the one with plenty pays for it.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from pathlib import Path

import harness

JOB = Path(__file__).parent.parent / "jobs" / "stdlib_tasks.toml"
TASKS = ("task_code", "task_comments", "task_kinds")
SEEDS = (1, 2, 3)
QUICK_STEPS = 40


def evaluated(tasks: tuple[str, ...], seed: int, folder: Path, steps: int) -> dict[str, float]:
    """The last figures of a run, by task and name: `code loss`, `code accuracy`."""
    run = folder / f"{'-'.join(tasks)}-{seed}"
    names = json.dumps([f"{name}.py" for name in tasks])
    values = [f"shared.tasks={names}", f"seed={seed}", "run.report=false", "checkpoint.every=0"]
    values += [f"train.steps={steps}", "schedule.warmup=4"] if steps else []
    harness.run_job(JOB, 1 + len(tasks), run, values)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    last = [line["validation"] for line in lines if "validation" in line][-1]
    return {  # "00-task_code loss" is the name of a child's figure
        key.partition("_")[2]: value for key, value in last.items() if "task_" in key
    }


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tasks-"))
    steps, seeds = (QUICK_STEPS, SEEDS[:1]) if options.quick else (0, SEEDS)
    shared: list[dict[str, float]] = []
    alone: list[dict[str, float]] = []
    try:
        for seed in seeds:
            shared.append(evaluated(TASKS, seed, folder, steps))
            alone.append({})
            for task in TASKS:
                alone[-1] |= evaluated((task,), seed, folder, steps)
    finally:
        shutil.rmtree(folder)
    rows = [
        {
            "figure": key,
            "alone": statistics.mean(found[key] for found in alone),
            "shared": statistics.mean(found[key] for found in shared),
        }
        for key in shared[0]
    ]
    figures = {
        "shared": {row["figure"]: row["shared"] for row in rows},
        "alone": {row["figure"]: row["alone"] for row in rows},
        "shared_over_alone": {
            row["figure"]: float(row["shared"]) / float(row["alone"])
            for row in rows
            if str(row["figure"]).endswith("loss")
        },
        "seeds": {"shared": shared, "alone": alone},
    }
    harness.finish(harness.table(rows), figures, options.save)


if __name__ == "__main__":
    main()
