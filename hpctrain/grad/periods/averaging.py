"""Means over ranks that are on the wire while ranks compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hpctrain.comm.channel import LANES, Channel, Ticket
from hpctrain.comm.memory import chunk_cuts
from hpctrain.comm.quantize import QUANTIZERS
from hpctrain.comm.reduce.messages import Direct
from hpctrain.comm.reduce.quantized import QuantizedMean
from hpctrain.comm.reducer import Parts, ReduceOptions, Reducer


class Averager:
    """Averages one flat tensor over ranks again and again, one time after another.

    Construction is collective, and all ranks post alike. With one rank it does nothing.

    Args:
        channel: of the ranks, and of this one alone.
        count: number of elements.
        dtype: of the elements.
        options: how they are summed; `wire` may also be one of `QUANTIZERS`.
        ways: of an averager that was made before, for the same kind of tensor.
        exact: number of elements at the end that are never rounded to few bits.

    Attributes:
        tensor: to be filled before `post`; the mean after `wait`.
    """

    def __init__(
        self,
        channel: Channel,
        count: int,
        dtype: torch.dtype,
        options: ReduceOptions,
        ways: Sequence[str] = (),
        *,
        exact: int = 0,
    ) -> None:
        self._channel = channel
        self._tickets: list[Ticket] = []
        self._reducer: Reducer | None = None
        self.ways: Sequence[str] = ()
        self._means: list[QuantizedMean] = []
        self._exact: Direct | None = None
        self._exact_bytes = 4 * exact
        if options.wire in QUANTIZERS:
            self.tensor = torch.zeros(count, dtype=torch.float32)
            count -= exact
            cuts = chunk_cuts(count, 4, 4 * options.chunk_bytes) or [slice(0, count)]
            if channel.size > 1:
                if exact:
                    part, scale = self.tensor[count:], 1 / channel.size
                    self._exact = Direct(part, scale, None, None, None, LANES - 1)
                self._means = [
                    QuantizedMean(self.tensor[cut], QUANTIZERS[options.wire], lane)
                    for lane, cut in enumerate(cuts)
                ]
            return
        self._reducer = Reducer(channel, options)
        (slab,) = self._reducer.allocate([count], [dtype])
        self.tensor = slab.tensor
        self._reducer.plan([slab], ways)
        self.ways = self._reducer.ways

    @staticmethod
    def held_bytes(count: int, dtype: torch.dtype, wire: str, ranks: int) -> int:
        """Memory for so many elements, without messages, which `in_flight_bytes` limits."""
        if wire not in QUANTIZERS:
            return count * dtype.itemsize
        if ranks == 1:
            return 4 * count
        own = -(-count // ranks)
        return 4 * (3 * count + own) + 2 * QUANTIZERS[wire].nbytes(count)

    def post(self, label: str) -> None:
        """Send what is in `tensor`. Returns at once."""
        assert not self._tickets
        if self._channel.size == 1:
            return
        if self._reducer:
            self._tickets = self._reducer.post(Parts(0), label)
        for mean in self._means:
            self._tickets.append(self._channel.post(mean, label, mean.nbytes))
        if self._exact:
            self._tickets.append(self._channel.post(self._exact, label, self._exact_bytes))

    def wait(self) -> torch.Tensor:
        """The mean, once it has come; it may be overwritten."""
        for ticket in self._tickets:
            self._channel.engine.wait(ticket)
        self._tickets = []
        return self.tensor

    @property
    def sent_bytes(self) -> int:
        """Of messages of this rank so far; see `Reducer.sent_bytes`."""
        by_sums = self._reducer.sent_bytes if self._reducer else 0
        exactly = self._exact.sent_bytes if self._exact else 0
        return by_sums + exactly + sum(mean.sent_bytes for mean in self._means)

    @property
    def lost(self) -> dict[str, torch.Tensor]:
        """What rounding has lost and is to be sent: a part of the state of a run."""
        found = {}
        for lane, mean in enumerate(self._means):
            found[f"unsent {lane}"] = mean.unsent
            found[f"unshared {lane}"] = mean.unshared
        return found
