"""The loss and the job's metrics over the validation data, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hpctrain.data.batches import Batches, MapStyle
from hpctrain.train.checks import checked_metrics
from hpctrain.train.device import moved
from hpctrain.train.settings import Parts


class Validation:
    """Validation data of a job, of which each batch can be looked at by any rank.

    Args:
        parts: whose loss and metrics are computed.
        data: indexed, and not empty.
        batch: samples looked at at once.
        device: where the model is.

    Attributes:
        samples: how many there are.
        batches: how many of so many samples, the last one of what is left.
    """

    def __init__(self, parts: Parts, data: MapStyle, batch: int, device: torch.device) -> None:
        self._parts = parts
        self._batch = batch
        self._device = device
        self._whole = Batches(
            data, batch=batch, shuffle=False, collate=parts.collate, name="validation_data"
        )
        self.samples = len(data)
        self.batches = -(-len(data) // batch)

    @classmethod
    def of(cls, parts: Parts, batch: int, device: torch.device) -> Validation | None:
        """That of a job; None without any."""
        data = parts.validation_data
        return cls(parts, data, batch, device) if data is not None and len(data) else None

    def sums(self, model: nn.Module, index: int) -> dict[str, float]:
        """Loss and metrics of the samples of a batch, added up."""
        count = min(self._batch, self.samples - index * self._batch)
        subset = moved(self._whole.read(index * self._batch, count), self._device)
        figures: dict[str, Any] = {"loss": self._parts.loss(model, subset)}
        if metrics := self._parts.metrics:
            figures |= checked_metrics(metrics, metrics(model, subset))
        return {name: float(value) * count for name, value in figures.items()}


@contextmanager
def not_training(model: nn.Module) -> Iterator[None]:
    """Inside, the model is one that is evaluated."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
