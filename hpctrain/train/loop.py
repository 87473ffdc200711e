"""The training loop. One step reads from top to bottom in `Trainer.step`."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hpctrain.comm.channel import Channel, Ticket
from hpctrain.comm.collect import all_gather, all_sum, barrier_on, broadcast, figures_of_all
from hpctrain.comm.engine import engine_of
from hpctrain.data.batches import Batches, Share, is_indexed
from hpctrain.data.generators import generator_state, restore_generators, seed_generators
from hpctrain.errors import JobError, RankDiedError, StoppedError, TrainingError
from hpctrain.grad.accumulate import accumulate
from hpctrain.grad.blocks import Block, gradient_norm
from hpctrain.grad.data_parallel import DataParallel
from hpctrain.stop import StopRequest
from hpctrain.trace import now_s
from hpctrain.train import resume
from hpctrain.train.checkpoint.loading import load_newest
from hpctrain.train.checkpoint.manifest import step_of
from hpctrain.train.checkpoint.saver import Saver
from hpctrain.train.checkpoint.store import complete_names
from hpctrain.train.checks import (
    check_same_data,
    loss_mistake,
    refused_exits,
)
from hpctrain.train.console import Console, RankLog
from hpctrain.train.device import device_of, moved
from hpctrain.train.evaluation import Validation, not_training
from hpctrain.train.finite import bad_parameter, first_not_finite
from hpctrain.train.inject import Injection
from hpctrain.train.interrupt import told_when_interrupted
from hpctrain.train.metrics import StepFigures
from hpctrain.train.optimizer import build_optimizer
from hpctrain.train.recording import Recording
from hpctrain.train.resume import BuffersBefore
from hpctrain.train.run_folder import open_run
from hpctrain.train.sample import show_sample
from hpctrain.train.settings import Parts, Settings
from hpctrain.train.standing import Standing, together
from hpctrain.world import World, tells_of_deaths

_log = logging.getLogger("hpctrain")

HOST = torch.device("cpu")
LAST_WRITE_S = 5.0
"""How long a rank that ends the run by an error waits for the checkpoint in the making ..."""
INTERRUPTED_S = 0.7
"""... one that is interrupted, as the launcher soon kills all ranks, ..."""
LET_GO_S = 0.2
"""... and one that goes on without others, which may never finish their part."""


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
        stop: what listens already for the word that this rank is to end.
        resumes_below: checkpoints of this step and of later ones are passed over.
    """

    model: nn.Module
    """What the job's loss is given."""
    parallel: DataParallel
    """What exchanges gradients."""
    speaks = True
    """Whether the root tells the user how far it is."""

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
        stop: StopRequest | None = None,
        resumes_below: int | None = None,
    ) -> None:
        self.world = world
        self.parts = parts
        self._resumes_below = resumes_below
        self.settings = settings
        self.before_step = BuffersBefore(parts.model) if self.may_recover else None
        """Where a step may have to be taken again."""
        self.control = engine_of(world).control
        self.console = Console(speaks=self.speaks and world.is_root, line_s=settings.run.line_s)
        self.step_number = 0
        train = settings.train
        self.device = device_of(world, train.device)
        parts.model.to(self.device)
        self.injection = Injection(
            settings.inject, self._own_number(), self._computing_ranks(), clock=self._own_s
        )
        self.injection.follow(parts.model.parameters())
        if settings.exchange.deterministic:
            torch.use_deterministic_algorithms(True)
        check_same_data(self.control, world, parts.train_data, "training")
        check_same_data(self.control, world, parts.validation_data, "validation")
        self.batches = Batches(
            parts.train_data,
            batch=train.batch,
            micro_batch=train.micro_batch,
            seed=settings.seed,
            shuffle=train.shuffle,
            rank=world.rank,
            size=world.size,
            collate=parts.collate,
            may_repeat=self.may_recover,
        )
        self.validation = Validation.of(parts, train.batch, self.device)
        self.optimizer = build_optimizer(
            [p for p in parts.model.parameters() if p.requires_grad], settings.optimizer
        )
        self.open_exchange()
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        seed_generators(settings.seed + 1 + world.rank)

        self._fresh = fresh
        opened = open_run(self.control, parent, facts, chosen, fresh, train.steps)
        self.run_folder = opened.folder
        self.recording = Recording(
            world, settings, facts, opened, self.console, base_rate=self._rates[0]
        )
        try:
            self._resume()
        except BaseException:
            self.recording.abandon()
            raise
        self._open_saver()
        self.injection.strikes = self.step_number == 0
        self._loss_checked = False
        self._saved_at = self._evaluated_at = -1
        self._stop = stop or StopRequest()
        self._vote: Ticket | None = None
        """Of all ranks, in the present step: the loss of each, and whether it was told to stop."""
        self._stops = False
        """Whether all ranks know that the run is to end here."""
        self._was_cut_off = False
        """Whether others died, maybe before all was done that belongs to the last step."""
        self._taken: tuple[int, torch.Tensor] = (0, torch.zeros(()))
        """Number and loss of the step whose blocks are on the wire, with `next_forward`."""
        self._block_norms: list[float] = []
        self._late_norms: list[float] = []
        self._log_every = settings.run.log_every or max(1, train.steps // 100)
        self.recording.begin(self.control, self.step_number)
        self._say_hello()

    @property
    def may_recover(self) -> bool:
        """Whether the ranks that are left go on when others die; see train.recovery."""
        return self.world.size > 1 and tells_of_deaths(os.environ)

    def _own_number(self) -> int:
        """This rank among those of the whole run."""
        return self.world.rank

    def _computing_ranks(self) -> Sequence[int]:
        """Those of the whole run that compute."""
        return range(self.world.size)

    def open_exchange(self) -> None:
        """Prepare model and optimizer for the exchange of gradients. Collective."""
        train, exchange = self.settings.train, self.settings.exchange
        self.model = self.parallel = DataParallel(self.parts.model, exchange, world=self.world)
        if exchange.next_forward:
            if train.clip_norm is not None or train.nonfinite == "skip":
                raise JobError(
                    "next_forward takes a step before all gradients are there to decide about it",
                    allowed="no train.clip_norm, and train.nonfinite = 'stop'",
                    everywhere=True,
                )
            later = self.parallel.overlap_step(self.optimizer, self._check_block)
            later.keeps = self.may_recover

    def _open_saver(self) -> None:
        """Prepare for checkpoints. Collective."""
        self._saver = Saver(
            self._saving_channel(),
            self.run_folder.checkpoints,
            self.settings.checkpoint,
            self.world.trace,
            self.step_number,
        )

    def _saving_channel(self) -> Channel:
        """Of the ranks that write a checkpoint together."""
        return self.control

    def run(self) -> dict[str, float]:
        """Train to the last step, evaluate, save. Returns the last evaluation's figures.

        Ctrl-C and SIGTERM end all ranks.

        Raises:
            StoppedError: on all ranks, after a checkpoint, when any was told to end by SIGUSR1, or
                by SIGTERM in a batch job.
        """
        with told_when_interrupted(self.world, self._farewell, self._stop), refused_exits():
            try:
                return self._run()
            except RankDiedError:  # the others may go on
                raise
            except Exception:
                self._saver.wait(LAST_WRITE_S)
                raise

    def _run(self) -> dict[str, float]:
        if self._was_cut_off:
            self._attend()
        while self.step_number < self.settings.train.steps:
            self.step()
            self._attend()
        self._finish_steps()
        figures = self.evaluate()
        if self._stops:
            self._end_early()
        self.save()
        self._close()
        return figures

    def _finish_steps(self) -> None:
        """The last step has been taken. Collective."""
        self.parallel.wait_for_gradients()

    def _attend(self) -> None:
        """Do what is to be done after a step, unless it has been done."""
        train, every, done = self.settings.train, self.settings.checkpoint.every, self.step_number
        if done % self._log_every == 0 or done == train.steps:
            self._report()
        if self._is_due(train.eval_every, self._evaluated_at):
            self.evaluate()
        if self._is_due(every, self._saved_at):
            self._report()
            self.save()
        if self._is_told_to_stop():
            self._end_early()

    def _is_due(self, every: int, done_at: int) -> bool:
        """Whether what is done every so many steps, but the last one, is still to be done now."""
        done = self.step_number
        return (
            0 < done < self.settings.train.steps
            and bool(every)
            and not done % every
            and done_at != done
        )

    def step(self) -> bool:
        """One optimizer step on one global batch; whether this rank took part, as all do here."""
        begun_s = now_s()
        step = self._begin_step()
        share = self.batches.share(self.step_number)
        if not share.sizes and not self._loss_checked:
            self._check_loss(None)
        loss = torch.zeros(())
        sizes = enumerate(share.sizes)

        def backward(subset: Any) -> None:
            nonlocal loss
            place, size = next(sizes)
            weight = size / share.total
            with self._phase("forward"):
                with self.injection.slowed(step):
                    value = self.parts.loss(self.model, subset)
                self._check_loss(loss_mistake(self.parts.loss, value))
                part = value * weight
            with self._phase("backward"), self.injection.slowed_backward(step):
                self.injection.strike(step, place, len(share.sizes))
                (part * self._multiple(share)).backward()
            loss = loss + part.detach()

        with self._phase("data"):
            on_device = (moved(subset, self.device) for subset in share.subsets)
            subsets = self._in_phase("data", on_device)
        self._accumulate(share, subsets, backward)

        own_loss = float(loss)
        vote = figures_of_all(own_loss, self._stop.has_come)
        self._vote = self.control.post(vote, "loss, and whether to stop")
        with self._phase("optimizer"):
            norm = self._update(loss)
            self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        self.recording.figures.pending.append(
            StepFigures(own_loss, norm, self._exposed_s, now_s() - begun_s)
        )
        self.recording.step_ended(self.step_number)
        return True

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss and metrics over the validation data; empty without any."""
        validation = self.validation
        if validation is None:
            return {}
        totals: dict[str, float] = {}
        with self._phase("evaluate"), self._as_of_all(), not_training(self.model):
            for index in range(self.world.rank, validation.batches, self.world.size):
                if self._stop.has_come:
                    break
                for name, value in validation.sums(self.model, index).items():
                    totals[name] = totals.get(name, 0.0) + value
        mine = list(totals), self._stop.has_come
        everyones = all_gather(self.control, mine, label="evaluation")
        if any(is_told for _, is_told in everyones):
            self._stops = True
            return {}
        names = sorted(set().union(*(names for names, _ in everyones)))
        sums = all_sum(
            self.control, np.array([totals.get(name, 0.0) for name in names]), label="evaluation"
        )
        return self._tell(dict(zip(names, (sums / validation.samples).tolist(), strict=True)))

    def _tell(self, figures: dict[str, float]) -> dict[str, float]:
        """Record and show the figures of an evaluation."""
        self.recording.evaluation(self.step_number, figures)
        self._evaluated_at = self.step_number
        return figures

    def _is_told_to_stop(self) -> bool:
        """Whether any rank was, when the step ended. Collective."""
        if self._vote:
            losses, are_told = engine_of(self.world).wait(self._vote).T
            self._vote = None
            self.recording.figures.losses[self.step_number] = float(losses.sum())
            self._stops |= bool(are_told.any())
        return self._stops

    def _end_early(self) -> None:
        """Save, unless this step is saved, and leave the rest for another launch."""
        self._report()
        if self._saved_at != self.step_number:
            self.save()
        self._close(is_finished=False)
        raise self._stopped()

    def _stopped(self) -> StoppedError:
        return StoppedError(
            f"told to end: saved at step {self.step_number} of {self.settings.train.steps}",
            fix="start the same command again to continue",
            everywhere=True,
        )

    def save(self) -> None:
        """Begin a checkpoint, which `finish_saving`, the next one or the end of the run waits for.

        Raises:
            CheckpointError: on all ranks, when the one before could not be written.
        """
        self.parallel.wait_for_gradients()
        self._write(self.parallel.exchange.state_dict(), self._own_state())

    def _own_state(self) -> dict[str, Any]:
        """State of this rank alone, for a checkpoint."""
        own: dict[str, Any] = {"generators": generator_state()}
        if self.settings.exchange.buffers == "local":
            own["buffers"] = resume.local_buffers(self.parts.model)
        return own

    def _write(self, exchange: dict[str, Any], own: dict[str, Any]) -> None:
        """Begin a checkpoint. Collective over the ranks that write together.

        Args:
            exchange: what the exchange of gradients wants to find again.
            own: state of this rank alone.
        """
        with self._phase("save"):
            saved = self._saver.save(
                self.step_number,
                shared={"model": self.parts.model.state_dict(), "exchange": exchange},
                own=own,
                facts={
                    "samples": self.step_number * self.settings.train.batch,
                    "optimizer": resume.optimizer_name(self.settings.optimizer),
                },
                optimizer=self.optimizer,
                updates_in_forward=self.settings.exchange.next_forward,
            )
        self._saved_at = self.step_number
        self.recording.checkpoint(self.step_number, saved)

    def finish_saving(self) -> None:
        """Wait until the checkpoint in the making is written.

        Raises:
            CheckpointError: on all ranks, when it could not be.
        """
        self.recording.checkpoint(self.step_number, self._saver.finish())

    def show_sample(self) -> None:
        """Print what the job's `sample` makes of the trained model, on the root. Not collective."""
        if self.parts.sample and self.world.is_root:
            log = RankLog(self.run_folder.log(self.world.rank), self.world, self.console)
            show_sample(
                self.parts.sample,
                self.parts.model.to(HOST),
                self.run_folder,
                self.console,
                self.settings.seed,
            )
            log.close()

    # ------------------------------------------------------------------ parts of a step

    def _multiple(self, share: Share) -> float:
        """What a part of the loss is multiplied with before backward.

        Every rank's gradient is divided by the number of ranks: that is undone here, and each
        sample counts equally, however many of them a rank has.
        """
        del share
        return self.world.size

    def _accumulate(
        self, share: Share, subsets: Iterable[Any], backward: Callable[[Any], None]
    ) -> None:
        """Add up gradients over a rank's subsets, and exchange them. Collective."""
        self.parallel.exchange.weight = share.weight
        accumulate(self.parallel, subsets, len(share.sizes), backward)

    @property
    def _exposed_s(self) -> float:
        """How long the last step has waited for the wire."""
        return self.parallel.exchange.exposed_s

    @contextmanager
    def _as_of_all(self) -> Iterator[None]:
        """Inside, parameters are what all ranks together have made of them. Collective."""
        self.parallel.wait_for_gradients()
        yield

    def _begin_step(self) -> int:
        """The number of the step that begins, which is written down."""
        self.world.position.step = step = self.step_number + 1
        self.recording.step_begins(step)
        if self.before_step:
            later = self.parallel.exchange.later
            if later:
                later.finish_buffers()
            self.before_step.take(self.step_number)
        return step

    def _update(self, loss: torch.Tensor) -> float:
        """Take the optimizer's step, if gradients are usable. Returns their norm.

        With `next_forward`, gradients are checked block by block, and the norm comes later.
        """
        if self.settings.exchange.next_forward:
            self._taken = self.step_number + 1, loss
            self._set_rate()
            self.optimizer.step()
            return math.nan
        norm = self._gradient_norm()
        if self._is_usable(norm, loss, self.step_number + 1):
            self._clip(norm)
            self._set_rate()
            self.optimizer.step()
        return norm

    def _gradient_norm(self) -> float:
        return float(self.parallel.exchange.gradient_norm())

    def _check_block(self, block: Block) -> None:
        """With `next_forward`: a block has come, and is about to be used."""
        norm = float(gradient_norm([block]))
        step, loss = self._taken
        self._is_usable(norm, loss, step)
        self._block_norms.append(norm)
        if len(self._block_norms) == len(self.parallel.exchange.blocks):
            self._late_norms.append(math.hypot(*self._block_norms))
            self._block_norms = []

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

    def _check_loss(self, mistake: str | None) -> None:
        """Refuse a loss that is none. In the first step all ranks agree, so that one may speak."""
        first, self._loss_checked = not self._loss_checked, True
        if first:
            mistakes = all_gather(self.control, mistake, label="loss check")
            mistake = next((text for text in mistakes if text), None)
        if mistake:
            raise JobError(mistake, everywhere=first)

    def _is_usable(self, norm: float, loss: torch.Tensor, step: int) -> bool:
        """Whether to take the step. All ranks hold the same gradients and so agree on it.

        Raises:
            TrainingError: gradients are not finite and the job says to stop; names the ranks.
        """
        if math.isfinite(norm):
            return True
        who = self._not_finite(loss)
        if self.settings.train.nonfinite == "skip":
            _log.warning("update left out, gradients are not finite: first not finite was %s", who)
            return False
        raise TrainingError(
            f"gradients are not finite in step {step}: first not finite was {who}",
            value=norm,
            fix="look for bad values in the input data, lower the learning rate, set "
            "train.clip_norm, or train.nonfinite = 'skip'",
            everywhere=True,
        )

    def _not_finite(self, loss: torch.Tensor) -> str:
        """Whose loss was not finite, if any. Collective."""
        is_fatal = self.settings.train.nonfinite == "stop"
        can_search = is_fatal and not self.settings.exchange.next_forward
        search = self._bad_gradient if can_search else None
        return first_not_finite(self.control, self.world, float(loss), search)

    def _bad_gradient(self) -> str:
        """The parameter whose gradient on this rank alone is not finite, if it is so once more."""
        subsets = self.batches.share(self.step_number).subsets
        with self.parallel.no_sync():
            return bad_parameter(
                self.parts.model,
                (self.parts.loss(self.model, moved(subset, self.device)) for subset in subsets),
            )

    def _clip(self, norm: float) -> None:
        limit = self.settings.train.clip_norm
        if limit is not None and norm > limit:
            self.parallel.exchange.scale_gradients(limit / norm)

    def _set_rate(self) -> None:
        factor = self.settings.schedule.factor(self.step_number, self.settings.train.steps)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    # ------------------------------------------------------------------ when others die

    def undo_step(self) -> None:
        """The last step does not count: parameters are those before it. Not collective."""
        figures = self.recording.figures
        figures.losses.pop(self.step_number, None)
        figures.pending.pop()
        self.step_number -= 1

    def standing(self, rank: int) -> Standing:
        """Where this rank stands, which had that number before."""
        return Standing(
            rank=rank,
            step=self.step_number,
            weight=self.batches.share(0).weight,
            figures=self.recording.figures,
            has_checked=self._loss_checked,
            stops=self._stops,
        )

    def stand_with(self, standings: Sequence[Standing], step: int) -> None:
        """All ranks that are left have taken so many steps. Not collective."""
        self.step_number = step
        self.recording.figures = together(standings, step)
        self._block_norms, self._late_norms = [], []
        self._vote = None
        self._loss_checked = all(each.has_checked for each in standings)
        self._stops = any(each.stops for each in standings)
        self._evaluated_at = -1
        self._was_cut_off = True

    def let_checkpoint_go(self) -> None:
        """The one in the making may lack what the dead were to write. Not collective."""
        self._saver.let_go(LET_GO_S)

    def record_anew(self) -> None:
        """Record as those that are left, and what the dead have not recorded. Collective."""
        is_evaluated = self.recording.begin_anew(self.world, self.control, self.step_number)
        self._open_saver()
        names = complete_names(self.run_folder.checkpoints) if self.world.is_root else []
        saved_at = step_of(names[0]) if names else -1
        done = broadcast(self.control, (saved_at, is_evaluated), label="what is done already")
        self._saved_at, is_evaluated = done
        if is_evaluated:
            self._evaluated_at = self.step_number
        self._report()

    # ------------------------------------------------------------------ around the steps

    def _resume(self) -> None:
        """Continue from the run's newest checkpoint, if it has one."""
        parts = ("model", "exchange", "optimizer")
        loaded = load_newest(
            self.control, self.run_folder.checkpoints, parts, below=self._resumes_below
        )
        if loaded is None:
            return
        state, manifest = loaded
        self.step_number = int(manifest["step"])
        with resume.state_of_a_run():
            resume.restore_model(self.parts.model, state["model"])
            table, written_by = self.settings.optimizer, manifest.get("optimizer")
            resume.restore_optimizer(self.optimizer, table, state["optimizer"], written_by)
            self._resume_exchange(state, int(manifest["ranks"]))
        self.console.say(f"resumed at step {self.step_number}")

    def _resume_exchange(self, state: Mapping[str, Any], ranks: int) -> None:
        """Restore what depends on ranks and on how gradients are exchanged. Collective."""
        self.parallel.exchange.load_state_dict(state["exchange"])
        own = state["own"]
        if own:
            if self.settings.exchange.buffers == "local":
                resume.restore_local_buffers(self.parts.model, own.get("buffers", {}))
            restore_generators(own["generators"])
        else:
            seed_generators(self.settings.seed + 1 + self.world.rank + 1_000_003 * self.step_number)
            _log.warning(
                "the checkpoint is of %d ranks: random generators start anew%s",
                ranks,
                ", and all ranks take the buffers of rank 0"
                if self.settings.exchange.buffers == "local"
                else "",
            )
        self.parallel.check_in_sync()

    def _say_hello(self) -> None:
        data: Any = self.parts.train_data
        self.recording.hello(
            sum(parameter.numel() for parameter in self.parts.model.parameters()),
            len(data) if is_indexed(data) else None,
        )
        if self.injection.text:
            self.console.say(self.injection.text)

    def _farewell(self) -> str:
        """What an interrupted user should know."""
        lost = ""
        if not self._saver.wait(INTERRUPTED_S if self.world.size > 1 else LAST_WRITE_S):
            lost = f"; that of step {self._saved_at} was still being written"
        names = complete_names(self.run_folder.checkpoints)
        if not names:
            return (
                f"interrupted at step {self.step_number}; there is no checkpoint to continue from"
                f"{lost}"
            )
        again = "without --fresh" if self._fresh else "again"
        return (
            f"interrupted at step {self.step_number}; newest checkpoint is step "
            f"{step_of(names[0])}{lost}: start the same command {again} to continue"
        )

    def _own_s(self) -> float:
        """A clock of what this rank does itself: it stands still while it waits for blocks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        later = self.parallel.exchange.later
        return now_s() - (later.waited_s if later else 0.0)

    def _report(self) -> None:
        """Bring the figures of the last steps together, record them and show how far the run is."""
        if self.recording.figures.pending:
            self.world.position.phase = "report"
            self.recording.report(self.step_number, self._sum_figures(), self._more_figures)

    def _more_figures(self, step: int) -> Mapping[str, float]:
        """What else is written down of a step."""
        del step
        return {}

    def _sum_figures(self) -> np.ndarray:
        """The figures of the last steps, one row a step, added up over ranks. Collective."""
        self._settle()
        pending = self.recording.figures.pending
        for place, norm in enumerate(self._late_norms):
            pending[place] = replace(pending[place], gradient_norm=norm)
        self._late_norms = []
        mine = np.array([astuple(figures) for figures in pending])
        return all_sum(self.control, mine, label="metrics")

    def _settle(self) -> None:
        """All ranks meet for a report: have what is on the wire, as far as figures need it."""
        self.parallel.wait_for_gradients()

    def _close(self, is_finished: bool = True) -> None:
        self.world.position.phase = "closing"
        self.finish_saving()
        self.console.finish()
        self.recording.close(is_finished, self._part())

    def _part(self) -> str:
        """Wait for the other ranks; how blocks were moved. Collective."""
        barrier_on(self.control, "end of training")
        return self.parallel.exchange.progress
