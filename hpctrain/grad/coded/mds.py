"""Cyclic MDS gradient codes: each worker sends one vector, and any n - s vectors give the sum.

A worker holds s + 1 of n groups of data blocks and sends one linear combination of their gradients
(Tandon et al., 'Gradient Coding', ICML 2017). Rows of coefficients are taken, as there, from the
null space of a matrix any s columns of which are independent and that has the vector of ones in
its null space. With a random one, rounding errors grow by thousands at 10 workers and s = 3. So
its rows are the s highest frequencies. If n - s is odd, this is a cyclic MDS code over the reals
(Raviv et al., 'Gradient Coding from Cyclic MDS Codes and Expander Graphs', ICML 2018).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpctrain.errors import ExchangeError
from hpctrain.grad.coded.assignment import check_whole

MOST_AMPLIFICATION = 1e3
MOST_SUBSETS = 1000
"""Up to so many sets of survivors, all are looked at; else those that lack adjacent workers, the
worst as far as was seen."""
SAMPLES = 200
"""Others that are looked at as well then."""
RESIDUAL = 1e-6
"""Decoding weights that miss the plain sum by more do not decode it."""


@dataclass(frozen=True, eq=False)
class Code:
    """What each worker adds up, and how the sum is had from what some of them send."""

    coefficients: NDArray[np.float64]
    """Workers x groups; worker w has groups w to w + stragglers, modulo their number."""
    stragglers: int

    def __post_init__(self) -> None:
        check_whole("number of stragglers", self.stragglers, 0, self.workers - 1)
        distance = np.arange(self.workers) - np.arange(self.workers)[:, None]
        held = distance % self.workers <= self.stragglers
        if held.shape != self.coefficients.shape or self.coefficients[~held].any():
            raise ExchangeError(
                "bad coefficients",
                allowed=f"{self.workers} groups, {self.stragglers + 1} of them at each worker, "
                "from its own on",
                everywhere=True,
            )

    @property
    def workers(self) -> int:
        """Number of workers and of groups of data blocks."""
        return len(self.coefficients)

    def decode(self, survivors: Sequence[int]) -> NDArray[np.float64]:
        """Weights with which the survivors' vectors add up to the sum of all groups."""
        if len({*survivors}) < len(survivors) or not {*survivors} <= {*range(self.workers)}:
            raise ExchangeError(
                "bad survivors",
                value=list(survivors),
                allowed=f"different workers from 0 to {self.workers - 1}",
                everywhere=True,
            )
        rows = self.coefficients[list(survivors)]
        weights = np.linalg.lstsq(rows.T, np.ones(self.workers), rcond=None)[0].astype(np.float64)
        if np.abs(weights @ rows - 1).max() > RESIDUAL:
            raise ExchangeError(
                "the sum of all data blocks cannot be decoded",
                value=f"vectors of workers {', '.join(map(str, survivors))}",
                allowed=f"any {self.workers - self.stragglers} of {self.workers} workers",
                everywhere=True,
            )
        return weights

    def amplification(self, survivors: Sequence[int]) -> float:
        """By how much rounding errors are larger than those of the plain sum of groups.

        If every product is wrong by a fraction e, so is the plain sum by up to e times the sum of
        all |gradients|. The decoded sum is wrong by up to e times the sum of |gradients|, each as
        often as the absolute values of weights times coefficients say: the largest of these counts.
        """
        weights = np.abs(self.decode(survivors))
        return float((weights @ np.abs(self.coefficients[list(survivors)])).max())


class Worst(NamedTuple):
    """The survivors from which decoding is the least exact."""

    amplification: float
    survivors: tuple[int, ...]


def cyclic_code(workers: int, stragglers: int, seed: int = 0) -> Code:
    """A code from which any `stragglers` workers may be missing; refused if that is inexact.

    Args:
        workers: number of workers and of groups.
        stragglers: how many may be missing; each worker computes one group more than that.
        seed: see `worst_amplification`.
    """
    check_whole("number of workers", workers, 1)
    check_whole("number of stragglers", stragglers, 0, workers - 1)
    coefficients = np.zeros((workers, workers))
    checks = _checks(workers, stragglers)
    for worker in range(workers):
        groups = (worker + np.arange(stragglers + 1)) % workers
        # s equations with s + 1 unknowns, any s of which are independent: one direction is left.
        row = np.linalg.svd(checks[:, groups])[2][-1]
        coefficients[worker, groups] = row * np.sign(row[0]) / np.abs(row).max()
    code = Code(coefficients, stragglers)
    check_amplification(code, seed)
    return code


def worst_amplification(code: Code, seed: int = 0) -> Worst:
    """The largest amplification over sets of n - s survivors; more of them do better.

    Args:
        code: the code.
        seed: of the sets that are looked at where there are too many to look at all.
    """
    return max(
        Worst(code.amplification(survivors), survivors) for survivors in _survivors(code, seed)
    )


def check_amplification(code: Code, seed: int = 0) -> None:
    """Refuse a code that loses more than about three digits."""
    worst = worst_amplification(code, seed)
    if worst.amplification > MOST_AMPLIFICATION:
        raise ExchangeError(
            f"rounding errors grow by {worst.amplification:.2g} when the sum of {code.workers} "
            f"workers is decoded from workers {', '.join(map(str, worst.survivors))}",
            allowed=f"at most {MOST_AMPLIFICATION:g}",
            fix="take fewer stragglers or fewer workers, or send data blocks uncoded",
            everywhere=True,
        )


def _checks(workers: int, stragglers: int) -> NDArray[np.float64]:
    """Equations that every row of coefficients meets, and so does the row of ones."""
    # Consecutive frequencies are a Vandermonde matrix but for the scale of its columns, so any s
    # columns are independent. They are real if each comes with its opposite, so they lie around
    # n / 2: whole numbers if n - s is odd. Then ones, which are frequency 0, meet the equations.
    frequencies = (workers - stragglers + 1) / 2 + np.arange(stragglers)
    angles = 2 * np.pi / workers * np.outer(frequencies, np.arange(workers) + 0.5)
    checks = np.cos(angles) + np.sin(angles)
    if stragglers and (workers - stragglers) % 2 == 0:
        # Halves of odd numbers do not exclude ones, but a vector near ones. Scaled by it, they do.
        ones = np.ones(workers)
        checks *= ones - checks.T @ np.linalg.solve(checks @ checks.T, checks @ ones)
    return checks


def _survivors(code: Code, seed: int) -> Iterator[tuple[int, ...]]:
    workers, sufficient = code.workers, code.workers - code.stragglers
    if math.comb(workers, sufficient) <= MOST_SUBSETS:
        yield from combinations(range(workers), sufficient)
        return
    for first in range(workers):
        yield tuple(sorted((first + step) % workers for step in range(sufficient)))
    random = np.random.default_rng(seed)
    for _ in range(SAMPLES):
        yield tuple(sorted(random.permutation(workers)[:sufficient].tolist()))
