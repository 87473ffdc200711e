"""Where ranks stand when others have died, and where they go on together. Plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np

from hpctrain.train.metrics import Figures, StepFigures


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a rank that is left stands, when it meets the others.

    Attributes:
        rank: its number before.
        step: steps that it has taken.
        weight: its share of the samples of a step.
        figures: what it knows of the last steps.
        has_checked: whether the job's loss was found to be one.
        stops: whether it knows that the run is to end.
    """

    rank: int
    step: int
    weight: float = 1.0
    figures: Figures
    has_checked: bool = True
    stops: bool = False


def leader_of(standings: Sequence[Standing]) -> int:
    """Whose state all take: that of the first of those that have taken most steps."""
    return max(range(len(standings)), key=lambda n: standings[n].step)


def together(standings: Sequence[Standing], step: int) -> Figures:
    """What each rank takes for its own figures, so that the ranks together have those of all steps.

    The loss of a step is that of all ranks that computed it. Where nobody knows that of the dead,
    which is so for the last step at most, it is estimated from those that are left.
    """
    last = max((each.figures for each in standings), key=lambda each: each.reported_at)
    rows = []
    for number in range(last.reported_at + 1, step + 1):
        there = [each for each in standings if number in each.figures.by_step()]
        own = [each.figures.by_step()[number] for each in there]
        known = [f.losses[number] for each in there if number in (f := each.figures).losses]
        estimate = sum(row.loss for row in own) / sum(each.weight for each in there)
        means = np.mean([astuple(row) for row in own], axis=0).tolist()
        rows.append(replace(StepFigures(*means), loss=known[0] if known else estimate))
    return Figures(
        reported_at=last.reported_at,
        pending=[replace(row, loss=row.loss / len(standings)) for row in rows],
        losses={number: row.loss for number, row in enumerate(rows, last.reported_at + 1)},
        reported=last.reported,
    )


def summed(means: StepFigures, ranks: int) -> StepFigures:
    """Means over ranks as sums over so many; the loss is one already."""
    values = StepFigures(*(value * ranks for value in astuple(means)))
    return replace(values, loss=means.loss)
