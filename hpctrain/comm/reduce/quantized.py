"""Averages in 8 or 4 bits, by messages between all pairs of ranks.

As ``direct``: rank m gets slice m of all, averages it, and sends the average to all, each time in
few bits. What rounding loses is kept and added to what the same elements send the next time: by
every rank for its own elements, and by rank m for the averages of its slice.
"""

from __future__ import annotations

import torch
from mpi4py import MPI

from hpctrain.comm.channel import FIRST_FIXED_TAG, LANES, Steps
from hpctrain.comm.quantize import GROUP, Quantizer
from hpctrain.comm.reduce.messages import Messages
from hpctrain.comm.reduce.sums import slices


class QuantizedMean:
    """An operation that replaces a slab on every rank by the mean over ranks, nearly.

    It leaves the same bits on every rank, and runs always on the same communicator.

    Args:
        slab: float32, one-dimensional, on the host; of the same length on all ranks.
        quantizer: of what is sent.
        lane: tells operations apart that run on one channel at the same time; below `LANES`.

    Attributes:
        unsent: what rounding has lost of this rank's own elements so far.
        unshared: what rounding has lost of the averages that this rank has made; of the slab's
            length, and zero outside its slice.
        sent_bytes: of messages of this rank so far.
    """

    def __init__(self, slab: torch.Tensor, quantizer: Quantizer, lane: int = 0) -> None:
        self.unsent = torch.zeros_like(slab)
        self.unshared = torch.zeros_like(slab)
        self.nbytes = quantizer.nbytes(slab.numel())
        """Of the slab, quantized."""
        self._slab = slab
        self._quantizer = quantizer
        self._tag = FIRST_FIXED_TAG + 2 * (lane % LANES)
        self._planned_for: MPI.Intracomm | None = None
        self.sent_bytes = 0

    def __call__(self, comm: MPI.Intracomm, tag: int) -> Steps:
        """The operation."""
        self._prepare(comm)
        slab = self._slab
        slab += self.unsent
        for cut, code in zip(self._cuts, self._codes, strict=True):
            self._quantizer.encode(slab[cut], code)
            self._quantizer.decode(code, self.unsent[cut])
        torch.sub(slab, self.unsent, out=self.unsent).nan_to_num_(0.0, 0.0, 0.0)
        yield from self._start(self._scatter)
        mean, mine = slab[self._mine], self._codes[comm.rank]
        self._quantizer.decode(self._parts[0], mean)
        for part in self._parts[1:]:
            self._quantizer.decode(part, self._term)
            mean += self._term
        mean *= 1.0 / len(self._parts)
        unshared = self.unshared[self._mine]
        mean += unshared
        self._quantizer.encode(mean, mine)
        self._quantizer.decode(mine, self._term)
        torch.sub(mean, self._term, out=unshared).nan_to_num_(0.0, 0.0, 0.0)
        yield from self._start(self._gather)
        for cut, code in zip(self._cuts, self._codes, strict=True):
            self._quantizer.decode(code, slab[cut])

    def _start(self, messages: Messages) -> Steps:
        self.sent_bytes += messages.nbytes
        yield from messages.start()

    def _prepare(self, comm: MPI.Intracomm) -> None:
        """Plan at the first run."""
        if self._planned_for is None:
            self._plan(comm)
            self._planned_for = comm
        assert self._planned_for is comm, "planned for another channel"

    def _plan(self, comm: MPI.Intracomm) -> None:
        rank, size = comm.rank, comm.size
        self._cuts = slices(self._slab.numel(), size, GROUP)
        self._mine = self._cuts[rank]
        sizes = [self._quantizer.nbytes(cut.stop - cut.start) for cut in self._cuts]
        self._codes = torch.empty(sum(sizes), dtype=torch.uint8).split(sizes)
        inbox = torch.empty(sizes[rank] * size, dtype=torch.uint8)
        rows = list(inbox.view(size, -1)) if sizes[rank] else [inbox] * size
        self._parts = [self._codes[rank] if r == rank else row for r, row in enumerate(rows)]
        self._term = torch.empty(self._mine.stop - self._mine.start)
        others = [other for other in range(size) if other != rank]
        codes = {other: self._codes[other] for other in others}
        self._scatter = Messages(comm, self._tag, codes, {o: self._parts[o] for o in others})
        own = dict.fromkeys(others, self._codes[rank])
        self._gather = Messages(comm, self._tag + 1, own, codes)
