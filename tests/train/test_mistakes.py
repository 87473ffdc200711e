"""Mistakes of a job are told on all ranks, with a fix; none of them goes by in silence."""

from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpctrain import ExchangeConfig, World
from hpctrain.data.generators import seed_generators
from hpctrain.errors import CheckpointError, ExitCode, HpctrainError, JobError
from hpctrain.train.checkpoint.config import CheckpointConfig
from hpctrain.train.checkpoint.store import complete_names
from hpctrain.train.checks import checked_metrics
from hpctrain.train.loop import Trainer
from hpctrain.train.optimizer import ScheduleConfig
from hpctrain.train.run_folder import AlreadyFinishedError, RunConfig
from hpctrain.train.settings import Parts, Settings, TrainConfig

pytestmark = pytest.mark.mpi

SETTINGS = Settings(
    train=TrainConfig(steps=6, batch=5),
    optimizer={"name": "sgd", "lr": 0.1},
    schedule=ScheduleConfig(),
    exchange=ExchangeConfig(progress="hooks"),
    checkpoint=CheckpointConfig(every=2),
    run=RunConfig(),
    seed=5,
)


def points(count: int = 12, seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).square().mean()  # type: ignore[no-any-return]


def net(norm: bool = False) -> nn.Module:
    seed_generators(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Tanh(), nn.Linear(4, 1))


Make = Callable[..., Trainer]


@pytest.fixture
def make(world: World, shared_folder: Path) -> Iterator[Make]:
    """Makes trainers in one run folder, each after the one before it was killed."""
    made: list[Trainer] = []

    def build(
        model: nn.Module | None = None, settings: Settings = SETTINGS, **parts: Any
    ) -> Trainer:
        for earlier in made:
            earlier.recording.opened.release()
        world.comm.Barrier()
        chosen = Parts(**{"model": model or net(), "train_data": points(), "loss": loss, **parts})
        job = {"optimizer": dict(settings.optimizer), "train": {"steps": settings.train.steps}}
        facts = {"fingerprint": json.dumps(job), "job": job}
        folder = shared_folder / "run"
        made.append(Trainer(world, chosen, settings, parent=folder, facts=facts, chosen=folder))
        return made[-1]

    yield build
    for one in made:
        one.recording.abandon()


def trained(made: Trainer, steps: int) -> Trainer:
    for _ in range(steps):
        made.step()
    return made


def saved(made: Trainer) -> None:
    made.save()
    made.finish_saving()


def refused(error: pytest.ExceptionInfo[HpctrainError]) -> str:
    """The message, if it is for a job to be corrected and one rank may speak for all."""
    assert error.value.exit_code == ExitCode.BAD_JOB
    assert error.value.everywhere
    return str(error.value)


def with_optimizer(**table: Any) -> Settings:
    return replace(SETTINGS, optimizer=table)


# ---------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("kind", "text"), [("seed", "another sample 0"), ("count", "has 13 samples, rank 0 has 12")]
)
def test_other_data_on_one_rank_is_refused(world: World, make: Make, kind: str, text: str) -> None:
    last = world.size - 1
    if world.size == 1:
        pytest.skip("needs two ranks")
    odd = world.rank == last
    data = points(count=12 + (odd and kind == "count"), seed=int(odd and kind == "seed"))
    with pytest.raises(JobError, match="training data is not the same") as error:
        make(train_data=data)
    assert world.name_of(last) in refused(error) and text in refused(error)
    with pytest.raises(JobError, match="validation data is not the same"):
        make(validation_data=data)


