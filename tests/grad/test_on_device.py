"""Models on a device: the same bits as on the host, late kernels and copies or not."""

from __future__ import annotations

import random

import pytest
import torch
from devices import gpu
from grad.plain import in_turns
from late_device import LateDevice
from torch import nn

from hpctrain import DataParallel, ExchangeConfig, World
from hpctrain.comm.reducer import OnDevice
from hpctrain.errors import ExchangeError
from hpctrain.grad import overlap

pytestmark = pytest.mark.mpi

WIDTH = 8


class Net(nn.Module):
    """With statistics, a branch that ranks take in turn, and a layer that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)  # its gradient would be nothing but noise
        self.norm = nn.BatchNorm1d(WIDTH)
        self.branch = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, takes_branch: bool) -> torch.Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        return self.branch(x) if takes_branch else x


def trained(
    world: World,
    options: ExchangeConfig,
    where: torch.device,
    steps: int = 6,
    takes_turns: bool = False,
) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = DataParallel(Net().double().to(where), options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if options.next_forward:
        model.overlap_step(optimizer)
    for step in range(steps):
        x = torch.randn(
            4,
            WIDTH,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(step + 9 * world.rank),
        )
        model(x.to(where), step % world.size == world.rank).square().sum().backward()
        assert all(p.grad is None for p in model.module.unused.parameters()) or (
            options.next_forward
        )
        optimizer.step()
        optimizer.zero_grad()
        if takes_turns and world.size > 1:
            model.wait_for_gradients()
            counts = model.exchange.reducer.part_counts
            assert max(counts) > 2
            model.exchange.send_in(in_turns(counts, random.Random(step)))
    model.check_in_sync()
    norm = model.exchange.gradient_norm()
    return {**model.module.state_dict(), "norm": norm}


CASES = [
    ExchangeConfig(block_bytes=400, next_forward=next_forward, way=way, wire=wire)
    for next_forward in (False, True)
    for way, wire in (("auto", "same"), ("direct", "bfloat16"))
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: f"{o.way}-{o.wire}-{o.next_forward}")
def test_late_device_trains_to_the_bits_of_the_host(
    world: World, options: ExchangeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = torch.device("cpu")
    expected = trained(world, options, host)
    for stays in (False, True):
        there = OnDevice(host, LateDevice(program_waits=True), stays)
        monkeypatch.setattr(overlap, "device_of", lambda *_, there=there: there)
        found = trained(world, options, host)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("stays", [False, True])
def test_late_device_sends_parts_of_blocks_in_turns(
    world: World, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ExchangeConfig(
        block_bytes=400, chunk_bytes=64, next_forward=True, way="direct", progress="hooks"
    )
    host = torch.device("cpu")
    expected = trained(world, options, host)
    there = OnDevice(host, LateDevice(program_waits=True), stays)
    monkeypatch.setattr(overlap, "device_of", lambda *_: there)
    found = trained(world, options, host, takes_turns=True)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@gpu
@pytest.mark.parametrize("options", CASES, ids=lambda o: f"{o.way}-{o.wire}-{o.next_forward}")
def test_gpu_trains_to_the_values_of_the_host(world: World, options: ExchangeConfig) -> None:
    where = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    expected = trained(world, options, torch.device("cpu"))
    with torch.cuda.device(where):
        found = trained(world, options, where)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-9, atol=1e-9)


def test_model_on_two_devices_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ExchangeError, match=r"1\.weight is on meta"):
        DataParallel(model)
