"""The random generators of a process: seeded, kept, and put aside."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from types import TracebackType
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Seed the generators of torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def generator_state() -> dict[str, Any]:
    """The state of every random generator of this process, as tensors and plain values."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "name": numpy_state["bit_generator"],
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "position": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_generators(state: Mapping[str, Any]) -> None:
    """Set every random generator of this process to a state from `generator_state`."""
    python, numpy_state = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(
        {
            "bit_generator": numpy_state["name"],
            "state": {
                "key": numpy_state["key"].numpy().astype(np.uint32),
                "pos": numpy_state["position"],
            },
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def kept_generators() -> Iterator[None]:
    """Have the program's generators, also those of CUDA devices, go on afterwards as before."""
    before, on_device = _take(), _take_cuda()
    try:
        yield
    finally:
        _put(before)
        if on_device:
            torch.cuda.set_rng_state_all(on_device)


def seed_by(*key: int) -> None:
    """Have what is drawn from now on be the same for the same key, on any rank."""
    text = " ".join(map(str, key)).encode()  # NumPy's SeedSequence takes longer than the seeding
    _seed_host(int.from_bytes(blake2b(text, digest_size=8).digest(), "little"))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(torch.initial_seed())


@contextmanager
def drawn_from(*key: int) -> Iterator[None]:
    """Have what draws inside a `with` block draw the same for the same key, on any rank."""
    with kept_generators():
        seed_by(*key)
        yield


class OwnGenerators:
    """Generators for one purpose: what draws inside a `with` block draws from them alone.

    They go on where the last block left them; those of the rest of the program are untouched.
    Only generators of the host are exchanged.
    """

    def __init__(self, seed: int) -> None:
        others = _take()
        _seed_host(seed)
        self._aside = _take()
        _put(others)

    def __enter__(self) -> None:
        self._swap()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._swap()

    def _swap(self) -> None:
        mine, self._aside = self._aside, _take()
        _put(mine)


def _seed_host(seed: int) -> None:
    """As `seed_generators`, but for devices; torch's own function takes a stack trace for those."""
    torch.default_generator.manual_seed(seed % 2**63)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _take() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _put(state: tuple[Any, Any, torch.Tensor]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def _take_cuda() -> list[torch.Tensor]:
    """States of the generators of CUDA devices, if any is in use."""
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
