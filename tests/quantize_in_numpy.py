"""What hpctrain.comm.quantize is to compute, in NumPy and element by element."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
GROUP = 64


def to_bfloat16_and_back(value: np.float32) -> np.float32:
    """Round to nearest, ties to even, as bits."""
    bits = int(value.view(np.uint32))
    bits += 0x7FFF + (bits >> 16 & 1)
    return np.uint32(bits & 0xFFFF0000).view(np.float32)


def scale_of(group: Floats, largest: int) -> np.float32:
    """The least bfloat16 near the quotient by which nothing is cut off."""
    most = np.abs(group).max(initial=np.float32(0))
    if not np.isfinite(most):
        return np.float32(np.nan)
    scale = to_bfloat16_and_back(np.float32(most / np.float32(largest)))
    if np.float32(scale * np.float32(largest)) < most:
        scale = np.uint32(int(scale.view(np.uint32)) + 0x10000).view(np.float32)
    return scale


def quantized(values: Floats, bits: int) -> Floats:
    """The values as they come out of a code of so many bits."""
    largest = 2 ** (bits - 1) - 1
    out = np.empty_like(values)
    for start in range(0, len(values), GROUP):
        group = values[start : start + GROUP]
        scale = scale_of(group, largest)
        if np.isnan(scale) or scale == 0:
            integers = np.zeros_like(group)
        else:
            integers = np.clip(np.rint(group / scale), -largest, largest).astype(np.float32)
        out[start : start + GROUP] = integers * scale
    return out


class QuantizedMean:
    """What ranks get who average so many elements again and again."""

    def __init__(self, count: int, ranks: int, bits: int) -> None:
        self.unsent = np.zeros((ranks, count), np.float32)
        self.unshared = np.zeros(count, np.float32)
        self._bits = bits
        groups = -(-count // GROUP)
        self._cuts = [min(count, groups * r // ranks * GROUP) for r in range(ranks + 1)]

    def __call__(self, values: Floats) -> Floats:
        """The same on all ranks, of one row a rank."""
        ranks = len(values)
        wanted = values + self.unsent
        sent = np.stack([self._by_slices(row) for row in wanted])
        self.unsent = wanted - sent
        mean = sent[0].copy()
        for row in sent[1:]:
            mean += row
        mean *= np.float32(1 / ranks)
        mean += self.unshared
        shared = self._by_slices(mean)
        self.unshared = mean - shared
        return shared

    def _by_slices(self, values: Floats) -> Floats:
        cuts = zip(self._cuts, self._cuts[1:], strict=False)
        parts = [quantized(values[start:stop], self._bits) for start, stop in cuts]
        return np.concatenate(parts)
