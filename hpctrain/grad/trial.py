"""Which way to move blocks while backward runs: tried out on the first steps of the real model.

Whether overlap pays, and who should drive it, differs by machine and model: with spare cores and
a slow link a thread hides nearly everything; where ranks and progress share cores and caches, it
may be best to send all blocks after backward. All ways give the same bits, so that trying costs
nothing but a few slower steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpctrain.comm.select import fastest, median_of_slowest

MODES = ("after", "thread", "hooks")
"""No progress before backward has ended, or by a thread, or by hooks; the simplest one first."""
WARM_UP_STEPS = 2
ROUNDS = 6
MARGIN = 0.95
"""A mode replaces an earlier one if its steps take less than this share of the time. Where ranks
share cores, a few steps differ by more than the modes do."""


class Trial:
    """Decides about the mode of each step, and keeps how long the steps took.

    Args:
        chained: whether a step goes on while the next one has begun. Then a mode keeps its turn
            for several steps, of which the first are not counted; else modes take turns step by
            step.
    """

    def __init__(self, chained: bool = False) -> None:
        if chained:
            # Only while backward runs does "after" differ from the others.
            modes = [mode for mode in MODES if mode != "after"]
            self._turns = [
                (mode, turn >= WARM_UP_STEPS)
                for mode in modes
                for turn in range(WARM_UP_STEPS + ROUNDS)
            ]
        else:
            warm_up = [(MODES[0], False)] * WARM_UP_STEPS
            self._turns = warm_up + [(mode, True) for mode in MODES] * ROUNDS
        self._steps = 0
        self.times_s: dict[str, list[float]] = {}
        """What counted steps took on this rank, by mode."""

    @property
    def mode(self) -> str:
        """The mode of the coming step."""
        return self._turns[self._steps][0]

    @property
    def is_over(self) -> bool:
        """Whether every mode has had its turns."""
        return self._steps == len(self._turns)

    def record(self, seconds: float) -> None:
        """A step in the current mode took this long, on this rank."""
        mode, counts = self._turns[self._steps]
        if counts:
            self.times_s.setdefault(mode, []).append(seconds)
        self._steps += 1


def chosen(medians_s: Mapping[str, float]) -> str:
    """The mode to go on with."""
    mode = fastest(medians_s, MARGIN)
    assert mode is not None
    return mode


def medians(times_s: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Median time of each mode on the rank that was slowest in each step.

    Args:
        times_s: what each rank recorded.
    """
    return {mode: median_of_slowest([rank[mode] for rank in times_s]) for mode in times_s[0]}
