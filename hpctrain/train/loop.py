"""The training loop. One step reads from top to bottom in `Trainer.step`."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hpctrain.comm.collect import all_gather, all_sum, barrier_on
from hpctrain.comm.engine import engine_of
from hpctrain.comm.measure import clock_offset
from hpctrain.config import check, option
from hpctrain.data.batches import Batches, Collate, MapStyle
from hpctrain.errors import TrainingError
from hpctrain.grad.accumulate import accumulate
from hpctrain.grad.data_parallel import DataParallel
from hpctrain.grad.overlap import ExchangeConfig
from hpctrain.trace import now_s
from hpctrain.train import checkpoint
from hpctrain.train.checkpoint import CheckpointConfig
from hpctrain.train.console import Console, Progress, RankLog
from hpctrain.train.optimizer import ScheduleConfig, build_optimizer
from hpctrain.train.run_folder import Metrics, RunConfig, open_run
from hpctrain.world import World

Loss = Callable[[nn.Module, Any], torch.Tensor]
_log = logging.getLogger("hpctrain")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, and on how much at a time."""

    steps: int = option(minimum=1)
    """Optimizer steps in the whole run."""
    batch: int = option(minimum=1)
    """Samples of one step over all ranks, whatever their number."""
    micro_batch: int = option(0, minimum=0)
    """Largest number of samples that a rank computes at a time; 0 for its whole share."""
    shuffle: bool = True
    """Whether a map-style data set is read in a new random order in each epoch."""
    clip_norm: float | None = option(None, above=0)
    """Gradients whose norm is larger are scaled down to it."""
    nonfinite: str = option("stop", choices=("stop", "skip"))
    """What to do when a gradient is not finite: end the run, or leave out that step's update."""
    eval_every: int = option(0, minimum=0)
    """Steps between two evaluations on the validation data; 0 for one at the end only."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Parts:
    """What a job trains: plain PyTorch that knows nothing of ranks.

    Attributes:
        model: the module to train.
        train_data: map-style data set or iterable of samples.
        loss: of a model and a batch: the mean over the batch's samples.
        validation_data: map-style data set, if there is one.
        metrics: of a model and a batch: means over the batch's samples, by name.
        collate: makes a batch of a list of samples; torch's default for None.
        sample: of a trained model: text to show at the end.
    """

    model: nn.Module
    train_data: MapStyle | Iterable[Any]
    loss: Loss
    validation_data: MapStyle | None = None
    metrics: Callable[[nn.Module, Any], Mapping[str, torch.Tensor]] | None = None
    collate: Collate | None = None
    sample: Callable[[nn.Module], str] | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a job trains its parts."""

    train: TrainConfig
    optimizer: Mapping[str, Any]
    schedule: ScheduleConfig
    exchange: ExchangeConfig
    checkpoint: CheckpointConfig
    run: RunConfig
    seed: int


