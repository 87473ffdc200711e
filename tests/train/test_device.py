"""Batches and states move to a device and keep their shape."""

import torch
from torch import nn

from hpctrain.train.device import moved

META = torch.device("meta")


def test_only_tensors_move_and_only_if_they_must() -> None:
    batch = {"x": torch.ones(2), "names": ["a", "b"], "more": (torch.zeros(1), 3)}
    assert moved(batch, torch.device("cpu")) is batch
    there = moved(batch, META)
    assert there["x"].device == META and there["more"][0].device == META
    assert there["names"] == ["a", "b"] and there["more"][1] == 3
    assert batch["x"].device.type == "cpu"


def test_a_modules_state_keeps_its_format() -> None:
    state = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict()
    there = moved(state, META)
    assert list(there) == list(state) and there._metadata == state._metadata