class Flipped:
    """Random, seldom, and from a generator that nobody knows of."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return points()[index] * (-1 if random.Random().random() < 0.3 else 1)


def test_random_augmentation_is_no_difference(make: Make) -> None:
    trained(make(train_data=Flipped()), 1)


@pytest.mark.parametrize(("count", "warns"), [(4, True), (5, False)])
def test_batch_larger_than_the_data_is_told_once(
    world: World, make: Make, caplog: pytest.LogCaptureFixture, count: int, warns: bool
) -> None:
    with caplog.at_level(logging.WARNING, "hpctrain"):
        trained(make(train_data=points(count)), 3)
    said = [r.getMessage() for r in caplog.records if "several times" in r.getMessage()]
    expected = ["a batch of 5 takes samples of the 4 several times"]
    assert said == (expected if warns and world.is_root else [])


# ---------------------------------------------------------------------- loss and sample


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda value: None, "returned None"),
        (lambda value: value.item(), "returned a value of type float"),
        (lambda value: value.detach(), "returned a number without a gradient"),
        (lambda value: value.expand(3), r"returned a tensor of shape \(3,\)"),
        (lambda value: value + 0j, "returned a complex number"),
        (lambda value: [value], "returned a value of type list"),
        (lambda value: value.to("meta"), "returned a number without a value"),
    ],
    ids=["None", "float", "detached", "vector", "complex", "list", "meta"],
)
@pytest.mark.parametrize("batch", [1, 5])  # of 1, most ranks have no sample
def test_wrong_loss_is_told_with_its_place(
    world: World, make: Make, spoil: Callable[[Any], Any], text: str, batch: int
) -> None:
    def wrong(model: nn.Module, batch: Any) -> Any:
        return spoil(loss(model, batch)) if world.rank == 0 else loss(model, batch)

    config = replace(SETTINGS, train=TrainConfig(steps=6, batch=batch, micro_batch=1))
    made = make(settings=config, loss=wrong)
    with pytest.raises(JobError, match=text) as error:
        made.step()
    assert f"wrong() in {__file__}:" in refused(error)
    assert "must return one number" in refused(error)


@pytest.mark.parametrize("returned", [None, 0.5, {"a": "x"}, {"a": torch.ones(2)}], ids=str)
def test_metrics_that_are_none_are_told_with_their_place(make: Make, returned: Any) -> None:
    def metrics(model: nn.Module, batch: Any) -> Any:
        return returned

    made = make(validation_data=points(5), metrics=metrics)
    evaluated = made.evaluate if made.world.is_root else lambda: checked_metrics(metrics, returned)
    with pytest.raises(JobError, match=r"returned .* in place of numbers by name") as error:
        evaluated()
    assert f"metrics() in {__file__}:" in str(error.value)


def test_exit_in_the_middle_is_no_end_of_the_run(make: Make) -> None:
    def leaves(model: nn.Module, batch: Any) -> Any:
        sys.exit()

    with pytest.raises(JobError, match=r"has called sys\.exit\(\) while") as error:
        make(loss=leaves).run()
    assert f"{__file__}:" in str(error.value.where) and "in leaves" in str(error.value.where)


def test_sample_is_made_in_evaluation_and_kept(world: World, make: Make) -> None:
    def sample(model: nn.Module) -> str:
        assert not model.training and not torch.is_grad_enabled()
        return f"drawn {random.random()}"

    made = trained(make(sample=sample), 1)
    seed_generators(3)
    made.show_sample()
    after = random.random()
    seed_generators(3)
    assert random.random() == after
    assert made.model.training
    kept = made.run_folder.path / "sample.txt"
    if world.is_root:
        assert kept.read_text().startswith("drawn 0.")


def test_failing_sample_is_one_line(
    world: World, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    def sample(model: nn.Module) -> str:
        raise KeyError("token")

    made = make(sample=sample)
    made.console._stream = __import__("sys").stderr
    made.show_sample()
    lines = [line for line in capsys.readouterr().err.splitlines() if "sample()" in line]
    assert len(lines) == int(world.is_root)
    if world.is_root:
        assert "KeyError: 'token'" in lines[0]
        assert "Traceback" in made.run_folder.log(0).read_text()


# ---------------------------------------------------------------------- going on


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"name": "adam", "lr": 0.1}, {"name": "sgd", "lr": 0.1, "momentum": 0.9}),
        ({"name": "sgd", "lr": 0.1, "momentum": 0.9}, {"name": "adam", "lr": 0.1}),
        ({"name": "adam", "lr": 0.1}, {"name": "adamw", "lr": 0.1}),
        ({"name": "adam", "lr": 0.1}, {"name": "adam", "lr": 0.1, "amsgrad": True}),
        ({"name": "rmsprop", "lr": 0.1}, {"name": "rmsprop", "lr": 0.1, "momentum": 0.9}),
    ],
    ids=str,
)
def test_state_of_another_optimizer_is_refused(
    make: Make, first: dict[str, Any], then: dict[str, Any]
) -> None:
    saved(trained(make(settings=with_optimizer(**first)), 2))
    with pytest.raises(JobError, match="of another optimizer") as error:
        make(settings=with_optimizer(**then))
    assert "choose another --run-dir" in refused(error)
    assert make(settings=with_optimizer(**first)).step_number == 2


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "radam", "asgd", "rprop"])
def test_options_of_the_optimizer_are_those_of_the_job(make: Make, name: str) -> None:
    saved(trained(make(settings=with_optimizer(name=name, lr=0.1)), 2))
    changed = make(settings=with_optimizer(name=name, lr=0.05))
    assert changed.step_number == 2
    assert changed.optimizer.param_groups[0]["lr"] == 0.05
    trained(changed, 1)


def test_changed_job_is_told_and_the_earlier_one_kept(
    world: World, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    saved(trained(make(), 2))
    longer = replace(SETTINGS, train=replace(SETTINGS.train, steps=8))
    with caplog.at_level(logging.WARNING, "hpctrain"):
        made = make(settings=longer)
    said = [r.getMessage() for r in caplog.records if "changed job" in r.getMessage()]
    assert len(said) == int(world.is_root)
    facts = made.run_folder.facts()
    if world.is_root:
        assert "train.steps 6 -> 8" in said[0]
        assert facts["job"]["train"] == {"steps": 8}
        assert [s["job"]["train"] for s in facts["history"]] == [{"steps": 6}]


def test_finished_run_is_left_alone_and_a_longer_one_goes_on(make: Make) -> None:
    first = make()
    first.run()
    with pytest.raises(AlreadyFinishedError, match="already finished at step 6"):
        make()
    longer = make(settings=replace(SETTINGS, train=replace(SETTINGS.train, steps=8)))
    assert longer.step_number == 6
    longer.run()
    lines = list(map(json.loads, longer.run_folder.metrics.open()))
    longer.world.comm.Barrier()
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [*range(1, 9)]


class Shuffled:
    """Draws its order from the generators of the whole process."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        samples = points()
        random.shuffle(samples)
        return (x + float(torch.rand(())) * 0.1 for x in samples)