class Trainer:
    """Trains a model over all ranks. Construction and every method are collective.

    Args:
        world: the ranks.
        parts: what to train; the same on all ranks.
        settings: how.
        parent: folder of all runs of this job.
        facts: plain values that describe the job, for run.json; ``fingerprint`` tells which
            earlier run may be continued.
        chosen: run folder to use, instead of a new or an unfinished one.
        fresh: do not continue an earlier run.
    """

    def __init__(
        self,
        world: World,
        parts: Parts,
        settings: Settings,
        *,
        parent: Path,
        facts: Mapping[str, Any],
        chosen: Path | None = None,
        fresh: bool = False,
    ) -> None:
        self.world = world
        self.parts = parts
        self.settings = settings
        self.control = engine_of(world).control
        self.step_number = 0
        if settings.exchange.deterministic:
            torch.use_deterministic_algorithms(True)
        self.model = DataParallel(parts.model, settings.exchange, world=world)
        self.optimizer = build_optimizer(
            [p for p in parts.model.parameters() if p.requires_grad], settings.optimizer
        )
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.batches = Batches(
            parts.train_data,
            batch=settings.train.batch,
            micro_batch=settings.train.micro_batch,
            seed=settings.seed,
            shuffle=settings.train.shuffle,
            rank=world.rank,
            size=world.size,
            collate=parts.collate,
        )
        seed_generators(settings.seed + 1 + world.rank)
        self.run_folder = open_run(
            self.control, parent, str(facts.get("fingerprint", "")), chosen, fresh
        )
        self._open(dict(facts))

    def run(self) -> dict[str, float]:
        """Train to the last step, evaluate, save. Returns the last evaluation's figures."""
        train, every = self.settings.train, self.settings.checkpoint.every
        figures: dict[str, float] = {}
        while self.step_number < train.steps:
            self.step()
            done = self.step_number
            if done % self._log_every == 0 or done == train.steps:
                self._report()
            if train.eval_every and done % train.eval_every == 0 and done < train.steps:
                figures = self.evaluate()
            if every and done % every == 0 and done < train.steps:
                self._report()
                self.save()
        figures = self.evaluate()
        self.save()
        self._close()
        return figures

    def step(self) -> None:
        """One optimizer step on one global batch."""
        begun_s = now_s()
        self.world.position.step = self.step_number + 1
        share = self.batches.share(self.step_number)
        loss = torch.zeros(())
        sizes = iter(share.sizes)

        def backward(subset: Any) -> None:
            nonlocal loss
            # Every rank's gradient is divided by the number of ranks: undo that, and weight
            # each sample equally, however many of them a rank has.
            weight = next(sizes) / share.total
            with self._phase("forward"):
                part = self.parts.loss(self.model, subset) * weight
            with self._phase("backward"):
                (part * self.world.size).backward()
            loss = loss + part.detach()

        with self._phase("data"):
            self.model.exchange.weight = share.weight
            subsets = self._in_phase("data", share.subsets)
        accumulate(self.model, subsets, len(share.sizes), backward)

        with self._phase("optimizer"):
            norm = float(self.model.exchange.gradient_norm())
            if self._is_usable(norm, loss):
                self._clip(norm)
                self._set_rate()
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        self._pending.append((float(loss), norm, self.model.exchange.exposed_s, now_s() - begun_s))
        if self._session_steps() >= self.settings.run.trace_steps:
            self.world.trace.active = False

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss and metrics over the validation data; empty without any."""
        data = self.parts.validation_data
        if data is None or len(data) == 0:
            return {}
        with self._phase("evaluate"):
            was_training = self.model.training
            self.model.eval()
            totals: dict[str, float] = {}
            try:
                self._add_up(data, totals)
            finally:
                self.model.train(was_training)
        names = sorted(set().union(*all_gather(self.control, list(totals), label="evaluation")))
        sums = all_sum(
            self.control, np.array([totals.get(name, 0.0) for name in names]), label="evaluation"
        )
        figures = {name: float(value) / len(data) for name, value in zip(names, sums, strict=True)}
        if self._metrics:
            self._metrics.write(self.step_number, validation=figures)
            self._metrics.flush()
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.console.say(f"step {self.step_number}  validation {shown}")
        return figures

    def save(self) -> None:
        """Write a checkpoint."""
        with self._phase("save"):
            checkpoint.save(
                self.control,
                self.run_folder.checkpoints,
                self.step_number,
                shared={
                    "model": self.parts.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "exchange": self.model.exchange.state_dict(),
                },
                own={"generators": checkpoint.generator_state()},
                facts={"samples": self.step_number * self.settings.train.batch},
                keep=self.settings.checkpoint.keep,
            )

    # ------------------------------------------------------------------ parts of a step

    def _phase(self, name: str) -> Any:
        self.world.position.phase = name
        return self.world.trace.span(name, step=self.step_number + 1)

    def _in_phase(self, name: str, items: Iterable[Any]) -> Iterable[Any]:
        """The items, with the time that reading each takes under `name`."""
        iterator = iter(items)
        while True:
            with self._phase(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
            del item

    def _is_usable(self, norm: float, loss: torch.Tensor) -> bool:
        """Whether to take the step. All ranks hold the same gradients and so agree on it.

        Raises:
            TrainingError: gradients are not finite and the job says to stop; names the ranks.
        """
        if math.isfinite(norm):
            return True
        losses = all_gather(self.control, float(loss), label="search for a loss not finite")
        bad = [self.world.name_of(r) for r, value in enumerate(losses) if not math.isfinite(value)]
        who = f"the loss of {', '.join(bad)}" if bad else "no loss, but a gradient in backward"
        if self.settings.train.nonfinite == "skip":
            _log.warning("update left out, gradients are not finite: first not finite was %s", who)
            return False
        raise TrainingError(
            f"gradients are not finite in step {self.step_number + 1}: first not finite was {who}",
            value=norm,
            fix="lower the learning rate, set train.clip_norm, or train.nonfinite = 'skip'",
            everywhere=True,
        )

    def _clip(self, norm: float) -> None:
        limit = self.settings.train.clip_norm
        if limit is not None and norm > limit:
            self.model.exchange.scale_gradients(limit / norm)

    def _set_rate(self) -> None:
        factor = self.settings.schedule.factor(self.step_number, self.settings.train.steps)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def _add_up(self, data: MapStyle, totals: dict[str, float]) -> None:
        """Add this rank's part of the validation sums to `totals`."""
        batch = self.settings.train.batch
        whole = Batches(data, batch=batch, shuffle=False, collate=self.parts.collate)
        for index in range(self.world.rank, -(-len(data) // batch), self.world.size):
            count = min(batch, len(data) - index * batch)
            subset = whole.read(index * batch, count)
            figures = {"loss": self.parts.loss(self.model, subset)}
            if self.parts.metrics:
                figures |= self.parts.metrics(self.model, subset)
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + float(value) * count

    # ------------------------------------------------------------------ around the steps

    def _open(self, facts: dict[str, Any]) -> None:
        """Open the run folder's files and continue from its newest checkpoint."""
        world = self.world
        self.console = Console(speaks=world.is_root, line_s=self.settings.run.line_s)
        self._log = RankLog(self.run_folder.log(world.rank), world, self.console)
        self._resume()
        self._started_at = self.step_number
        self._metrics: Metrics | None = None
        if world.is_root:
            self.run_folder.write_facts(**facts, **self._surroundings(), finished=False)
            self._metrics = Metrics(
                self.run_folder, self.settings.run.tensorboard, self.step_number
            )
        world.trace.offset_s = clock_offset(self.control)
        if self.settings.run.trace_steps:
            world.trace.open(self.run_folder.trace(world.rank), world.rank)
        steps = self.settings.train.steps
        self._log_every = self.settings.run.log_every or max(1, steps // 100)
        self._pending: list[tuple[float, float, float, float]] = []
        self._begun_s = now_s()
        parameters = sum(p.numel() for p in self.parts.model.parameters())
        _log.info(
            "%d parameters, %d of %d steps to go", parameters, steps - self.step_number, steps
        )
        self.console.say(
            f"{parameters:,} parameters, {world.size} rank(s) on {len(world.nodes)} node(s), "
            f"{world.library}; run folder {self.run_folder.path}"
        )

    def _resume(self) -> None:
        loaded = checkpoint.load_newest(self.control, self.run_folder.checkpoints)
        if loaded is None:
            return
        state, manifest = loaded
        self.step_number = int(manifest["step"])
        _restore_model(self.parts.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.model.exchange.load_state_dict(state["exchange"])
        if state["own"]:
            checkpoint.restore_generators(state["own"]["generators"])
        else:
            seed_generators(self.settings.seed + 1 + self.world.rank + 1_000_003 * self.step_number)
            _log.warning(
                "the checkpoint is of %d ranks: random generators start anew", manifest["ranks"]
            )
        self.model.check_in_sync()
        self.console.say(f"resumed at step {self.step_number}")

    def _surroundings(self) -> dict[str, Any]:
        world = self.world
        return {
            "ranks": world.size,
            "nodes": [world.seats[ranks[0]].host for ranks in world.nodes],
            "mpi": world.library,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "resumed_at": self.step_number,
        }

    def _session_steps(self) -> int:
        return self.step_number - self._started_at

    def _report(self) -> None:
        """Bring the figures of the last steps together, record them and show how far the run is."""
        if not self._pending:
            return
        self.world.position.phase = "report"
        mine = np.array(self._pending)
        first = self.step_number - len(mine) + 1
        self._pending = []
        total = all_sum(self.control, mine, label="metrics")
        self.world.trace.flush()
        if not self._metrics:
            return
        ranks, batch = self.world.size, self.settings.train.batch
        for offset, (loss, norm, exposed_s, step_s) in enumerate(total):
            self._metrics.write(
                first + offset,
                loss=loss,
                gradient_norm=norm / ranks,
                rate=self._rates[0]
                * self.settings.schedule.factor(first + offset - 1, self.settings.train.steps),
                samples_per_s=batch * ranks / step_s,
                step_s=step_s / ranks,
                exposed_s=exposed_s / ranks,
            )
        self._metrics.flush()
        mean_loss, _, exposed_s, step_s = total.mean(axis=0)
        left = self.settings.train.steps - self.step_number
        self.console.progress(
            Progress(
                step=self.step_number,
                steps=self.settings.train.steps,
                loss=float(mean_loss),
                samples_per_s=float(batch * ranks / step_s),
                exposed=float(exposed_s / step_s),
                left_s=(now_s() - self._begun_s) / self._session_steps() * left,
            )
        )

    def _close(self) -> None:
        self.world.position.phase = "closing"
        self.console.finish()
        self.world.trace.close()
        self._log.close()
        barrier_on(self.control, "end of training")
        if self._metrics:
            self._metrics.close()
            self.run_folder.write_facts(
                finished=True,
                seconds=now_s() - self._begun_s,
                progress=self.model.exchange.progress,
            )


def seed_generators(seed: int) -> None:
    """Seed the generators of torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _restore_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise TrainingError(
            f"the checkpoint is of another model: {error}",
            fix="start anew with --fresh, or with the model that wrote it",
            everywhere=True,
        ) from error
