"""What a run leaves behind while it trains, and what users see: figures, logs, trace, facts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from hpctrain.comm.channel import Channel
from hpctrain.comm.measure import clock_offset
from hpctrain.records import StepMark
from hpctrain.trace import now_s
from hpctrain.train.checkpoint.saver import Saved
from hpctrain.train.console import Console, Progress, RankLog
from hpctrain.train.metrics import Figures, Metrics, StepFigures
from hpctrain.train.run_folder import OpenedRun, files_of
from hpctrain.train.settings import Settings
from hpctrain.train.standing import summed
from hpctrain.world import World

_log = logging.getLogger("hpctrain")

MoreFigures = Callable[[int], Mapping[str, float]]
"""What else is written down of a step."""


class Recording:
    """One rank's records of a run. The root's are the run's: metrics.jsonl, run.json, the console.

    Nothing is recorded before `begin`.

    Args:
        world: the ranks.
        settings: of the run.
        facts: of the job, for run.json.
        opened: the run folder.
        console: shows progress.
        base_rate: learning rate that the schedule multiplies.

    Attributes:
        opened: the run folder; another one of the ranks may come to hold its lock.
        figures: of the last steps, once it has begun.
    """

    def __init__(
        self,
        world: World,
        settings: Settings,
        facts: Mapping[str, Any],
        opened: OpenedRun,
        console: Console,
        base_rate: float,
    ) -> None:
        self.opened = opened
        self._world = world
        self._settings = settings
        self._facts = facts
        self._folder = opened.folder
        self._console = console
        self._base_rate = base_rate
        self._metrics: Metrics | None = None
        self._mark: StepMark | None = None
        self._open_log()
        for note in opened.notes:
            _log.warning(note)

    # ------------------------------------------------------------------ sessions

    def begin(self, control: Channel, step: int) -> None:
        """Begin with a run that has done so many steps. Collective."""
        self.figures = Figures(step)
        self._begun_s, self._begun_at = now_s(), step
        self._begin_session(control, step)

    def hello(self, parameters: int, samples: int | None) -> None:
        """Say what is about to be trained, and what the user should know of it.

        Args:
            parameters: number of the model's parameters.
            samples: number of samples of the training data, if it has one.
        """
        world, train = self._world, self._settings.train
        left = train.steps - self._begun_at
        _log.info("%d parameters, %d of %d steps to go", parameters, left, train.steps)
        if world.is_root and samples is not None and samples < train.batch:
            _log.warning(
                "a batch of %d takes samples of the %d several times", train.batch, samples
            )
        if world.is_root and world.split_machines:
            _log.warning(
                "%s: the MPI library says that ranks of one machine share no memory, so that "
                "gradients between them travel as messages; another launcher may help",
                ", ".join(world.split_machines),
            )
        self._console.say(
            f"{parameters:,} parameters, {world.size} rank(s) on {len(world.nodes)} node(s), "
            f"{world.library}; run folder {self._folder.path}"
        )

    def begin_anew(self, world: World, control: Channel, step: int) -> bool:
        """Go on in a world of the ranks that are left. Collective.

        Returns:
            On the root: whether the evaluation after this step is recorded.
        """
        self._world = world
        self._console.finish()
        self._console.speaks = world.is_root
        self._log.close()
        self._open_log()
        if world.is_root and self.opened.lock is None:
            self.opened = self.opened.taken_over()
        self._begin_session(control, step)
        if self._metrics is None:
            return False
        reported = self.figures.reported
        for number, row in enumerate(reported, self.figures.reported_at - len(reported) + 1):
            if number not in self._metrics.recorded:
                self._write_step(number, summed(row, world.size), {})
        return step in self._metrics.evaluated

    def abandon(self) -> None:
        """The run has not begun after all."""
        self.opened.release()
        self._log.close()

    def close(self, is_finished: bool, progress: str) -> None:
        """The session is over.

        Args:
            is_finished: whether the run is.
            progress: how blocks were moved.
        """
        self._world.trace.close()
        self._log.close()
        if self._mark:
            self._mark.close()
        if self._metrics:
            self._metrics.close()
            self._folder.write_facts(
                finished=is_finished, seconds=now_s() - self._begun_s, progress=progress
            )
        self.opened.release()

    # ------------------------------------------------------------------ what happens

    def step_begins(self, step: int) -> None:
        """Write down where the run is, for who finds it dead."""
        if self._mark:
            self._mark.set(step)

    def step_ended(self, step: int, late: int = 0) -> None:
        """Trace no more than was asked for.

        Args:
            step: the number of steps done.
            late: after how many more steps this rank knows all of a step.
        """
        if step >= self._traced_until + late:
            self._world.trace.active = False

    def report(self, step: int, sums: np.ndarray, more: MoreFigures) -> None:
        """Record the last steps, and show how far the run is.

        Args:
            step: the last one.
            sums: a row of `StepFigures` for each step, added up over ranks.
            more: figures of a step.
        """
        self.figures.report(step, sums, self._world.size)
        self._world.trace.flush()
        if not self._metrics:
            return
        for number, row in enumerate(sums, step - len(sums) + 1):
            self._write_step(number, StepFigures(*map(float, row)), more(number))
        self._metrics.flush()
        mean = StepFigures(*map(float, sums.mean(axis=0)))
        steps = self._settings.train.steps
        self._console.progress(
            Progress(
                step=step,
                steps=steps,
                loss=mean.loss,
                samples_per_s=self._samples_per_s(mean),
                exposed=mean.exposed_s / mean.step_s,
                left_s=(now_s() - self._begun_s) / (step - self._begun_at) * (steps - step),
            )
        )

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Record and show the figures of an evaluation."""
        self._write(step, validation=dict(figures))
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self._console.say(f"step {step}  validation {shown}")

    def checkpoint(self, step: int, saved: Saved | None) -> None:
        """Record what a checkpoint cost, if there is one."""
        if saved:
            self._write(step, checkpoint=asdict(saved))

    def has_evaluation(self, step: int) -> bool:
        """On the root: whether an earlier launch has recorded that after this step."""
        return self._metrics is not None and step in self._metrics.evaluated

    def recovery(self, step: int, took_s: float, text: str) -> None:
        """Record and tell that ranks died, and how long it took to go on without them."""
        self._write(step, recovery={"recovery_s": took_s, "ranks": self._world.size})
        _log.warning(text)

    # ------------------------------------------------------------------ files

    def _open_log(self) -> None:
        world = self._world
        with files_of(self._folder, world.name_of(world.rank)):
            self._log = RankLog(self._folder.log(world.rank), world, self._console)

    def _begin_session(self, control: Channel, step: int) -> None:
        world, run = self._world, self._settings.run
        with files_of(self._folder, world.name_of(world.rank)):
            if world.is_root:
                if self._metrics:
                    self._metrics.close()
                at_end = step == self._settings.train.steps  # which is evaluated again
                self._mark = self._mark or StepMark(self._folder.path)
                self._folder.begin_session({**self._facts, **self._surroundings(step)})
                self._metrics = Metrics(self._folder, run.tensorboard, step, at_end)
            if run.trace_steps:
                world.trace.open(self._folder.trace(world.rank), world.rank)
        world.trace.offset_s = clock_offset(control)
        self._traced_until = step + run.trace_steps

    def _surroundings(self, step: int) -> dict[str, Any]:
        world = self._world
        return {
            "ranks": world.size,
            "nodes": [world.seats[ranks[0]].host for ranks in world.nodes],
            "mpi": world.library,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "resumed_at": step,
        }

    def _write(self, step: int, **values: Any) -> None:
        if self._metrics:
            self._metrics.write(step, **values)
            self._metrics.flush()

    def _write_step(self, step: int, total: StepFigures, more: Mapping[str, float]) -> None:
        """The figures of a step, added up over ranks."""
        assert self._metrics
        ranks, steps = self._world.size, self._settings.train.steps
        self._metrics.write(
            step,
            loss=total.loss,
            gradient_norm=total.gradient_norm / ranks,
            rate=self._base_rate * self._settings.schedule.factor(step - 1, steps),
            samples_per_s=self._samples_per_s(total),
            step_s=total.step_s / ranks,
            exposed_s=total.exposed_s / ranks,
            **more,
        )

    def _samples_per_s(self, total: StepFigures) -> float:
        return self._settings.train.batch * self._world.size / total.step_s
