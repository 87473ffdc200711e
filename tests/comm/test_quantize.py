"""Elements of 8 and 4 bits: as close as can be, bit for bit as in NumPy, and nothing hidden."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantize_in_numpy import quantized

from hpctrain.comm.quantize import GROUP, QUANTIZERS, Quantizer

BITS = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)


def through(quantizer: Quantizer, values: torch.Tensor) -> torch.Tensor:
    """What comes out of the code of the values."""
    packed = torch.full((quantizer.nbytes(values.numel()),), 255, dtype=torch.uint8)
    quantizer.encode(values, packed)
    out = torch.full_like(values, 7)
    quantizer.decode(packed, out)
    return out


@BITS
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1.0, 1e30, 3e38])
def test_bits_are_those_of_numpy(quantizer: Quantizer, count: int, size: float) -> None:
    draw = np.random.default_rng(count)
    values = (draw.standard_normal(count) * size).clip(-3.3e38, 3.3e38).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = quantized(values, quantizer.bits)
    np.testing.assert_array_equal(through(quantizer, torch.from_numpy(values)).numpy(), expected)


@BITS
@given(
    st.lists(
        st.floats(width=32, allow_nan=False, min_value=-(2.0**99), max_value=2.0**99), min_size=1
    )
)
def test_elements_are_wrong_by_half_a_scale(quantizer: Quantizer, numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    out = through(quantizer, values)
    for group, other in zip(values.split(GROUP), out.split(GROUP), strict=True):
        most = group.abs().max().item() if len(group) else 0.0
        scale = most / quantizer.largest * (1 + 2**-7) + 1e-40
        assert (group.double() - other.double()).abs().max().item() <= 0.501 * scale


@BITS
def test_what_is_not_finite_stays_so(quantizer: Quantizer) -> None:
    for odd in (math.nan, math.inf, -math.inf):
        values = torch.ones(3 * GROUP)
        values[GROUP + 5] = odd
        out = through(quantizer, values)
        assert out[GROUP : 2 * GROUP].isnan().all()
        assert torch.equal(out[:GROUP], through(quantizer, values[:GROUP]))
        assert out[2 * GROUP :].isfinite().all()


@BITS
def test_zeros_are_kept_and_signs_alike(quantizer: Quantizer) -> None:
    values = torch.zeros(GROUP)
    values[3], values[9] = 5.0, -5.0
    out = through(quantizer, values)
    assert out[3] == -out[9]
    assert out.count_nonzero() == 2


def test_sizes() -> None:
    assert [quantizer.nbytes(GROUP) for quantizer in QUANTIZERS.values()] == [66, 34]
    assert [quantizer.nbytes(1) for quantizer in QUANTIZERS.values()] == [66, 34]
    assert QUANTIZERS["int8"].nbytes(0) == 0
