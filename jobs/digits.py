"""A small convolutional network on the 1,797 handwritten digits that scikit-learn brings along."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

TEST_EVERY = 5
"""Every fifth digit is kept for the test."""


def _digits(test: bool) -> TensorDataset:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    chosen = (torch.arange(len(labels)) % TEST_EVERY == 0) == test
    return TensorDataset(images[chosen], labels[chosen])


def model(channels: int = 32) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, padding=1, stride=2),
        nn.GroupNorm(4, 2 * channels),
        nn.ReLU(),
        nn.Conv2d(2 * channels, 2 * channels, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * channels * 16, 10),
    )


def train_data() -> TensorDataset:
    return _digits(test=False)


def validation_data() -> TensorDataset:
    return _digits(test=True)


def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def metrics(model: nn.Module, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    images, labels = batch
    return {"accuracy": (model(images).argmax(dim=1) == labels).float().mean()}
