"""A byte-level encoder that tasks on the standard library's source share: a GPT's trunk."""

from __future__ import annotations

from stdlib_lm import Trunk, draw_tables
from torch import nn


def encoder(width: int = 128, layers: int = 4, heads: int = 4) -> nn.Module:
    """Takes bytes (batch, length), gives features (batch, length, width); looks back only."""
    trunk = Trunk(width, layers, heads)
    draw_tables(trunk.bytes, trunk.places)
    return trunk
