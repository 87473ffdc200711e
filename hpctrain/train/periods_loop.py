"""The training loop where gradients or parameters of other ranks come late.

A step is `Trainer.step`; here stands what is exchanged otherwise, and what a rank has for itself.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from hpctrain.comm.channel import Ticket
from hpctrain.comm.collect import barrier_on
from hpctrain.comm.engine import engine_of
from hpctrain.data.batches import Share
from hpctrain.data.generators import generator_state, restore_generators, seed_generators
from hpctrain.errors import TrainingError
from hpctrain.grad.accumulate import streamed
from hpctrain.grad.blocks import norm_of
from hpctrain.grad.periods.periods import Periods
from hpctrain.trace import now_s
from hpctrain.train import resume
from hpctrain.train.loop import Trainer

_log = logging.getLogger("hpctrain")

LATE_VOTES = 8
"""Steps after which all ranks know that one of them was told to end."""


class PeriodsTrainer(Trainer):
    """Trains a model with steps of each rank's own. Construction is collective."""

    @property
    def may_recover(self) -> bool:
        """What is on the wire when a rank dies cannot be had again: the run ends."""
        return False

    def open_exchange(self) -> None:
        """Prepare model and optimizer. Collective."""
        settings = self.settings
        self.model = self.parts.model
        self._votes: deque[Ticket] = deque()
        self._last_factor: float | None = None
        self.periods = Periods(
            self.parts.model,
            self.optimizer,
            settings.periods,
            exchange=settings.exchange,
            world=self.world,
        )
        self.periods.check = self._take_or_leave
        if self.world.is_root:
            self.console.say(f"periods: {self.periods.summary}")

    # ------------------------------------------------------------------ parts of a step

    def _multiple(self, share: Share) -> float:
        if self.periods.method.sends == "gradients" or self.periods.is_warming_up:
            return self.world.size
        return share.total / share.samples  # this rank's step is on the mean over its own samples

    def _accumulate(
        self, share: Share, subsets: Iterable[Any], backward: Callable[[Any], None]
    ) -> None:
        self.periods.weight = share.weight
        for subset in streamed(subsets, len(share.sizes), self.world):
            backward(subset)
            del subset

    @property
    def _exposed_s(self) -> float:
        return self.periods.exposed_s

    def _update(self, loss: torch.Tensor) -> float:
        """Take this rank's step, and what has come. Returns the norm of its own gradient."""
        self._norm = math.nan
        self._set_rate()
        self._saver.before_change()  # a step that is taken back puts the optimizer's state back
        self.periods.step()
        return self._norm

    def _take_or_leave(self, gradients: list[torch.Tensor], is_shared: bool) -> bool:
        """Whether to take a step on gradients, which are clipped.

        Args:
            gradients: of all parameters that have one.
            is_shared: whether they are the mean over ranks, and not this rank's own.
        """
        norm = float(norm_of(gradients))
        self._norm = norm
        if math.isfinite(norm):
            factor = self._clip_factor(norm, is_shared)
            if factor < 1.0:
                for gradient in gradients:
                    gradient.mul_(factor)
            return True
        whose = "that of all ranks together" if is_shared else "its own"
        if self.settings.train.nonfinite == "skip":
            _log.warning("update left out, gradient is not finite: %s", whose)
            return False
        raise TrainingError(
            f"gradient is not finite in step {self.step_number + 1}: {whose}",
            value=norm,
            where=self.world.name_of(self.world.rank),
            fix="look for bad values in the input data, lower the learning rate, set "
            "train.clip_norm, or train.nonfinite = 'skip'",
            everywhere=is_shared,
        )

    def _clip_factor(self, norm: float, is_shared: bool) -> float:
        """What a gradient is multiplied by.

        A step that is taken back later stands for that on the gradient of all ranks, whose norm is
        smaller than a rank's own: it is scaled as the last of those was.
        """
        limit = self.settings.train.clip_norm
        factor = 1.0 if limit is None or norm <= limit else limit / norm
        if is_shared:
            self._last_factor = factor
        elif self.periods.method.sends == "gradients" and self._last_factor is not None:
            return self._last_factor
        return factor

    @contextmanager
    def _as_of_all(self) -> Iterator[None]:
        with self.periods.shared():
            yield

    def _own_s(self) -> float:
        return now_s()

    def _is_told_to_stop(self) -> bool:
        """As the trainer's, but a vote is looked at some steps later: nobody waits for it."""
        if self._vote:
            self._votes.append(self._vote)
            self._vote = None
        while len(self._votes) > LATE_VOTES:
            _, are_told = engine_of(self.world).wait(self._votes.popleft()).T
            self._stops |= bool(are_told.any())
        return self._stops

    # ------------------------------------------------------------------ around the steps

    def _finish_steps(self) -> None:
        self.periods.finish()

    def save(self) -> None:
        """Begin a checkpoint, with what is on the wire.

        Raises:
            CheckpointError: on all ranks, when the one before could not be written.
        """
        own = {
            "generators": generator_state(),
            "periods": self.periods.state_dict(),
            "clip_factor": self._last_factor,
            "buffers": {  # copies: those of the model are exchanged while it is saved
                name: buffer.clone()
                for name, buffer in resume.local_buffers(self.parts.model).items()
            },
        }
        with self.periods.shared():
            self._write({}, own)

    def _resume_exchange(self, state: Mapping[str, Any], ranks: int) -> None:
        own = state["own"]
        if own and "periods" in own:
            options = [dict(group) for group in self.optimizer.param_groups]
            self.periods.load_state_dict(own["periods"])
            for group, values in zip(self.optimizer.param_groups, options, strict=True):
                group.update(values)  # as the job has them now
            resume.restore_local_buffers(self.parts.model, own["buffers"])
            self._last_factor = own["clip_factor"]
            restore_generators(own["generators"])
            return
        self.periods.begin_anew(self.step_number)
        seed_generators(self.settings.seed + 1 + self.world.rank + 1_000_003 * self.step_number)
        _log.warning(
            "the checkpoint is of %s: what was on the wire is left out, all begin with the "
            "parameters that they agreed on and the optimizer's state of rank 0; the outer "
            "optimizer and random generators start anew",
            "another exchange.mode" if own else f"{ranks} ranks",
        )

    def _settle(self) -> None:
        pass

    def _more_figures(self, step: int) -> Mapping[str, float]:
        is_last = step == self.step_number
        return {"sent_bytes": self.periods.sent_bytes} if is_last else {}

    def _part(self) -> str:
        barrier_on(self.control, "end of training")
        return "periods"
