"""Jobs in the coded mode: the same bits whoever is slow or dies, and what is left when too many."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from devices import EACH
from safetensors.torch import load_file
from torch import nn

from hpctrain import CodedConfig, ExchangeConfig, World
from hpctrain.comm.collect import barrier_on
from hpctrain.data.generators import seed_generators
from hpctrain.train.checkpoint.config import CheckpointConfig
from hpctrain.train.coded_loop import CodedTrainer
from hpctrain.train.inject import InjectConfig
from hpctrain.train.optimizer import ScheduleConfig
from hpctrain.train.run_folder import RunConfig
from hpctrain.train.settings import Parts, Settings, TrainConfig

if TYPE_CHECKING:
    from conftest import Launch

STEPS = 12
STRUCK = 7
"""The step in which ranks are killed."""
LIMIT_S = 90.0
"""A launch that takes longer hangs."""
ENDED_S = 15.0
"""The run ends so soon after a death: 5 s, and something for a machine that does much else."""

MODULE = """
import os, pathlib, time
import torch
from torch import nn

def model():
    return nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1)
    )

def train_data():
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    return [(row, row.sum().sin()[None]) for row in x]

def validation_data():
    return train_data()[:8]

def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()

def metrics(model, batch):
    begun_s = time.monotonic()
    while (text := os.environ.get("AWAITED")) and time.monotonic() - begun_s < 60:
        if any(text in log.read_text() for log in pathlib.Path("runs").rglob("*.log")):
            break
        time.sleep(0.01)
    return {"error": (model(batch[0]) - batch[1]).abs().mean()}
"""
"""Each evaluation waits until a rank's log says what is AWAITED."""
KEYS = f"""
train = {{ steps = {STEPS}, batch = 30 }}
optimizer = {{ name = "adamw", lr = 0.01 }}
exchange = {{ mode = "coded", block_bytes = 200 }}
coded = {{ blocks = 6, relearn = false }}
checkpoint = {{ every = 0 }}
run = {{ report = false }}
"""
LET_LIVE = ("--with-ft", "ulfm")


def command(launch: Launch, *keys: str) -> list[str]:
    """Trains the job, with these keys."""
    sets = [word for key in keys for word in ("--set", key)]
    return ["-m", "hpctrain", "run", launch.job(MODULE, KEYS, name="coded"), *sets]


def newest(folder: Path) -> tuple[int, Path]:
    """The newest checkpoint of the only run, and its step."""
    (run,) = folder.glob("runs/coded/*/")
    path = max(run.glob("checkpoints/step-*/manifest.json")).parent
    return int(path.name.removeprefix("step-")), path


def checksum(folder: Path) -> str:
    """Of parameters and buffers of the last step."""
    step, path = newest(folder)
    assert step == STEPS
    found = hashlib.sha256()
    for name, tensor in load_file(path / "model.safetensors").items():
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch's on any number of ranks: the bits of a gradient depend on their number."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checksum of the job on one rank."""
    from conftest import Launch

    launch = Launch(tmp_path_factory.mktemp("undisturbed"))
    ended = launch(1, *command(launch), OMP_NUM_THREADS="1")
    assert ended.status == 0, ended.err
    return checksum(launch.folder)


# ---------------------------------------------------------------------- launches


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.any_mpi
def test_slow_ranks_change_no_bit(launch: Launch, undisturbed: str) -> None:
    ended = launch(3, *command(launch, 'inject={kind="rotating",factor=5}'))
    assert ended.status == 0, ended.err
    assert checksum(launch.folder) == undisturbed


@pytest.mark.launch
@pytest.mark.any_mpi
@pytest.mark.parametrize(
    ("dies", "awaited"),
    [
        (1, "rank 1 is dead"),
        pytest.param(2, "rank 2 is dead", marks=pytest.mark.slow),
        pytest.param(2, "", id="the end", marks=pytest.mark.slow),
    ],
)
def test_dead_worker_changes_no_bit(
    launch: Launch, world: World, undisturbed: str, dies: int, awaited: str
) -> None:
    """Also the one that was to evaluate, or if the run is over before MPI tells of the death."""
    skip_unless_survivors_live(world)
    ended = launch(
        4,
        *command(launch, "coded.root=dedicated", kill(dies)),
        options=LET_LIVE,
        limit_s=LIMIT_S,
        AWAITED=awaited,
    )
    assert ended.status == 0, ended.err
    assert ended.err.count(f"rank {dies} is dead") == 1 or not awaited
    assert "Traceback" not in ended.err
    assert checksum(launch.folder) == undisturbed


