"""The training loop of one encoder with many tasks: a root that leads, and children that train.

The root's side is `SharedTrainer._lead`: rounds, and what is recorded and saved after each. A
child's is `SharedTrainer._follow`: a `Trainer` over the ranks of the child, in a run folder of its
own inside the run's, takes so many steps a round.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hpctrain.comm.collect import barrier_on
from hpctrain.comm.engine import engine_of
from hpctrain.comm.part import PartEngine
from hpctrain.errors import HpctrainError, RankDiedError, StoppedError
from hpctrain.grad.shared.rounds import Child
from hpctrain.grad.shared.shared import Shared, Turn
from hpctrain.stop import StopRequest
from hpctrain.trace import now_s
from hpctrain.train import resume
from hpctrain.train.checkpoint.loading import load_newest
from hpctrain.train.checkpoint.saver import Saved, Saver
from hpctrain.train.checks import refused_exits
from hpctrain.train.console import Console
from hpctrain.train.inject import Injection
from hpctrain.train.interrupt import told_when_interrupted
from hpctrain.train.loop import LAST_WRITE_S, Trainer
from hpctrain.train.metrics import StepFigures
from hpctrain.train.recording import Recording
from hpctrain.train.run_folder import open_run
from hpctrain.train.settings import Parts, Settings
from hpctrain.world import World

_log = logging.getLogger("hpctrain")

CHILDREN = "children"
"""Folder of the children's run folders, in that of the run."""


class Joined(nn.Module):
    """An encoder and a task's head: `model(*inputs)` is the head's of the encoder's."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the head makes of what the encoder makes of the inputs."""
        return self.head(self.encoder(*inputs, **options))


@dataclass(frozen=True)
class Tasks:
    """What is trained together.

    Attributes:
        names: of the tasks; children take them in turn.
        encoder: makes the encoder.
        kind: what it is made with, as plain JSON values.
        parts: makes model, data and loss of a task, by its number, with the encoder.
    """

    names: tuple[str, ...]
    encoder: Callable[..., nn.Module]
    kind: Mapping[str, Any]
    parts: Callable[[int, nn.Module], Parts]


class _Told(StopRequest):
    """A child is to end when it was told so, or when the root says that the run does."""

    def __init__(self, stop: StopRequest, shared: Shared) -> None:
        super().__init__()
        self._stop, self._shared = stop, shared

    @property
    def has_come(self) -> bool:
        return self._stop.has_come or self._shared.is_told_to_end

    @has_come.setter
    def has_come(self, value: bool) -> None:
        del value


class ChildTrainer(Trainer):
    """Trains encoder and head over the ranks of one child."""

    speaks = False
    _losses: Sequence[float] = ()
    """Of the steps of the present round."""
    _found: Mapping[str, float] = {}
    """Figures of the evaluation at its beginning."""
    _has_played = False

    @property
    def may_recover(self) -> bool:
        """A child that loses a rank is left out."""
        return False

    def _own_number(self) -> int:
        return self.world.numbers[self.world.rank]

    def _computing_ranks(self) -> Sequence[int]:
        engine = engine_of(self.world)
        assert isinstance(engine, PartEngine)
        return _computing(engine.whole.world, self.settings)

    def play(self, turn: Turn) -> None:
        """Take the steps of a round, or as many as are left of it."""
        end = int(turn.values["step"])
        if not self.is_within(turn.values):
            begin = end - int(turn.values["steps"])
            if self.step_number < begin and not self._has_played:
                turn.figures["note"] = (
                    f"joins at step {begin} with a head of step {self.step_number}, the newest "
                    "that it has a checkpoint of"
                )
            self.step_number = begin
            self.recording.figures.reported_at = self.step_number
            self._losses = []
            self._found = self.evaluate() if turn.values["evaluates"] else {}
        self._has_played = True
        while self.step_number < end and not self._stops:
            self.step()
            self._is_told_to_stop()
        self._report()
        turn.figures["loss"] = float(np.mean(self._losses)) if self._losses else math.nan
        if self._found:
            turn.figures["validation"] = self._found
        turn.is_cut = self.step_number < end
        if turn.values["saves"] and not turn.is_cut:
            self.save()
            self.finish_saving()

    def is_within(self, values: Mapping[str, Any]) -> bool:
        """Whether this child stands in the middle of a round, or at its end, where it was ended."""
        end = int(values["step"])
        return end - int(values["steps"]) < self.step_number <= end

    def leave(self) -> dict[str, float]:
        """The run is over: evaluate with the last encoder, save. Returns the figures."""
        figures, stops = {}, self._stops
        if not stops:
            figures = self.evaluate()
        if not stops or self._saved_at != self.step_number:
            self.save()
        self._close(is_finished=False)  # the whole run is, or is not
        return figures

    def _sum_figures(self) -> np.ndarray:
        sums = super()._sum_figures()
        self._losses = [*self._losses, *sums[:, 0].tolist()]
        return sums

    def _own_state(self) -> dict[str, Any]:
        told = {"losses": list(self._losses), "validation": self._found}
        return super()._own_state() | {"round": told}

    def _resume_exchange(self, state: Mapping[str, Any], ranks: int) -> None:
        super()._resume_exchange(state, ranks)
        if told := (state["own"] or {}).get("round"):
            self._losses, self._found = told["losses"], told["validation"]


