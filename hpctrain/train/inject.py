"""Stragglers and faults on purpose, the same in every exchange mode: `[inject]` of a job file.

Steps are counted from 1, as in all that users see. What is slowed down is what a rank computes,
never what it waits for: a sleep of (factor - 1) times as long follows the work itself.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields

import numpy as np
import torch
from torch import nn

from hpctrain.config import LONGEST_S, check, option
from hpctrain.errors import JobError, shown
from hpctrain.trace import now_s
from hpctrain.world import FORWARD_S

_log = logging.getLogger("hpctrain")

_USES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "none": ((), ()),
    "persistent": (("ranks", "factor"), ()),
    "rotating": (("factor",), ("ranks", "every")),
    "bernoulli": (("factor", "probability"), ("ranks", "seed")),
    "exponential": (("mean",), ("ranks", "seed")),
    "stall": (("ranks", "step", "stall_s"), ()),
    "kill": (("ranks", "step"), ()),
}
"""Of each kind, the fields that it needs and those that it may have."""

_SLICE_S = 5e-4
"""A sleep that may end early asks this often."""
_LEAST_SLEEP_S = 2e-4
"""Shorter sleeps of a backward are put together: the kernel adds some 60 us to each."""


@dataclass(frozen=True, kw_only=True)
class InjectConfig:
    """Stragglers and faults, to test a job with."""

    kind: str = option("none", choices=tuple(_USES))
    """Which ranks are slow when, stand still, or are killed; see docs/job-file.md."""
    ranks: list[int] = option([])
    """Ranks that are struck, of those that compute; with rotating, bernoulli and exponential all of
    them if it is empty."""
    factor: float | None = option(None, minimum=1)
    """How many times as long a slow rank computes; for persistent, rotating and bernoulli."""
    every: int = option(1, minimum=1)
    """Steps for which a rank is the slow one before the next rank is; for rotating."""
    probability: float | None = option(None, minimum=0, maximum=1)
    """With which each rank is slow in each step; for bernoulli."""
    mean: float | None = option(None, minimum=0)
    """Mean of what an exponential distribution adds to each rank's factor of 1 in each step; for
    exponential."""
    step: int | None = option(None, minimum=1)
    """Step, counted from 1, in the middle of which ranks are struck; for stall and kill."""
    stall_s: float | None = option(None, above=0, maximum=LONGEST_S)
    """How long ranks stand still; for stall."""
    seed: int = option(0, minimum=0)
    """Of what is random about it; for bernoulli and exponential."""

    def __post_init__(self) -> None:
        check(self)
        needed, optional = _USES[self.kind]
        defaults = {f.name: [] if f.default is MISSING else f.default for f in fields(self)}
        given = [n for n, unset in defaults.items() if n != "kind" and getattr(self, n) != unset]
        mistakes = [
            f"{name} is missing; kind = {self.kind!r} needs it"
            for name in needed
            if name not in given
        ]
        mistakes += [
            f"{name} does nothing with kind = {self.kind!r}, "
            f"which uses {', '.join(needed + optional) or 'no other key'}"
            for name in given
            if name not in needed + optional
        ]
        are_ranks = all(type(rank) is int and rank >= 0 for rank in self.ranks)
        if not are_ranks or len(set(self.ranks)) < len(self.ranks):
            got = shown(self.ranks)
            mistakes.append(f"ranks: got {got}; allowed: integers from 0 on, none twice")
        if mistakes:
            raise JobError("; ".join(mistakes))


class Injection:
    """What one rank suffers. Not collective, but for the errors of its construction.

    Args:
        config: the same on all ranks.
        rank: this rank.
        ranks: those that compute, and may be struck.
        clock: seconds of this rank's own work; should stand still while it waits for others.
        sleep: of the main thread.

    Attributes:
        strikes: whether `strike` may do anything. A resumed session sets it to false, or each
            would be ended at the same step again.

    Raises:
        JobError: the job names ranks that do not exist or do not compute.
    """

    def __init__(
        self,
        config: InjectConfig,
        rank: int,
        ranks: Sequence[int],
        *,
        clock: Callable[[], float] = now_s,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        missing = [named for named in config.ranks if named not in ranks]
        if missing:
            raise JobError(
                "inject.ranks names ranks that compute nothing in this run",
                value=missing,
                allowed=f"{min(ranks)} to {max(ranks)}" if len(ranks) > 1 else f"{ranks[0]}",
                fix="start more ranks, or change inject.ranks",
                everywhere=True,
            )
        self.config = config
        self.strikes = True
        self._has_struck = False
        self._rank = rank
        self._ranks = tuple(config.ranks or ranks)
        self._clock = clock
        self._sleep = sleep
        self._extra = 0.0  # factor - 1 of the backward that is running
        self._unless: Callable[[], bool] | None = None
        self._worked_until_s = 0.0
        self._owed_s = 0.0

    # ------------------------------------------------------------------ slow ranks

    def factor(self, step: int) -> float:
        """How many times as long this rank computes in a step; at least 1.

        Depends on the configuration, the step and the rank alone: it is the same in a resumed run,
        in any mode and, but for a `rotating` over all ranks, with any number of ranks.
        """
        config, is_listed = self.config, self._rank in self._ranks
        if config.kind == "none" or not is_listed:
            return 1.0
        if config.kind == "rotating":
            turn = (step - 1) // config.every % len(self._ranks)
            is_slow = self._ranks[turn] == self._rank
        elif config.kind == "bernoulli":
            assert config.probability is not None
            is_slow = self._uniform(step) < config.probability
        elif config.kind == "exponential":
            assert config.mean is not None
            return 1.0 - config.mean * math.log1p(-self._uniform(step))
        else:
            is_slow = config.kind == "persistent"
        return (config.factor or 1.0) if is_slow else 1.0

    def _uniform(self, step: int) -> float:
        """A random number below 1 that belongs to seed, step and rank."""
        key = np.random.SeedSequence(self.config.seed, spawn_key=(step, self._rank))
        return float(np.random.Generator(np.random.Philox(key)).random())

    @contextmanager
    def slowed(self, step: int, unless: Callable[[], bool] | None = None) -> Iterator[None]:
        """Around computing that nobody sees before its end, as the forward and backward of a block.

        Args:
            step: counted from 1.
            unless: asked every half a millisecond of the sleep; ends it when it returns true.
        """
        extra = self.factor(step) - 1
        if not extra:
            yield
            return
        begun_s = self._clock()
        yield
        self._rest(extra * (self._clock() - begun_s), unless)

    @contextmanager
    def slowed_backward(
        self, step: int, unless: Callable[[], bool] | None = None
    ) -> Iterator[None]:
        """Around a backward whose gradients go on the wire as they come.

        A sleep after it would come too late to keep the other ranks waiting, and one before it
        would have to guess how long it takes. So each gradient of `follow` arrives late, by what
        the computing of it has taken. `step` and `unless` are as for `slowed`.
        """
        self._extra, self._unless = self.factor(step) - 1, unless
        if self._extra:
            self._worked_until_s = self._clock()
        try:
            yield
        finally:
            self._extra = 0.0

    def follow(self, parameters: Iterable[nn.Parameter]) -> None:
        """Have `slowed_backward` delay the gradients of these.

        To be called before they are wrapped in DataParallel: hooks run in the order in which they
        were registered, and the exchange is to see a gradient after the sleep.
        """
        if self.config.kind in ("none", "stall", "kill") or self._rank not in self._ranks:
            return
        this = weakref.ref(self)  # the garbage collector does not see into a parameter's hooks

        def delay(_: torch.Tensor) -> None:
            injection = this()
            if injection is not None:
                injection._delay()

        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(delay)

    def _delay(self) -> None:
        """A gradient has been computed: sleep for the work since the one before it."""
        if not self._extra:
            return
        self._owed_s += self._extra * (self._clock() - self._worked_until_s)
        if self._owed_s >= _LEAST_SLEEP_S:
            self._owed_s -= self._rest(self._owed_s, self._unless)
        self._worked_until_s = self._clock()

    def _rest(self, seconds: float, unless: Callable[[], bool] | None = None) -> float:
        """Sleep; returns for how long it was."""
        begun_s = self._clock()
        while (left_s := seconds - (self._clock() - begun_s)) > 0:
            if unless is None:
                self._sleep(left_s)
            elif unless():
                break
            else:
                self._sleep(min(left_s, _SLICE_S))
        return self._clock() - begun_s

    # ------------------------------------------------------------------ faults

    def strike(self, step: int, block: int = 0, blocks: int = 1) -> None:
        """Stand still or die, if it is this rank's turn. To be called before each backward.

        Args:
            step: counted from 1.
            block: number of the micro-batch or data block, counted from 0 in each step.
            blocks: how many the rank has in this step. With several, the first one is done when it
                is struck; if it computes no second one, it is struck in its next step.
        """
        config = self.config
        if self._has_struck or self._rank not in self._ranks or not self.strikes:
            return
        if config.step is None or step < config.step:
            return
        if step == config.step and block != min(1, blocks - 1):
            return
        self._has_struck = True
        if config.kind == "stall":
            assert config.stall_s is not None
            _log.info("[inject] stands still for %g s", config.stall_s)
            self._rest(config.stall_s)
            return
        line = f"hpctrain: [inject] kills rank {self._rank} in step {step}"
        _log.warning(line, extra={"shown": True})
        os.write(2, f"{line}\n".encode())
        self._sleep(FORWARD_S)
        os.kill(os.getpid(), signal.SIGKILL)

    # ------------------------------------------------------------------ what the user is told

    @property
    def text(self) -> str:
        """What is injected, in one line; empty if nothing is."""
        config = self.config
        who = _named(config.ranks) if config.ranks else "every rank"
        slower = f"inject: computing takes {config.factor} times as long on {who}"
        again = "" if self.strikes else "; not again in a resumed run"
        return {
            "none": "",
            "persistent": slower,
            "rotating": f"{slower} in turn, {config.every} step(s) each",
            "bernoulli": f"{slower} with probability {config.probability}, seed {config.seed}",
            "exponential": f"inject: computing takes 1 + Exp({config.mean}) times as long "
            f"on {who}, seed {config.seed}",
            "stall": f"inject: {who} to stand still for {config.stall_s} s "
            f"in step {config.step}{again}",
            "kill": f"inject: {who} to be killed in step {config.step}{again}",
        }[config.kind]


def _named(ranks: Sequence[int]) -> str:
    """`rank 1`, or `ranks 1, 3`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
