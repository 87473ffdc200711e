"""Sums the slabs of one exchange: makes them, chooses a way for each, plans once, posts.

Between nodes, and for messages, large slabs are cut into chunks that are operations of their own,
so that a chunk is on the wire while others are summed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch

from hpctrain.comm import reduce
from hpctrain.comm.channel import IN_FLIGHT_BYTES, Channel, Operation, Ticket
from hpctrain.comm.device import Device, on_device
from hpctrain.comm.memory import ScratchRing, Slab, aligned, chunk_cuts
from hpctrain.comm.node import shared_slabs
from hpctrain.comm.select import Tried, kind_of, select
from hpctrain.errors import ExchangeError

_log = logging.getLogger("hpctrain")

CHUNK_BYTES = 1 << 18
"""Largest operation by messages."""


@dataclass(frozen=True, kw_only=True)
class ReduceOptions:
    """How slabs are summed."""

    way: str = "auto"
    wire: str = "same"
    ordered: bool = False
    in_flight_bytes: int = IN_FLIGHT_BYTES
    chunk_bytes: int = CHUNK_BYTES


@dataclass(frozen=True)
class OnDevice:
    """That slabs are on a device, and what the MPI library can do with them there."""

    where: torch.device
    device: Device
    stays: bool = False
    """Whether messages take device memory, on all ranks; see comm.device_probe."""


class Parts(NamedTuple):
    """Parts of a slab that are posted one after another, by default all."""

    slab: int
    start: int = 0
    stop: int | None = None
    """The one after the last; None for all that follow."""


class _Planned(NamedTuple):
    operation: Operation
    nbytes: int
    scratch_bytes: int


class Reducer:
    """Averages slabs over the ranks of a channel. Collective in the same order on all ranks.

    Args:
        channel: of the ranks.
        options: how slabs are summed.
        on_device: where they are, if not on the host; the same kind on all ranks.

    Raises:
        ExchangeError: the way that the options force is not possible here.
    """

    def __init__(
        self, channel: Channel, options: ReduceOptions, on_device: OnDevice | None = None
    ) -> None:
        self._on_device = on_device
        self._channel = channel
        self._options = options
        self._wire = reduce.WIRE_DTYPES[options.wire]
        self._nodes = channel.engine.world.nodes
        self._planned: list[list[_Planned]] = []
        self.ways: list[str] = []
        """The way of each slab; empty with a single rank."""
        self.tried: list[Tried] = []
        """What was measured to choose them."""
        if options.way == "shared" and len(self._nodes) > 1:
            raise ExchangeError(
                "way = 'shared' sums within one node",
                value=f"{len(self._nodes)} nodes",
                allowed="way = 'two_level' or 'auto' with several nodes",
                everywhere=True,
            )

        if options.way in reduce.STAY_ON_DEVICE and not (on_device and on_device.stays):
            raise ExchangeError(
                f"way = {options.way!r} needs gradients on a device and an MPI library whose "
                "messages take device memory",
                value="this library's do not" if on_device else "gradients on the host",
                fix="use way = 'auto'; hpctrain doctor tells what the library takes",
                everywhere=True,
            )
        if options.way == "native" and on_device:
            raise ExchangeError(
                "way = 'native' sums gradients on the host",
                value=f"gradients on {on_device.where}",
                fix="use way = 'auto'",
                everywhere=True,
            )
        if on_device and on_device.stays:
            channel.engine.enter(on_device.device.enter)

    def allocate(self, counts: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[Slab]:
        """Slabs of zeros, in node-shared memory where that helps and can be had. Collective."""
        slabs = None
        if self._options.way in ("auto", *reduce.IN_SHARED_MEMORY):
            slabs = shared_slabs(self._channel.engine, counts, dtypes, self._options.chunk_bytes)
        if self._on_device:
            there = self._on_device
            if slabs:
                _pin(slabs, there.device)
            else:
                slabs = _pinned(counts, dtypes, self._options, there.device)
            return [
                on_device(mirror, torch.zeros_like(mirror.tensor, device=there.where), there.device)
                for mirror in slabs
            ]
        return slabs or [
            Slab.allocate(count, dtype, self._options.chunk_bytes)
            for count, dtype in zip(counts, dtypes, strict=True)
        ]

    def plan(
        self,
        slabs: Sequence[Slab],
        ways: Sequence[str] = (),
        sequence: Sequence[Parts] | None = None,
    ) -> None:
        """Choose the way of each slab and plan its operations. Collective; contents are kept.

        Again for another sequence, with no operation in flight.

        Args:
            slabs: the same on all ranks.
            ways: chosen earlier, to be kept where they are possible.
            sequence: the order in which parts will be posted, if it is not that of the slabs; those
                of one slab come in their own order.
        """
        if self._channel.size == 1:
            return
        if len(ways) == len(slabs) and all(
            way in self._possible(slab) for way, slab in zip(ways, slabs, strict=True)
        ):
            self.ways = list(ways)
        else:
            found = select(self._channel, slabs, self._possible, self._trial_operations)
            self.tried = list(found.values())
            self.ways = [found[kind_of(slab)].way for slab in slabs]
            if any(tried.times_s for tried in self.tried):
                _log.info("blocks are summed: %s", "; ".join(map(str, self.tried)))
        whole = [Parts(index) for index in range(len(slabs))]
        self._plan(slabs, whole if sequence is None else sequence)

    @property
    def part_counts(self) -> list[int]:
        """How many parts each slab has; empty with a single rank."""
        return [len(planned) for planned in self._planned]

    def post(self, parts: Parts, label: str) -> list[Ticket]:
        """Start to average parts of a slab. Returns at once.

        The slab's content is undefined until all of its parts are done.
        """
        post = self._channel.post
        planned = self._planned[parts.slab][parts.start : parts.stop]
        return [post(p.operation, label, p.nbytes, p.scratch_bytes) for p in planned]

    @property
    def sent_bytes(self) -> int:
        """Of messages of this rank so far; what the MPI library sends by itself is not seen."""
        planned = (each.operation for cut in self._planned for each in cut)
        return sum(getattr(operation, "sent_bytes", 0) for operation in planned)

    def summary(self) -> str:
        """How many slabs go which way."""
        return ", ".join(f"{count} by {way}" for way, count in Counter(self.ways).items())

    def _possible(self, slab: Slab) -> list[str]:
        """Ways of a slab, the preferred one first; the one that is forced if it is possible."""
        ways = reduce.possible(
            self._nodes,
            slab.tensor.dtype,
            in_shared_memory=slab.place is not None,
            ordered=self._options.ordered,
            narrow=self._options.wire != "same",
            on_device=self._on_device is not None,
            stays=self._on_device is not None and self._on_device.stays,
        )
        forced = self._options.way
        if forced == "two_level" and len(self._nodes) == 1:
            forced = "shared"  # which is the lower of the two levels
        if forced == "native" and reduce.is_native(slab.tensor.dtype):
            return [forced]
        if forced in ("direct", "ring", *reduce.STAY_ON_DEVICE) or forced in ways:
            return [forced]
        return ways

    def _plan(self, slabs: Sequence[Slab], sequence: Sequence[Parts]) -> None:
        parts = [_parts(way, slab) for way, slab in zip(self.ways, slabs, strict=True)]
        needed = [
            [self._scratch_bytes(way, part) for part in cut]
            for way, cut in zip(self.ways, parts, strict=True)
        ]
        flat = [nbytes for cut in needed for nbytes in cut]
        # The channel lets operations begin as long as their scratch fits in `in_flight_bytes`.
        in_flight = min(self._options.in_flight_bytes, sum(flat))
        host = ScratchRing(in_flight, max(flat, default=0))
        stays = any(way in reduce.STAY_ON_DEVICE for way in self.ways)
        there = (
            ScratchRing(in_flight, max(flat, default=0), self._on_device.where)
            if stays and self._on_device
            else host
        )
        lanes = count()
        self._planned = [[] for _ in slabs]
        for index, start, stop in sequence:
            assert start == len(self._planned[index]), "parts of a slab are not in their order"
            way = self.ways[index]
            ring = there if way in reduce.STAY_ON_DEVICE else host
            for part, nbytes in zip(
                parts[index][start:stop], needed[index][start:stop], strict=True
            ):
                operation = self._operation(way, part, next(lanes), ring.part(nbytes))
                self._planned[index].append(_Planned(operation, part.nbytes, nbytes))
        # Scratch is given out in this order: in another one, operations in flight would share it.
        assert self.part_counts == [len(cut) for cut in parts], "not every part is posted once"

    def _scratch_bytes(self, way: str, part: Slab) -> int:
        nbytes = reduce.scratch_bytes(
            way, part, self._wire, self._channel.size, self._options.ordered
        )
        return aligned(nbytes)

    def _trial_operations(self, way: str, slab: Slab) -> list[Operation]:
        parts = _parts(way, slab)
        return [self._operation(way, part, lane) for lane, part in enumerate(parts)]

    def _operation(
        self, way: str, part: Slab, lane: int, scratch: torch.Tensor | None = None
    ) -> Operation:
        return reduce.all_reduce(
            way,
            part,
            1.0 / self._channel.size,
            None if way == "native" else self._wire,
            ordered=self._options.ordered,
            scratch=scratch,
            lane=lane,
        )


def _pinned(
    counts: Sequence[int], dtypes: Sequence[torch.dtype], options: ReduceOptions, device: Device
) -> list[Slab]:
    """Slabs of zeros on the host, for the device to copy to and from."""
    kinds = list(zip(counts, dtypes, strict=True))
    sizes = [aligned(n * dtype.itemsize) for n, dtype in kinds]
    slabs = []
    for (n, dtype), part in zip(kinds, device.host_memory(sum(sizes)).split(sizes), strict=True):
        tensor = part[: n * dtype.itemsize].view(dtype)
        cuts = chunk_cuts(n, dtype.itemsize, options.chunk_bytes)
        slabs.append(Slab(tensor, chunks=tuple(Slab(tensor[cut]) for cut in cuts)))
    return slabs


def _pin(slabs: Sequence[Slab], device: Device) -> None:
    """Pin slabs that lie side by side, in one piece: single ones would share pages."""
    filled = [slab for slab in slabs if slab.nbytes]
    if filled:
        start, end = filled[0].tensor.data_ptr(), filled[-1].tensor.data_ptr() + filled[-1].nbytes
        device.pin(start, end - start, filled[0].tensor)


def _parts(way: str, slab: Slab) -> Sequence[Slab]:
    """The parts of a slab that are operations of their own."""
    return (slab,) if way == "shared" else slab.chunks or (slab,)
