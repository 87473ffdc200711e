"""Who is slow or struck when, and that it costs time alone: no test depends on speed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from hpctrain import DataParallel, ExchangeConfig, World, job
from hpctrain.data.generators import seed_generators
from hpctrain.errors import ExitCode, JobError
from hpctrain.train.checkpoint.config import CheckpointConfig
from hpctrain.train.inject import InjectConfig, Injection
from hpctrain.train.loop import Trainer
from hpctrain.train.optimizer import ScheduleConfig
from hpctrain.train.run_folder import RunConfig
from hpctrain.train.settings import Parts, Settings, TrainConfig

if TYPE_CHECKING:
    from conftest import Launch

STEPS = range(1, 13)


def factors(config: InjectConfig, size: int = 3) -> list[list[float]]:
    """The factor of each rank in each step."""
    ranks = [Injection(config, rank, range(size)) for rank in range(size)]
    return [[rank.factor(step) for step in STEPS] for rank in ranks]


# ---------------------------------------------------------------------- factors


def test_nothing_is_injected_by_default() -> None:
    assert factors(InjectConfig()) == [[1.0] * 12] * 3
    assert Injection(InjectConfig(), 0, [0]).text == ""


def test_persistent_ranks_are_always_slow() -> None:
    config = InjectConfig(kind="persistent", ranks=[0, 2], factor=3)
    assert factors(config) == [[3.0] * 12, [1.0] * 12, [3.0] * 12]


def test_rotating_goes_round_the_ranks_in_the_order_of_the_list() -> None:
    slow = factors(InjectConfig(kind="rotating", factor=2.5))
    assert [list(column) for column in zip(*slow, strict=True)][:4] == [
        [2.5, 1, 1],
        [1, 2.5, 1],
        [1, 1, 2.5],
        [2.5, 1, 1],
    ]
    slow = factors(InjectConfig(kind="rotating", factor=2, every=2, ranks=[2, 0]))
    assert slow == [[1, 1, 2, 2] * 3, [1] * 12, [2, 2, 1, 1] * 3]


@pytest.mark.parametrize("values", [{"probability": 0.5, "factor": 4}, {"mean": 0.5}])
def test_what_is_random_belongs_to_seed_step_and_rank(values: dict[str, Any]) -> None:
    config = InjectConfig(kind="exponential" if "mean" in values else "bernoulli", **values)
    slow = factors(config)
    assert factors(config) == slow
    assert factors(config, size=5)[:3] == slow
    assert factors(replace(config, ranks=[1]))[:2] == [[1.0] * 12, slow[1]]
    later = Injection(config, 1, range(3))
    assert [later.factor(step) for step in reversed(STEPS)] == slow[1][::-1]
    assert factors(replace(config, seed=1)) != slow
    assert len({tuple(rank) for rank in slow}) == 3


def test_random_factors_keep_their_values() -> None:
    """Those of a kept figure, or of a run that is repeated elsewhere."""
    found = Injection(InjectConfig(kind="exponential", mean=1.0, seed=7), 2, range(3))
    assert [found.factor(step) for step in (1, 2)] == pytest.approx(
        [1.9875883845282991, 1.3245068827063573], rel=1e-12
    )


def test_random_factors_have_their_distribution() -> None:
    slow = [
        Injection(InjectConfig(kind="exponential", mean=0.5), rank, range(4)).factor(step)
        for rank in range(4)
        for step in range(1, 1001)
    ]
    assert min(slow) >= 1
    assert mean(slow) == pytest.approx(1.5, abs=0.03)
    assert mean(factor > 1.5 for factor in slow) == pytest.approx(0.368, abs=0.03)
    rare = Injection(InjectConfig(kind="bernoulli", factor=2, probability=0.2), 0, [0])
    assert mean(rare.factor(step) == 2 for step in range(1, 4001)) == pytest.approx(0.2, abs=0.03)
    for probability, factor in ((0, 1), (1, 2)):
        sure = Injection(InjectConfig(kind="bernoulli", factor=2, probability=probability), 0, [0])
        assert {sure.factor(step) for step in STEPS} == {factor}


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"kind": "slow"}, "kind: got 'slow'; allowed: none, persistent, rotating, bernoulli, "),
        ({"factor": 2}, "factor does nothing with kind = 'none', which uses no other key"),
        ({"ranks": [0]}, "ranks does nothing with kind = 'none'"),
        ({"kind": "persistent", "factor": 2}, "ranks is missing; kind = 'persistent' needs it"),
        ({"kind": "persistent", "ranks": [0], "factor": 0.5}, "factor: got 0.5; allowed: at least"),
        ({"kind": "rotating", "factor": 2, "seed": 1}, "which uses factor, ranks, every"),
        ({"kind": "bernoulli", "factor": 2}, "probability is missing; kind = 'bernoulli' needs it"),
        ({"kind": "bernoulli", "factor": 2, "probability": 1.5}, "probability: got 1.5; allowed:"),
        ({"kind": "exponential", "mean": 1, "factor": 2}, "factor does nothing with kind = 'exp"),
        ({"kind": "exponential", "mean": 1, "every": 2}, "every does nothing with kind = 'exp"),
        ({"kind": "stall", "ranks": [0], "step": 2}, "stall_s is missing; kind = 'stall' needs it"),
        ({"kind": "kill", "ranks": [0], "step": 0}, "step: got 0; allowed: at least 1"),
        (
            {"kind": "kill", "step": 2, "stall_s": 1},
            "ranks is missing; kind = 'kill' needs it; "
            "stall_s does nothing with kind = 'kill', which uses ranks, step",
        ),
        ({"kind": "kill", "step": 2, "ranks": [1, 1]}, "ranks: got [1, 1]; allowed: integers from"),
        ({"kind": "kill", "step": 2, "ranks": [-1]}, "ranks: got [-1]; allowed: integers from 0"),
        ({"kind": "kill", "step": 2, "ranks": [True]}, "ranks: got [True]; allowed: integers"),
        ({"kind": "kill", "step": 2, "ranks": ["0"]}, "ranks: got ['0']; allowed: integers from"),
        ({"kind": "kill", "step": 2, "ranks": 0}, "ranks: expected a list, got 0"),
    ],
)
def test_what_does_not_belong_together_is_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(JobError) as caught:
        InjectConfig(**values)
    assert text in str(caught.value)


MODULE = """
from torch import nn, ones
def model(): return nn.Linear(2, 1)
def train_data(): return [ones(2)] * 8
def loss(model, batch): return model(batch).square().mean()
"""
JOB = 'module = "work.py"\ntrain = { steps = 10, batch = 4 }\n'


def test_job_file_injects_and_goes_on_without(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(MODULE)
    path = tmp_path / "mine.toml"
    path.write_text(JOB + '[inject]\nkind = "kill"\nranks = [1]\nstep = 3\n')
    loaded = job.load(path)
    assert loaded.job.settings.inject == InjectConfig(kind="kill", ranks=[1], step=3)
    assert job.load(path, ["inject={}"]).job.inject == InjectConfig()
    assert job.load(path, ["inject={}"]).fingerprint == loaded.fingerprint
    with pytest.raises(JobError) as caught:
        job.load(path, ["inject.factor=2"])
    assert "inject: factor does nothing with kind = 'kill'" in str(caught.value)
    with pytest.raises(JobError) as caught:
        job.load(path, ["inject.step=11"])
    assert "inject.step: got 11; the run has 10 steps (--set inject.step=11)" in str(caught.value)


def test_ranks_that_do_not_exist_are_refused_on_all_ranks() -> None:
    config = InjectConfig(kind="persistent", ranks=[1, 4, 3], factor=2)
    for rank in range(3):
        with pytest.raises(
            JobError, match=r"compute nothing in this run: got \[4, 3\]; allowed: 0 to 2"
        ) as caught:
            Injection(config, rank, range(3))
        assert caught.value.everywhere and caught.value.exit_code == ExitCode.BAD_JOB
    Injection(config, 0, range(5))


def test_a_root_that_only_adds_up_is_not_struck() -> None:
    """It is refused by name, and its turn of `rotating` falls to the ranks that compute."""
    with pytest.raises(JobError, match=r"got \[0\]; allowed: 1 to 3"):
        Injection(InjectConfig(kind="kill", ranks=[0], step=2), 1, range(1, 4))
    config = InjectConfig(kind="rotating", factor=5)
    ranks = [Injection(config, rank, range(1, 4)) for rank in range(1, 4)]
    turns = [[rank.factor(step) for rank in ranks].index(5.0) for step in range(1, 7)]
    assert turns == [0, 1, 2, 0, 1, 2]


# ---------------------------------------------------------------------- slowing down


class Time:
    """A clock that goes on by work and sleep alone."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []

    def work(self, seconds: float) -> None:
        self.now_s += seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds

    def injection(self, rank: int = 0, size: int = 1, **values: Any) -> Injection:
        config = InjectConfig(**values)
        return Injection(config, rank, range(size), clock=lambda: self.now_s, sleep=self.sleep)


