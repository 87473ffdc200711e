"""Checkpoints as the training loop sees them: begun, waited for, and what went wrong raised.

`Saver.save` copies the state and returns; `writer` does the rest on a thread. At most one is in the
making. `finish`, with which the next save begins, brings all ranks together, so that an error is
raised on all of them.
"""

from __future__ import annotations

import secrets
import shutil
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpctrain.comm.channel import Channel
from hpctrain.comm.collect import all_gather, broadcast
from hpctrain.errors import CheckpointError
from hpctrain.trace import COMPUTE, Trace, now_s
from hpctrain.train.checkpoint.config import CheckpointConfig
from hpctrain.train.checkpoint.copies import Copies
from hpctrain.train.checkpoint.format import UnreadableError
from hpctrain.train.checkpoint.manifest import is_whole, step_of
from hpctrain.train.checkpoint.store import complete_names, name_of
from hpctrain.train.checkpoint.writer import LOOK_S, Making, Part, Writer
from hpctrain.train.device import moved

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written: its step, and what it cost this rank."""

    step: int
    stall_s: float
    """For how long training stood still: for copies, and in the next step for their end."""
    written_s: float
    """From the save to the moment in which it could be seen."""


class Saver:
    """Writes the checkpoints of a run. Construction is collective.

    Args:
        channel: over all ranks that write together.
        folder: of all checkpoints; visible to all ranks.
        config: how.
        trace: receives what it costs.
        resumed_at: the step from which this run goes on; later checkpoints were passed over.
    """

    def __init__(
        self,
        channel: Channel,
        folder: Path,
        config: CheckpointConfig,
        trace: Trace,
        resumed_at: int = 0,
    ) -> None:
        self._channel = channel
        self._folder = folder
        self._trace = trace
        self._config = config
        self._take_on_writer()
        self._token = broadcast(channel, secrets.token_hex(4), label="checkpoints")
        self._gone_back_from = frozenset(
            n for n in complete_names(folder) if step_of(n) > resumed_at
        )
        self._begun = 0
        self._reads_back = True
        self._making: Making | None = None

    def save(
        self,
        step: int,
        shared: Mapping[str, Any],
        own: Mapping[str, Any],
        facts: Mapping[str, Any],
        optimizer: torch.optim.Optimizer | None = None,
        updates_in_forward: bool = False,
    ) -> Saved | None:
        """Begin a checkpoint; it is visible some time later. Collective.

        The first one of a launch is read back before it becomes visible.

        Args:
            step: number of steps done.
            shared: state that is the same on all ranks, one file a key; rank 0 writes it.
            own: state of this rank.
            facts: plain values for the manifest.
            optimizer: its state is shared, too. Its next step waits for the end of the copy.
            updates_in_forward: whether it takes parts of its steps elsewhere.

        Returns:
            What is known of the one before, as `finish`; of this one where saving is synchronous.

        Raises:
            CheckpointError: on every rank, when the one before could not be written.
            UnreadableError: on every rank, when it could be written and not be read back.
        """
        called_s = now_s()
        before = self.finish()
        self._begun += 1
        self._making = making = Making(
            step=step,
            side=self._folder / f".{name_of(step)}.{self._token}-{self._begun}.partial",
            facts=dict(facts),
            reads_back=self._reads_back,
            gone_back_from=self._gone_back_from,
            copies=self._copies,
            on_thread=self._config.asynchronous,
        )
        if self._channel.rank:
            shared, optimizer = {}, None
        try:
            self._take(making, shared, own, optimizer, updates_in_forward)
        except Exception as error:
            making.fail(f"{type(error).__name__}: {error}")
        if not self._config.asynchronous:
            self._writer.write(making)
            return self.finish()
        making.stall_s = now_s() - called_s
        self._writer.start(making)
        return before

    def finish(self) -> Saved | None:
        """Wait until the checkpoint in the making is visible. Collective.

        Returns:
            What it cost; None without one.

        Raises:
            CheckpointError: on every rank, when it could not be written; older ones are intact.
            UnreadableError: on every rank, when it could be written and not be read back.
        """
        making = self._making
        if making is None:
            return None
        channel = self._channel
        making.written.wait()
        making.everyone = all_gather(channel, making.part, label="checkpoint written")
        making.known.set()
        last = ""
        if channel.rank == 0:
            if not making.on_thread:
                self._writer.complete(making)
            making.over.wait()
            if making.outcome.failure:
                shutil.rmtree(making.side, ignore_errors=True)
                last = self._last_good()
        outcome, last = broadcast(channel, (making.outcome, last), label="checkpoint")
        self._forget(making)
        if outcome.failure:
            raise self._error(making.step, outcome, last)
        self._reads_back = False
        self._gone_back_from = frozenset()
        written_s = (making.ended_s or now_s()) - making.begun_s
        return Saved(making.step, making.stall_s if making.on_thread else written_s, written_s)

    def before_change(self) -> None:
        """The optimizer's state is about to change otherwise than by its step. Not collective."""
        if self._making and self._making.hooks:
            self._wait_for_copy(self._making)()

    def wait(self, longest_s: float) -> bool:
        """Wait for the checkpoint in the making, but not for other ranks' main threads.

        Not collective. For a rank that is about to end all of them.

        Returns:
            Whether there is none any more, as far as this rank can see.
        """
        making = self._making
        until_s = now_s() + longest_s
        if making is None:
            return True
        if not making.over.wait(longest_s):
            return False
        while self._channel.rank and not making.part.failure and making.side.exists():
            if now_s() > until_s:
                return False
            time.sleep(LOOK_S)
        return True

    def let_go(self, longest_s: float) -> None:
        """Wait for the checkpoint in the making, and forget it however it ended. Not collective.

        For ranks that go on without others, which may never finish theirs.
        """
        making = self._making
        if making is None:
            return
        if not self.wait(longest_s):
            making.everyone = [Part(failure="given up")]
            making.known.set()
            if not making.over.wait(longest_s):  # its thread has still to do with it
                self._take_on_writer()
        self._forget(making)

    def _take_on_writer(self) -> None:
        channel = self._channel
        self._writer = Writer(channel.rank, channel.size, self._folder, self._config, self._trace)
        self._copies = Copies()
        weakref.finalize(self, self._writer.stop).atexit = False

    def _forget(self, making: Making) -> None:
        for hook in making.hooks:
            hook.remove()
        self._making = None

    def _take(
        self,
        making: Making,
        shared: Mapping[str, Any],
        own: Mapping[str, Any],
        optimizer: torch.optim.Optimizer | None,
        updates_in_forward: bool,
    ) -> None:
        """Copy what the program may change before it is written."""
        held = {"optimizer": optimizer.state_dict()} if optimizer else {}
        if not self._config.asynchronous:
            making.shared = {key: moved(value, _HOST) for key, value in {**shared, **held}.items()}
            making.own = moved(own, _HOST)
            return
        if optimizer and not updates_in_forward and _is_on_host(optimizer):
            making.held, held = held, {}
            wait = self._wait_for_copy(making)
            making.hooks = [
                optimizer.register_step_pre_hook(wait),
                optimizer.register_load_state_dict_pre_hook(wait),
            ]
        for key, value in {**shared, **held}.items():
            making.shared[key] = self._copies.of(key, value, is_dense=key == "model")
        making.own = self._copies.of("own", own)

    def _wait_for_copy(self, making: Making) -> Callable[..., None]:
        """What the optimizer calls before it changes its state."""

        def wait(*_: Any) -> None:
            if not making.copied.is_set():
                begun_s = now_s()
                making.copied.wait()
                ended_s = now_s()
                self._trace.add(COMPUTE, "wait for the copy", begun_s, ended_s)
                making.stall_s += ended_s - begun_s
            for hook in making.hooks:
                hook.remove()
            making.hooks = []

        return wait

    def _last_good(self) -> str:
        names = complete_names(self._folder)
        return next((name for name in names if is_whole(self._folder / name)), "")

    def _error(self, step: int, outcome: Part, last: str) -> CheckpointError:
        if outcome.is_unreadable:
            return UnreadableError(
                "the checkpoint could be written, but not be read again",
                value=outcome.failure,
                allowed="tensors, numbers, text, and lists and dicts of them",
                fix="store it as one of these, in get_extra_state() for example",
                everywhere=True,
            )
        left = f"the last good one is {last}" if last else "there is no other one"
        return CheckpointError(
            f"the checkpoint of step {step} could not be written; {left}",
            value=outcome.failure,
            where=str(self._folder),
            fix="free space or make the folder writable, then run the job again: it resumes",
            everywhere=True,
        )


def _is_on_host(optimizer: torch.optim.Optimizer) -> bool:
    groups = optimizer.param_groups
    return all(parameter.device.type == "cpu" for group in groups for parameter in group["params"])
