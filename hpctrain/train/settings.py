"""What is trained, and how: plain values and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpctrain.config import check, option
from hpctrain.data.batches import Collate, MapStyle
from hpctrain.grad.coded.config import CodedConfig
from hpctrain.grad.config import ExchangeConfig
from hpctrain.grad.periods.method import PeriodsConfig
from hpctrain.grad.shared.config import SharedConfig
from hpctrain.train.checkpoint.config import CheckpointConfig
from hpctrain.train.device import DEVICES
from hpctrain.train.inject import InjectConfig
from hpctrain.train.optimizer import ScheduleConfig
from hpctrain.train.run_folder import RunConfig

Loss = Callable[[nn.Module, Any], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, and on how much at a time."""

    steps: int = option(minimum=1)
    """Optimizer steps in the whole run."""
    batch: int = option(minimum=1)
    """Samples of one step over all ranks, whatever their number."""
    micro_batch: int = option(0, minimum=0)
    """Largest number of samples that a rank computes at a time; 0 for its whole share."""
    device: str = option("cpu", choices=DEVICES)
    """Where to train; `cuda` deals the GPUs of a node out to its ranks in turn."""
    shuffle: bool = True
    """Whether a map-style data set is read in a new random order in each epoch."""
    clip_norm: float | None = option(None, above=0)
    """Gradients whose norm is larger are scaled down to it."""
    nonfinite: str = option("stop", choices=("stop", "skip"))
    """What to do when a gradient is not finite: end the run, or leave out that step's update."""
    eval_every: int = option(0, minimum=0)
    """Steps between two evaluations on the validation data; 0 for one at the end only."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Parts:
    """What a job trains: plain PyTorch that knows nothing of ranks.

    Attributes:
        model: the module to train.
        train_data: map-style data set or iterable of samples.
        loss: of a model and a batch: the mean over the batch's samples.
        validation_data: map-style data set, if there is one.
        metrics: of a model and a batch: means over the batch's samples, by name.
        collate: makes a batch of a list of samples; torch's default for None.
        sample: of a trained model: text to show at the end.
    """

    model: nn.Module
    train_data: MapStyle | Iterable[Any]
    loss: Loss
    validation_data: MapStyle | None = None
    metrics: Callable[[nn.Module, Any], Mapping[str, torch.Tensor]] | None = None
    collate: Collate | None = None
    sample: Callable[[nn.Module], str] | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a job trains its parts."""

    train: TrainConfig
    optimizer: Mapping[str, Any]
    schedule: ScheduleConfig
    exchange: ExchangeConfig
    coded: CodedConfig = CodedConfig()
    periods: PeriodsConfig = PeriodsConfig()
    shared: SharedConfig = SharedConfig()
    checkpoint: CheckpointConfig
    run: RunConfig
    seed: int
    inject: InjectConfig = InjectConfig()
