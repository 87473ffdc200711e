"""Sums by messages between the members of a group: all pairs at once, or round a ring.

Both cut the slab into a slice a member, sum each slice on one member (reduce-scatter) and hand the
sums round (all-gather). They move 2 (n-1)/n of a slab in and out of each member, which is the
least that an all-reduce can do (Patarasuk and Yuan, 2009).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from mpi4py import MPI

from hpctrain.comm.channel import FIRST_FIXED_TAG, LANES, Steps
from hpctrain.comm.device import Crossing, DeviceSum
from hpctrain.comm.memory import aligned, buffer_of
from hpctrain.comm.reduce.sums import SumInOrder, slices


class _Planned(ABC):
    """What both have in common: planned on the first communicator that they run on.

    Args:
        slab: real elements, contiguous.
        scale: factor of the sum.
        wire: narrower dtype on the wire, or None for the slab's own.
        members: ranks of the group, in the order of summation; None for the whole communicator.
        scratch: at least `scratch_bytes` bytes, which nobody else uses while the operation runs.
        lane: tells operations apart that run on one channel at the same time.
        crossing: if the slab is on a device, in whose memory messages then begin and end.
    """

    def __init__(
        self,
        slab: torch.Tensor,
        scale: float,
        wire: torch.dtype | None,
        members: Sequence[int] | None,
        scratch: torch.Tensor | None,
        lane: int,
        crossing: Crossing | None = None,
    ) -> None:
        self._crossing = crossing
        self._slab = slab
        self._scale = scale
        self._narrow = narrower(wire, slab.dtype)
        self._members = members
        self._scratch = scratch
        self._tag = FIRST_FIXED_TAG + 2 * (lane % LANES)
        self._planned_for: MPI.Intracomm | None = None
        self.sent_bytes = 0
        """Of messages of this rank so far."""

    def _prepare(self, comm: MPI.Intracomm) -> None:
        """Plan at the first run."""
        if self._planned_for is None:
            members = tuple(range(comm.Get_size()) if self._members is None else self._members)
            here = members.index(comm.Get_rank())
            if self._scratch is None:
                nbytes = self.scratch_bytes(
                    self._slab.numel(), self._slab.dtype, self._narrow, len(members)
                )
                self._scratch = torch.empty(nbytes, dtype=torch.uint8, device=self._slab.device)
            self._plan(comm, members, here, self._scratch)
            self._planned_for = comm
        assert self._planned_for is comm, "planned for another channel"

    def _start(self, messages: Messages) -> Steps:
        """Send and receive."""
        self.sent_bytes += messages.nbytes
        yield from messages.start()

    def _ready(self) -> Steps:
        """Wait until the slab may be read, which on a device is later than when it was posted."""
        if self._crossing and self._crossing.ready:
            yield self._crossing.ready.query

    def _compute(self, work: Callable[[], object]) -> Steps:
        """Compute now on the host, or on a device, where messages must wait for the end."""
        if self._crossing:
            yield self._crossing.device.run(work, "sum").query
        else:
            work()

    @abstractmethod
    def __call__(self, comm: MPI.Intracomm, tag: int) -> Steps:
        """The operation."""

    @abstractmethod
    def _plan(
        self, comm: MPI.Intracomm, members: tuple[int, ...], here: int, scratch: torch.Tensor
    ) -> None:
        """Make all requests and views."""

    @staticmethod
    @abstractmethod
    def inboxes(members: int) -> int:
        """Slices that a member receives before it may sum."""

    @classmethod
    def scratch_bytes(
        cls, count: int, dtype: torch.dtype, wire: torch.dtype | None, members: int
    ) -> int:
        """Temporary memory for `count` elements: inboxes, and the elements as they are sent."""
        narrow = narrower(wire, dtype)
        inbox = cls.inboxes(members) * -(-count // members)
        if narrow is None:
            return inbox * dtype.itemsize
        return aligned(count * narrow.itemsize) + inbox * narrow.itemsize

    def _split_scratch(self, scratch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The elements as they go on the wire, and an inbox of the same dtype."""
        if self._narrow is None:
            return self._slab, scratch.view(self._slab.dtype)
        nbytes = self._slab.numel() * self._narrow.itemsize
        return scratch[:nbytes].view(self._narrow), scratch[aligned(nbytes) :].view(self._narrow)


