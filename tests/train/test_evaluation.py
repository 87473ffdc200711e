"""Figures over validation data."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from hpctrain.train.evaluation import Validation, not_training
from hpctrain.train.settings import Parts

HOST = torch.device("cpu")


def parts(samples: int | None) -> Parts:
    def mean(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(batch).mean()
        return found

    def metrics(model: nn.Module, batch: torch.Tensor) -> dict[str, Any]:
        return {"largest": float(batch.max())}

    data = [torch.tensor([float(n)]) for n in range(samples or 0)]
    return Parts(
        nn.Identity(),
        data,
        mean,
        validation_data=None if samples is None else data,
        metrics=metrics,
    )


@pytest.mark.parametrize("batch", [1, 3, 4, 7, 100])
def test_every_sample_counts_once(batch: int) -> None:
    """Also those of a last batch that is smaller."""
    validation = Validation.of(parts(7), batch, HOST)
    assert validation and validation.samples == 7
    sums = [validation.sums(nn.Identity(), index) for index in range(validation.batches)]
    assert sum(each["loss"] for each in sums) == pytest.approx(sum(range(7)))
    last = 7 % batch or min(batch, 7)
    assert sums[-1]["largest"] == 6 * last


@pytest.mark.parametrize("samples", [None, 0])
def test_without_any(samples: int | None) -> None:
    assert Validation.of(parts(samples), 4, HOST) is None


@pytest.mark.parametrize("was_training", [True, False])
def test_a_model_is_left_as_it_was(was_training: bool) -> None:
    model = nn.Dropout().train(was_training)
    with suppress(ZeroDivisionError), not_training(model):
        assert not model.training
        _ = 1 / 0
    assert model.training == was_training
