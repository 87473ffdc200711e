"""Accumulation over streamed subsets: the whole batch's gradient, one subset in memory."""

from __future__ import annotations

import gc
import resource
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from hpctrain import DataParallel, ExchangeConfig, World, accumulate
from hpctrain.errors import TrainingError

pytestmark = pytest.mark.mpi

CONFIG = ExchangeConfig(progress="hooks", block_bytes=100)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def samples(count: int) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [3, 1, 2, 5], [2, 0, 0, 1]], ids=str)
@pytest.mark.parametrize("overlap", [True, False])
def test_sum_over_subsets_is_the_gradient_of_the_batch(
    world: World, counts: list[int], overlap: bool
) -> None:
    counts = counts[: world.size]
    config = ExchangeConfig(progress="hooks", block_bytes=100, overlap=overlap)
    parallel, alone = DataParallel(model(), config), model()
    data = samples(2 * sum(counts))
    for _ in range(3):
        first = 2 * sum(counts[: world.rank])
        mine = iter(data[first : first + 2 * counts[world.rank]].split(2))

        def backward(subset: torch.Tensor) -> None:
            (parallel(subset).sum() / len(data) * world.size).backward()

        parallel.zero_grad()
        accumulate(parallel, mine, counts[world.rank], backward)
        alone.zero_grad()
        alone(data).mean().backward()
        for found, expected in zip(parallel.module.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(found.grad, expected.grad, rtol=1e-12, atol=1e-15)


def test_blocks_go_on_the_wire_with_the_last_subset(world: World) -> None:
    parallel = DataParallel(model(), CONFIG)
    channel = parallel.exchange.channel
    posted = []

    def backward(subset: torch.Tensor) -> None:
        parallel(subset).sum().backward()
        posted.append(channel.posted)

    for _ in range(2):
        accumulate(parallel, samples(6).split(2), 3, backward)
    blocks = len(parallel.exchange.blocks)
    assert blocks > 1
    assert posted[:2] == [0, 0]
    before = posted[2]  # the first step also tries ways to sum
    assert posted[3:] == [before, before, before + blocks]


def test_a_subset_is_freed_before_the_next_is_read(world: World) -> None:
    parallel = DataParallel(model(), CONFIG)
    alive: list[weakref.ref[torch.Tensor]] = []

    def stream() -> Iterator[torch.Tensor]:
        for _ in range(4):
            gc.collect()
            assert all(reference() is None for reference in alive)
            subset = samples(2)
            alive.append(weakref.ref(subset))
            yield subset
            del subset

    accumulate(parallel, stream(), 4, lambda subset: parallel(subset).sum().backward())
    assert len(alive) == 4


def test_peak_memory_does_not_grow_with_the_number_of_subsets(world: World) -> None:
    parallel = DataParallel(nn.Linear(4000, 1).double(), CONFIG)

    def subsets(count: int) -> Iterator[torch.Tensor]:
        for _ in range(count):
            # 38 MB: too large for malloc to keep, so that what is freed leaves the process.
            yield torch.ones(1200, 4000, dtype=torch.float64)

    def backward(subset: torch.Tensor) -> None:
        parallel(subset).sum().backward()

    def peak_bytes() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    accumulate(parallel, subsets(2), 2, backward)
    before = peak_bytes()
    accumulate(parallel, subsets(6), 6, backward)
    # Four more subsets, if they or their graphs stayed, would be over 150 MB.
    assert peak_bytes() - before < 76_000_000


def test_nothing_is_read_beyond_the_count(world: World) -> None:
    parallel = DataParallel(model(), CONFIG)
    stream = iter(samples(10).split(2))
    accumulate(parallel, stream, 2, lambda subset: parallel(subset).sum().backward())
    assert len(list(stream)) == 3


def test_stream_that_ends_early_is_told(world: World) -> None:
    parallel = DataParallel(model(), CONFIG)
    with pytest.raises(TrainingError, match=r"ended after 1 of 3 subsets"):
        accumulate(parallel, samples(2).split(2), 3, lambda s: parallel(s).sum().backward())
