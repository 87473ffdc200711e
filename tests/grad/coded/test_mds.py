"""Cyclic codes: the plain sum from any survivors, as exactly as promised."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from hpctrain.errors import ExchangeError
from hpctrain.grad.coded.mds import (
    MOST_AMPLIFICATION,
    Code,
    check_amplification,
    cyclic_code,
    worst_amplification,
)

SMALL = [(n, s) for n in range(1, 13) for s in range(min(n, 4))]


def random_code(workers: int, stragglers: int, seed: int) -> Code:
    """Algorithm 2 of Tandon et al. (2017)."""
    checks = np.random.default_rng(seed).standard_normal((stragglers, workers))
    checks[:, -1] = -checks[:, :-1].sum(axis=1)
    coefficients = np.zeros((workers, workers))
    for worker in range(workers):
        first, *others = (worker + np.arange(stragglers + 1)) % workers
        coefficients[worker, first] = 1
        coefficients[worker, others] = np.linalg.solve(checks[:, others], -checks[:, first])
    return Code(coefficients, stragglers)


@pytest.mark.parametrize(("workers", "stragglers"), SMALL)
def test_sum_is_decoded_from_all_survivors(workers: int, stragglers: int) -> None:
    """In float64 and float32, no less exactly than the amplification says."""
    code = cyclic_code(workers, stragglers)
    gradients = np.random.default_rng(0).standard_normal((workers, 50))
    plain, scale = gradients.sum(axis=0), np.abs(gradients).sum(axis=0)
    sent = code.coefficients @ gradients
    sent32 = code.coefficients.astype(np.float32) @ gradients.astype(np.float32)
    worst = worst_amplification(code).amplification
    for missing in range(stragglers + 1):
        for survivors in combinations(range(workers), workers - missing):
            weights = code.decode(survivors)
            amplification = code.amplification(survivors)
            assert 1 - 1e-9 <= amplification <= worst * (1 + 1e-9)
            errors = np.abs(weights @ sent[[*survivors]] - plain) / scale
            assert errors.max() <= 1e-12 * amplification
            decoded32 = weights.astype(np.float32) @ sent32[[*survivors]]
            assert (np.abs(decoded32 - plain) / scale).max() <= 1e-6 * amplification


@pytest.mark.parametrize(("workers", "stragglers"), SMALL)
def test_support_is_cyclic(workers: int, stragglers: int) -> None:
    coefficients = cyclic_code(workers, stragglers).coefficients
    for worker, row in enumerate(coefficients):
        held = {(worker + step) % workers for step in range(stragglers + 1)}
        assert {*np.flatnonzero(row)} == held
        assert np.abs(row).max() == 1
        assert row[worker] > 0


@pytest.mark.parametrize(("workers", "stragglers"), [(4, 1), (5, 2), (8, 3), (7, 0)])
def test_without_stragglers_decoding_loses_nothing(workers: int, stragglers: int) -> None:
    """Where frequencies come in whole pairs."""
    code = cyclic_code(workers, stragglers)
    assert code.amplification(range(workers)) == pytest.approx(1)


@pytest.mark.parametrize(("workers", "stragglers"), [(8, 2), (9, 2), (10, 3), (11, 3), (12, 4)])
def test_adjacent_stragglers_are_the_worst(workers: int, stragglers: int) -> None:
    """So looking at those is enough where sets are too many to look at all."""
    code = cyclic_code(workers, stragglers)
    adjacent = [
        code.amplification([w for w in range(workers) if (w - first) % workers >= stragglers])
        for first in range(workers)
    ]
    assert worst_amplification(code).amplification == pytest.approx(max(adjacent))


def test_it_is_better_than_a_random_code() -> None:
    for seed in range(3):
        best = worst_amplification(cyclic_code(10, 3)).amplification
        assert worst_amplification(random_code(10, 3, seed)).amplification > 10 * best


@pytest.mark.parametrize(
    ("workers", "stragglers"),
    [(64, 1), (64, 2), (49, 3), (25, 4), (18, 5), (15, 6), (10, 9), (12, 11)],
)
def test_codes_that_are_exact_enough(workers: int, stragglers: int) -> None:
    assert worst_amplification(cyclic_code(workers, stragglers)).amplification <= MOST_AMPLIFICATION


@pytest.mark.parametrize(("workers", "stragglers"), [(128, 3), (32, 4), (24, 6)])
def test_inexact_codes_are_refused(workers: int, stragglers: int) -> None:
    with pytest.raises(ExchangeError, match=r"rounding errors grow by .* decoded from workers"):
        cyclic_code(workers, stragglers)


def test_inexact_random_code_is_refused_with_the_survivors() -> None:
    code = random_code(12, 3, seed=0)
    worst = worst_amplification(code)
    assert worst.amplification == code.amplification(worst.survivors) > MOST_AMPLIFICATION
    with pytest.raises(ExchangeError) as error:
        check_amplification(code)
    assert f"decoded from workers {', '.join(map(str, worst.survivors))}" in str(error.value)
    assert error.value.everywhere


def test_amplification_by_hand() -> None:
    """Workers 0 and 1 send g0 + 2 g1 and g1 - g2; the difference is the sum."""
    code = Code(np.array([[1.0, 2, 0], [0, 1, -1], [1, 0, 1]]), 1)
    assert code.decode([0, 1]) == pytest.approx([1, -1])
    assert code.amplification([0, 1]) == pytest.approx(3)  # g1 counts 2 + 1 times


def test_too_few_survivors_are_refused() -> None:
    code = cyclic_code(6, 2)
    for survivors in ((), (0, 1, 2)):
        with pytest.raises(ExchangeError, match=r"cannot be decoded.*any 4 of 6 workers"):
            code.decode(survivors)


@pytest.mark.parametrize("survivors", [(0, 0, 1), (0, 1, 3), (-1, 0, 1)])
def test_bad_survivors_are_refused(survivors: tuple[int, ...]) -> None:
    with pytest.raises(ExchangeError, match="bad survivors"):
        cyclic_code(3, 1).decode(survivors)


def test_order_of_survivors_is_that_of_weights() -> None:
    code = cyclic_code(7, 2)
    order = [5, 0, 3, 6, 1]
    weights = dict(zip(sorted(order), code.decode(sorted(order)), strict=True))
    assert code.decode(order) == pytest.approx([weights[worker] for worker in order])


def test_out_of_range() -> None:
    with pytest.raises(ExchangeError, match="bad number of stragglers: got 3; allowed: 0 to 2"):
        cyclic_code(3, 3)
    with pytest.raises(ExchangeError, match="bad number of workers"):
        cyclic_code(0, 0)
    with pytest.raises(ExchangeError, match="bad coefficients; allowed: 3 groups, 2 of them"):
        Code(np.ones((3, 3)), 1)
    with pytest.raises(ExchangeError, match="bad coefficients"):
        Code(np.ones((3, 2)), 1)
