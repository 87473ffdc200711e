from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from hpctrain.data.agreement import describe_data, difference, is_steady
from hpctrain.data.generators import seed_generators


def told(root: Any, other: Any) -> str | None:
    return difference(describe_data(root), describe_data(other))


@dataclass
class Pair:
    x: torch.Tensor
    name: str


def tensors(seed: int) -> torch.Tensor:
    return torch.randn(5, generator=torch.Generator().manual_seed(seed))


KINDS: dict[str, Callable[[int], Any]] = {
    "tensor": tensors,
    "float64": lambda seed: tensors(seed).double(),
    "bfloat16": lambda seed: tensors(seed).bfloat16(),
    "complex": lambda seed: tensors(seed) * 1j,
    "integers": lambda seed: torch.tensor([seed, 2]),
    "array": lambda seed: tensors(seed).numpy(),
    "bytes": lambda seed: np.array([seed], np.uint8),
    "scalar": lambda seed: np.float32(seed),
    "float": lambda seed: seed + 0.5,
    "int": lambda seed: seed,
    "text": str,
    "none or text": lambda seed: None if seed else "a",
    "tuple": lambda seed: (torch.ones(2), seed),
    "dict": lambda seed: {"x": [tensors(seed)]},
    "dataclass": lambda seed: Pair(torch.ones(2), f"{seed}"),
    "not a number": lambda seed: torch.tensor([float("nan"), float(seed)]),
    "shape": lambda seed: torch.ones(2 + seed),
}
kinds = pytest.mark.parametrize("sample", KINDS.values(), ids=KINDS)


@kinds
@pytest.mark.parametrize("index", [0, 4, 8])
def test_another_sample_is_found(sample: Callable[[int], Any], index: int) -> None:
    root, other = ([sample(0) for _ in range(9)] for _ in range(2))
    assert told(root, other) is None
    other[index] = sample(1)
    assert told(root, other) == f"has another sample {index} than rank 0"


def test_another_length_is_found() -> None:
    assert told([1, 2], [1, 2, 3]) == "has 3 samples, rank 0 has 2 samples"
    assert told([1], []) == "has 0 samples, rank 0 has 1 samples"
    assert told([1], iter([1])) == "has data without a length, rank 0 has 1 samples"


def test_last_bits_of_another_processor_are_no_difference() -> None:
    root = [tensors(seed) for seed in range(3)]
    other = [x * (1 + 1e-6) for x in root]
    assert not torch.equal(root[0], other[0])
    assert told(root, other) is None


class Odd:
    """A sample that tells nothing of itself."""


def test_what_cannot_be_told_is_passed_over() -> None:
    assert told([Odd()], [Odd()]) is None
    assert told([(Odd(), 1)], [(Odd(), 2)]) == "has another sample 0 than rank 0"


class Augmented:
    """Adds noise from some generator."""

    def __init__(self, noise: Callable[[], float]) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        return index + self.noise()


def test_noise_of_its_own_generator_is_not_steady() -> None:
    facts = describe_data(Augmented(random.Random().random))
    assert not is_steady(facts)
    assert difference(facts, describe_data(Augmented(random.Random().random))) is None


@pytest.mark.parametrize("noise", [random.random, np.random.rand, lambda: float(torch.rand(()))])
def test_noise_of_common_generators_is_no_difference(noise: Callable[[], float]) -> None:
    """Flipped in half of the cases, two readings may be equal by chance."""
    data = Augmented(lambda: float(noise() < 0.5))
    seed_generators(1)
    mine = describe_data(data)
    after = noise()
    seed_generators(2)
    assert difference(mine, describe_data(data)) is None
    seed_generators(1)
    assert noise() == after  # they were left alone


def test_data_that_cannot_be_read_is_left_to_training() -> None:
    class Broken(Augmented):
        def __getitem__(self, index: int) -> float:
            raise OSError("gone")

    assert told(Broken(random.random), Broken(random.random)) is None


def test_iterables_are_not_read() -> None:
    def stream() -> Iterator[int]:
        raise AssertionError
        yield 1

    assert told(stream(), stream()) is None
