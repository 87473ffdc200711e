"""Steps on the gradient of all ranks in the same iteration, as a run of late ones begins with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hpctrain.comm.channel import Channel
from hpctrain.comm.reducer import ReduceOptions
from hpctrain.grad.flat import dtype_of
from hpctrain.grad.periods.averaging import Averager
from hpctrain.grad.periods.late import Check, LateGradients
from hpctrain.grad.periods.method import Method
from hpctrain.trace import now_s


class Together:
    """Takes the optimizer's steps with all ranks at once. Construction is collective.

    Args:
        channel: of the ranks, and of this one alone.
        parameters: what is trained.
        optimizer: updates it.
        options: how gradients are summed.
        check: asked before each step.
    """

    def __init__(
        self,
        channel: Channel,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        options: ReduceOptions,
        check: Check,
    ) -> None:
        self._gradients = LateGradients(Method(), parameters, optimizer, check)
        count = LateGradients.count(parameters)
        self._averager = Averager(channel, count, dtype_of(parameters), options)

    def step(self, iteration: int) -> float:
        """Exchange gradients and take a step. Returns how long it waited for the wire."""
        self._gradients.capture(self._averager.tensor)
        begun_s = now_s()
        self._averager.post(f"gradients of iteration {iteration}")
        mean = self._averager.wait()
        waited_s = now_s() - begun_s
        self._gradients.pull(mean)
        return waited_s

    @property
    def sent_bytes(self) -> int:
        """Of messages of this rank so far; see `Reducer.sent_bytes`."""
        return self._averager.sent_bytes