def weights(made: Trainer) -> torch.Tensor:
    state = made.parts.model.state_dict().values()
    return torch.cat([tensor.double().flatten() for tensor in state]).clone()


@pytest.mark.parametrize("buffers", ["broadcast", "local"])
def test_resumed_run_has_the_same_bits(make: Make, buffers: str) -> None:
    """With a stream that draws, and batch statistics that differ by rank."""
    exchange = ExchangeConfig(progress="hooks", buffers=buffers)
    config = replace(SETTINGS, exchange=exchange, train=TrainConfig(steps=6, batch=8))
    whole = make(net(norm=True), config, train_data=Shuffled())
    saved(trained(whole, 4))
    trained(whole, 2)
    seed_generators(77)
    resumed = make(net(norm=True), config, train_data=Shuffled())
    assert resumed.step_number == 4
    trained(resumed, 2)
    assert torch.equal(weights(whole), weights(resumed))


class Extra(nn.Linear):
    """Keeps a NumPy array among its state."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__(3, 1)
        self.plain = plain

    def get_extra_state(self) -> Any:
        counts = np.ones(3)
        return {"counts": counts.tolist() if self.plain else counts}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_checkpoint_that_cannot_be_read_is_told_when_it_is_written(make: Make) -> None:
    made = trained(make(nn.Sequential(Extra())), 1)
    made.save()
    with pytest.raises(CheckpointError, match="could be written, but not be read") as error:
        made.finish_saving()
    assert "model['0._extra_state']['counts'] (numpy.ndarray)" in refused(error)
    assert complete_names(made.run_folder.checkpoints) == []
    made.world.comm.Barrier()
    plain = trained(make(nn.Sequential(Extra(plain=True))), 1)
    saved(plain)
    assert len(complete_names(plain.run_folder.checkpoints)) == 1
