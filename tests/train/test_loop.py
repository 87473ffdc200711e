"""Training over ranks equals training in one process; a stopped run goes on as if it had not."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import EACH, gpu
from torch import nn

from hpctrain import ExchangeConfig, World
from hpctrain.comm.collect import all_gather
from hpctrain.comm.engine import engine_of
from hpctrain.data.generators import seed_generators
from hpctrain.errors import CheckpointError, JobError, TrainingError, UnfitError
from hpctrain.train.checkpoint.config import CheckpointConfig
from hpctrain.train.loop import Trainer
from hpctrain.train.optimizer import ScheduleConfig
from hpctrain.train.run_folder import RunConfig
from hpctrain.train.settings import Parts, Settings, TrainConfig

pytestmark = pytest.mark.mpi

SAMPLES = 23
Sample = tuple[torch.Tensor, torch.Tensor]


class Points:
    """Samples of a known function, as a map-style data set."""

    def __init__(self, count: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
        self.y = self.x.sum(dim=1, keepdim=True).sin()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Sample:
        return self.x[index], self.y[index]


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return (model(x) - y).pow(2).mean()


def net(dropout: float = 0.0) -> nn.Module:
    seed_generators(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)).double()


def settings(next_forward: bool = False, **train: Any) -> Settings:
    return Settings(
        train=TrainConfig(**{"steps": 8, "batch": 10, **train}),
        optimizer={"name": "adamw", "lr": 0.01},
        schedule=ScheduleConfig(name="cosine", warmup=2),
        exchange=ExchangeConfig(progress="hooks", block_bytes=100, next_forward=next_forward),
        checkpoint=CheckpointConfig(every=4),
        run=RunConfig(),
        seed=5,
    )


def trainer(
    world: World, folder: Path, config: Settings, model: nn.Module | None = None, **parts: Any
) -> Trainer:
    chosen = Parts(**{"model": model or net(), "train_data": Points(), "loss": loss, **parts})
    return Trainer(world, chosen, config, parent=folder, facts={"fingerprint": "test"})


def killed(made: Trainer) -> Trainer:
    """What is left of a run that did not come to its end, but to that of its last checkpoint."""
    made.finish_saving()
    made.recording.opened.release()
    made.world.comm.Barrier()
    return made


def losses(made: Trainer) -> list[float]:
    """The loss of every step, as recorded by rank 0."""
    lines = made.run_folder.metrics.read_text().splitlines()
    made.world.comm.Barrier()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def plain_losses(config: Settings) -> list[float]:
    """What one process computes with a loop of its own."""
    from hpctrain.data.batches import Batches

    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batches = Batches(
        Points(), batch=config.train.batch, seed=config.seed, shuffle=config.train.shuffle
    )
    found = []
    for step in range(config.train.steps):
        (batch,) = batches.share(step).subsets
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * config.schedule.factor(step, config.train.steps)
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        if config.train.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
        optimizer.step()
        found.append(value.item())
    return found


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"batch": 7, "micro_batch": 2},
        {"batch": 1},
        {"batch": 3, "shuffle": False},
        {"batch": 12, "clip_norm": 0.05},
    ],
    ids=str,
)
def test_loss_curve_is_that_of_one_process(
    world: World, shared_folder: Path, train: dict[str, Any]
) -> None:
    config = settings(**train)
    made = trainer(world, shared_folder, config)
    made.run()
    # clip_grad_norm_ adds 1e-6 to the norm that it divides by
    tolerance = 1e-4 if config.train.clip_norm else 1e-10
    assert losses(made) == pytest.approx(plain_losses(config), rel=tolerance)
    made.model.check_in_sync()


class Stream:
    """The same samples as an iterable that can be started again."""

    def __iter__(self) -> Iterator[Sample]:
        points = Points()
        return (points[index] for index in range(len(points)))


def test_iterable_gives_the_same_curve_as_indices_in_order(
    world: World, shared_folder: Path
) -> None:
    config = settings(shuffle=False)
    made = trainer(world, shared_folder, config, train_data=Stream())
    made.run()
    assert losses(made) == pytest.approx(plain_losses(config), rel=1e-10)


def state_of(made: Trainer) -> list[Any]:
    """Everything that decides how training goes on, on this rank."""
    optimizer = made.optimizer.state_dict()["state"]
    return [
        [p.detach().clone() for p in made.parts.model.parameters()],
        [value for _, entry in sorted(optimizer.items()) for value in entry.values()],
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        torch.tensor(np.random.get_state()[1].astype(np.int64)),
        torch.tensor(random.getstate()[1]),
    ]


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return len(first) == len(second) and all(map(equal, first, second))


class Noisy(Points):
    """Augments samples with the generators of Python and NumPy."""

    def __getitem__(self, index: int) -> Sample:
        x, y = super().__getitem__(index)
        return x + random.random() * 0.01 + np.random.rand() * 0.01, y


@pytest.mark.parametrize("device", EACH)
@pytest.mark.parametrize("next_forward", [False, True])
@pytest.mark.parametrize("stop", [4, 5])
def test_stopped_and_resumed_run_ends_with_the_same_bits(
    world: World, shared_folder: Path, stop: int, next_forward: bool, device: str
) -> None:
    """With dropout and random augmentation; stopped at a checkpoint, and a step after one."""
    config = settings(next_forward, device=device)
    whole = trainer(world, shared_folder / "whole", config, net(0.3), train_data=Noisy())
    whole.run()

    first = trainer(world, shared_folder / "parts", config, net(0.3), train_data=Noisy())
    for _ in range(stop):
        first.step()
        if first.step_number % 4 == 0:
            first.save()
    first._report()
    killed(first)
    seed_generators(99)
    second = trainer(world, shared_folder / "parts", config, net(0.3), train_data=Noisy())
    assert second.run_folder == first.run_folder
    assert second.step_number == 4
    second.run()
    whole_state = state_of(second)
    seed_generators(98)
    third = trainer(world, shared_folder / "whole2", config, net(0.3), train_data=Noisy())
    third.run()
    assert equal(whole_state, state_of(third))
    assert losses(second) == losses(whole)


def test_next_forward_records_the_same_and_stops_at_bad_gradients(
    world: World, shared_folder: Path
) -> None:
    recorded = []
    for next_forward in (False, True):
        made = trainer(world, shared_folder / str(next_forward), settings(next_forward))
        made.run()
        lines = made.run_folder.metrics.read_text().splitlines()
        world.comm.Barrier()
        recorded.append([entry for entry in map(json.loads, lines) if "checkpoint" not in entry])
    for plain, ahead in zip(*recorded, strict=True):
        assert plain.get("loss") == ahead.get("loss")
        assert plain.get("gradient_norm") == pytest.approx(ahead.get("gradient_norm"), rel=1e-12)

    def broken(model: nn.Module, batch: Any) -> torch.Tensor:
        return loss(model, batch) * (float("nan") if world.rank == world.size - 1 else 1.0)

    made = trainer(world, shared_folder / "broken", settings(True), loss=broken)
    with pytest.raises(TrainingError, match=rf"in step 1: .*rank {world.size - 1}"):
        made.run()
    world.comm.Barrier()


def test_gpu_is_refused_where_there_is_none(
    world: World, shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnfitError, match="torch sees no GPU"):
        trainer(world, shared_folder, settings(device="cuda"))


@gpu
def test_gpu_gives_the_curve_of_the_host(world: World, shared_folder: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        made = trainer(world, shared_folder / device, settings(device=device))
        made.run()
        found.append(losses(made))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_finished_run_is_not_continued(world: World, shared_folder: Path) -> None:
    config = settings(steps=2)
    first = trainer(world, shared_folder, config)
    first.run()
    second = trainer(world, shared_folder, config)
    assert second.run_folder != first.run_folder
    assert second.step_number == 0


def test_damaged_checkpoint_is_passed_over_on_all_ranks(world: World, shared_folder: Path) -> None:
    config = settings()
    first = trainer(world, shared_folder, config)
    for _ in range(8):
        first.step()
        if first.step_number in (4, 8):
            first.save()
    newest, older = (first.run_folder.checkpoints / f"step-{n:09d}" for n in (8, 4))
    killed(first)
    last = world.size - 1
    damaged = newest / f"rank-{last:05d}.pt"  # which only one rank reads
    if world.rank == 0:
        damaged.write_bytes(damaged.read_bytes()[:-1])
    world.comm.Barrier()
    assert killed(trainer(world, shared_folder, config)).step_number == 4
    if world.rank == 0:
        (older / "model.safetensors").write_bytes(b"")
    world.comm.Barrier()
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is intact"):
        trainer(world, shared_folder, config)


def test_failed_write_is_told_on_all_ranks_and_harms_nothing(
    world: World, shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(world, shared_folder, settings())
    made.step()
    made.save()
    made.finish_saving()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    made.step()
    if world.rank == world.size - 1:
        monkeypatch.setattr(torch, "save", full)
    made.save()
    with pytest.raises(CheckpointError, match="the last good one is step-000000001") as told:
        made.finish_saving()
    assert f"rank {world.size - 1}: OSError" in str(told.value) or world.size == 1
    monkeypatch.undo()
    killed(made)
    assert trainer(world, shared_folder, settings()).step_number == 1


def test_run_whose_folder_vanishes_ends_with_the_reason(
    world: World, shared_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the save after the one that fails; spans, which need the folder too, are given up."""
    import shutil

    made = trainer(world, shared_folder / "run", settings(steps=12))

    def vanish(model: nn.Module, batch: Any) -> torch.Tensor:
        if world.rank == 0 and made.step_number == 5:
            made._saver.wait(30)
            shutil.rmtree(made.run_folder.path, ignore_errors=True)
        return loss(model, batch)

    made.parts = replace(made.parts, loss=vanish)
    with pytest.raises(CheckpointError, match="step 8 could not be written; there is no other"):
        made.run()
    assert made.step_number == 12
    assert not made.run_folder.path.exists()
    assert "no more spans are recorded" in caplog.text
    made.recording.opened.release()


