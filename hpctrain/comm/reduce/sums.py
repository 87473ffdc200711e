"""Sums in rank order, piece by piece: the arithmetic that the ways to reduce a slab share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

PIECE_BYTES = 1 << 17
"""Largest piece of a part that is summed at a time."""
CACHE_BYTES = 1 << 20
"""The same piece of all parts together, so that it stays in a core's own cache in between."""
SMALLEST_PIECE_BYTES = 1 << 15


def slices(count: int, size: int, multiple: int = 1) -> list[slice]:
    """Cut `count` elements into `size` slices, as even as can be; some may be empty.

    Cuts inside lie at multiples of `multiple` elements, for example of a cache line.
    """
    units = -(-count // multiple)
    cuts = [min(count, units * index // size * multiple) for index in range(size + 1)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]


def piece_bytes(parts: int) -> int:
    """Bytes of each of `parts` parts that are summed at a time."""
    return max(SMALLEST_PIECE_BYTES, min(PIECE_BYTES, CACHE_BYTES // max(1, parts)))


class SumInOrder:
    """Writes ``scale * (((parts[0] + parts[1]) + parts[2]) + ...)`` to all of `outs` when called.

    Works piece by piece, so that a piece stays in the core's own cache between additions. 16-bit
    parts are summed in float32 and rounded once. Outs may be parts; the first part may be
    overwritten.
    """

    def __init__(
        self, outs: Sequence[torch.Tensor], parts: Sequence[torch.Tensor], scale: float
    ) -> None:
        count, itemsize = outs[0].numel(), outs[0].element_size()
        if itemsize == 2:
            step = piece_bytes(len(parts)) // 4
            wide = torch.empty(min(step, count), dtype=torch.float32)
            kind: Callable[..., _Piece] = partial(_WidePiece, wide, scale)
        else:
            step = piece_bytes(len(parts)) // itemsize
            kind = partial(_NumpyPiece, scale)
        self._pieces = [
            kind(
                [out[start : start + step] for out in outs],
                [part[start : start + step] for part in parts],
            )
            for start in range(0, count, step)
        ]

    def __call__(self) -> None:
        """Sum what the parts hold now."""
        for piece in self._pieces:
            piece.sum()


class _Piece(Protocol):
    def sum(self) -> None:
        """Sum and store a piece of each part."""


class _NumpyPiece:
    """float32 and float64 by NumPy, whose calls cost less than torch's on pieces that small."""

    __slots__ = ("_copies", "_first", "_last", "_middle", "_out", "_scale")

    def __init__(
        self, scale: float, outs: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]
    ) -> None:
        self._out, *self._copies = (out.numpy() for out in outs)
        first, *others = (part.numpy() for part in parts)
        self._first = first
        self._middle, self._last = others[:-1], others[-1] if others else None
        self._scale = self._out.dtype.type(scale)

    def sum(self) -> None:
        out, total = self._out, self._first
        for part in self._middle:
            np.add(total, part, out=total)
        if self._last is None:
            np.multiply(total, self._scale, out=out)
        else:
            np.add(total, self._last, out=out)
            if self._scale != 1:
                np.multiply(out, self._scale, out=out)
        for copy in self._copies:
            np.copyto(copy, out)


class _WidePiece:
    """16-bit elements by way of float32."""

    __slots__ = ("_copies", "_out", "_parts", "_scale", "_wide")

    def __init__(
        self,
        wide: torch.Tensor,
        scale: float,
        outs: Sequence[torch.Tensor],
        parts: Sequence[torch.Tensor],
    ) -> None:
        self._out, *self._copies = outs
        self._parts = parts
        self._wide = wide[: self._out.numel()]
        self._scale = scale

    def sum(self) -> None:
        first, *others = self._parts
        self._wide.copy_(first)
        for part in others:
            self._wide.add_(part)
        if self._scale != 1:
            self._wide.mul_(self._scale)
        self._out.copy_(self._wide)
        for copy in self._copies:
            copy.copy_(self._out)
