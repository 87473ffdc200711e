"""Whether ranks hold the same data: a few samples, told in a few bytes.

Integers and text must be equal to the bit. Numbers with a fraction are told by a projection,
because processors of different kinds may compute the same data with other last bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch

from hpctrain.data.batches import MapStyle, is_indexed
from hpctrain.data.generators import OwnGenerators

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class SampleFacts:
    """What tells a sample from another.

    Attributes:
        exact: hash of all that must be equal.
        sizes: of each tensor with fractions, the sum of absolute values.
        projections: of each of those tensors, a sum with fixed weights.
    """

    exact: str
    sizes: tuple[float, ...]
    projections: tuple[float, ...]

    def agrees_with(self, other: SampleFacts) -> bool:
        """Whether both are of the same sample."""
        return self.exact == other.exact and all(
            abs(a - b) <= _TOLERANCE * size
            for a, b, size in zip(self.projections, other.projections, self.sizes, strict=True)
        )


@dataclass(frozen=True)
class DataFacts:
    """What tells a data set from another: its length, and samples by index.

    `length` is None for data that has no indices; a sample is None when it cannot be read, or is
    another one each time, as random augmentation makes it.
    """

    length: int | None
    samples: tuple[tuple[int, SampleFacts | None], ...] = ()


def describe_data(data: Any, repeats: int = 2) -> DataFacts:
    """Read the first, the middle and the last sample, `repeats` times. Leaves generators alone.

    All ranks draw alike meanwhile, so that random augmentation gives the same on all of them.
    """
    if not is_indexed(data):
        return DataFacts(None)
    length = len(data)
    generators = OwnGenerators(seed=0)
    with generators:
        samples = [(i, _read(data, i, repeats)) for i in sorted({0, length // 2, length - 1})]
    return DataFacts(length, tuple(samples if length else ()))


def difference(root: DataFacts, other: DataFacts) -> str | None:
    """The first way in which another rank's data is not the root's, or None."""
    if root.length != other.length:
        return f"has {_count(other)}, rank 0 has {_count(root)}"
    for (index, first), (_, second) in zip(root.samples, other.samples, strict=True):
        if first and second and not first.agrees_with(second):
            return f"has another sample {index} than rank 0"
    return None


def is_steady(facts: DataFacts) -> bool:
    """Whether every sample was the same each time that it was read."""
    return all(sample is not None for _, sample in facts.samples)


def _count(facts: DataFacts) -> str:
    return "data without a length" if facts.length is None else f"{facts.length} samples"


def _read(data: MapStyle, index: int, repeats: int) -> SampleFacts | None:
    try:
        found = [_sample_facts(data[index]) for _ in range(repeats)]
    except (Exception, SystemExit):
        return None  # training tells it better, should it read this sample
    return found[0] if all(found[0].agrees_with(again) for again in found) else None


def _sample_facts(sample: Any) -> SampleFacts:
    digest, sizes, projections = hashlib.sha256(), [], []
    for leaf in _leaves(sample):
        if isinstance(leaf, np.ndarray):
            digest.update(f"{leaf.dtype} {leaf.shape}".encode())
            if leaf.dtype.kind in "fc":
                values = np.nan_to_num(_as_doubles(leaf), posinf=1.0, neginf=-1.0)
                sizes.append(float(np.abs(values).sum()))
                projections.append(float(values @ np.cos(np.arange(values.size))))
            else:
                digest.update(np.ascontiguousarray(leaf).tobytes())
        else:
            digest.update(leaf.encode())
        digest.update(b"\0")
    return SampleFacts(digest.hexdigest(), tuple(sizes), tuple(projections))


def _as_doubles(array: np.ndarray) -> np.ndarray:
    flat = array.ravel()
    if array.dtype.kind == "c":
        flat = np.stack([flat.real, flat.imag]).ravel()
    return flat.astype(np.float64)


def _leaves(sample: Any) -> Iterator[np.ndarray | str]:
    """Arrays and text that a sample is made of; of what is neither, its type alone."""
    if isinstance(sample, torch.Tensor):
        value = sample.detach().cpu()
        narrow = value.is_floating_point() and value.dtype != torch.float64
        yield (value.float() if narrow else value).numpy()
    elif isinstance(sample, (np.ndarray, np.generic, float)):
        array = np.asarray(sample)
        yield type(sample).__name__ if array.dtype.hasobject else array
    elif isinstance(sample, (str, bytes, int, type(None))):
        yield repr(sample)
    elif isinstance(sample, Mapping):
        for key, value in sample.items():
            yield repr(key)
            yield from _leaves(value)
    elif isinstance(sample, Sequence):
        yield f"{len(sample)} values"
        for value in sample:
            yield from _leaves(value)
    elif is_dataclass(sample) and not isinstance(sample, type):
        for field in fields(sample):
            yield from _leaves(getattr(sample, field.name))
    else:
        yield type(sample).__name__