def test_sleep_follows_the_work_and_is_in_proportion() -> None:
    time = Time()
    injection = time.injection(kind="rotating", factor=3, ranks=[0, 1], size=2)
    with injection.slowed(1):
        time.work(2.0)
    assert time.slept == [4.0]
    with injection.slowed(2):
        time.work(2.0)
    assert time.slept == [4.0]
    with pytest.raises(ValueError, match="broken"), injection.slowed(3):
        raise ValueError("broken")
    assert time.slept == [4.0]


def test_sleep_ends_early_when_nobody_needs_the_work() -> None:
    time = Time()
    injection = time.injection(kind="persistent", factor=2, ranks=[0])
    with injection.slowed(1, unless=lambda: time.now_s >= 1.25):
        time.work(1.0)
    assert time.now_s == pytest.approx(1.25, abs=1e-3)
    assert max(time.slept) <= 1e-3
    with injection.slowed(1, unless=lambda: False):
        time.work(1.0)
    assert time.now_s == pytest.approx(3.25, abs=1e-3)
    before = len(time.slept)
    with injection.slowed(1, unless=lambda: True):
        time.work(1.0)
    assert len(time.slept) == before


class Slow(torch.autograd.Function):
    """Passes its input on; its backward takes one second of a clock."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, time: Time) -> torch.Tensor:
        context.time = time
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        context.time.work(1.0)
        return gradient, None


class SlowLayers(nn.Module):
    def __init__(self, time: Time) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
        self.time = time

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = Slow.apply(layer(x), self.time)
        return x


@pytest.mark.mpi
def test_gradients_go_on_the_wire_after_the_sleep(world: World) -> None:
    """Or the other ranks would not notice that this one is slow."""
    time = Time()
    injection = time.injection(world.rank, world.size, kind="persistent", factor=3, ranks=[0])
    module = SlowLayers(time)
    injection.follow(module.parameters())
    model = DataParallel(module, ExchangeConfig(progress="hooks", block_bytes=16), world=world)
    released: list[int] = []
    sleep = injection._sleep

    def watched(seconds: float) -> None:
        released.append(sum(block.released for block in model.exchange.blocks))
        sleep(seconds)

    injection._sleep = watched
    for step in (1, 2):
        released.clear()
        with injection.slowed_backward(step):
            model(torch.ones(1, 2)).sum().backward()
    is_slow = world.rank == 0
    assert released == ([0, 1, 2] if is_slow else [])
    assert time.slept == ([2.0] * 6 if is_slow else [])
    assert time.now_s == (18.0 if is_slow else 6.0)
    model(torch.ones(1, 2)).sum().backward()  # outside of `slowed_backward`
    assert len(time.slept) == (6 if is_slow else 0)


def test_short_sleeps_are_put_together() -> None:
    time = Time()
    injection = time.injection(kind="persistent", factor=2, ranks=[0])
    with injection.slowed_backward(1):
        for _ in range(8):
            time.work(1e-4)
            injection._delay()
    assert time.slept == pytest.approx([2e-4] * 4)


# ---------------------------------------------------------------------- striking


def test_rank_stands_still_once_in_the_middle_of_its_step() -> None:
    time = Time()
    injection = time.injection(1, 2, kind="stall", ranks=[1], step=3, stall_s=5)
    for step in STEPS:
        for block in range(3):
            injection.strike(step, block, 3)
            time.work(1.0)
    assert time.slept == [5.0]
    assert injection.factor(3) == 1
    other = time.injection(0, 2, kind="stall", ranks=[1], step=3, stall_s=5)
    other.strike(3)
    assert time.slept == [5.0]


def test_rank_whose_second_block_others_compute_is_struck_in_the_next_step() -> None:
    time = Time()
    injection = time.injection(1, 2, kind="stall", ranks=[1], step=3, stall_s=5)
    injection.strike(2, 0, 4)
    injection.strike(3, 0, 4)
    assert time.slept == []
    injection.strike(4, 0, 4)
    injection.strike(4, 1, 4)
    assert time.slept == [5.0]


@pytest.mark.parametrize(("blocks", "struck"), [(1, 0), (2, 1), (4, 1)])
def test_rank_kills_itself_after_its_first_block_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    blocks: int,
    struck: int,
) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *to: killed.append(to))
    injection = Time().injection(1, 2, kind="kill", ranks=[1], step=3)
    for block in range(blocks):
        injection.strike(2, block, blocks)
        injection.strike(3, block, blocks)
        assert len(killed) == (block >= struck)
    assert killed == [(os.getpid(), signal.SIGKILL)]
    assert capfd.readouterr().err == "hpctrain: [inject] kills rank 1 in step 3\n"
    injection.strikes = False
    injection.strike(3)
    assert len(killed) == 1
    assert injection.text.endswith("rank 1 to be killed in step 3; not again in a resumed run")


# ---------------------------------------------------------------------- training

Sample = tuple[torch.Tensor, torch.Tensor]
Make = Callable[..., Trainer]


def points() -> list[Sample]:
    x = torch.randn(23, 3, generator=torch.Generator().manual_seed(0))
    return [(row, row.sum().sin()[None]) for row in x]


@pytest.fixture
def make(world: World, shared_folder: Path) -> Make:
    """Makes trainers of the same job with different injections."""

    def build(folder: str, inject: InjectConfig, **exchange: Any) -> Trainer:
        seed_generators(1)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
        settings = Settings(
            train=TrainConfig(steps=6, batch=10, micro_batch=2),
            optimizer={"name": "adamw", "lr": 0.01},
            schedule=ScheduleConfig(),
            exchange=ExchangeConfig(progress="hooks", block_bytes=100, way="direct", **exchange),
            checkpoint=CheckpointConfig(every=2),
            run=RunConfig(),
            seed=5,
            inject=inject,
        )
        parts = Parts(model, points(), lambda m, batch: (m(batch[0]) - batch[1]).square().mean())
        return Trainer(
            world, parts, settings, parent=shared_folder / folder, facts={"fingerprint": "test"}
        )

    return build


@pytest.mark.mpi
@pytest.mark.parametrize("next_forward", [False, True])
def test_slow_ranks_change_no_bit(make: Make, next_forward: bool) -> None:
    found = []
    for inject in (
        InjectConfig(),
        InjectConfig(kind="rotating", factor=3),
        InjectConfig(kind="exponential", mean=1.0),
    ):
        made = make(f"{inject.kind}", inject, next_forward=next_forward, deterministic=True)
        made.run()
        found.append(torch.cat([p.detach().flatten() for p in made.parts.model.parameters()]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.mpi
def test_resumed_run_is_not_struck_again(make: Make, world: World) -> None:
    stall = InjectConfig(kind="stall", ranks=[world.size - 1], step=3, stall_s=1e-3)
    first = make("run", stall)
    assert first.injection.strikes
    for _ in range(2):
        first.step()
    first.save()
    first.finish_saving()
    first.recording.opened.release()
    world.comm.Barrier()
    second = make("run", stall)
    assert second.step_number == 2 and not second.injection.strikes
    second.recording.opened.release()
    world.comm.Barrier()


@pytest.mark.mpi
def test_missing_rank_is_told_before_a_run_folder_is_made(
    make: Make, world: World, shared_folder: Path
) -> None:
    with pytest.raises(JobError, match=r"inject\.ranks names ranks") as caught:
        make("none", InjectConfig(kind="persistent", ranks=[world.size], factor=2))
    assert caught.value.everywhere
    assert not (shared_folder / "none").exists()


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.any_mpi
def test_killed_rank_ends_the_run_and_the_next_launch_goes_on(launch: Launch) -> None:
    keys = """
train = { steps = 6, batch = 4 }
checkpoint = { every = 2 }
run = { report = false }
inject = { kind = "kill", ranks = [1], step = 4 }
"""
    file = launch.job(MODULE, keys, name="killed")
    command = ("-m", "hpctrain", "run", file)
    ended = launch(2, *command)
    assert ended.status != 0
    assert ended.err.count("inject: rank 1 to be killed in step 4\n") == 1
    assert ended.err.count("hpctrain: [inject] kills rank 1 in step 4\n") == 1
    again = launch(2, *command)
    assert again.status == 0, again.err
    assert "resumed at step 2" in again.err
    assert "not again in a resumed run" in again.err
