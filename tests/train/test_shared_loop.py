"""Jobs of one encoder with several tasks: resumed with the same bits, going on without the dead."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from left_behind import losses, parameters
from torch import nn

from hpctrain.world import World

if TYPE_CHECKING:
    from conftest import Ended, Launch

pytestmark = [pytest.mark.launch, pytest.mark.any_mpi]
SLOW = pytest.mark.slow

ENCODER = """
import os
from pathlib import Path
from torch import nn
from hpctrain.launched import launched_rank
Path(f"pid-{launched_rank(os.environ)}").write_text(str(os.getpid()))
def encoder(width): return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(0.1))
"""
# A rank strikes itself at some step: STRIKE says whom, at which step and how.
TASK = """
import os, signal
import torch
from torch import nn
from hpctrain.launched import launched_rank
WHO, AT, HOW = os.environ.get("STRIKE", "-1 0 none").split()
steps = 0
def head(encoder): return nn.Linear(encoder[0].out_features, 1)
def train_data():
    if HOW == "data" and launched_rank(os.environ) == int(WHO):
        raise ValueError("lost")
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    return [(row, row.sum().sin()[None] * TASK) for row in x]
def validation_data(): return train_data()[:8]
def loss(model, batch):
    global steps
    steps += model.training
    value = (model(batch[0]) - batch[1]).square().mean()
    if launched_rank(os.environ) == int(WHO) and steps == int(AT) and model.training:
        if HOW == "nan":
            return value * float("nan")
        os.kill(os.getpid(), getattr(signal, HOW))
    return value
"""
JOB = """
module = "encoder.py"
model = { width = 8 }
exchange = { mode = "shared" }
train = { steps = 30, batch = 8, eval_every = 10 }
optimizer = { name = "adamw", lr = 0.01 }
checkpoint = { every = 10 }
run = { report = false }
shared = { tasks = ["first.py", "second.py"], round_steps = 5 }
"""


def encoder() -> nn.Module:
    """As the job's."""
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1))


RUN = ("-m", "hpctrain", "run", "job.toml", "--run-dir", "run")
CHILDREN = ("00-first", "01-second")
LOOK_S = 0.005
"""How often a run is looked at, which needs the cores."""
ULFM = ("--with-ft", "ulfm")


@pytest.fixture
def job(launch: Launch) -> Launch:
    written(launch)
    return launch


def written(launch: Launch) -> None:
    (launch.folder / "encoder.py").write_text(ENCODER)
    for number, name in enumerate(("first", "second")):
        (launch.folder / f"{name}.py").write_text(TASK.replace("TASK", str(1 + number)))
    (launch.folder / "job.toml").write_text(JOB)


@pytest.fixture(scope="module")
def undisturbed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import Launch

    launch = Launch(tmp_path_factory.mktemp("undisturbed"))
    written(launch)
    ended = launch(3, *RUN)
    assert ended.status == 0, ended.err
    return launch.folder / "run"


@pytest.fixture(scope="module")
def undisturbed(undisturbed_run: Path) -> list[dict[str, torch.Tensor]]:
    return all_parameters(undisturbed_run)


def all_parameters(run: Path) -> list[dict[str, torch.Tensor]]:
    return [parameters(folder) for folder in (run, *(run / "children" / c for c in CHILDREN))]


def assert_ends_undisturbed(
    launch: Launch, undisturbed: list[dict[str, torch.Tensor]], ended: Ended
) -> None:
    assert ended.status == 0, ended.err
    for found, expected in zip(all_parameters(launch.folder / "run"), undisturbed, strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert None not in losses(launch.folder / "run").values()


def test_rounds_are_recorded_by_child(undisturbed_run: Path) -> None:
    run = undisturbed_run
    assert list(losses(run)) == [5, 10, 15, 20, 25, 30]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "validation" in line]
    assert [line["step"] for line in evaluated] == [10, 20, 30]
    for child in CHILDREN:
        assert all(f"{child} loss" in line["validation"] for line in evaluated)
        assert list(losses(run / "children" / child)) == list(range(1, 31))
    whole = parameters(run)
    for child in CHILDREN:  # has the encoder of all at the end, and a head of its own
        own = parameters(run / "children" / child)
        assert all(torch.equal(own[f"encoder.{name}"], value) for name, value in whole.items())
    assert not any("head" in name for name in whole)


@pytest.mark.parametrize(
    ("who", "at"),
    [
        (1, 13),
        pytest.param(0, 0, marks=pytest.mark.slow),
        pytest.param(2, 10, marks=pytest.mark.slow),
    ],
)
def test_run_that_is_told_to_end_goes_on_with_the_same_bits(
    job: Launch,
    undisturbed: list[dict[str, torch.Tensor]],
    undisturbed_run: Path,
    who: int,
    at: int,
) -> None:
    """And what is recorded of a round is of all of it."""
    if who == 0:  # the root computes no loss: the launcher tells it, and all others
        process = job.start(3, *RUN)
        while not list(job.folder.glob("run/children/*/step")) and process.poll() is None:
            time.sleep(LOOK_S)
        process.send_signal(signal.SIGUSR1)
        _, err = process.communicate()
        status = process.returncode
    else:
        ended = job(3, *RUN, STRIKE=f"{who} {at} SIGUSR1")
        status, err = ended.status, ended.err
    assert status == 75, err
    assert "told to end: saved at step" in err
    assert_ends_undisturbed(job, undisturbed, job(3, *RUN))
    assert recorded(job.folder / "run") == recorded(undisturbed_run)


