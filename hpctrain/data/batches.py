"""Which samples of which step belong to which rank.

The global batch is fixed by the job, whatever the number of ranks. Sample number n of a run is
sample n mod L of epoch n div L, in an order that depends on seed and epoch alone. So a position
is one integer, every sample comes exactly once an epoch, and a run resumed on another number of
ranks continues with the right sample.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch.utils.data import IterableDataset, default_collate

from hpctrain.data.generators import OwnGenerators
from hpctrain.errors import JobError, TrainingError

Collate = Callable[[list[Any]], Any]


class MapStyle(Protocol):
    """A data set whose samples can be had by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True)
class Share:
    """What one rank computes of one step.

    Attributes:
        samples: number of this rank's samples.
        total: number of samples of the whole step.
        sizes: number of samples in each of this rank's subsets.
        subsets: the subsets, collated, each read when it is asked for.
    """

    samples: int
    total: int
    sizes: tuple[int, ...]
    subsets: Iterator[Any]

    @property
    def weight(self) -> float:
        """This rank's part of the step."""
        return self.samples / self.total


_PLACE = "train_data() of the job module"


def is_indexed(data: Any) -> bool:
    """Whether samples can be had by index. torch gives iterable data sets a useless __getitem__."""
    return (
        not isinstance(data, IterableDataset)
        and hasattr(data, "__getitem__")
        and hasattr(data, "__len__")
    )


def split_evenly(count: int, parts: int) -> list[int]:
    """Sizes of `parts` parts of `count` things; they differ by at most one, larger ones first."""
    whole, left = divmod(count, parts)
    return [whole + (index < left) for index in range(parts)]


def subset_sizes(samples: int, micro_batch: int) -> tuple[int, ...]:
    """Sizes of the subsets into which a rank's samples are cut; `micro_batch` 0 means one."""
    if samples == 0:
        return ()
    if micro_batch == 0:
        return (samples,)
    return tuple(split_evenly(samples, -(-samples // micro_batch)))


class Batches:
    """Cuts a data set into global batches, and each of them into the shares of the ranks.

    Args:
        data: a map-style data set, or an iterable of samples. An iterable is read by every rank,
            which keeps its own samples and passes over the others'. What it draws while it is
            read comes from generators of its own, seeded with `seed`: all ranks read the same
            samples, and so does a resumed run.
        batch: samples of a global batch.
        micro_batch: largest subset that a rank holds in memory at a time; 0 for its whole share.
        seed: of the order of samples.
        shuffle: whether the order of a map-style data set is random, anew in each epoch.
        rank: this rank.
        size: number of ranks.
        collate: makes a batch of a list of samples; torch's default for None.
        may_repeat: whether the last step may be asked for again, on other ranks: samples of an
            iterable are then kept for as long.

    Raises:
        JobError: the data set is empty or is neither map-style nor iterable.
    """

    def __init__(
        self,
        data: MapStyle | Iterable[Any],
        *,
        batch: int,
        micro_batch: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        size: int = 1,
        collate: Collate | None = None,
        may_repeat: bool = False,
    ) -> None:
        self._batch = batch
        self._micro_batch = micro_batch
        self._collate = collate or default_collate
        self.deal(rank, size)
        self._source: _Indexed | _Streamed
        if is_indexed(data):
            self._source = _Indexed(cast(MapStyle, data), seed, shuffle)
        elif isinstance(data, Iterable):
            self._source = _Streamed(data, seed, batch if may_repeat else 0)
        else:
            raise JobError(
                "the training data can be neither indexed nor iterated",
                value=type(data).__name__,
                allowed="an object with __len__ and __getitem__, or with __iter__",
                where=_PLACE,
                everywhere=True,
            )

    def deal(self, rank: int, size: int) -> None:
        """Be the part of this rank among so many, from the next share on."""
        self._sizes = split_evenly(self._batch, size)
        self._first = sum(self._sizes[:rank])
        self._rank = rank

    def share(self, step: int) -> Share:
        """This rank's part of step `step`, counted from 0. Reads nothing yet."""
        samples = self._sizes[self._rank]
        sizes = subset_sizes(samples, self._micro_batch)
        return Share(samples, self._batch, sizes, self._subsets(step, sizes))

    def read(self, position: int, count: int) -> Any:
        """A collated batch of `count` samples from `position` on, counted over the whole run."""
        return self._collate(self._source.read(position, count))

    def _subsets(self, step: int, sizes: Sequence[int]) -> Iterator[Any]:
        position = step * self._batch + self._first
        for size in sizes:
            yield self.read(position, size)
            position += size


class _Indexed:
    """Samples by index, in an order given by seed and epoch."""

    def __init__(self, data: MapStyle, seed: int, shuffle: bool) -> None:
        self._data = data
        self._length = len(data)
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._order: Any = range(self._length)
        if self._length == 0:
            raise _empty(everywhere=True)

    def read(self, position: int, count: int) -> list[Any]:
        indices = [self._index(position + offset) for offset in range(count)]
        batched = getattr(self._data, "__getitems__", None)  # torch's protocol for whole batches
        if batched is not None:
            return cast(list[Any], batched(indices))
        return [self._data[index] for index in indices]

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self._length)
        if self._shuffle and epoch != self._epoch:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**64)
            self._order = torch.randperm(self._length, generator=generator).numpy()
            self._epoch = epoch
        return int(self._order[offset])


class _Streamed:
    """Samples in the order in which an iterable gives them; started again at its end.

    The last `kept` of them can be read again.
    """

    def __init__(self, data: Iterable[Any], seed: int, kept: int = 0) -> None:
        self._data = data
        self._seed = seed
        self._kept: deque[Any] = deque(maxlen=kept)
        self._start()

    def read(self, position: int, count: int) -> list[Any]:
        if position < self._position - len(self._kept):
            if self._stream is self._data:
                raise TrainingError("an iterator cannot be read back", value=position)
            self._start()
        again = list(self._kept)[len(self._kept) - max(0, self._position - position) :][:count]
        with self._generators:
            while self._position < position:
                self._next()
            return again + [self._next() for _ in range(count - len(again))]

    def _start(self) -> None:
        self._generators = OwnGenerators(self._seed)
        with self._generators:
            self._stream = iter(self._data)
        self._position = 0
        self._kept.clear()

    def _next(self) -> Any:
        for _ in range(2):
            for sample in self._stream:
                self._position += 1
                self._kept.append(sample)
                return sample
            self._stream = iter(self._data)
        if self._position == 0:
            # Not everywhere: ranks without a sample of this step do not meet it.
            raise _empty(everywhere=False)
        raise TrainingError(
            f"the training data ended after {self._position} samples",
            where=_PLACE,
            fix="give an iterable that can be iterated again, or set fewer train.steps",
        )


def _empty(everywhere: bool) -> JobError:
    return JobError(
        "the training data is empty",
        where=_PLACE,
        fix="return at least one sample: look at the paths and filters that it reads with",
        everywhere=everywhere,
    )
