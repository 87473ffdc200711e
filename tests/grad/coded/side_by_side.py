"""A coded run and the same in one process, compared step by step, bit by bit."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from grad import plain
from grad.coded.alone import Alone, Step
from grad.plain import WIDTH
from torch import nn

from hpctrain.comm.collect import all_gather
from hpctrain.comm.engine import engine_of
from hpctrain.grad.coded.config import CodedConfig
from hpctrain.grad.coded.exchange import Coded
from hpctrain.world import World

BLOCKS = 6
PER_BLOCK = 4
STEPS = 4
POLL_S = 1e-4

Subset = tuple[torch.Tensor, float, int]
"""Samples, their share of the step's, and the data block."""


class Sometimes(nn.Module):
    """One layer is used on every third data block, one on none."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(WIDTH, WIDTH)
        self.rarely = nn.Linear(WIDTH, WIDTH)
        self.always = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, block: int) -> torch.Tensor:
        x = torch.tanh(self.always(x))
        return self.rarely(x) if block % 3 == 1 else x


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 1, 3)),
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        nn.Linear(12, WIDTH),
    )


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 20), nn.Dropout(0.4), nn.Linear(20, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: model for name, model in plain.MODELS.items() if "tiny" not in name},
    "300 tiny": lambda: plain.ManyTiny(300),
    "convolution with batch norm": convolution,
    "dropout": dropping,
    "parameters used by some data blocks": Sometimes,
    "one parameter": lambda: nn.Linear(WIDTH, 2, bias=False),
}
OF_ITS_OWN = ("convolution with batch norm", "dropout")
"""Models whose data blocks do not simply add up to the whole batch."""


def make(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    model = MODELS[name]()
    return model if name.startswith("mixed") else model.to(dtype)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


class Data:
    """Samples of each data block of each step, in subsets.

    Args:
        samples: their number in each data block.
        most: in a subset.
    """

    def __init__(
        self,
        samples: Sequence[int] = (PER_BLOCK,) * BLOCKS,
        most: int = PER_BLOCK,
        dtype: torch.dtype = torch.float64,
        device: torch.device | None = None,
    ) -> None:
        self.samples = tuple(samples)
        self._most = most
        self._to = {"dtype": dtype, "device": device}

    def batch(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 + step)
        batch = torch.randn(sum(self.samples), WIDTH, generator=generator, dtype=torch.float64)
        return batch.to(**self._to)

    def read(self, step: int, block: int) -> Iterable[Subset]:
        first, count = sum(self.samples[:block]), self.samples[block]
        for part in self.batch(step)[first : first + count].split(self._most) if count else ():
            yield part.clone().requires_grad_(), len(part) / sum(self.samples), block


def loss_of(module: nn.Module, subset: Subset) -> torch.Tensor:
    x, share, block = subset
    out = module(x, block) if isinstance(module, Sometimes) else module(x)
    return out.pow(2).mean() * share


class Run:
    """A Coded and the same in one process.

    Args:
        loss: of a subset, if it is to do more than `loss_of`.
    """

    def __init__(
        self,
        world: World,
        module: nn.Module,
        data: Data | None = None,
        make_optimizer: Callable[..., torch.optim.Optimizer] = sgd,
        loss: Callable[[Subset], torch.Tensor] | None = None,
        seed: int = 0,
        block_bytes: int = 200,
        extra: Any = None,
        **config: Any,
    ) -> None:
        self.world = world
        self.data = data or Data()
        self.module = module
        self.optimizer = make_optimizer(module.parameters())
        self.loss = loss or partial(loss_of, module)
        config = {"blocks": len(self.data.samples), "copies": 1, **config}
        self.coded = Coded(
            module,
            self.optimizer,
            CodedConfig(**config),
            world=world,
            samples=self.data.samples,
            seed=seed,
            block_bytes=block_bytes,
            extra=extra,
        )
        self._alone = Alone(
            module, make_optimizer, self.data.read, loss_of, self.data.samples, seed
        )
        self._expected: list[Step] = []
        self.checked = 0
        """Steps whose gradients this rank got."""
        self.jumps: list[tuple[int, int]] = []
        """From where to where this rank was moved."""

    def expected(self, step: int) -> Step:
        """What step number `step`, counted from 0, gives in one process."""
        while len(self._expected) <= step:
            self._expected.append(self._alone.step())
        return self._expected[step]

    def step(self) -> bool:
        """One step, compared."""
        coded, number = self.coded, self.coded.step_number
        if not coded.step(lambda block: self.data.read(number, block), self.loss):
            if not coded.is_over:
                assert coded.moved
                self.jumps.append((number, coded.step_number))
                self.assert_state()
            return False
        assert not coded.moved
        assert coded.step_number == number + 1
        expected = self.expected(number)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        assert_same([p.grad for p in trained], expected.gradients)
        assert coded.loss == expected.loss
        self.optimizer.step()
        self.checked += 1
        self.assert_state()
        return True

    def assert_state(self) -> None:
        """Compare module and optimizer with those of one process after as many steps."""
        if self.coded.step_number == 0:
            return
        expected = self.expected(self.coded.step_number - 1)
        assert_same([*self.module.buffers()], expected.buffers)
        assert_same([*self.module.parameters()], expected.parameters)
        assert_equal(self.optimizer.state_dict(), expected.optimizer)

    def to(self, steps: int) -> None:
        """Steps up to so many, and the end of the run."""
        while self.coded.step_number < steps and not self.coded.is_over:
            self.step()
        self.end()

    def end(self) -> None:
        """End the run. All ranks whose number of steps is the same have the same of everything."""
        self.coded.end()
        ends = all_gather(engine_of(self.world).control, (self.coded.step_number, self._checksum()))
        last = max(number for number, _ in ends)
        assert ends[0][0] == last  # a root is never left behind
        assert len({checksum for number, checksum in ends if number == last}) == 1

    def _checksum(self) -> int:
        state = self.optimizer.state_dict()["state"]
        moments = [t for each in state.values() for t in each.values() if torch.is_tensor(t)]
        checksum = 0
        for tensor in (*self.module.parameters(), *self.module.buffers(), *moments):
            checksum = zlib.crc32(bits(tensor.detach()), checksum)
        return checksum


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(
    found: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None]
) -> None:
    assert [g is None for g in found] == [e is None for e in expected]
    for gradient, reference in zip(found, expected, strict=True):
        if gradient is not None and reference is not None:
            assert gradient.shape == reference.shape
            assert gradient.dtype == reference.dtype
            assert bits(gradient.detach()) == bits(reference.detach())


def assert_equal(found: Any, expected: Any) -> None:
    """Of state dicts, bit by bit."""
    if torch.is_tensor(expected):
        assert_same([found], [expected])
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected
