"""Which samples of which step belong to which rank.

The global batch is fixed by the job, whatever the number of ranks. Sample number n of a run is
sample n mod L of epoch n div L, in an order that depends on seed and epoch alone. So a position
is one integer, every sample comes exactly once an epoch, and a run resumed on another number of
ranks continues with the right sample.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch.utils.data import IterableDataset, default_collate

from hpctrain.data.generators import OwnGenerators
from hpctrain.errors import HpctrainError, JobError, TrainingError, shortened, shown, told

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


@dataclass(frozen=True)
class _Name:
    """What a data set is called."""

    function: str

    @property
    def data(self) -> str:
        return f"the {'training' if self.function == 'train_data' else 'validation'} data"

    @property
    def place(self) -> str:
        return f"{self.function}() of the job module"


def is_indexed(data: Any) -> bool:
    """Whether samples can be had by index. torch gives iterable data sets a useless __getitem__."""
    return (
        not isinstance(data, IterableDataset)
        and hasattr(data, "__getitem__")
        and hasattr(data, "__len__")
    )


def data_error(data: Any, name: str = "train_data", where: str | None = None) -> JobError | None:
    """What keeps a data set from being read, or None. Reads no sample.

    Args:
        data: what the job's function has returned.
        name: of that function; `validation_data` must have indices.
        where: place of that function.
    """
    what, where = _Name(name).data, where or _Name(name).place

    def error(text: str, fix: str, **parts: Any) -> JobError:
        return JobError(f"{what} {text}", where=where, fix=fix, everywhere=True, **parts)

    instance = f"return an instance of it: {getattr(data, '__name__', '')}(...)"
    if isinstance(data, type):
        return error("is a class, and not an instance of it", instance, value=data)
    if isinstance(data, str):
        return error("is a string", "return the samples, and not the path to them", value=data)
    if isinstance(data, Mapping) and any(i not in data for i in range(len(data))):
        fix = "return a list of samples, each of which may be a dict"
        return error("is a dict whose keys are not the numbers of its samples", fix)
    if is_indexed(data):
        try:
            length = len(data)
        except Exception as failure:
            return error(f"has no length: {told(failure)}", "mend its __len__")
        if length == 0 and name == "train_data":
            fix = "return at least one sample: look at the paths and filters that it reads with"
            return error("is empty", fix)
        return None
    if name != "train_data":
        fix = "return a list of it, if it fits in memory"
        allowed = "an object with __len__ and __getitem__"
        return error("has no indices", fix, value=type(data).__name__, allowed=allowed)
    if isinstance(data, Iterable):
        return None
    allowed = "an object with __len__ and __getitem__, or with __iter__"
    value = type(data).__name__
    return error("can be neither indexed nor iterated", "return one", value=value, allowed=allowed)


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
        name: the function that has made the data, for messages.
        may_repeat: whether the last step may be asked for again, on other ranks: samples of an
            iterable are then kept for as long.

    Raises:
        JobError: the data set cannot be read; see `data_error`.
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
        name: str = "train_data",
        may_repeat: bool = False,
    ) -> None:
        self._name = _Name(name)
        self._batch = batch
        self._micro_batch = micro_batch
        self._collate = collate or default_collate
        self.deal(rank, size)
        if error := data_error(data, name):
            raise error
        self._source: _Indexed | _Streamed
        if is_indexed(data):
            self._source = _Indexed(cast(MapStyle, data), seed, shuffle, self._name)
        else:
            kept = batch if may_repeat else 0
            self._source = _Streamed(cast("Iterable[Any]", data), seed, self._name, kept)

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
        """A collated batch of `count` samples from `position` on, counted over the whole run.

        Raises:
            JobError: a sample that should be there is not, or samples make no batch.
            TrainingError: the data set or `collate` fails; names the samples.
        """
        samples, names = self._source.read(position, count)
        try:
            return self._collate(samples)
        except HpctrainError:
            raise
        except Exception as error:
            named = f"samples {shortened(', '.join(map(str, names)), 80)}"
            if self._collate is not default_collate:
                raise TrainingError(f"collate() failed on {named}: {told(error)}") from error
            if isinstance(error, MemoryError) or "allocate memory" in str(error):
                raise JobError(
                    f"{count} samples do not fit in memory at a time: {told(error)}",
                    where=self._name.place,
                    fix="set train.micro_batch to fewer, start more ranks, or lower train.batch",
                ) from None
            raise JobError(
                f"{named} of {self._name.data} make no batch: {_misfit(samples, names, error)}",
                where=self._name.place,
                fix="return tensors, arrays, numbers, or dicts and tuples of them, of the same "
                "shapes in all samples; or define collate(samples) in the job module",
            ) from None

    def _subsets(self, step: int, sizes: Sequence[int]) -> Iterator[Any]:
        position = step * self._batch + self._first
        for size in sizes:
            yield self.read(position, size)
            position += size


class _Indexed:
    """Samples by index, in an order given by seed and epoch."""

    def __init__(self, data: MapStyle, seed: int, shuffle: bool, name: _Name) -> None:
        self._name = name
        self._data = data
        self._length = len(data)
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._order: Any = range(self._length)

    def read(self, position: int, count: int) -> tuple[list[Any], list[int]]:
        indices = [self._index(position + offset) for offset in range(count)]
        batched = getattr(self._data, "__getitems__", None)  # torch's protocol for whole batches
        if batched is not None:
            with self._failing(f"samples {shortened(', '.join(map(str, indices)), 80)}", indices):
                return cast(list[Any], batched(indices)), indices
        samples = []
        for index in indices:
            with self._failing(f"sample {index}", [index]):
                samples.append(self._data[index])
        return samples, indices

    @contextmanager
    def _failing(self, what: str, indices: list[int]) -> Iterator[None]:
        """Name the samples that the data set fails to give."""
        try:
            yield
        except HpctrainError:
            raise
        except Exception as error:
            length = self._length_now() if isinstance(error, LookupError) else self._length
            if length <= max(indices):
                raise JobError(
                    f"{what} of {self._name.data} is missing: it had {self._length} samples at "
                    f"the start, and has {length} now",
                    where=self._name.place,
                    fix="have its length stay the same while it is used",
                ) from None
            if isinstance(error, IndexError):
                raise JobError(
                    f"{what} of {self._name.data} is missing, though its length is {length}: "
                    f"{told(error)}",
                    where=_place_of(error),
                    fix="have __len__ count what __getitem__ can give",
                ) from None
            raise TrainingError(f"{what} of {self._name.data} failed: {told(error)}") from error

    def _length_now(self) -> int:
        try:
            return len(self._data)
        except Exception:
            return 0

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self._length)
        if self._shuffle and epoch != self._epoch:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**64)
            try:
                self._order = torch.randperm(self._length, generator=generator).numpy()
            except RuntimeError as error:  # of 8 bytes a sample
                raise JobError(
                    f"the order of {self._length} samples does not fit in memory: {told(error)}",
                    where=self._name.place,
                    fix="set train.shuffle = false",
                ) from None
            self._epoch = epoch
        return int(self._order[offset])


class _Streamed:
    """Samples in the order in which an iterable gives them; started again at its end.

    The last `kept` of them can be read again.
    """

    def __init__(self, data: Iterable[Any], seed: int, name: _Name, kept: int = 0) -> None:
        self._name = name
        self._data = data
        self._seed = seed
        self._kept: deque[Any] = deque(maxlen=kept)
        self._start()

    def read(self, position: int, count: int) -> tuple[list[Any], range]:
        if position < self._position - len(self._kept):
            if self._stream is self._data:
                raise TrainingError("an iterator cannot be read back", value=position)
            self._start()
        again = list(self._kept)[len(self._kept) - max(0, self._position - position) :][:count]
        with self._generators:
            while self._position < position:
                self._next()
            samples = again + [self._next() for _ in range(count - len(again))]
            return samples, range(position, position + count)

    def _start(self) -> None:
        self._generators = OwnGenerators(self._seed)
        self._position = 0
        self._kept.clear()
        with self._generators:
            self._stream = self._begun()

    def _begun(self) -> Iterator[Any]:
        try:
            return iter(self._data)
        except Exception as error:
            raise TrainingError(f"{self._name.data} failed to begin: {told(error)}") from error

    def _next(self) -> Any:
        for _ in range(2):
            try:
                for sample in self._stream:
                    self._position += 1
                    self._kept.append(sample)
                    return sample
            except Exception as error:
                raise TrainingError(
                    f"{self._name.data} failed after {self._position} samples: {told(error)}"
                ) from error
            self._stream = self._begun()
        if self._position == 0:
            # Not everywhere: ranks without a sample of this step do not meet it.
            raise JobError(
                f"{self._name.data} is empty",
                where=self._name.place,
                fix="give at least one sample: look at the paths and filters that it reads with",
            )
        raise JobError(
            f"{self._name.data} ended after {self._position} samples",
            where=self._name.place,
            fix="give an iterable that can be iterated again, or set fewer train.steps",
        )


def _place_of(error: Exception) -> str | None:
    """`data.py:12 in __getitem__`: where an exception was raised, as far as that is known."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else None


def _misfit(samples: Sequence[Any], names: Sequence[int], error: Exception) -> str:
    """Which sample is of another form than the first, or else what torch says."""
    try:
        forms = [_form(sample) for sample in samples]
    except Exception:  # cyclic ones, or no list of samples at all
        return told(error)
    for name, form in zip(names, forms, strict=False):
        if form != forms[0]:
            return f"sample {names[0]} is {shortened(forms[0])}, sample {name} {shortened(form)}"
    return told(error)


def _form(sample: Any) -> str:
    """Types and shapes of what a sample is made of."""
    if isinstance(sample, Mapping):
        return f"{{{', '.join(f'{shown(k, 40)}: {_form(v)}' for k, v in sample.items())}}}"
    if isinstance(sample, (tuple, list)):
        return f"({', '.join(map(_form, sample))})"
    shape = getattr(sample, "shape", None)
    kind = type(sample).__name__
    return kind if shape is None else f"{kind} of shape {tuple(shape)}"
