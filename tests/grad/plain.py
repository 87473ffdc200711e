"""Models, and their gradients in one process, which those of all ranks are compared with."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpctrain import ExchangeConfig, World
from hpctrain.comm.collect import all_gather
from hpctrain.comm.engine import engine_of
from hpctrain.comm.reducer import Parts

WIDTH = 6
PER_RANK = 4


def config(**values: Any) -> ExchangeConfig:
    return ExchangeConfig(**{"block_bytes": 200, "progress": "hooks", **values})


def perceptron(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, WIDTH)
    ).to(dtype)


class Tied(nn.Module):
    """Two layers share their weight, and one of them runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))


class Recomputed(nn.Module):
    """Layers are computed again in backward; the shared one's gradient arrives twice if nested."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        self.nested = nested
        self.repeats = 2
        self.before = nn.Linear(WIDTH, WIDTH)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.after = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        for _ in range(self.repeats):
            x = checkpoint(lambda y: torch.tanh(self.shared(y)), x, use_reentrant=self.nested)
        return self.after(x)


class Partly(nn.Module):
    """Holds a layer that forward never uses and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.used = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(torch.tanh(self.used(x)))


class Mixed(nn.Module):
    """Parameters of several dtypes, of size zero and without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, WIDTH).double()
        self.narrow = nn.Linear(WIDTH, WIDTH)
        self.empty = nn.Parameter(torch.zeros(0, WIDTH))
        self.scalar = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.turn = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(x.double()) * self.scalar + self.empty.sum()
        x = (x * self.turn).abs()
        return self.narrow(x.float()).double()


class ManyTiny(nn.Module):
    def __init__(self, count: int = 2000) -> None:
        super().__init__()
        self.terms = nn.ParameterList(nn.Parameter(torch.randn(3)) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :3] * torch.stack(list(self.terms)).sum(dim=0)


def channels_last() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 1, 3)), nn.Conv2d(2, 4, 3, padding=1), nn.Flatten()
    ).to(memory_format=torch.channels_last)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron,
    "tied": Tied,
    "recomputed": lambda: Recomputed(nested=False),
    "recomputed, re-entrant": lambda: Recomputed(nested=True),
    "unused and frozen": Partly,
    "mixed dtypes and sizes": Mixed,
    "2,000 tiny": ManyTiny,
    "channels last": channels_last,
    "recurrent": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.GRU(3, 5, batch_first=True), Second()
    ),
}


class Second(nn.Module):
    """The first of a pair of outputs."""

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return pair[0]


def make(name: str, dtype: torch.dtype | None = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    model = MODELS[name]()
    return model if name.startswith("mixed") or dtype is None else model.to(dtype)


def batch_of(world: World, step: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(PER_RANK * world.size, WIDTH, generator=generator, dtype=dtype)


def own(world: World, batch: torch.Tensor) -> torch.Tensor:
    return batch[world.rank * PER_RANK : (world.rank + 1) * PER_RANK].clone().requires_grad_()


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.detach().clone() for p in model.parameters()]


def plain(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor | None]:
    """Gradients of one process on the whole batch."""
    alone = copy.deepcopy(model)
    for parameter in alone.parameters():
        parameter.grad = None
    alone(batch.clone().requires_grad_()).pow(2).mean().backward()
    return gradients(alone)


def assert_close(
    found: Sequence[torch.Tensor | None],
    expected: Sequence[torch.Tensor | None],
) -> None:
    """Relative to the largest element of each gradient: 1e-12, or 1e-6 with float32 on the way."""
    singles = [g for g in found if g is not None and g.dtype == torch.float32]
    bound = 1e-6 if singles else 1e-12
    assert [g is None for g in found] == [e is None for e in expected]
    for gradient, reference in zip(found, expected, strict=True):
        if gradient is not None and gradient.numel():
            assert reference is not None
            scale = reference.abs().max().clamp_min(1e-30)
            assert ((gradient - reference).abs().max() / scale).item() <= bound


def assert_same_bits(world: World, found: Sequence[torch.Tensor | None]) -> None:
    mine = [None if g is None else g.reshape(-1).view(torch.uint8).numpy().tobytes() for g in found]
    assert all(other == mine for other in all_gather(engine_of(world).control, mine))


def in_turns(part_counts: Sequence[int], chance: random.Random) -> list[Parts]:
    """Each part alone, in any order that keeps the order of a block's own."""
    turns = [block for block, count in enumerate(part_counts) for _ in range(count)]
    chance.shuffle(turns)
    return [Parts(b, n := turns[:i].count(b), n + 1) for i, b in enumerate(turns)]
