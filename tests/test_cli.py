"""The command line, as a user starts it: alone, and under mpiexec."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from left_behind import assert_same_parameters, losses, parameters

from hpctrain import __version__, cli

if TYPE_CHECKING:
    from conftest import Launch

pytestmark = pytest.mark.launch

JOBS = Path(__file__).parents[1] / "jobs"
HPCTRAIN = ("-m", "hpctrain")

SMALL = """
import torch
from torch import nn
def model(): return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
def train_data(): return list(torch.randn(200, 3, generator=torch.Generator().manual_seed(0)))
def loss(model, batch): return (model(batch) - batch.prod(dim=1, keepdim=True)).square().mean()
"""


def validation(run: Path) -> dict[str, float]:
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    figures: dict[str, float] = [e["validation"] for e in entries if "validation" in e][-1]
    return figures


@pytest.mark.any_mpi
def test_version_and_help(launch: Launch) -> None:
    assert launch(0, *HPCTRAIN, "--version").out.strip() == f"hpctrain {__version__}"
    text = launch(0, *HPCTRAIN, "--help").out
    assert all(command in text for command in ("run", "doctor", "report"))


def test_digits_reach_their_accuracy_and_leave_a_whole_run_folder(launch: Launch) -> None:
    ended = launch(2, *HPCTRAIN, "run", JOBS / "digits.toml", limit_s=60)
    assert ended.status == 0, ended.err
    run = launch.folder / "runs/digits/001"
    assert validation(run)["accuracy"] >= 0.97
    assert len(losses(run)) == 400
    assert re.search(r"step 400/400  loss .* samples/s  exposed .*% .* left", ended.err)
    assert "\r" not in ended.out + ended.err
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {
        *("run.json", "metrics.jsonl", "timeline.json", "report.html"),
        *("logs/rank-00000.log", "logs/rank-00001.log"),
        *("trace/rank-00000.jsonl", "trace/rank-00001.jsonl"),
        *(f"checkpoints/step-000000400/{n}" for n in ("manifest.json", "optimizer.pt")),
        *("checkpoints/step-000000400/model.safetensors", "checkpoints/latest"),
    } <= names
    page = (run / "report.html").read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 2
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    timeline = json.loads((run / "timeline.json").read_text())["traceEvents"]
    assert {event["pid"] for event in timeline} == {0, 1}

    (run / "report.html").unlink()
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.html").is_file()


@pytest.mark.parametrize(
    "option", ["", pytest.param("--no-live", marks=[pytest.mark.any_mpi, pytest.mark.slow])]
)
def test_terminal_of_the_launcher_gets_a_bar(launch: Launch, option: str) -> None:
    """All streams of the ranks are pipes or terminals of their own: they cannot tell."""
    ours, theirs = os.openpty()
    launcher = Path(sys.executable).with_name("mpiexec")
    job = launch.job(SMALL, "train = { steps = 5, batch = 4 }\nrun = { report = false }")
    command = [str(launcher), "-n", "2", sys.executable, *HPCTRAIN, "run", job, *option.split()]
    process = subprocess.Popen(
        command, cwd=launch.folder, env=launch.environment, stdin=subprocess.DEVNULL, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends when its last writer is gone
        while piece := os.read(ours, 1 << 16):
            shown += piece
    os.close(ours)
    assert process.wait(60) == 0
    assert (b"\r\x1b[K[######" in shown) == (not option), shown
    assert b"step 5/5" in shown


@pytest.mark.any_mpi
def test_curve_is_the_same_on_any_number_of_ranks(launch: Launch) -> None:
    """61 samples a step do not divide by 3."""
    keys = """
    train = { steps = 30, batch = 61, micro_batch = 9 }
    optimizer = { name = "adamw", lr = 0.05 }
    run = { report = false }
    """
    job, curves = launch.job(SMALL, keys), []
    for ranks in (0, 3):
        ended = launch(ranks, *HPCTRAIN, "run", job, "--run-dir", f"of-{ranks}")
        assert ended.status == 0, ended.err
        curves.append(losses(launch.folder / f"of-{ranks}"))
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.any_mpi
def test_killed_run_resumes_and_ends_with_the_same_bits(launch: Launch) -> None:
    command = (*HPCTRAIN, "run", JOBS / "digits.toml", "--set", "checkpoint.every=20")
    command += ("--set", "train.steps=120", "--set", "exchange.deterministic=true")
    command += ("--set", "run.report=false")
    whole = launch(2, *command, "--run-dir", "whole")
    assert whole.status == 0, whole.err

    process = launch.start(2, *command)
    checkpoints = launch.folder / "runs/digits/001/checkpoints"
    for _ in range(600):
        if any(checkpoints.glob("step-*/manifest.json")) or process.poll() is not None:
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    resumed = launch(2, *command)
    assert resumed.status == 0, resumed.err
    run = launch.folder / "runs/digits/001"
    assert not (launch.folder / "runs/digits/002").exists()
    if process.returncode != 0:
        assert re.search(r"resumed at step \d+0\b", resumed.err)
    assert_same_parameters(run, parameters(launch.folder / "whole"))
    assert losses(run) == losses(launch.folder / "whole")


@pytest.mark.slow
@pytest.mark.any_mpi
def test_main_job_in_short(launch: Launch) -> None:
    ended = launch(
        2, *HPCTRAIN, "run", JOBS / "stdlib_lm.toml",
        "--set", "train.steps=12", "--set", "train.eval_every=6", "--set", "run.tensorboard=true",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    assert ended.out.startswith("def ")
    run = launch.folder / "runs/stdlib_lm/001"
    curve = losses(run)
    assert len(curve) == 12
    assert curve[12] < curve[1]
    assert ended.err.count("validation loss") == 2
    assert list((run / "tensorboard").iterdir())
    facts: dict[str, Any] = json.loads((run / "run.json").read_text())
    assert facts["job"]["train"]["steps"] == 12


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.any_mpi), 2])
def test_all_mistakes_of_a_job_are_told_at_once_and_once(launch: Launch, ranks: int) -> None:
    ended = launch(
        ranks, *HPCTRAIN, "run", JOBS / "digits.toml",
        "--set", "train.stepz=3", "--set", "train.batch=0", "--set", "exchange.progres=hooks",
        "--set", "optimizer.name=adamm",
    )  # fmt: skip
    assert ended.status == 2
    for mistake in (
        "the command line has 4 mistakes",
        "train.stepz: unknown key; did you mean 'steps'?",
        "train.batch: got 0; allowed: at least 1",
        "exchange.progres: unknown key; did you mean 'progress'?",
        "optimizer.name: unknown optimizer 'adamm'; did you mean 'adam'?",
    ):
        assert ended.err.count(mistake) == 1, ended.err
    assert "Traceback" not in ended.err
    assert not (launch.folder / "runs").exists()


@pytest.mark.any_mpi
def test_job_module_that_fails_on_one_rank_ends_all_with_its_name(launch: Launch) -> None:
    job = launch.job(
        "import hpctrain, torch\n"
        "def model():\n"
        "    if hpctrain.join().rank == 1: raise OSError('no such weights')\n"
        "    return torch.nn.Linear(1, 1)\n"
        "def train_data(): return [torch.ones(1)]\n"
        "def loss(model, batch): return model(batch).mean()\n",
        "train = { steps = 1, batch = 1 }",
    )
    ended = launch(2, *HPCTRAIN, "run", job)
    assert ended.status == 2
    assert "rank 1" in ended.err
    assert re.search(r"OSError: no such weights\n  where: .*odd\.py:3 in model", ended.err)
    assert ended.err.count("no such weights") == 1


@pytest.mark.any_mpi
def test_model_that_differs_between_ranks_is_the_jobs_mistake(launch: Launch) -> None:
    job = launch.job(
        "import hpctrain, torch\n"
        "def model(): return torch.nn.Linear(1, 1 + hpctrain.join().rank)\n"
        "def train_data(): return [torch.ones(1)]\n"
        "def loss(model, batch): return model(batch).mean()\n",
        "train = { steps = 1, batch = 2 }",
    )
    ended = launch(2, *HPCTRAIN, "run", job, limit_s=60)
    assert ended.status == 2
    assert "odd.py: the model is not the same on all ranks" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.any_mpi
def test_loss_that_fails_in_training_ends_all_with_its_traceback(launch: Launch) -> None:
    job = launch.job(
        "import hpctrain, torch\n"
        "def model(): return torch.nn.Linear(1, 1)\n"
        "def train_data(): return [torch.ones(1)]\n"
        "def loss(model, batch):\n"
        "    if hpctrain.join().rank == 1: raise KeyError('label')\n"
        "    return model(batch).mean()\n",
        "train = { steps = 1, batch = 2 }",
    )
    ended = launch(2, *HPCTRAIN, "run", job, limit_s=60)
    assert ended.status == 1
    assert "rank 1" in ended.err
    assert "failed at step 1, forward" in ended.err
    assert "KeyError: 'label'" in ended.err


@pytest.mark.parametrize("ranks", [0, 3])
def test_doctor(launch: Launch, ranks: int) -> None:
    ended = launch(ranks, *HPCTRAIN, "doctor", "--json")
    assert ended.status == 0, ended.err
    report = json.loads(ended.out)
    assert report["fit"] is True
    assert report["ranks"] == max(1, ranks)
    names = {finding["name"] for finding in report["findings"]}
    assert {"launcher", "thread level", "versions", "binding", "links", "device buffers"} <= names
    if ranks:
        assert {"progress", "all-reduce"} <= names


@pytest.mark.any_mpi
def test_report_of_no_run_is_refused(launch: Launch) -> None:
    ended = launch(0, *HPCTRAIN, "report", "nowhere")
    assert ended.status == 2
    assert "there is no such folder" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.slow
@pytest.mark.any_mpi
def test_data_that_ends_early_on_one_rank_ends_all_with_one_message(launch: Launch) -> None:
    job = launch.job(
        "import hpctrain, torch\n"
        "def model(): return torch.nn.Linear(1, 1)\n"
        "def train_data(): return iter([torch.ones(1)] * (11 if hpctrain.join().rank else 99))\n"
        "def loss(model, batch): return model(batch).mean()\n",
        "train = { steps = 20, batch = 4 }",
    )
    ended = launch(2, *HPCTRAIN, "run", job, limit_s=60)
    assert ended.status == 2, ended.err
    assert re.search(
        r"hpctrain: rank 1 \(.*\) at step 3, data: the training data ended after 11 samples\n"
        r"  where: train_data\(\) of the job module\n  fix: ",
        ended.err,
    )
    assert ended.err.count("ended after") == 1 and "Traceback" not in ended.err
    alone = launch(0, *HPCTRAIN, "run", job, "--set", "train.steps=40", "--run-dir", "alone")
    assert alone.status == 2
    assert alone.err.endswith("set fewer train.steps\n") and "Traceback" not in alone.err


@pytest.mark.any_mpi
def test_job_that_differs_between_ranks_is_refused(launch: Launch) -> None:
    """As from a file system that nodes do not share."""
    program = launch.script(
        "import os, sys\n"
        "from hpctrain import cli\n"
        "from hpctrain.world import launched_rank\n"
        "os.chdir(str(launched_rank(os.environ)))\n"
        "sys.exit(cli.main(['run', 'odd.toml']))\n"
    )
    job = launch.job(SMALL, "train = { steps = 2, batch = 4 }")
    for rank in range(2):
        folder = launch.folder / str(rank)
        folder.mkdir()
        (folder / "odd.py").write_text(SMALL)
        (folder / job).write_text((launch.folder / job).read_text().replace("2", str(2 + rank), 1))
    ended = launch(2, program, limit_s=60)
    assert ended.status == 2, ended.err
    assert ended.err.count(
        "the job is not the same on all ranks\n  where: other than on rank 0: [1]"
    )
    assert "Traceback" not in ended.err and not (launch.folder / "0" / "runs").exists()
