"""Sums in rank order, piece by piece: the arithmetic that the ways to reduce a slab share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

PIECE_BYTES = 1 << 18
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
        self._scale = scale
        self._wide: torch.Tensor | None = None
        count = outs[0].numel()
        step = piece_bytes(len(parts)) // outs[0].element_size()
        if outs[0].element_size() == 2:
            step //= 2
            self._wide = torch.empty(min(step, count), dtype=torch.float32)
        self._pieces = [
            (
                outs[0][start : start + step],
                [out[start : start + step] for out in outs[1:]],
                [part[start : start + step] for part in parts],
            )
            for start in range(0, count, step)
        ]

    def __call__(self) -> None:
        """Sum what the parts hold now."""
        for out, copies, parts in self._pieces:
            if self._wide is not None:
                self._sum_wide(self._wide[: out.numel()], out, parts)
            else:
                self._sum(out, parts)
            for copy in copies:
                copy.copy_(out)

    def _sum(self, out: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        total = parts[0]
        for part in parts[1:-1]:
            total.add_(part)
        if len(parts) == 1:
            out.copy_(total)
        else:
            torch.add(total, parts[-1], out=out)
        if self._scale != 1:
            out.mul_(self._scale)

    def _sum_wide(
        self, total: torch.Tensor, out: torch.Tensor, parts: Sequence[torch.Tensor]
    ) -> None:
        total.copy_(parts[0])
        for part in parts[1:]:
            total.add_(part)
        if self._scale != 1:
            total.mul_(self._scale)
        out.copy_(total)
