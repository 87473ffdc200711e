"""A task for `stdlib_encoder`: language modelling, the next byte at each place of the source."""

from __future__ import annotations

import stdlib_lm
import torch
from torch import nn
from torch.utils.data import Dataset


def head(encoder: nn.Module) -> nn.Module:
    """Logits (batch, length, 256) for the byte after each."""
    linear = nn.Linear(encoder.width, stdlib_lm.BYTES, bias=False)
    stdlib_lm.draw_tables(linear)
    return linear


def train_data() -> Dataset:
    return stdlib_lm.train_data()


def validation_data() -> Dataset:
    return stdlib_lm.validation_data()


def loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    return stdlib_lm.loss(model, windows)


def metrics(model: nn.Module, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    windows = windows.long()
    guesses = model(windows[:, :-1]).argmax(dim=-1)
    return {"accuracy": (guesses == windows[:, 1:]).float().mean()}
