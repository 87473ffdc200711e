"""Which way to move blocks while backward runs: tried out on the first steps of the real model.

Whether overlap pays, and who should drive it, differs by machine and model: with spare cores and
a slow link a thread hides nearly everything; where ranks and progress share cores and caches, it
may be best to send all blocks after backward. All ways give the same bits, so that trying costs
nothing but a few slower steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpctrain.comm.select import median_of_slowest

MODES = ("thread", "hooks", "after")
"""Progress by a thread, by hooks, or not at all before backward has ended."""
WARM_UP_STEPS = 2
ROUNDS = 4


class Trial:
    """Takes turns with the modes, step by step, and keeps how long each step took."""

    def __init__(self) -> None:
        self._steps = 0
        self.times_s: list[float] = []

    @property
    def mode(self) -> str:
        """The mode of the coming step."""
        return MODES[max(0, self._steps - WARM_UP_STEPS) % len(MODES)]

    @property
    def is_over(self) -> bool:
        """Whether every mode has had its turns."""
        return len(self.times_s) == ROUNDS * len(MODES)

    def record(self, seconds: float) -> None:
        """A step in the current mode took this long, on this rank."""
        if self._steps >= WARM_UP_STEPS:
            self.times_s.append(seconds)
        self._steps += 1


def medians(times_s: Sequence[Sequence[float]]) -> dict[str, float]:
    """Median time of each mode on the rank that was slowest in each step.

    Args:
        times_s: what each rank recorded.
    """
    return {
        mode: median_of_slowest([rank[place :: len(MODES)] for rank in times_s])
        for place, mode in enumerate(MODES)
    }
