"""A program whose ranks die, stop and are late, and which compares every step with one process.

Started by test_deaths.py and test_soak.py with a scenario: the steps go on until all that it tells
has happened and some steps have followed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from grad.coded.alone import Alone, Step

import hpctrain
from hpctrain.grad.coded import exchange

exchange.LEAST_BYTES = 1  # lend also what is small

WIDTH = 6
PER_BLOCK = 3
POLL_S = 1e-3
FOLLOWING = 20
"""Steps after all has happened."""
LIMIT_S = 60.0
"""All must have happened by then."""

Subset = tuple[torch.Tensor, float]


class Momentum:
    """SGD with momentum. torch.optim itself takes a second to be imported."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._moments = [torch.zeros_like(p) for p in self._parameters]

    @torch.no_grad()
    def step(self) -> None:
        for parameter, moment in zip(self._parameters, self._moments, strict=True):
            assert parameter.grad is not None
            moment.mul_(0.9).add_(parameter.grad)
            parameter.sub_(moment, alpha=0.05)

    def state_dict(self) -> dict[str, Any]:
        return {"moments": [m.clone() for m in self._moments]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moments = [m.clone() for m in state["moments"]]


class Net(nn.Module):
    """With what is drawn at random, and with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.Tanh())
        self.second = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 16), nn.Tanh())
        self.third = nn.Linear(16, 2)
        self.in_backward: Any = None
        """Called when the gradients of the layers above the first are there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.in_backward and x.requires_grad:
            x.register_hook(self.in_backward)
        out: torch.Tensor = self.third(self.second(x))
        return out


def loss_of(module: nn.Module, subset: Subset) -> torch.Tensor:
    x, share = subset
    out: torch.Tensor = module(x)
    return out.pow(2).mean() * share


class Lossy:
    """Trains, suffers and compares.

    Args:
        scenario: `faults`, each with a rank, the first step in which it may happen and what
            happens when: `compute`, `backward` or `done` to die, `stop` to stand still, `lie` to
            send wrong gradients; `coded`, the configuration; `seed`, of random delays in each step,
            if there are to be some.
        folder: where ranks leave word.
    """

    def __init__(self, scenario: dict[str, Any], folder: Path) -> None:
        self.folder = folder
        self.world = hpctrain.join()
        config = hpctrain.CodedConfig(**scenario["coded"])
        self.samples = (PER_BLOCK,) * config.blocks
        torch.manual_seed(1)
        self.module = Net().double()
        make: Any = Momentum
        self.optimizer = make(self.module.parameters())
        self._alone = Alone(self.module, make, self.read, loss_of, self.samples, 5)
        self._expected: tuple[int, Step | None] = (0, None)
        self.coded = hpctrain.Coded(
            self.module,
            self.optimizer,
            config,
            world=self.world,
            samples=self.samples,
            seed=5,
            block_bytes=200,
        )
        rank, faults = self.world.rank, scenario["faults"]
        self._fault = next((f for f in faults if f["rank"] == rank), None)
        self._deaths = {f["rank"] for f in faults if f["when"] not in ("stop", "lie")}
        self._stops = [f["rank"] for f in faults if f["when"] == "stop"]
        seed = scenario.get("seed")
        self._delays = None if seed is None else random.Random(1000 * seed + rank)
        self._late_s = 0.0
        self.checked = self.jumps = 0

    # ------------------------------------------------------------------ faults

    def _is_due(self, *when: str) -> bool:
        fault = self._fault
        return bool(fault and fault["when"] in when and self.coded.step_number + 1 >= fault["step"])

    def _die(self, *_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _stop(self) -> None:
        """Stand still, with all threads, for 3 s."""
        self._fault = None
        subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        (self.folder / f"continued-{self.world.rank}").touch()

    def _draw_delay(self) -> None:
        """How late this rank is in this step: mostly not at all, sometimes very much."""
        draw = self._delays
        if draw is not None:
            kind = draw.random()
            self._late_s = 0.0
            if kind < 0.1:
                self._late_s = 0.02
            elif kind < 0.3:
                self._late_s = draw.expovariate(1 / 0.003)
            elif kind < 0.302:
                self._late_s = 0.5
            elif kind > 0.5 and self.coded.step_number // 40 % self.world.size == self.world.rank:
                self._late_s = 0.01

    # ------------------------------------------------------------------ a step

    def read(self, step: int, block: int) -> Iterable[Subset]:
        generator = torch.Generator().manual_seed(100 * step + block)
        x = torch.randn(PER_BLOCK, WIDTH, generator=generator, dtype=torch.float64)
        yield x, 1 / len(self.samples)

    def loss(self, subset: Subset) -> torch.Tensor:
        if self._is_due("compute"):
            self._die()
        if self._is_due("stop"):
            self._stop()
        self.module.in_backward = self._die if self._is_due("backward") else None
        until_s = time.monotonic() + self._late_s
        while time.monotonic() < until_s and self.coded.is_wanted:
            time.sleep(POLL_S)
        return loss_of(self.module, subset) * (1.001 if self._is_due("lie") else 1)

    def step(self) -> None:
        """One step, compared bit by bit."""
        coded, number = self.coded, self.coded.step_number
        self._draw_delay()
        if coded.step(lambda block: self.read(number, block), self.loss):
            assert coded.step_number == number + 1
            expected = self.expected(number + 1)
            for parameter, gradient in zip(
                self.module.parameters(), expected.gradients, strict=True
            ):
                assert gradient is not None
                assert same(parameter.grad, gradient), f"gradient of step {number + 1}"
            assert coded.loss == expected.loss
            self.optimizer.step()
            self.checked += 1
        elif not coded.is_over:
            assert coded.moved
            self.jumps += 1
        if coded.step_number:
            self._compare_state()

    def expected(self, steps: int) -> Step:
        """What so many steps give in one process. Never asked for fewer than before."""
        done, last = self._expected
        while done < steps:
            last, done = self._alone.step(), done + 1
        assert last is not None and done == steps
        self._expected = done, last
        return last

    def _compare_state(self) -> None:
        expected = self.expected(self.coded.step_number)
        found = [*self.module.parameters(), *self.module.buffers()]
        for tensor, reference in zip(found, [*expected.parameters, *expected.buffers], strict=True):
            assert same(tensor, reference), f"state after step {self.coded.step_number}"
        for moment, reference in zip(
            self.optimizer.state_dict()["moments"], expected.optimizer["moments"], strict=True
        ):
            assert same(moment, reference), f"moments after step {self.coded.step_number}"

    # ------------------------------------------------------------------ the run

    def run(self) -> None:
        """Until rank 0 has seen all that was to happen."""
        coded = self.coded
        waits = coded._wait

        def wait() -> None:  # there is nothing left to compute: the last DONE has just gone
            if self._is_due("done") and coded.worked_on >= 0:
                self._die()
            waits()

        coded._wait = wait  # type: ignore[method-assign]
        (self.folder / f"pid-{self.world.rank}").write_text(str(os.getpid()))
        given_up_s = time.monotonic() + LIMIT_S
        last = None
        while not coded.is_over and coded.step_number != last:
            self.step()
            if (self.folder / f"continued-{self.world.rank}").exists() and self.jumps:
                (self.folder / f"rejoined-{self.world.rank}").touch()
            if self.world.rank == 0 and last is None and self._all_happened():
                last = coded.step_number + FOLLOWING
            assert last or self._delays or time.monotonic() < given_up_s, "not all happened"
        coded.end()
        told = {"rank": self.world.rank, "steps": coded.step_number, "checked": self.checked}
        (self.folder / f"end-{self.world.rank}").write_text(
            json.dumps(told | {"jumps": self.jumps})
        )

    def _all_happened(self) -> bool:
        if self._delays is not None:
            return (self.folder / "enough").exists()
        assert self.coded.coordinator
        rejoined = all((self.folder / f"rejoined-{rank}").exists() for rank in self._stops)
        return rejoined and self.coded.coordinator.dead >= self._deaths


def same(found: torch.Tensor | None, expected: torch.Tensor) -> bool:
    """Bit by bit, signs of zeros and all."""
    return found is not None and (
        found.detach().numpy().tobytes() == expected.detach().numpy().tobytes()
    )


if __name__ == "__main__":
    Lossy(json.loads(sys.argv[1]), Path(sys.argv[2])).run()
