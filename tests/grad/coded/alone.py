"""The coded step in one process: data blocks one after another, summed along the tree.

What any number of ranks come to must have the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpctrain.data.generators import drawn_from
from hpctrain.grad.coded.sums import Node

Read = Callable[[int], Iterable[Any]]
Loss = Callable[[nn.Module, Any], torch.Tensor]
Gradients = list[torch.Tensor | None]


@dataclass
class Step:
    """What a step gives, and what the optimizer makes of it."""

    gradients: Gradients
    loss: float
    buffers: list[torch.Tensor]
    parameters: list[torch.Tensor]
    optimizer: dict[str, Any]


class Alone:
    """Trains a copy of a module.

    Args:
        module: to be copied.
        make_optimizer: of parameters.
        read: subsets of a data block of a step, given both.
        loss: of a subset.
        samples: number of samples of each data block, for the mean of buffers.
    """

    def __init__(
        self,
        module: nn.Module,
        make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        read: Callable[[int, int], Iterable[Any]],
        loss: Loss,
        samples: Sequence[int],
        seed: int = 0,
    ) -> None:
        self.module = copy.deepcopy(module)
        self.optimizer = make_optimizer(self.module.parameters())
        self._trained = [p for p in self.module.parameters() if p.requires_grad]
        self._read, self._loss, self._seed = read, loss, seed
        self._samples = samples
        self._number = 0

    def steps(self, count: int) -> list[Step]:
        """So many steps, one after another."""
        return [self.step() for _ in range(count)]

    def step(self) -> Step:
        """One step."""
        blocks = range(len(self._samples))
        begun = [buffer.clone() for buffer in self.module.buffers()]
        cells: list[Gradients] = []
        losses: list[float] = []
        after: list[list[torch.Tensor]] = []
        for block in blocks:
            with torch.no_grad():
                for buffer, value in zip(self.module.buffers(), begun, strict=True):
                    buffer.copy_(value)
            for parameter in self.module.parameters():
                parameter.grad = None
            total = 0.0
            with drawn_from(self._seed, self._number, block):
                for subset in self._read(self._number, block):
                    value = self._loss(self.module, subset)
                    total += float(value.detach())
                    value.backward()
            cells.append([None if p.grad is None else wide(p.grad) for p in self._trained])
            losses.append(total)
            after.append([buffer.clone() for buffer in self.module.buffers()])
        gradients = [
            self._sum(parameter, [cell[place] for cell in cells])
            for place, parameter in enumerate(self._trained)
        ]
        for parameter, gradient in zip(self._trained, gradients, strict=True):
            parameter.grad = gradient
        self._set_buffers(begun, after)
        self.optimizer.step()
        self._number += 1
        return Step(
            [None if g is None else g.clone() for g in gradients],
            along_tree([torch.tensor(loss, dtype=torch.float64) for loss in losses]).item(),
            [buffer.clone() for buffer in self.module.buffers()],
            [parameter.detach().clone() for parameter in self.module.parameters()],
            copy.deepcopy(self.optimizer.state_dict()),
        )

    def _sum(
        self, parameter: nn.Parameter, cells: Sequence[torch.Tensor | None]
    ) -> torch.Tensor | None:
        if all(cell is None for cell in cells):
            return None
        zeros = torch.zeros_like(wide(parameter.detach()))
        return along_tree([zeros if c is None else c for c in cells]).to(parameter.dtype)

    def _set_buffers(
        self, begun: Sequence[torch.Tensor], after: Sequence[Sequence[torch.Tensor]]
    ) -> None:
        shares = [count / sum(self._samples) for count in self._samples]
        with torch.no_grad():
            for place, buffer in enumerate(self.module.buffers()):
                values = [each[place] for each in after]
                if not buffer.is_floating_point():
                    buffer.copy_(values[0])
                elif all(torch.equal(v, begun[place]) for v in values):
                    buffer.copy_(begun[place])
                else:
                    parts = [v.double() * share for v, share in zip(values, shares, strict=True)]
                    buffer.copy_(along_tree(parts))


def wide(gradient: torch.Tensor) -> torch.Tensor:
    """As it travels."""
    return gradient.float() if gradient.dtype.itemsize == 2 else gradient.clone()


def along_tree(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum in the order of the tree."""

    def node(which: Node) -> torch.Tensor:
        if which.is_leaf:
            return parts[which.lo]
        left, right = which.halves()
        return node(left) + node(right)

    return node(Node(0, len(parts)))
