"""Packets of a root and its children."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpctrain.grad.shared.packets import Kind, Packet


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_what_is_packed_is_unpacked(dtype: torch.dtype, count: int) -> None:
    body = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    values = {"kind": "of my own", "dtype": 3, "text": "ä\0", "deep": {"a": [1.5, None]}}
    packed = Packet(Kind.TRAIN, values, body).pack()
    assert packed.dtype == np.uint8
    found = Packet.unpack(packed)
    packed[:] = 0  # the memory belongs to the sender
    assert found.kind is Kind.TRAIN and found.values == values
    assert found.body is not None and found.body.dtype == dtype and torch.equal(found.body, body)


def test_without_a_body() -> None:
    assert Packet.unpack(Packet(Kind.ALIVE).pack()) == Packet(Kind.ALIVE)
