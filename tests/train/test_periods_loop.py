"""Jobs whose ranks take steps of their own: resumed with the same bits, told what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from left_behind import parameters
from torch import nn

from hpctrain import ExchangeConfig, PeriodsConfig, World
from hpctrain.comm.collect import barrier_on
from hpctrain.data.generators import seed_generators
from hpctrain.grad.periods.method import PRESETS
from hpctrain.train.checkpoint.config import CheckpointConfig
from hpctrain.train.loop import Trainer
from hpctrain.train.optimizer import ScheduleConfig
from hpctrain.train.periods_loop import PeriodsTrainer
from hpctrain.train.run_folder import RunConfig
from hpctrain.train.settings import Parts, Settings, TrainConfig

pytestmark = pytest.mark.mpi

STEPS = 24

Make = Callable[..., Trainer]


class Centred(nn.Module):
    """What it is in training depends on a running mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        centred: torch.Tensor = x - self.mean
        return centred


@pytest.fixture
def make(world: World, shared_folder: Path) -> Make:
    """Makes trainers of the same job."""
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    points = [(row, row.sum().sin()[None]) for row in x]

    def build(folder: str, preset: str = "", **values: Any) -> Trainer:
        seed_generators(1)
        model = nn.Sequential(
            *(
                nn.Linear(3, 8),
                nn.BatchNorm1d(8),
                Centred(8),
                nn.Tanh(),
                nn.Dropout(0.2),
                nn.Linear(8, 1),
            )
        )
        mode = "periods" if preset else "allreduce"
        words = preset.split()
        unsaid = ("every_step", "same", "0", "broadcast")
        name, wire, warmup, buffers = [*words, *unsaid[len(words) :]]
        periods = PeriodsConfig(preset=name, wire=wire, warmup=int(warmup))
        rate = values.pop("lr", 0.01)
        train = {"steps": STEPS, "batch": 16, "micro_batch": 3, "eval_every": 5, **values}
        settings = Settings(
            train=TrainConfig(**train),
            optimizer={"name": "adamw", "lr": rate},
            schedule=ScheduleConfig(name="cosine", warmup=3),
            exchange=ExchangeConfig(mode=mode, deterministic=True, buffers=buffers),
            periods=periods,
            checkpoint=CheckpointConfig(every=5),
            run=RunConfig(report=False),
            seed=5,
        )
        parts = Parts(
            *(model, points, lambda m, batch: (m(batch[0]) - batch[1]).square().mean()),
            validation_data=points[:9],
        )
        kind = PeriodsTrainer if preset else Trainer
        return kind(
            world, parts, settings, parent=shared_folder / folder, facts={"fingerprint": "test"}
        )

    return build


def finish(trainer: Trainer) -> dict[str, Any]:
    """Train to the end; all that is trained, of the last step."""
    trainer.run()
    found = parameters(trainer.run_folder.path)
    barrier_on(trainer.control)
    return found


def left_at(trainer: Trainer, step: int) -> None:
    """Train so far, save, and leave the rest for another."""
    while trainer.step_number < step:
        trainer.step()
    trainer.save()
    trainer.finish_saving()
    trainer.recording.abandon()
    barrier_on(trainer.control)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_without_a_lag_bits_are_those_of_the_other_mode(make: Make) -> None:
    assert_same(finish(make("periods", "every_step")), finish(make("plain")))


def test_warm_up_has_the_bits_of_the_other_mode(make: Make) -> None:
    assert_same(finish(make("periods", f"diloco same {STEPS}")), finish(make("plain")))


def test_clipping_is_that_of_the_other_mode(make: Make) -> None:
    """But for how a norm is rounded; a bias before batch norm has nothing but roundings."""
    expected = finish(make("plain", clip_norm=0.1))
    for name, value in finish(make("periods", "every_step", clip_norm=0.1)).items():
        if name not in ("0.bias", "1.running_mean"):
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


RESUMED = ("od_sgd", "eager_diloco", "streaming_diloco int4", "diloco same 15 local")
RESUMED_SLOWLY = [*(name for name in PRESETS if name not in RESUMED), "od_sgd same 5"]


@pytest.mark.parametrize(
    "preset", [*RESUMED, *(pytest.param(name, marks=pytest.mark.slow) for name in RESUMED_SLOWLY)]
)
def test_resumed_run_ends_with_the_bits_of_one_that_was_not_interrupted(
    make: Make, preset: str
) -> None:
    """Also with an evaluation in between, for which parameters are put aside."""
    expected = finish(make("undisturbed", preset))
    left_at(make("run", preset), 13)
    second = make("run", preset)
    assert second.step_number == 13
    assert_same(finish(second), expected)


@pytest.mark.parametrize(("before", "after"), [("", "od_sgd"), ("diloco", ""), ("", "diloco")])
def test_checkpoint_of_the_other_mode_goes_on(
    make: Make, before: str, after: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = make("run", before)
    left_at(first, 13)
    saved = parameters(first.run_folder.path)
    barrier_on(first.control)
    second = make("run", after)
    assert second.step_number == 13
    assert_same(dict(second.parts.model.state_dict()), saved)
    if after:
        assert "the checkpoint is of another exchange.mode" in caplog.text
    finish(second)
    assert second.step_number == STEPS


@pytest.mark.parametrize("preset", ["od_sgd", "diloco"])
def test_resumed_run_takes_the_rate_that_the_job_has_now(make: Make, preset: str) -> None:
    first = make("run", preset)
    left_at(first, 9)
    second = make("run", preset, lr=0.02)
    first.step()
    second.step()
    (was,), (now,) = first.optimizer.param_groups, second.optimizer.param_groups
    assert now["lr"] == pytest.approx(2 * was["lr"])


@pytest.mark.parametrize("preset", ["one_late", "od_sgd", "diloco", "overlap_local"])
def test_training_helps(make: Make, world: World, preset: str) -> None:
    trainer = make("run", preset)
    finish(trainer)
    if world.is_root:
        lines = (trainer.run_folder.path / "metrics.jsonl").read_text().splitlines()
        told = [json.loads(line).get("validation") for line in lines]
        losses = [each["loss"] for each in told if each]
        assert len(losses) == 5
        assert losses[-1] < losses[0]
