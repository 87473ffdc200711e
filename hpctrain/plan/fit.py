"""Constants of the cost model, found from steps that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hpctrain.plan.cost import Links
from hpctrain.plan.schedule import Step, step_s

FREE = ("latency_s", "bytes_per_s", "overhead_s", "handshake")
"""What is found by default."""
PULL = 1e-3
"""Weight of where the search begins against one step."""
FAR_OFF = 0.1
"""Relative error from which on a step counts by its distance, no longer by the square."""
NUDGE = 1e-3
"""Relative change of a constant that shows its slope."""
MOST = 1.0
"""Longest move in one round, as a logarithm."""


def fit(
    steps: Sequence[Step],
    measured_s: Sequence[float],
    links: Sequence[Links],
    free: Sequence[str] = FREE,
    rounds: int = 20,
) -> dict[str, float]:
    """Constants with which the model is nearest to measured steps, by relative error.

    Least squares (Gauss and Newton, damped) over logarithms: of the constants, so that they stay
    positive, and of the times, so that short steps count like long ones. Steps that are far off
    count less (Huber), since some were disturbed. A weak pull to where the search begins decides
    about constants that the steps say nothing about.

    Args:
        steps: what was measured.
        measured_s: time of each.
        links: the machine of each; the `free` facts of the first are where the search begins.
        free: names of the facts to find, which are the same for all steps.
        rounds: how often to improve them.

    Returns:
        The facts, by name.
    """
    begin = np.log([getattr(links[0], name) for name in free])
    truth = np.log(measured_s)

    def found(at: np.ndarray) -> dict[str, Any]:
        return {name: float(value) for name, value in zip(free, np.exp(at), strict=True)}

    def errors(at: np.ndarray) -> np.ndarray:
        facts = found(at)
        times = [step_s(s, replace(on, **facts)) for s, on in zip(steps, links, strict=True)]
        return np.concatenate([_tamed(np.log(times) - truth), PULL * (at - begin)])

    at, damping = begin, 0.1
    now = errors(at)
    for _ in range(rounds):
        slopes = [(errors(at + NUDGE * row) - now) / NUDGE for row in np.eye(len(free))]
        matrix = np.vstack([np.transpose(slopes), damping * np.eye(len(free))])
        target = np.concatenate([-now, np.zeros(len(free))])
        move = np.clip(np.linalg.lstsq(matrix, target, rcond=None)[0], -MOST, MOST)
        there = errors(at + move)
        if there @ there < now @ now:
            at, now, damping = at + move, there, damping / 3
        else:
            damping *= 4
    return found(at)


def _tamed(errors: np.ndarray) -> np.ndarray:
    """Errors whose squares are Huber's loss of the given ones."""
    size = np.abs(errors)
    far = np.sqrt(FAR_OFF * (2 * np.maximum(size, FAR_OFF) - FAR_OFF))
    return np.where(size > FAR_OFF, np.copysign(far, errors), errors)
