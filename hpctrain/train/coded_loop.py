"""The training loop of the coded mode: no rank waits for one that is slow, stalled or dead.

One step reads from top to bottom in `CodedTrainer.step`. The ranks meet only at the start. After
it, rank 0 alone records and saves, and whatever ranks compute together goes through `Coded`.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hpctrain.comm.channel import Channel
from hpctrain.comm.collect import broadcast
from hpctrain.data.batches import is_indexed, split_evenly, subset_sizes
from hpctrain.errors import CheckpointError, HpctrainError, JobError
from hpctrain.grad.coded.config import Hands, LostError
from hpctrain.grad.coded.exchange import Coded
from hpctrain.trace import now_s
from hpctrain.train.checkpoint.manifest import step_of
from hpctrain.train.checkpoint.store import complete_names
from hpctrain.train.checks import loss_mistake
from hpctrain.train.device import moved
from hpctrain.train.evaluation import not_training
from hpctrain.train.loop import Trainer
from hpctrain.train.metrics import StepFigures
from hpctrain.world import fail

_log = logging.getLogger("hpctrain")

CLAIM = ".rescue-"
"""Names a file by which one of several ranks takes it upon itself to save."""
LATE_STEPS = 2
"""Steps after which rank 0 knows all of a step, what came too late included."""
RESCUED_S = 60.0
"""How long a rank waits for another that saves what a dead root cannot."""


class Exactness:
    """Of gradients that a deadline made estimates."""

    def __init__(self) -> None:
        self._unreported: dict[int, tuple[float, float]] = {}
        self._steps = self._estimated = 0
        self._least = 1.0
        self._worst = math.nan

    def add(self, step: int, covered: float, error: float) -> None:
        """Of a step: the share of the samples that the gradient was made from, and its standard
        error over its norm; NaN if that is not known."""
        self._unreported[step] = covered, error
        self._steps += 1
        if covered < 1:
            self._estimated += 1
            self._least = min(covered, self._least)
            self._worst = float(np.fmax(error, self._worst))

    def take(self, step: int) -> dict[str, float]:
        """What metrics say of a step, once."""
        if step not in self._unreported:
            return {}
        covered, error = self._unreported.pop(step)
        return {"covered": covered, "gradient_error": error}

    @property
    def text(self) -> str:
        """How exact gradients were, if not always."""
        if not self._estimated:
            return ""
        return (
            f"coded: {self._estimated} of {self._steps} steps were estimated at the deadline, from "
            f"{self._least:.0%} of the samples or more; standard error of the gradient up to "
            f"{self._worst:.2g} of its norm"
        )


class CodedTrainer(Trainer):
    """Trains a model with data blocks that several ranks hold. Construction is collective."""

    @property
    def may_recover(self) -> bool:
        """Nobody waits for a dead rank in this mode, which has other means."""
        return False

    def _computing_ranks(self) -> Sequence[int]:
        return Hands.of(self.settings.coded, self.world.size).workers

    def open_exchange(self) -> None:
        """Prepare model and optimizer. Collective."""
        settings = self.settings
        if not is_indexed(self.parts.train_data):
            raise JobError(
                "the coded mode needs training data that can be indexed, since a rank may compute "
                "what another was to",
                value=type(self.parts.train_data).__name__,
                allowed="an object with __len__ and __getitem__",
                everywhere=True,
            )
        self.model = self.parts.model
        self.coded = Coded(
            self.parts.model,
            self.optimizer,
            settings.coded,
            world=self.world,
            samples=lambda blocks: split_evenly(settings.train.batch, blocks),
            seed=settings.seed,
            block_bytes=settings.exchange.block_bytes,
        )
        self._exactness = Exactness()
        self._launch = broadcast(self.control, secrets.token_hex(4), label="launch")
        samples = self.coded.samples
        self._firsts = [sum(samples[:block]) for block in range(len(samples))]
        if self.world.is_root:
            self.console.say(f"coded: {self.coded.summary}")

    def _saving_channel(self) -> Channel:
        return self.coded.engine.alone("checkpoints")

    def run(self) -> dict[str, float]:
        """Train to the last step, evaluate, save. Returns the last evaluation's figures.

        When a root died, or all holders of a data block did, all ranks end, after a checkpoint.
        """
        try:
            return super().run()
        except LostError as error:
            self._rescue()
            fail(self.world, error, error.__traceback__)
            raise
        except CheckpointError as error:
            if self.world.size > 1:  # rank 0 is alone with it, and the others would wait for it
                fail(self.world, error, error.__traceback__)
            raise

    def _run(self) -> dict[str, float]:
        train, every = self.settings.train, self.settings.checkpoint.every
        figures: dict[str, float] = {}
        while not self.coded.is_over:
            if self._is_told_to_stop():
                self._end_early()
            if self.step_number < train.steps:
                if not self.step():
                    continue  # this rank had fallen behind, and goes on where the others are
                done = self.step_number
                if done % self._log_every == 0 or done == train.steps:
                    self._report()
                if train.eval_every and done % train.eval_every == 0 and done < train.steps:
                    figures = self.evaluate()
                    if self.coded.moved:
                        continue
                if every and done % every == 0 and done < train.steps:
                    self._report()
                    self.save()
            else:
                figures = self.evaluate()
                if not self.coded.moved and not self._is_told_to_stop():
                    self.save()
                    break
        self._close()
        if self.coded.continues:
            raise self._stopped()
        return figures

    def _is_told_to_stop(self) -> bool:
        """On rank 0, which decides: whether any rank was. Another rank that was lets it know."""
        if self._stop.has_come:
            self.coded.ask_to_stop()
        self._stops = self.coded.is_told_to_stop
        return self._stops

    def step(self) -> bool:
        """One optimizer step on one global batch; whether this rank could take part in it."""
        begun_s = now_s()
        step = self._begin_step()
        coded, injection = self.coded, self.injection

        def loss(subset: tuple[Any, int]) -> torch.Tensor:
            batch, size = subset
            with self._phase("forward"):
                with injection.slowed(step, unless=lambda: not coded.is_wanted):
                    value = self.parts.loss(self.model, batch)
                self._check_loss(loss_mistake(self.parts.loss, value))
            self.world.position.phase = "backward"
            injection.strike(step, coded.worked_on, len(coded.worker.own))
            return value * (size / self.settings.train.batch)

        has_gradients = coded.step(
            self._read,
            loss,
            around=lambda: injection.slowed_backward(step, unless=lambda: not coded.is_wanted),
        )
        if not has_gradients:
            self.step_number = coded.step_number
            return False
        with self._phase("optimizer"):
            norm = self._update(torch.tensor(coded.loss))
        self.step_number = coded.step_number
        self.recording.figures.pending.append(
            StepFigures(coded.loss, norm, coded.exposed_s, now_s() - begun_s)
        )
        if self.settings.coded.deadline_s and self.world.is_root:
            error = coded.error / norm if norm else 0.0
            self._exactness.add(self.step_number, coded.covered, error)
        self.recording.step_ended(self.step_number, LATE_STEPS if self.world.is_root else 0)
        return True

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss and metrics over the validation data; empty without any."""
        validation = self.validation
        self.coded.moved = False
        if validation is None:
            return {}
        with self._phase("evaluate"), not_training(self.model):
            sums = self.coded.evaluate(
                validation.batches,
                lambda index: validation.sums(self.model, index),
                unless=self._is_told_to_stop,
            )
        self.step_number = self.coded.step_number
        if sums is None:
            return {}
        return self._tell({name: value / validation.samples for name, value in sums.items()})

    def save(self) -> None:
        """Begin a checkpoint, on rank 0 alone."""
        if self.world.is_root:
            self._write(self.coded.state_dict(), {})

    def _say_hello(self) -> None:
        if self.world.is_root:
            for left in self.run_folder.path.glob(f"{CLAIM}*"):
                left.unlink(missing_ok=True)
        super()._say_hello()

    # ------------------------------------------------------------------ parts of a step

    def _read(self, block: int) -> Iterator[tuple[Any, int]]:
        """The subsets of a data block of the present step, and their numbers of samples."""
        samples = self.coded.samples[block]
        position = self.step_number * self.settings.train.batch + self._firsts[block]
        for size in subset_sizes(samples, self.settings.train.micro_batch):
            with self._phase("data"):
                subset = moved(self.batches.read(position, size), self.device)
            yield subset, size
            position += size

    def _check_loss(self, mistake: str | None) -> None:
        """Refuse a loss that is none."""
        if mistake:
            raise JobError(mistake)

    def _not_finite(self, loss: torch.Tensor) -> str:
        """What was not finite first, as far as is known."""
        if math.isfinite(loss):
            return "no loss, but a gradient in backward"
        return "the loss of a data block"

    def _gradient_norm(self) -> float:
        return self.coded.gradient_norm()

    def _clip(self, norm: float) -> None:
        limit = self.settings.train.clip_norm
        if limit is not None and norm > limit:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(limit / norm)

    def _own_s(self) -> float:
        """A clock of what this rank does itself."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return now_s()

    # ------------------------------------------------------------------ around the steps

    def _resume_exchange(self, state: Mapping[str, Any], ranks: int) -> None:
        """Take what an earlier run agreed on. What is drawn at random depends on no rank."""
        self.coded.load_state_dict(state["exchange"])
        self.coded.step_number = self.step_number

    def _sum_figures(self) -> np.ndarray:
        """The figures of rank 0, which all others take the same time for, as if of all ranks."""
        rows = [
            (f.loss, *(self.world.size * v for v in (f.gradient_norm, f.exposed_s, f.step_s)))
            for f in self.recording.figures.pending
        ]
        return np.array(rows)

    def _more_figures(self, step: int) -> dict[str, float]:
        return self._exactness.take(step)

    def _rescue(self) -> None:
        """Save the last step that is whole, on the first rank that comes to it."""
        self._saver.let_go(RESCUED_S)
        claim = self.run_folder.path / f"{CLAIM}{self._launch}"
        saved = claim.with_suffix(".done")
        try:  # a full disk is told, and no more: why the run ends is what counts
            claim.touch(exist_ok=False)
            self._save_if_newer()
            claim.rename(saved)
        except FileExistsError:  # another rank does it
            given_up_s = now_s() + RESCUED_S
            while now_s() < given_up_s and not saved.exists():
                time.sleep(0.1)
        except (OSError, HpctrainError) as error:
            _log.error("the last step that was whole could not be saved: %s", error)

    def _save_if_newer(self) -> None:
        """This rank may have fallen behind, and what it saves would replace later steps."""
        names = complete_names(self.run_folder.checkpoints)
        if not names or step_of(names[0]) < self.step_number:
            self._write(self.coded.state_dict(), {})
            self._saver.finish()

    def _part(self) -> str:
        """Wait until the run is over; whoever is late or dead is not waited for."""
        self.coded.end(continues=self._stops)
        if self._exactness.text:
            self.console.say(self._exactness.text)
        return "coded"