def test_whoever_interrupts_a_write_is_told(
    world: World, shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import threading

    made = trainer(world, shared_folder, settings())
    made.step()
    made.save()
    made.finish_saving()
    made.step()
    opened, sync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (opened.wait(30), sync(file)))
    monkeypatch.setattr("hpctrain.train.loop.INTERRUPTED_S", 0.05)
    monkeypatch.setattr("hpctrain.train.loop.LAST_WRITE_S", 0.05)
    made.save()
    text = made._farewell()
    assert "newest checkpoint is step 1; that of step 2 was still being written: start" in text
    world.comm.Barrier()
    opened.set()
    made.finish_saving()
    assert "newest checkpoint is step 2: start" in made._farewell()
    killed(made)


def test_metrics_tell_what_checkpoints_cost(world: World, shared_folder: Path) -> None:
    made = trainer(world, shared_folder, settings())
    made.run()
    world.comm.Barrier()  # of rank 0, which closes the file last
    lines = made.run_folder.metrics.read_text().splitlines()
    world.comm.Barrier()
    told = [line for line in map(json.loads, lines) if "checkpoint" in line]
    assert [line["checkpoint"]["step"] for line in told] == [4, 8]
    assert all(line["checkpoint"]["stall_s"] > 0 for line in told)
    assert all(line["checkpoint"]["written_s"] > 0 for line in told)


