"""A task for `stdlib_encoder`: of what kind the next token is, for windows that end before one."""

from __future__ import annotations

import keyword

import torch
import torch.nn.functional as F
from stdlib_tokens import (
    LABEL_SMOOTHING,
    TRAIN_WINDOWS,
    UNLABELLED,
    VALIDATION_WINDOWS,
    Token,
    labelled_files,
    labelled_windows,
    tokens,
)
from torch import nn
from torch.utils.data import TensorDataset

KINDS = ("NAME", "KEYWORD", "OP", "NUMBER", "STRING", "NEWLINE", "COMMENT")
"""NEWLINE is the end of any line outside strings."""
SYNONYMS = {"NL": "NEWLINE", "FSTRING_START": "STRING", "TSTRING_START": "STRING"}
"""Since Python 3.12, a string with values inside is several tokens."""


def kind(token: Token) -> int:
    """Index in KINDS; UNLABELLED for indentation and for the rest of a string's tokens."""
    name = SYNONYMS.get(token.kind, token.kind)
    if name == "NAME" and keyword.iskeyword(token.text):
        name = "KEYWORD"
    return KINDS.index(name) if name in KINDS else UNLABELLED


def kinds(source: bytes) -> bytearray:
    """For each place of a source where a token begins, its kind."""
    labels = bytearray([UNLABELLED]) * (len(source) + 1)
    for token in tokens(source):
        labels[token.start] = kind(token)
    return labels


def head(encoder: nn.Module) -> nn.Module:
    """Logits (batch, length, kinds) for the token after each byte, if one begins there."""
    return nn.Linear(encoder.width, len(KINDS))


def train_data() -> TensorDataset:
    return labelled_windows(labelled_files(validation=False), kinds, len(KINDS), TRAIN_WINDOWS)


def validation_data() -> TensorDataset:
    return labelled_windows(labelled_files(validation=True), kinds, len(KINDS), VALIDATION_WINDOWS)


def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    windows, labels = batch
    logits = model(windows.long())[:, -1]
    return F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)


def metrics(model: nn.Module, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    windows, labels = batch
    guesses = model(windows.long())[:, -1].argmax(dim=1)
    return {"accuracy": (guesses == labels).float().mean()}
