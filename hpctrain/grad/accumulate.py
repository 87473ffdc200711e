"""Gradient accumulation over streamed subsets of a rank's samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import TypeVar

from hpctrain.errors import TrainingError
from hpctrain.grad.data_parallel import DataParallel
from hpctrain.world import World

Subset = TypeVar("Subset")


def accumulate(
    model: DataParallel,
    subsets: Iterable[Subset],
    count: int,
    backward: Callable[[Subset], None],
) -> None:
    """Add up the gradients of `count` subsets and average the sum over ranks. Collective.

    One subset is read at a time and let go of before the next is read, so that peak memory does
    not grow with their number. Blocks go on the wire during the backward of the last subset.
    Ranks may have different numbers of subsets, also none.

    Args:
        model: whose gradients are averaged.
        subsets: read lazily; nothing is read after `count`.
        count: number of subsets of this rank.
        backward: computes the loss of a subset and calls `backward` on it once. Weighting is its
            own: gradients are added up as they are, then divided by the number of ranks.

    Raises:
        TrainingError: fewer than `count` subsets came.
    """
    if count == 0:
        model.exchange.finish()
        return
    stream = streamed(subsets, count, model.world)
    for index in range(count):
        subset = next(stream)
        with nullcontext() if index == count - 1 else model.no_sync():
            backward(subset)
        del subset


def streamed(subsets: Iterable[Subset], count: int, world: World) -> Iterator[Subset]:
    """So many subsets, each let go of before the next is read.

    Raises:
        TrainingError: fewer came.
    """
    stream = iter(subsets)
    for index in range(count):
        try:
            subset = next(stream)
        except StopIteration:
            raise TrainingError(
                f"the data ended after {index} of {count} subsets of a step",
                where=f"{world.name_of(world.rank)}, {world.position}",
            ) from None
        yield subset
        del subset
