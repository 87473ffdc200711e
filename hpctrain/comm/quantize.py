"""Numbers in 8 or 4 bits: small integers, with one scale for each group of neighbours.

The scale of a group is its largest magnitude over the largest integer, as a bfloat16 that is
rounded up, so that nothing is cut off and an element is wrong by half a scale at most. A group with
an infinite element, or one that is no number, comes out as not a number: nothing is hidden. What is
lost by rounding is for the caller to keep, and to add to what is sent next (error feedback: Seide
et al., 2014; Karimireddy et al., 2019).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

GROUP = 64
"""Elements that share a scale: 2 bytes, so that 8 bits are 8.25 and 4 bits are 4.25."""


@dataclass(frozen=True)
class Quantizer:
    """Integers of so many bits.

    Attributes:
        bits: 8 or 4.
    """

    bits: int

    @property
    def largest(self) -> int:
        """The largest integer; the smallest is its negative."""
        return (1 << self.bits - 1) - 1

    def nbytes(self, count: int) -> int:
        """Bytes of `count` elements."""
        return _groups(count) * (self._group_bytes + 2)

    def encode(self, values: torch.Tensor, code: torch.Tensor) -> None:
        """Write the code of elements.

        Args:
            values: float32, one-dimensional, on the host.
            code: `nbytes` bytes.
        """
        count, groups = values.numel(), _groups(values.numel())
        rows = pad(values, (0, groups * GROUP - count)).view(groups, GROUP)
        most = rows.abs().amax(dim=1)
        scales = (most / self.largest).to(torch.bfloat16)
        bits = scales.view(torch.int16)
        bits += scales.float() * self.largest < most
        scales[~most.isfinite()] = torch.nan
        integers = (rows / scales.float()[:, None]).round_().nan_to_num_(0.0)
        integers.clamp_(-self.largest, self.largest)  # a quotient may round up
        ends = groups * self._group_bytes
        code[ends:].view(torch.bfloat16).copy_(scales)
        whole = code[:ends].view(groups, self._group_bytes)
        if self.bits == 8:
            whole.view(torch.int8).copy_(integers)
        else:
            halves = (integers + 8).to(torch.uint8)
            torch.bitwise_or(
                halves[:, : GROUP // 2], halves[:, GROUP // 2 :].bitwise_left_shift(4), out=whole
            )

    def decode(self, code: torch.Tensor, values: torch.Tensor) -> None:
        """Write the elements of a code.

        Args:
            code: as `encode` made it.
            values: float32, one-dimensional, on the host.
        """
        count, groups = values.numel(), _groups(values.numel())
        ends = groups * self._group_bytes
        scales = code[ends:].view(torch.bfloat16).float()[:, None]
        whole = code[:ends].view(groups, self._group_bytes)
        if self.bits == 8:
            rows = whole.view(torch.int8) * scales
        else:
            halves = torch.cat((whole & 15, whole >> 4), dim=1)
            rows = (halves.to(torch.int8) - 8) * scales
        values.copy_(rows.view(-1)[:count])

    @property
    def _group_bytes(self) -> int:
        return GROUP * self.bits // 8


QUANTIZERS = {"int8": Quantizer(8), "int4": Quantizer(4)}
"""By the name of the wire."""


def _groups(count: int) -> int:
    return -(-count // GROUP)