@pytest.mark.launch
@pytest.mark.any_mpi
@pytest.mark.parametrize(
    ("ranks", "keys", "dead"),
    [
        pytest.param(
            4, ("coded.root=dedicated",), (1, 3), id="two of three", marks=pytest.mark.slow
        ),
        pytest.param(3, ("coded.copies=1",), (1,), id="one copy", marks=pytest.mark.slow),
        pytest.param(2, ("coded.copies=1",), (1,), id="one left", marks=pytest.mark.slow),
    ],
)
def test_data_that_nobody_is_left_to_compute(
    launch: Launch,
    world: World,
    undisturbed: str,
    ranks: int,
    keys: tuple[str, ...],
    dead: tuple[int, ...],
) -> None:
    skip_unless_survivors_live(world)
    ended = struck(launch, ranks, *command(launch, *keys, kill(*dead)))
    assert ended.status != 0
    who = ", ".join(map(str, dead))
    (blocks,) = re.findall(
        rf"hpctrain: step {STRUCK} cannot be completed: the workers that are left hold no "
        rf"complete set: data blocks ([\d, ]+) were held by dead ranks alone; "
        rf"dead or silent: rank {who}\n",
        ended.err,
    )
    assert set(map(int, blocks.split(", "))) < set(range(6))
    assert ended.err.count("start the job again") == 1
    assert "Traceback" not in ended.err
    assert ended.took_s < ENDED_S
    assert newest(launch.folder)[0] == STRUCK - 1
    resume(launch, ranks // 2, *keys)
    assert checksum(launch.folder) == undisturbed


@pytest.mark.launch
@pytest.mark.any_mpi
def test_dead_root_leaves_a_checkpoint(launch: Launch, world: World) -> None:
    skip_unless_survivors_live(world)
    ended = struck(launch, 3, *command(launch, kill(0)))
    assert ended.status != 0
    found = re.findall(
        r"step (\d+) cannot be completed: rank 0, which adds up gradients, is dead\n", ended.err
    )
    assert "Traceback" not in ended.err
    assert ended.took_s < ENDED_S
    # In the moment between its last words and its death others may have done the step without it.
    step, _ = newest(launch.folder)
    assert step in (STRUCK - 1, STRUCK) and str(step + 1) in found


def skip_unless_survivors_live(world: World) -> None:
    if "Open MPI" not in world.library:
        pytest.skip("MPICH's launcher ends all ranks when one is killed")


def kill(*ranks: int) -> str:
    return f'inject={{kind="kill",ranks={list(ranks)},step={STRUCK}}}'


@dataclass(frozen=True)
class Struck:
    """How a launch ended in which ranks were killed."""

    status: int
    err: str
    took_s: float
    """From the last death on."""


def struck(launch: Launch, ranks: int, *words: str) -> Struck:
    """Run to the end."""
    process = launch.start(ranks, *words, options=LET_LIVE)
    assert process.stderr
    dead_s, err = float("inf"), ""
    hangs = threading.Timer(LIMIT_S, lambda: os.killpg(process.pid, signal.SIGKILL))
    hangs.start()
    try:
        for line in process.stderr:
            err += line
            if "[inject] kills rank" in line:
                dead_s = time.monotonic()
        process.communicate()
    finally:
        hangs.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return Struck(process.returncode, err, time.monotonic() - dead_s)


def resume(launch: Launch, ranks: int, *keys: str) -> None:
    """To the end, on other ranks."""
    step, _ = newest(launch.folder)
    ended = launch(ranks, *command(launch, *keys))
    assert ended.status == 0, ended.err
    assert f"resumed at step {step}" in ended.err


# ---------------------------------------------------------------------- all ranks in a test

Make = Callable[..., CodedTrainer]


@pytest.fixture
def make(world: World, shared_folder: Path) -> Make:
    """Makes trainers of the same job."""
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    points = [(row, row.sum().sin()[None]) for row in x]

    def build(
        folder: str, inject: InjectConfig | None = None, device: str = "cpu", **coded: Any
    ) -> CodedTrainer:
        seed_generators(1)
        model = nn.Sequential(
            *(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
        )
        settings = Settings(
            train=TrainConfig(steps=STEPS, batch=24, micro_batch=2, device=device),
            optimizer={"name": "adamw", "lr": 0.01},
            schedule=ScheduleConfig(name="cosine", warmup=3),
            exchange=ExchangeConfig(block_bytes=100),
            coded=CodedConfig(**{"blocks": 6, **coded}),
            checkpoint=CheckpointConfig(every=2),
            run=RunConfig(report=False),
            seed=5,
            inject=inject or InjectConfig(),
        )
        parts = Parts(
            *(model, points, lambda m, batch: (m(batch[0]) - batch[1]).square().mean()),
            validation_data=points[:9],
        )
        return CodedTrainer(
            world, parts, settings, parent=shared_folder / folder, facts={"fingerprint": "test"}
        )

    return build


def finish(trainer: CodedTrainer) -> torch.Tensor:
    """Train to the end; all that is trained, of the last step."""
    trainer.run()
    state = trainer.run_folder.checkpoints / f"step-{STEPS:09d}" / "model.safetensors"
    barrier_on(trainer.control)
    return torch.cat([v.flatten() for v in load_file(state).values()])


@pytest.mark.mpi
@pytest.mark.parametrize("device", EACH)
def test_bits_of_slow_ranks_copies_and_kinds_of_root(make: Make, world: World, device: str) -> None:
    make = partial(make, device=device)
    expected = finish(make("undisturbed"))
    slow = InjectConfig(kind="rotating", factor=5)
    assert torch.equal(finish(make("slow", slow)), expected)
    stalled = InjectConfig(kind="stall", ranks=[world.size - 1], step=3, stall_s=0.3)
    assert torch.equal(finish(make("stalled", stalled, copies=world.size)), expected)
    if world.size > 1:
        some = InjectConfig(kind="exponential", mean=2.0)
        assert torch.equal(finish(make("other", some, copies=1, root="dedicated")), expected)


@pytest.mark.mpi
@pytest.mark.parametrize("device", EACH)
def test_resumed_run_ends_with_the_bits_of_one_that_was_not_interrupted(
    make: Make, device: str
) -> None:
    make = partial(make, device=device)
    expected = finish(make("undisturbed"))
    first = make("run")
    while first.step_number < STEPS // 2:
        first.step()
    first.save()
    first.finish_saving()
    first.recording.opened.release()
    first.coded.end()
    barrier_on(first.control)
    second = make("run")
    assert second.step_number == STEPS // 2
    assert torch.equal(finish(second), expected)


@pytest.mark.mpi
@pytest.mark.parametrize("deadline_s", [60.0, 0.02])
def test_metrics_tell_how_exact_gradients_were(make: Make, world: World, deadline_s: float) -> None:
    exact = finish(make("exact"))
    late = InjectConfig()
    if world.size > 1 and deadline_s < 1:
        late = InjectConfig(kind="persistent", ranks=[world.size - 1], factor=200)
    trainer = make("estimated", late, deadline_s=deadline_s, copies=1)
    found = finish(trainer)
    assert bool(found.isfinite().all())
    if deadline_s > 1:
        assert torch.equal(found, exact)
    if world.is_root:
        lines = [json.loads(line) for line in trainer.run_folder.metrics.read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        assert len(steps) == STEPS
        if deadline_s > 1:
            assert {line["covered"] for line in steps} == {1.0}
            assert {line["gradient_error"] for line in steps} == {0.0}
        else:
            assert all(0 < line["covered"] <= 1 for line in steps)
            assert min(line["covered"] for line in steps) < 1 or world.size == 1


@pytest.mark.mpi
def test_rescue_does_not_fight_with_a_writer_at_work(
    make: Make, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root was saving when data was lost: both the older and the newer step are whole."""
    trainer = make("run")
    while trainer.step_number < 2:
        trainer.step()
    writing, sync = threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        assert writing.wait(LIMIT_S)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    trainer.save()
    while trainer.step_number < 3:
        trainer.step()
    threading.Timer(0.1, writing.set).start()
    if world.is_root:
        trainer._rescue()
        folder = trainer.run_folder.checkpoints
        assert {path.name for path in folder.iterdir()} == {
            *("latest", "step-000000002", "step-000000003")
        }
    trainer.recording.opened.release()
    trainer.coded.end()
    barrier_on(trainer.control)
