"""What a root makes of the parameters that children send back: a mean, or what a few cannot spoil.

Every rule takes one row a child, all of the same length, and gives one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hpctrain.config import check, option
from hpctrain.errors import JobError

RULES = ("mean", "median", "trimmed", "krum")
SERVERS = ("sgd", "adam")
MOMENT_DECAY = 0.99
FLOOR = 1e-3
ADAM_RATE, ADAM_MOMENTUM = 1e-2, 0.9
"""What is not set with server = "adam"; the mean of squares begins at the square of FLOOR."""


@dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """How the parameters that children return become the next ones."""

    rule: str = option("mean", choices=RULES)
    """`mean` weighs children by their samples (FedAvg, McMahan et al., 2017); `median` of each
    element, `trimmed` mean of each element without the `tolerates` largest and smallest (Yin et
    al., 2018), and `krum`, the child that is nearest to its neighbours (Blanchard et al., 2017),
    are not spoilt by a few children."""
    tolerates: int = option(0, minimum=0)
    """How many children may send anything, with `trimmed` and `krum`."""
    server: str = option("sgd", choices=SERVERS)
    """Optimizer of the root, which takes the change that the rule gives as its gradient; with
    `adam` it is FedAdam (Reddi et al., 2021)."""
    server_rate: float | None = option(None, above=0)
    """Its learning rate; 1 unless set, and with `adam` 0.01."""
    server_momentum: float | None = option(None, minimum=0, maximum=0.9999)
    """Its momentum, or Adam's first decay; 0 unless set, and with `adam` 0.9."""

    def __post_init__(self) -> None:
        check(self)
        if self.tolerates and self.rule not in ("trimmed", "krum"):
            raise JobError(
                f"tolerates does nothing with rule = {self.rule!r}",
                allowed="rule = 'trimmed' or 'krum'",
                everywhere=True,
            )

    @property
    def rate(self) -> float:
        """Learning rate of the root's optimizer."""
        usual = ADAM_RATE if self.server == "adam" else 1.0
        return usual if self.server_rate is None else self.server_rate

    @property
    def momentum(self) -> float:
        """Its momentum, or first decay."""
        usual = ADAM_MOMENTUM if self.server == "adam" else 0.0
        return usual if self.server_momentum is None else self.server_momentum

    @property
    def fewest(self) -> int:
        """Children that must have answered for the rule to mean anything."""
        return self.fewest_without(0)

    def fewest_without(self, known: int) -> int:
        """The same where so many of those that are tolerated are known, and left out already."""
        tolerates = max(0, self.tolerates - known)
        if self.rule == "krum":
            return 2 * tolerates + 3
        if self.rule == "trimmed":
            return 2 * tolerates + 1
        return 1

    def refuse_few(self, children: int) -> None:
        """Make sure that there are enough children.

        Raises:
            JobError: there are not.
        """
        if children < self.fewest:
            raise JobError(
                f"rule = {self.rule!r} that tolerates {self.tolerates} needs more children",
                value=children,
                allowed=f"{self.fewest} or more",
                fix="start more ranks, lower tolerates, or take another rule",
                everywhere=True,
            )


def combined(
    config: RuleConfig, rows: torch.Tensor, samples: Sequence[int], known: int = 0
) -> torch.Tensor:
    """What the rule makes of the rows.

    Args:
        config: which rule.
        rows: one child a row; all finite.
        samples: of each child's training data.
        known: how many of those that are tolerated are left out of the rows already.
    """
    tolerates = max(0, config.tolerates - known)
    combine: dict[str, Callable[[], torch.Tensor]] = {
        "mean": lambda: weighted_mean(rows, samples),
        "median": lambda: median(rows),
        "trimmed": lambda: trimmed_mean(rows, tolerates),
        "krum": lambda: rows[krum(rows, tolerates)].clone(),
    }
    return combine[config.rule]()


def weighted_mean(rows: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
    """The mean, in which each sample of a child counts alike; summed in the order of children."""
    total = sum(samples)
    mean = torch.zeros_like(rows[0])
    for row, count in zip(rows, samples, strict=True):
        mean += row * (count / total)
    return mean


def median(rows: torch.Tensor) -> torch.Tensor:
    """Of each element; of an even number of rows, the mean of the two in the middle."""
    ordered = rows.sort(dim=0).values
    middle = len(rows) // 2
    if len(rows) % 2:
        return ordered[middle].clone()
    return (ordered[middle - 1] + ordered[middle]) / 2


def trimmed_mean(rows: torch.Tensor, tolerates: int) -> torch.Tensor:
    """Of each element, without so many of the largest and of the smallest."""
    ordered = rows.sort(dim=0).values
    return ordered[tolerates : len(rows) - tolerates].mean(dim=0)


def krum(rows: torch.Tensor, tolerates: int) -> int:
    """The row with the least sum of squared distances to its n - f - 2 nearest others."""
    wide = rows.double()
    distances = torch.stack([(wide - row).square().sum(dim=1) for row in wide])
    near = len(rows) - tolerates - 2
    scores = [
        row[[i for i in range(len(rows)) if i != place]].sort().values[:near].sum()
        for place, row in enumerate(distances)
    ]
    return int(torch.stack(scores).argmin())


class Server:
    """The root's optimizer: moves the encoder towards what the rule gives.

    Args:
        config: which optimizer.
        start: initial parameters, flat, and behind them buffers.
        trained: how many elements are parameters, all if None. Buffers are what the rule gives: a
            variance that an optimizer moves may become negative.

    Attributes:
        target: what goes out next.
    """

    def __init__(self, config: RuleConfig, start: torch.Tensor, trained: int | None = None) -> None:
        self._config = config
        self._trained = trained
        self.target = start.clone()
        self._momentum = torch.zeros_like(start[:trained])
        self._squares = torch.full_like(start[:trained], FLOOR**2)

    def step(self, rows: torch.Tensor, samples: Sequence[int], known: int = 0) -> None:
        """Take in what children have returned.

        Args:
            rows: the parameters of one child a row; all finite.
            samples: of each child's training data.
            known: how many of those that are tolerated are left out already.
        """
        config, found = self._config, combined(self._config, rows, samples, known)
        if config.server == "sgd" and config.rate == 1 and not config.momentum:
            self.target = found
            return
        before, decay = self.target[: self._trained], config.momentum
        change = found[: self._trained] - before
        if config.server == "adam":
            self._momentum.mul_(decay).add_(change * (1 - decay))
            self._squares.mul_(MOMENT_DECAY).add_(change * change * (1 - MOMENT_DECAY))
            change = self._momentum / (self._squares.sqrt() + FLOOR)
        else:
            change = self._momentum.mul_(decay).add_(change)
        found[: self._trained] = before + change * config.rate
        self.target = found

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What is needed to go on."""
        return {"target": self.target, "momentum": self._momentum, "squares": self._squares}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from there."""
        self.target = state["target"].clone()
        self._momentum.copy_(state["momentum"][: self._trained])
        self._squares.copy_(state["squares"][: self._trained])
