"""Averages in few bits over real ranks, bit for bit as in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quantize_in_numpy import QuantizedMean as Expected

from hpctrain import World
from hpctrain.comm.engine import engine_of
from hpctrain.comm.quantize import QUANTIZERS, Quantizer
from hpctrain.comm.reduce.quantized import QuantizedMean

pytestmark = pytest.mark.mpi

BITS = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)


def values(ranks: int, count: int, seed: int) -> np.ndarray:
    """One row a rank."""
    draw = np.random.default_rng(seed)
    return draw.standard_normal((ranks, count)).astype(np.float32)


@BITS
@pytest.mark.parametrize("count", [0, 1, 3, 64, 1000, 20_003])
def test_bits_are_those_of_numpy(world: World, quantizer: Quantizer, count: int) -> None:
    """Also the second and third time, when what was lost is added."""
    control = engine_of(world).control
    slab = torch.empty(count)
    mean = QuantizedMean(slab, quantizer)
    expected = Expected(count, world.size, quantizer.bits)
    for turn in range(3):
        rows = values(world.size, count, turn)
        slab.copy_(torch.from_numpy(rows[world.rank]))
        control.run(mean, "mean")
        np.testing.assert_array_equal(slab.numpy(), expected(rows))
        np.testing.assert_array_equal(mean.unsent.numpy(), expected.unsent[world.rank])


@BITS
def test_what_is_lost_comes_later(world: World, quantizer: Quantizer) -> None:
    """The sum of what came is that of what was to come, but for the last rounding."""
    control, count, turns = engine_of(world).control, 500, 20
    rows = values(world.size, count, 0)
    slab, came = torch.empty(count), torch.zeros(count)
    mean = QuantizedMean(slab, quantizer)
    for _ in range(turns):
        slab.copy_(torch.from_numpy(rows[world.rank]))
        control.run(mean, "mean")
        came += slab
    wanted = turns * torch.from_numpy(rows.mean(axis=0))
    assert (came - wanted).abs().max() < 2 * np.abs(rows).max() / quantizer.largest


@BITS
def test_many_at_once(world: World, quantizer: Quantizer) -> None:
    control = engine_of(world).control
    rows = values(world.size, 300, 0)
    slabs = [torch.from_numpy(rows[world.rank]).clone() for _ in range(8)]
    tickets = [
        control.post(QuantizedMean(slab, quantizer, lane), f"mean {lane}")
        for lane, slab in enumerate(slabs)
    ]
    for ticket in tickets:
        control.engine.wait(ticket)
    expected = Expected(300, world.size, quantizer.bits)(rows)
    for slab in slabs:
        np.testing.assert_array_equal(slab.numpy(), expected)


@BITS
def test_not_finite_stays_so_everywhere(world: World, quantizer: Quantizer) -> None:
    slab = torch.ones(200)
    if world.rank == world.size - 1:
        slab[3] = torch.inf
    engine_of(world).control.run(QuantizedMean(slab, quantizer), "mean")
    assert slab[3].isnan()