class SharedTrainer:
    """Trains one encoder with many tasks. Construction and `run` are collective.

    Args:
        world: the ranks; rank 0 leads.
        tasks: what to train; the same on all ranks.
        settings: how.
        parent: folder of all runs of this job.
        facts: as of `Trainer`.
        chosen: as of `Trainer`.
        fresh: as of `Trainer`.
        stop: as of `Trainer`.
    """

    may_recover = False

    def __init__(
        self,
        world: World,
        tasks: Tasks,
        settings: Settings,
        *,
        parent: Path,
        facts: Mapping[str, Any],
        chosen: Path | None = None,
        fresh: bool = False,
        stop: StopRequest | None = None,
    ) -> None:
        self.world = world
        self.tasks = tasks
        self.settings = settings
        self._facts = facts
        self._stop = stop or StopRequest()
        self.shared = Shared(settings.shared, world=world)
        self.console = Console(speaks=world.is_root, line_s=settings.run.line_s)
        self.step_number = 0
        self._child: ChildTrainer | None = None
        self._saver: Saver | None = None
        control = engine_of(world).control
        Injection(settings.inject, world.rank, _computing(world, settings))  # or all refuse it
        self._opened = open_run(control, parent, facts, chosen, fresh, settings.train.steps)
        self.run_folder = self._opened.folder
        barrier_on(control, "run folder")  # the last that all ranks do together
        if self.shared.is_root:
            with _of_this_rank():
                self._prepare_to_lead()

    def run(self) -> dict[str, float]:
        """Train to the last round. Returns the last evaluation's figures, on the root of all tasks.

        Raises:
            StoppedError: on all ranks, after checkpoints, when any was told to end.
            TrainingError: on the root, when too few children are left.
        """
        with told_when_interrupted(self.world, self._farewell, self._stop), refused_exits():
            if not self.shared.is_root:
                return self._follow()
            with _of_this_rank():
                return self._lead()

    def show_sample(self) -> None:
        """No task is that of the root."""

    def _farewell(self) -> str:
        saver = self._saver or (self._child and self._child._saver)
        if saver:
            saver.wait(LAST_WRITE_S)
        return f"interrupted at step {self.step_number}: start the same command again to continue"

    # ------------------------------------------------------------------ the root

    def _prepare_to_lead(self) -> None:
        settings, shared = self.settings, self.shared
        train = settings.train
        self.encoder = self.tasks.encoder(**self.tasks.kind)
        self._control = engine_of(shared.world).control
        rate = float(settings.optimizer.get("lr", 1.0))
        self.recording = Recording(
            shared.world, settings, self._facts, self._opened, self.console, base_rate=rate
        )
        self._names = [self._name(number) for number in range(len(shared.children))]
        rounds = -(-train.steps // settings.shared.round_steps)
        try:
            loaded = load_newest(self._control, self.run_folder.checkpoints, ("model", "exchange"))
            if loaded:
                resume.restore_model(self.encoder, loaded[0]["model"])
        except BaseException:
            self.recording.abandon()
            raise
        self._rounds = shared.open(
            self.encoder,
            rounds,
            names=[f"{n} ({self._rank_of(k)})" for k, n in enumerate(self._names)],
            say=self._say,
            kind=dict(self.tasks.kind),
        )
        if loaded:
            self._rounds.load_state_dict(loaded[0]["exchange"])
            self.step_number = int(loaded[1]["step"])
            left = -(-(train.steps - self.step_number) // settings.shared.round_steps)
            self._rounds.rounds = self._rounds.number + max(0, left)  # as the job has them now
        self._saver = Saver(
            self._control,
            self.run_folder.checkpoints,
            settings.checkpoint,
            self.world.trace,
            self.step_number,
        )
        self._saved_at = self.step_number if loaded else -1
        self.recording.begin(self._control, self.step_number)
        self.console.say(
            f"one encoder of {self._rounds.server.target.numel():,} parameters, "
            f"{len(self._names)} child(ren) of {settings.shared.group} rank(s): "
            f"{', '.join(self._names)}; {self.world.library}; run folder {self.run_folder.path}"
        )
        if loaded:
            self.console.say(f"resumed at step {self.step_number}")

    def _name(self, child: int) -> str:
        """A child, by its number and task: that of its run folder too."""
        return f"{child:02d}-{self.tasks.names[child % len(self.tasks.names)]}"

    def _rank_of(self, child: int) -> str:
        return self.world.name_of(self.shared.children[child][0])

    def _say(self, text: str) -> None:
        _log.warning(text)

    def _lead(self) -> dict[str, float]:
        train, every = self.settings.train, self.settings.checkpoint.every
        if self._rounds.is_over:  # an earlier launch was ended between the last round and the end
            self.shared.gather(unless=self._is_told_to_stop)
        while not self._rounds.is_over:
            begun_s, begin = now_s(), self.step_number
            end = min(train.steps, begin + self.settings.shared.round_steps)
            self.world.position.step = end
            is_due = bool(every) and end // every > begin // every
            was_played = self.shared.play(
                unless=self._is_told_to_stop,
                step=end,
                steps=end - begin,
                saves=is_due,
                evaluates=self._evaluates(begin),
            )
            if not was_played:
                self._end_early()
            self.step_number = end
            self._record(begin, (now_s() - begun_s) / (end - begin))
            if is_due or self._rounds.is_over:
                self._save()
        self.recording.checkpoint(self.step_number, self._finish_saving())
        self.shared.end(stops=False, step=self.step_number)  # children put the last encoder in
        figures = self._validation(self.step_number, self._named(self._rounds.confirmed))
        self._close(is_finished=True)
        return figures

    def _evaluates(self, begin: int) -> bool:
        """Whether children evaluate at the beginning of a round, after so many steps."""
        every, steps = self.settings.train.eval_every, self.settings.shared.round_steps
        return bool(every) and begin > 0 and begin // every > max(0, begin - steps) // every

    def _is_told_to_stop(self) -> bool:
        return self._stop.has_come or self.shared.is_told_to_stop

    def _end_early(self) -> None:
        """Save, have the children save where they are, and leave the rest for another launch."""
        if self._saved_at != self.step_number:
            self._save()
        self.shared.end(stops=True, step=self.step_number)
        self._close(is_finished=False)
        raise _stopped(self.step_number, self.settings.train.steps)

    def _named(self, numbers: Iterable[int]) -> dict[str, Child]:
        """Children by their names."""
        return {self._names[n]: self._rounds.children[n] for n in numbers}

    def _record(self, begin: int, step_s: float) -> None:
        """Write down a round, which began after so many steps."""
        answers = self._named(self._rounds.answered)
        for name, child in answers.items():
            if note := child.figures.get("note"):
                self._say(f"{name} {note}")
        losses = {name: float(child.figures["loss"]) for name, child in answers.items()}
        known = [name for name, loss in losses.items() if not math.isnan(loss)]
        samples = sum(answers[name].samples for name in known)
        loss = math.nan
        if known:
            loss = sum(losses[name] * answers[name].samples for name in known) / samples
        self.recording.figures.pending.append(StepFigures(loss, math.nan, 0.0, step_s))
        self.recording.report(
            self.step_number,
            np.array([[loss, math.nan, 0.0, step_s]]),
            lambda step: {f"loss {name}": value for name, value in losses.items()},
        )
        self._validation(begin, answers)

    def _validation(self, step: int, children: Mapping[str, Child]) -> dict[str, float]:
        """Write down what children found with the encoder of after so many steps, if they did."""
        found = {
            f"{name} {key}": float(value)
            for name, child in children.items()
            for key, value in dict(child.figures.get("validation", {})).items()
        }
        losses = [value for key, value in found.items() if key.endswith(" loss")]
        if not losses:
            return {}
        figures = {"loss": sum(losses) / len(losses), **found}
        if not self.recording.has_evaluation(step):  # of a launch that ended in that round
            self.recording.evaluation(step, figures)
        return figures

    def _save(self) -> None:
        assert self._saver
        saved = self._saver.save(
            self.step_number,
            shared={"model": self.encoder.state_dict(), "exchange": self._rounds.state_dict()},
            own={},
            facts={"samples": self.step_number * self.settings.train.batch},
        )
        self._saved_at = self.step_number
        self.recording.checkpoint(self.step_number, saved)

    def _finish_saving(self) -> Saved | None:
        assert self._saver
        return self._saver.finish()

    def _close(self, is_finished: bool) -> None:
        self.world.position.phase = "closing"
        self.recording.checkpoint(self.step_number, self._finish_saving())
        self.console.finish()
        self.recording.close(is_finished, "shared")

    # ------------------------------------------------------------------ a child

    def _follow(self) -> dict[str, float]:
        shared = self.shared
        kind = shared.instruction()["kind"]
        encoder = self.tasks.encoder(**kind)
        settings = replace(
            self.settings,
            exchange=replace(self.settings.exchange, mode="allreduce"),
            checkpoint=replace(self.settings.checkpoint, keep=self.settings.checkpoint.keep + 2),
            seed=self.settings.seed + 1 + shared.child,
        )
        trainer: ChildTrainer | None = None
        told = _Told(self._stop, shared)

        def made(values: Mapping[str, Any]) -> ChildTrainer:
            nonlocal trainer
            if trainer is None:
                trainer = self._child = self._make_child(parts, settings, values, told)
            return trainer

        try:
            parts = self.tasks.parts(shared.child % len(self.tasks.names), encoder)
            samples = _samples_of(parts)
            for turn in shared.turns(
                encoder, samples, lambda values: made(values).is_within(values)
            ):
                made(turn.values).play(turn)
                if turn.is_cut:
                    shared.stop()
            assert shared.ended
            # If it is made only now it came too late for any round, or all are done.
            child, stops = made(shared.ended), bool(shared.ended["stops"])
            child._stops = stops
            if not stops:
                shared.take_last()
            figures = child.leave()
        except RankDiedError:
            raise
        except HpctrainError as error:
            return self._give_up(error)
        shared.goodbye(validation=figures)
        if stops:
            raise _stopped(child.step_number, self.settings.train.steps)
        return figures

    def _give_up(self, error: HpctrainError) -> dict[str, float]:
        """The others need not end because this child cannot go on."""
        self.shared.refuse(error.what)
        _log.error("%s: this child takes no part any more", error)
        self.shared.wait_for_end()
        return {}

    def _make_child(
        self, parts: Parts, settings: Settings, values: Mapping[str, Any], told: StopRequest
    ) -> ChildTrainer:
        """The trainer of this child, which goes on where it stood in this round."""
        folder = self.run_folder.path / CHILDREN / self._name(self.shared.child)
        return ChildTrainer(
            self.shared.world,
            parts,
            settings,
            parent=folder.parent,
            facts=self._facts,
            chosen=folder,
            stop=told,
            resumes_below=int(values["step"]) + 1,
        )


def _computing(world: World, settings: Settings) -> list[int]:
    """Ranks of the run that are not the root."""
    return [rank for ranks in settings.shared.children(world.size) for rank in ranks]


@contextmanager
def _of_this_rank() -> Iterator[None]:
    """What the root meets inside it meets alone: the children do not know, and are to end."""
    try:
        yield
    except StoppedError:
        raise
    except HpctrainError as error:
        error.everywhere = False
        raise


def _samples_of(parts: Parts) -> int:
    """How many samples a task's training data have; 1 where they do not tell."""
    try:
        return max(1, len(parts.train_data))  # type: ignore[arg-type]
    except TypeError:
        return 1


def _stopped(step: int, steps: int) -> StoppedError:
    return StoppedError(
        f"told to end: saved at step {step} of {steps}",
        fix="start the same command again to continue",
        everywhere=True,
    )
