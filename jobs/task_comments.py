"""A task for `stdlib_encoder`: whether the last line of a window, as far as it goes, has a comment.

Python is read from left to right, so that the bytes up to a place decide whether it lies in a
comment. Every window holds a "#", else it would be the answer: in a comment that goes on, in one of
a line before, or in a string.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from stdlib_lm import CONTEXT
from stdlib_tokens import (
    LABEL_SMOOTHING,
    TRAIN_WINDOWS,
    UNLABELLED,
    VALIDATION_WINDOWS,
    labelled_files,
    labelled_windows,
    tokens,
)
from torch import nn
from torch.utils.data import TensorDataset


def comments(source: bytes) -> bytearray:
    """For each place of a source whose window holds a "#", whether a comment began in its line."""
    labels = bytearray([UNLABELLED]) * (len(source) + 1)
    found = tokens(source)
    if found:
        for sign in re.finditer(b"#", source):
            count = min(CONTEXT, len(source) - sign.start())
            labels[sign.end() : sign.start() + count + 1] = bytes(count)
    for token in found:
        if token.kind == "COMMENT":
            places = slice(token.start + 1, token.end + 1)
            labels[places] = labels[places].replace(b"\0", b"\1")
    return labels


def head(encoder: nn.Module) -> nn.Module:
    """Logits (batch, length, 2) of no comment and a comment, after each byte."""
    return nn.Linear(encoder.width, 2)


def train_data() -> TensorDataset:
    return labelled_windows(labelled_files(validation=False), comments, 2, TRAIN_WINDOWS)


def validation_data() -> TensorDataset:
    return labelled_windows(labelled_files(validation=True), comments, 2, VALIDATION_WINDOWS)


def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    windows, labels = batch
    logits = model(windows.long())[:, -1]
    return F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)


def metrics(model: nn.Module, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    windows, labels = batch
    guesses = model(windows.long())[:, -1].argmax(dim=1)
    return {"accuracy": (guesses == labels).float().mean()}
