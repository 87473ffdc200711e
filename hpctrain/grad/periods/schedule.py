"""Which fragment is captured, pushed and pulled after which iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, pairwise

from hpctrain.grad.periods.method import Method


class Act(Enum):
    """What is done with a fragment after an iteration."""

    PULL = "pull"
    CAPTURE = "capture"
    PUSH = "push"


@dataclass(frozen=True)
class Action:
    """One thing to do.

    Attributes:
        act: what.
        fragment: of which fragment.
        of: the iteration after which it was captured.
    """

    act: Act
    fragment: int
    of: int

    def __str__(self) -> str:
        return f"{self.act.value} {self.fragment} of {self.of}"


@dataclass(frozen=True)
class Schedule:
    """What is done after each iteration, which are counted from 1.

    Fragment j of F is captured after the iterations that lie j K / F before the end of a period of
    K: the last fragment, which backward finishes last, first.
    """

    method: Method

    def after(self, iteration: int) -> list[Action]:
        """What to do after an iteration, in this order."""
        method = self.method
        found = []
        for act, lag in self._lags():
            of = iteration - lag
            if of >= 1:
                found += [
                    Action(act, fragment, of)
                    for fragment in range(method.fragments)
                    if self.is_captured(fragment, of)
                ]
        return found

    def is_captured(self, fragment: int, iteration: int) -> bool:
        """Whether a fragment is captured after an iteration."""
        period = self.method.period
        return (iteration + fragment * period // self.method.fragments) % period == 0

    def in_flight(self, iteration: int) -> list[Action]:
        """Captures that have not been pulled when all is done after an iteration, oldest first."""
        first = max(1, iteration - self.method.pull_lag + 1)
        return [
            Action(Act.CAPTURE, fragment, of)
            for of in range(first, iteration + 1)
            for fragment in range(self.method.fragments)
            if self.is_captured(fragment, of)
        ]

    def _lags(self) -> Sequence[tuple[Act, int]]:
        """The acts in their order.

        What was captured a period ago is pulled before the next is captured, which would tell it
        once more; but after it where all is replaced, which would lose what is to be captured, or
        where a gradient is kept with the parameters that it was computed at.
        """
        method = self.method
        capture, push = (Act.CAPTURE, 0), (Act.PUSH, method.push_lag)
        pull = (Act.PULL, method.pull_lag)
        if method.pull_lag == 0:
            return capture, push, pull
        if method.merge in ("replace", "compensate"):
            return capture, pull, push
        return pull, capture, push


def fragments_of(sizes: Sequence[int], fragments: int) -> list[slice]:
    """Cut parameters, in their order, into fragments of nearly equal size.

    Args:
        sizes: elements of each parameter.
        fragments: how many; some may be empty.
    """
    total = sum(sizes)
    middles = [end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True)]
    place = [min(fragments - 1, int(m * fragments / total)) if total else 0 for m in middles]
    cuts = [sum(each < fragment for each in place) for fragment in range(fragments + 1)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]