class Direct(_Planned):
    """All pairs: member m gets slice m of all, sums it in the order of members, sends it to all.

    Each element is summed in the same order whatever the size and number of slabs, so results
    are the same bits on every rank, from run to run and for any block size. Takes two steps, but
    2 (n-1) messages a member.
    """

    def __call__(self, comm: MPI.Intracomm, tag: int) -> Steps:
        """The operation."""
        self._prepare(comm)
        yield from self._ready()
        if self._narrow is not None:
            # Scaled before it is narrowed: a sum of float16 gradients may exceed 65,504.
            yield from self._compute(partial(torch.mul, self._slab, self._scale, out=self._wire))
        yield from self._start(self._scatter)
        yield from self._compute(self._sum)
        yield from self._start(self._gather)
        if self._narrow is not None:
            yield from self._compute(partial(self._slab.copy_, self._wire))

    @staticmethod
    def inboxes(members: int) -> int:
        """One from each other member."""
        return members - 1

    def _plan(
        self, comm: MPI.Intracomm, members: tuple[int, ...], here: int, scratch: torch.Tensor
    ) -> None:
        self._wire, inbox = self._split_scratch(scratch)
        cuts = slices(self._slab.numel(), len(members))
        mine = self._wire[cuts[here]]
        others = [place for place in range(len(members)) if place != here]
        parts = {
            place: inbox[row * mine.numel() : (row + 1) * mine.numel()]
            for row, place in enumerate(others)
        }
        slice_of = {place: self._wire[cuts[place]] for place in others}
        self._scatter = Messages(
            comm,
            self._tag,
            {members[place]: slice_of[place] for place in others},
            {members[place]: parts[place] for place in others},
        )
        self._gather = Messages(
            comm,
            self._tag + 1,
            {members[place]: mine for place in others},
            {members[place]: slice_of[place] for place in others},
        )
        ordered = [mine if place == here else parts[place] for place in range(len(members))]
        kind = DeviceSum if self._crossing else SumInOrder
        self._sum = kind([mine], ordered, 1.0 if self._narrow else self._scale)


class Ring(_Planned):
    """Round a ring: each member only talks to its two neighbours.

    In step s, a member sends the slice that it has just added its own part to, so that slice m is
    summed in the order m, m+1, ... round the ring: the same bits on every rank and from run to
    run, but an element's order depends on its place in the slab. With fewer bits on the wire,
    a sum is rounded at each hop. Takes 2 (n-1) steps; operations in flight at the same time
    keep the wire busy in between.
    """

    def __call__(self, comm: MPI.Intracomm, tag: int) -> Steps:
        """The operation."""
        self._prepare(comm)
        yield from self._ready()
        if self._narrow is not None:
            yield from self._compute(partial(self._slab.mul_, self._scale))
        for messages, sent, received, inbox in self._scatter:
            if self._narrow is not None:
                yield from self._compute(partial(sent[1].copy_, sent[0]))
            yield from self._start(messages)
            yield from self._compute(partial(received.add_, inbox))
        if self._narrow is not None:
            yield from self._compute(partial(self._sum[1].copy_, self._sum[0]))
        elif self._scale != 1:
            yield from self._compute(partial(self._sum[0].mul_, self._scale))
        for messages in self._gather:
            yield from self._start(messages)
        if self._narrow is not None:
            yield from self._compute(partial(self._slab.copy_, self._wire))

    @staticmethod
    def inboxes(members: int) -> int:
        """One at a time, from the left neighbour."""
        return min(1, members - 1)

    def _plan(
        self, comm: MPI.Intracomm, members: tuple[int, ...], here: int, scratch: torch.Tensor
    ) -> None:
        size = len(members)
        self._wire, inbox = self._split_scratch(scratch)
        cuts = slices(self._slab.numel(), size)
        left, right = members[here - 1], members[(here + 1) % size]

        def both(place: int) -> tuple[torch.Tensor, torch.Tensor]:
            cut = cuts[place % size]
            return self._slab[cut], self._wire[cut]

        def step(out: torch.Tensor, into: torch.Tensor, tag: int) -> Messages:
            return Messages(comm, tag, {right: out}, {left: into})

        self._scatter = []
        self._gather = []
        for turn in range(size - 1):
            sent, (received, _) = both(here - turn), both(here - turn - 1)
            part = inbox[: received.numel()]
            self._scatter.append((step(sent[1], part, self._tag), sent, received, part))
        for turn in range(size - 1):
            sent, into = both(here + 1 - turn), both(here - turn)
            self._gather.append(step(sent[1], into[1], self._tag + 1))
        self._sum = both(here + 1)


def narrower(wire: torch.dtype | None, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype on the wire if it is narrower than the slab's, else None."""
    return wire if wire is not None and wire.itemsize < dtype.itemsize else None


class Messages:
    """Messages to and from ranks that begin together; empty ones are left out on both sides.

    Args:
        comm: over which.
        tag: of all of them.
        sends: what is sent, by rank.
        receives: where what comes is put, by rank.

    Attributes:
        nbytes: that are sent.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        tag: int,
        sends: Mapping[int, torch.Tensor],
        receives: Mapping[int, torch.Tensor],
    ) -> None:
        self.nbytes = sum(part.nbytes for part in sends.values())
        self._requests = [
            comm.Recv_init([buffer_of(part), MPI.BYTE], rank, tag)
            for rank, part in receives.items()
            if part.numel()
        ]
        self._requests += [
            comm.Send_init([buffer_of(part), MPI.BYTE], rank, tag)
            for rank, part in sends.items()
            if part.numel()
        ]

    def start(self) -> Steps:
        """Send and receive once; wait for the end."""
        if self._requests:
            MPI.Prequest.Startall(self._requests)
            yield self._requests
