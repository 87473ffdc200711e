"""How parameters take in what others have told: arithmetic on flat tensors.

All ranks hold the same *anchor*, the parameters as all ranks together have made them, and each its
own *local* parameters, which are ahead of it. The change that a rank tells is what its local
parameters were ahead when they were captured. The mean change moves the anchor, by an outer
optimizer; a merge says what that does to the local parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hpctrain.grad.flat import Flat
from hpctrain.grad.periods.method import Method

ADAM_DECAY = 0.99
ADAM_FLOOR = 1e-3
"""As FedAdam's (Reddi et al., ICLR 2021), which has no bias correction: the mean of squares begins
at the square of the floor.

Sums and products are taken one by one here: fused, their bits would depend on the processor."""


class Outer:
    """The outer optimizer of one fragment. It moves the anchor by the mean change.

    Args:
        method: says which.
        anchor: flat, moved in place.
    """

    def __init__(self, method: Method, anchor: torch.Tensor) -> None:
        self._method = method
        self._anchor = anchor
        has_momentum = method.outer_momentum > 0 or method.outer == "adam"
        self.momentum = torch.zeros_like(anchor) if has_momentum else None
        self.squares = torch.empty_like(anchor) if method.outer == "adam" else None
        self.begin_anew()

    def begin_anew(self) -> None:
        """No step has been taken."""
        if self.momentum is not None:
            self.momentum.zero_()
        if self.squares is not None:
            self.squares.fill_(ADAM_FLOOR**2)

    def step(self, change: torch.Tensor) -> None:
        """Take one step.

        Args:
            change: mean over ranks; overwritten.
        """
        method, momentum = self._method, self.momentum
        if self.squares is not None and momentum is not None:
            self.squares.mul_(ADAM_DECAY).add_(change * change * (1 - ADAM_DECAY))
            momentum.mul_(method.outer_momentum).add_(change * (1 - method.outer_momentum))
            torch.div(momentum, torch.sqrt(self.squares).add_(ADAM_FLOOR), out=change)
        elif momentum is not None:
            momentum.mul_(method.outer_momentum).add_(change)
            if method.outer_clip:
                momentum.clamp_(-method.outer_clip, method.outer_clip)
            if method.outer == "nesterov":
                change.add_(momentum * method.outer_momentum)
            else:
                change.copy_(momentum)
        self._anchor.add_(change.mul_(method.outer_rate))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its state, for checkpoints; loaded by copying into them."""
        named = {"momentum": self.momentum, "squares": self.squares}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


class _Eager:
    """With merge = "eager": what of an exchange is taken in before and after it has come.

    Attributes:
        told: this rank's share in what is on the wire.
        missing: what the others have told that has come and is not taken in.
        has_come: one element, whether there is any.
    """

    def __init__(self, anchor: Flat) -> None:
        self.told = anchor.again().tensor
        self.missing = anchor.again().tensor
        self.has_come = torch.zeros(1)


class Changes:
    """One fragment whose change is sent.

    Args:
        method: how.
        local: this rank's own parameters, which are changed in place.
        ranks: how many tell their changes.
    """

    def __init__(self, method: Method, local: Sequence[torch.Tensor], ranks: int) -> None:
        self._method = method
        self._local = local
        self._ranks = ranks
        self.anchor = Flat(local)
        self.anchor.gather(local)
        self._now = self.anchor.again()
        """The local parameters, for the moment."""
        self._outer = Outer(method, self.anchor.tensor)
        corrects = method.merge == "correct" and method.pull_lag > 0
        self._captured = self.anchor.again().tensor if corrects else None
        """The local parameters when they were captured."""
        self._eager = _Eager(self.anchor) if method.merge == "eager" else None

    def capture(self, change: torch.Tensor) -> None:
        """Write what is to be told.

        Args:
            change: flat; receives it.
        """
        self._now.gather(self._local)
        torch.sub(self._now.tensor, self.anchor.tensor, out=change)
        if self._captured is not None:
            self._captured.copy_(self._now.tensor)
        if self._method.merge == "replace" and self._method.pull_lag:
            self.anchor.scatter(self._local)  # what is told now is not to be told once more
        if self._eager:
            torch.mul(change, 1 / self._ranks, out=self._eager.told)
            self._outer.step(self._eager.missing.add_(self._eager.told))
            self._eager.missing.zero_()
            self._eager.has_come.zero_()
            self.anchor.scatter(self._local)

    def pull(self, mean: torch.Tensor, is_last: bool = False) -> None:
        """Take in what has come.

        Args:
            mean: flat; over ranks, of what was captured last; overwritten.
            is_last: at the end of a run, where nothing else is on its way: local steps since the
                capture are not given up, as a merge might.
        """
        if self._eager:
            torch.sub(mean, self._eager.told, out=self._eager.missing)
            self._eager.has_come.fill_(1)
            return
        now = self._now.tensor
        if is_last and self._method.merge == "replace" and self._method.pull_lag:
            self._now.gather(self._local)
            now.sub_(self.anchor.tensor)
            self._outer.step(mean)
            now.add_(self.anchor.tensor)
            self._now.scatter(self._local)
            return
        self._outer.step(mean)
        if self._captured is not None:
            self._now.gather(self._local)
            now.sub_(self._captured).add_(self.anchor.tensor)
            self._now.scatter(self._local)
        elif self._method.merge == "mix":
            self._now.gather(self._local)
            now.mul_(self._method.mix).add_(self.anchor.tensor * (1 - self._method.mix))
            self._now.scatter(self._local)
        else:
            self.anchor.scatter(self._local)

    def begin_anew(self) -> None:
        """The local parameters are what all ranks agree on, and nothing has been on the wire."""
        for tensor in self.tensors().values():
            tensor.zero_()
        self._outer.begin_anew()
        self.anchor.gather(self._local)

    def ahead(self) -> torch.Tensor:
        """What is to be averaged at the end, when nothing is on the wire."""
        self._now.gather(self._local)
        own = self._now.tensor - self.anchor.tensor
        if not self._eager:
            return own
        if self._eager.has_come:
            self._outer.step(self._eager.missing)
            self._eager.missing.zero_()
            self._eager.has_come.zero_()
        return own.add_(self.anchor.tensor)  # each rank has an anchor of its own

    def agree(self, mean: torch.Tensor) -> None:
        """Take the mean of what all ranks were ahead: they are all the same afterwards."""
        if self._eager:
            self.anchor.tensor.copy_(mean)
        else:
            self.anchor.tensor.add_(mean)
        self.anchor.scatter(self._local)

    @property
    def scratch(self) -> list[torch.Tensor]:
        """Memory that has no state."""
        return [self._now.tensor]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its state, for checkpoints; loaded by copying into them."""
        named = {"anchor": self.anchor.tensor}
        if self._captured is not None:
            named["captured"] = self._captured
        return named | (vars(self._eager) if self._eager else {}) | self._outer.tensors()


def compensate(
    gradient: torch.Tensor, now: torch.Tensor, then: torch.Tensor, weight: float
) -> None:
    """Correct a late gradient to first order, with its square for the Hessian (Zheng et al., 2017).

    Args:
        gradient: at the parameters `then`; becomes an estimate of that at `now`.
        now: the parameters that it is applied to.
        then: those that it was computed at.
        weight: of the correction.
    """
    gradient.add_(gradient * gradient * (now - then) * weight)
