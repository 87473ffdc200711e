"""Where the ranks that are left go on: plain values, one process."""

from __future__ import annotations

from typing import Any

import pytest

from hpctrain.train.metrics import Figures, StepFigures
from hpctrain.train.standing import Standing, leader_of, summed, together


def row(loss: float, seconds: float = 1.0) -> StepFigures:
    return StepFigures(loss, 2.0, 0.5 * seconds, seconds)


def standing(rank: int, step: int, **others: Any) -> Standing:
    return Standing(rank=rank, step=step, **{"figures": Figures(step), **others})


@pytest.mark.parametrize(
    ("standings", "leader"),
    [
        ([standing(0, 4), standing(2, 4)], 0),
        ([standing(0, 4), standing(2, 5), standing(3, 5)], 1),
        ([standing(1, 7)], 0),
    ],
)
def test_who_is_furthest(standings: list[Standing], leader: int) -> None:
    assert leader_of(standings) == leader


def test_losses_of_the_dead_count_where_they_are_known() -> None:
    """Rank 1 of three has died after step 6; rank 2 has not taken that step."""
    left = [
        standing(0, 6, weight=0.5, figures=Figures(4, [row(5.0, 2.0), row(3.0)], {5: 12.0})),
        standing(2, 5, weight=0.25, figures=Figures(4, [row(4.0, 4.0)], {5: 12.0})),
    ]
    all_of = together(left, 6)
    assert all_of.reported_at == 4
    fifth, sixth = all_of.pending
    assert 2 * fifth.loss == 12.0
    assert 2 * sixth.loss == pytest.approx(3.0 / 0.5)  # estimated from half of the samples
    assert (fifth.step_s, fifth.exposed_s, fifth.gradient_norm) == (3.0, 1.5, 2.0)
    again = together([standing(n, 6, weight=0.1, figures=all_of) for n in range(2)], 6)
    assert again == all_of


def test_what_one_has_reported_is_not_reported_again() -> None:
    """Rank 0 has died in a report that rank 1 has ended with, and rank 2 has not."""
    reported = Figures(6, [], {}, [row(12.0), row(11.0)])
    waiting = Figures(4, [row(5.0), row(4.0)], {5: 12.0, 6: 11.0})
    all_of = together([standing(1, 6, figures=reported), standing(2, 6, figures=waiting)], 6)
    assert all_of == reported


def test_nothing_is_pending_before_the_first_step() -> None:
    assert together([standing(0, 0), standing(1, 0)], 0) == Figures(0)


def test_means_become_sums() -> None:
    assert summed(StepFigures(7.0, 1.0, 2.0, 3.0), 4) == StepFigures(7.0, 4.0, 8.0, 12.0)


def test_sums_become_means() -> None:
    import numpy as np

    figures = Figures(4, [row(1.0)], {5: 2.0})
    figures.report(5, np.array([[2.0, 4.0, 6.0, 8.0]]), 2)
    assert figures == Figures(5, [], {}, [StepFigures(2.0, 2.0, 3.0, 4.0)])