def test_evaluation_weights_every_sample_equally(world: World, shared_folder: Path) -> None:
    data = Points(17)
    made = trainer(
        world,
        shared_folder,
        settings(batch=4),
        validation_data=data,
        metrics=lambda model, batch: {"positive": (model(batch[0]) > 0).double().mean()},
    )
    figures = made.evaluate()
    model = made.parts.model
    assert figures["loss"] == pytest.approx(loss(model, (data.x, data.y)).item(), rel=1e-12)
    assert figures["positive"] == pytest.approx((model(data.x) > 0).double().mean().item())
    assert made.model.training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_all_ranks_and_names_the_first(
    world: World, shared_folder: Path, value: float
) -> None:
    last = world.size - 1

    def broken(model: nn.Module, batch: Any) -> torch.Tensor:
        return loss(model, batch) * (value if world.rank == last else 1.0)

    made = trainer(world, shared_folder, settings(), loss=broken)
    before = state_of(made)[:2]
    with pytest.raises(TrainingError, match=f"the loss of rank {last}"):
        made.step()
    assert equal(state_of(made)[:2], before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_is_named_with_its_rank(
    world: World, shared_folder: Path, value: float
) -> None:
    """The sum, which all ranks see, does not tell whose it was."""
    made = trainer(world, shared_folder, settings())
    name, parameter = list(made.parts.model.named_parameters())[-1]
    if world.rank == world.size - 1:
        parameter.register_hook(lambda gradient: gradient * value)
    place = rf"a gradient in backward: that of {name} on rank {world.size - 1} \("
    with pytest.raises(TrainingError, match=place):
        made.step()


def test_update_that_is_not_finite_can_be_skipped(world: World, shared_folder: Path) -> None:
    calls = 0

    def broken_once(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return loss(model, batch) * (float("nan") if calls == 1 and world.rank == 0 else 1.0)

    made = trainer(world, shared_folder, settings(nonfinite="skip"), loss=broken_once)
    before = [p.detach().clone() for p in made.parts.model.parameters()]
    made.step()
    assert equal([p.detach() for p in made.parts.model.parameters()], before)
    made.step()
    assert not equal([p.detach() for p in made.parts.model.parameters()], before)
    made.model.check_in_sync()


def test_data_that_ends_early_is_told(world: World, shared_folder: Path) -> None:
    points = Points(25)
    config = settings(shuffle=False)
    made = trainer(world, shared_folder, config, train_data=(points[i] for i in range(25)))
    made.step()
    made.step()
    with pytest.raises(JobError, match="ended after 25 samples"):
        next(made.batches.share(3).subsets)


def test_checkpoint_that_holds_no_state_is_refused(
    world: World, shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(world, shared_folder, settings())
    made.step()
    monkeypatch.setattr("hpctrain.train.loop.generator_state", lambda: {"torch": [1]})
    made.save()
    killed(made)
    with pytest.raises(JobError, match="something else than the state of a run"):
        trainer(world, shared_folder, settings())
    world.comm.Barrier()


def test_checkpoint_of_another_model_is_refused(world: World, shared_folder: Path) -> None:
    made = trainer(world, shared_folder, settings())
    made.step()
    made.save()
    killed(made)
    other = nn.Sequential(nn.Linear(3, 1)).double()
    with pytest.raises(JobError, match="another model") as caught:
        trainer(world, shared_folder, settings(), other)
    assert "choose another --run-dir" in str(caught.value)
    # What was refused has let go of the folder.
    assert killed(trainer(world, shared_folder, settings())).step_number == 1


def test_every_rank_logs_to_its_own_file_with_rank_and_step(
    world: World, shared_folder: Path
) -> None:
    import logging

    made = trainer(world, shared_folder, settings())
    made.step()
    logging.getLogger("user").warning("look here")
    line = made.run_folder.log(world.rank).read_text().splitlines()[-1]
    assert f"rank {world.rank} step 1 WARNING look here" in line


def test_trace_has_every_phase_of_every_traced_step(world: World, shared_folder: Path) -> None:
    from hpctrain import trace

    config = settings()
    config = replace(config, run=RunConfig(trace_steps=3))
    made = trainer(world, shared_folder, config)
    made.run()
    spans = list(trace.read(made.run_folder.trace(world.rank)))
    names = {(span["name"], span.get("step")) for span in spans}
    for step in (1, 2, 3):
        for phase in ("data", "forward", "backward", "optimizer"):
            assert (phase, step) in names
    assert ("forward", 4) not in names
    blocks = {span["name"] for span in spans if span["track"] == trace.WIRE}
    assert any(name.startswith("block") for name in blocks)


def test_run_json_tells_the_surroundings(world: World, shared_folder: Path) -> None:
    made = trainer(world, shared_folder, settings(steps=1))
    made.run()
    everyone = all_gather(engine_of(world).control, made.run_folder)
    facts = made.run_folder.facts()
    assert facts["ranks"] == world.size
    assert facts["finished"] is True
    assert facts["mpi"] == world.library
    assert all(folder == made.run_folder for folder in everyone)