def recorded(run: Path) -> list[tuple[int, dict[str, float]]]:
    """Losses and figures of evaluations, by step and child."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line.get("validation", line)) for line in lines]
    losses = [(step, {k: v for k, v in of.items() if "loss" in k}) for step, of in found]
    return sorted(((step, of) for step, of in losses if of), key=lambda pair: (pair[0], str(pair)))


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 11])
def test_killed_child_ends_the_run_which_goes_on_with_the_same_bits(
    job: Launch, undisturbed: list[dict[str, torch.Tensor]], at: int
) -> None:
    assert job(3, *RUN, STRIKE=f"1 {at} SIGKILL").status not in (0, 75)
    assert_ends_undisturbed(job, undisturbed, job(3, *RUN))


def skip_unless_survivors_live(world: World) -> None:
    if "Open MPI" not in world.library:
        pytest.skip("MPICH's launcher ends all ranks when one is killed")


def test_others_go_on_without_a_dead_child(job: Launch, world: World) -> None:
    skip_unless_survivors_live(world)
    ended = job(3, *RUN, options=ULFM, STRIKE="2 8 SIGKILL")
    assert ended.status == 0, ended.err
    assert "01-second (rank 2" in ended.err and "is left out: rank 2" in ended.err
    assert list(losses(job.folder / "run"))[-1] == 30


@pytest.mark.slow
def test_others_go_on_without_a_group_that_lost_a_rank(job: Launch, world: World) -> None:
    skip_unless_survivors_live(world)
    ended = job(5, *RUN, "--set", "shared.group=2", options=ULFM, STRIKE="4 8 SIGKILL")
    assert ended.status == 0, ended.err
    assert "01-second (rank 3" in ended.err and "is left out" in ended.err


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_ranks_killed_at_random_points(
    job: Launch, undisturbed: list[dict[str, torch.Tensor]], undisturbed_run: Path, seed: int
) -> None:
    """A child or the root, by another process, again and again until a launch is let be."""
    draw = random.Random(seed)
    metrics = job.folder / "run" / "metrics.jsonl"
    for _ in range(3):
        victim, lines = draw.choice((0, 0, 1, 2)), draw.randint(0, 5)
        begun = metrics.read_text().count("\n") if metrics.exists() else 0
        told = job.folder / f"pid-{victim}"
        told.unlink(missing_ok=True)  # of the launch before
        process = job.start(3, *RUN)
        while process.poll() is None:
            done = metrics.read_text().count("\n") if metrics.exists() else 0
            is_there = told.exists() and (job.folder / "run" / "checkpoints").exists()
            if done - begun >= lines and is_there and (number := told.read_text()):
                os.kill(int(number), signal.SIGKILL)
                break
            time.sleep(LOOK_S)
        _, err = process.communicate()
        assert process.returncode not in (2, 75), err
    assert_ends_undisturbed(job, undisturbed, job(3, *RUN))
    assert recorded(job.folder / "run") == recorded(undisturbed_run)


@pytest.mark.slow
def test_run_that_was_ended_after_its_last_round_is_evaluated(
    job: Launch, undisturbed_run: Path
) -> None:
    shutil.copytree(undisturbed_run, job.folder / "run")
    metrics = job.folder / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    is_last = [json.loads(line)["step"] == 30 and "validation" in line for line in lines]
    assert sum(is_last) == 1
    facts = job.folder / "run" / "run.json"
    facts.write_text(facts.read_text().replace('"finished": true', '"finished": false'))
    metrics.write_text("".join(line for line, last in zip(lines, is_last, strict=True) if not last))
    ended = job(3, *RUN)
    assert ended.status == 0, ended.err
    assert recorded(job.folder / "run") == recorded(undisturbed_run)


@pytest.mark.slow
def test_finished_run_goes_on_with_more_steps_in_other_rounds(
    job: Launch, undisturbed_run: Path
) -> None:
    shutil.copytree(undisturbed_run, job.folder / "run")
    ended = job(3, *RUN, "--set", "train.steps=43", "--set", "shared.round_steps=10")
    assert ended.status == 0, ended.err
    assert list(losses(job.folder / "run"))[-2:] == [40, 43]
    for child in CHILDREN:
        assert list(losses(job.folder / "run" / "children" / child))[-1] == 43


def test_checkpoint_of_another_encoder_ends_all_with_one_error(
    job: Launch, undisturbed_run: Path
) -> None:
    """Which the root meets alone, while the children wait for it."""
    shutil.copytree(undisturbed_run, job.folder / "run")
    ended = job(3, *RUN, "--set", "train.steps=43", "--set", "model.width=16", limit_s=60)
    assert ended.status == 2, ended.err
    assert ended.err.count("checkpoint is of another model") == 1


@pytest.mark.slow
def test_child_that_cannot_write_its_checkpoints_is_left_out(
    job: Launch, undisturbed_run: Path
) -> None:
    shutil.copytree(undisturbed_run, job.folder / "run")
    folder = job.folder / "run" / "children" / CHILDREN[0] / "checkpoints"
    shutil.rmtree(folder)
    folder.write_text("in the way")
    ended = job(3, *RUN, "--set", "train.steps=43", limit_s=60)
    assert ended.status == 0, ended.err
    assert "00-first (rank 1" in ended.err and "is left out" in ended.err
    assert list(losses(job.folder / "run"))[-1] == 43


@pytest.mark.slow
def test_child_without_a_checkpoint_that_fits_says_so(job: Launch, undisturbed_run: Path) -> None:
    shutil.copytree(undisturbed_run, job.folder / "run")
    for each in (job.folder / "run" / "children" / CHILDREN[0] / "checkpoints").glob("step-*"):
        shutil.rmtree(each)
    ended = job(3, *RUN, "--set", "train.steps=43")
    assert ended.status == 0, ended.err
    assert "00-first joins at step 30 with a head of step 0" in ended.err


@pytest.mark.slow
def test_ranks_that_are_struck_are_those_of_the_run(job: Launch) -> None:
    ended = job(3, *RUN, "--set", "inject={kind='persistent', factor=2, ranks=[0]}")
    assert ended.status == 2, ended.err
    assert "inject.ranks names ranks that compute nothing" in ended.err
    values = "inject={kind='kill', step=7, ranks=[2]}"
    ended = job(3, *RUN, "--set", values)
    assert ended.status not in (0, 2) and "kills rank 2 in step 7" in ended.err, ended.err


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 2])
def test_child_without_data_is_left_out(job: Launch, group: int) -> None:
    """Also if it is one rank of a group that has none: the others of the group are told."""
    ranks, victim = 1 + 2 * group, group
    ended = job(ranks, *RUN, "--set", f"shared.group={group}", STRIKE=f"{victim} 0 data")
    assert ended.status == 0, ended.err
    assert "00-first (rank 1" in ended.err and "ValueError: lost" in ended.err
    assert list(losses(job.folder / "run"))[-1] == 30


@pytest.mark.slow
def test_group_evaluates_at_the_end(job: Launch) -> None:
    sets = ("--set", "shared.group=2", "--set", 'shared.tasks=["first.py"]')
    ended = job(3, *RUN, *sets)
    assert ended.status == 0, ended.err
    lines = (job.folder / "run" / "metrics.jsonl").read_text().splitlines()
    evaluated = {line["step"]: line for line in map(json.loads, lines) if "validation" in line}
    assert list(evaluated) == [10, 20, 30]
    whole = nn.ModuleDict({"encoder": encoder(), "head": nn.Linear(8, 1)})
    whole.load_state_dict(parameters(job.folder / "run" / "children" / CHILDREN[0]))
    whole.eval()
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))[:8]
    found = whole["head"](whole["encoder"](x)) - x.sum(1, keepdim=True).sin()
    expected = pytest.approx(found.square().mean().item(), rel=1e-5)
    assert evaluated[30]["validation"]["loss"] == expected  # of all data, by both ranks


@pytest.mark.slow
def test_child_whose_gradients_are_not_finite_is_left_out(job: Launch) -> None:
    ended = job(3, *RUN, STRIKE="1 8 nan")
    assert ended.status == 0, ended.err
    assert "00-first (rank 1" in ended.err and "not finite" in ended.err


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("shared.tasks=[]", "shared.tasks: missing"),
        pytest.param('shared.tasks=["third.py"]', "shared.tasks: there is no", marks=SLOW),
        ('shared.tasks=["encoder.py"]', "defines no head()"),
        pytest.param('module="first.py"', "defines no encoder()", marks=SLOW),
        pytest.param(
            "exchange.mode=allreduce",
            "shared: does nothing unless exchange.mode = 'shared'",
            marks=SLOW,
        ),
        ("shared.rule=krum", "needs more children"),
        pytest.param("shared.tasks=[1]", "tasks: must be names of files", marks=SLOW),
        pytest.param("shared.group=3", "needs a root and children", marks=SLOW),
        pytest.param("exchange.wire=bfloat16", "unless shared.group > 1", marks=SLOW),
    ],
)
def test_job_that_cannot_be_is_refused(job: Launch, key: str, text: str) -> None:
    ended = job(3 if "needs" in text else 1, *RUN, "--set", key)
    assert ended.status == 2, ended.err
    assert text in ended.err and "Traceback" not in ended.err
    assert not (job.folder / "run").exists()
