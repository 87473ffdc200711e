"""Messages of the coded mode: a header of eight numbers and, behind it, vectors of gradients.

A *cell* is the gradient of one model block on some data blocks. Its header says of which round,
model block and data blocks it is, so that a late one is known for what it is and dropped. Buffers
are used again, but only when nobody holds them any more.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch

from hpctrain.comm.memory import buffer_of

HEADER_BYTES = 64


class Kind(IntEnum):
    """What a message says."""

    JOIN = 1
    """A rank begins a round and is ready for its results. lo: data blocks of the round."""
    CELL = 2
    """A sum of gradients of model block `column` over data blocks lo to hi - 1."""
    DONE = 3
    """A worker has computed data block lo; behind it, figures of an evaluation."""
    RESULT = 4
    """The sum of model block `column` over all data blocks."""
    HELP = 5
    """The worker is to compute data block lo as well. Orders about a data block are numbered in
    `column`: the last one holds."""
    TAKEN = 6
    """Another worker computes data block lo as well: go on with it, but do not hold sums back."""
    LEAVE = 15
    """Another worker computes data block lo: do not begin it, do not hold sums back."""
    DROP = 7
    """Data block lo is there: give it up."""
    OWN = 8
    """Behind it, the data blocks that the worker computes from the round on that it begins next. Of
    two such messages the one of the later `round` holds."""
    ORDER = 9
    """Behind it, the order in which a backward finished gradients."""
    LAYOUT = 10
    """Behind it, the order on which all agree."""
    STATE = 11
    """Behind it, the state from which a rank that fell behind goes on in round `round`."""
    OVER = 12
    """An evaluation is complete; behind it, its figures."""
    END = 13
    """The run is over; behind it, the ranks that are dead. lo: 1 if it is to be continued."""
    BEAT = 14
    """The sender lives. lo: the rank that it is for."""
    BEHIND = 16
    """The sender has no results of round `round` any more, which rank lo has begun only now."""
    LENT = 17
    """A message of hi bytes lies in the arena of rank `column`, from byte lo on; see `lending`."""
    BACK = 18
    """What was lent at byte lo of the arena of rank `column` is not needed any more."""
    STOP = 19
    """The run is to end soon, to be continued."""


_OF_ANY_SIZE = frozenset((Kind.STATE, Kind.OVER, Kind.ORDER, Kind.LAYOUT))


class Spot(NamedTuple):
    """Where a buffer lies in memory that all ranks of a node can use; see `lending`."""

    rank: int
    """Whose part of it."""
    begin: int
    """First byte there."""


class Buffer:
    """A message: header and payload in one piece of host memory.

    Attributes:
        whole: all bytes.
        payload: the bytes behind the header.
        holders: how many still need it; see `Pool`.
        spot: where other ranks of the node find it, if they can use its memory.
        give_back: called when nobody holds it any more, if it belongs to another rank.
        cached: what others keep with the memory, such as views of it.
    """

    __slots__ = (
        *("_floats", "_words", "cached", "give_back", "holders"),
        *("mpi", "payload", "spot", "whole"),
    )

    def __init__(
        self,
        whole: torch.Tensor,
        spot: Spot | None = None,
        give_back: Callable[[], object] | None = None,
    ) -> None:
        self.whole = whole
        self.payload = whole[HEADER_BYTES:]
        self._words = whole[:HEADER_BYTES].view(torch.int64).numpy()
        self._floats = self._words.view(np.float64)
        self.mpi = buffer_of(whole)
        self.holders = 1
        self.spot = spot
        self.give_back = give_back
        self.cached: dict[Any, Any] = {}

    def write(
        self, kind: Kind, round_: int, column: int = 0, lo: int = 0, hi: int = 0, loss: float = 0.0
    ) -> Buffer:
        """Set the header."""
        self._words[:5] = kind, round_, column, lo, hi
        self._floats[5:] = loss, 1.0, 0.0
        return self

    @property
    def kind(self) -> Kind:
        """What the message says."""
        return Kind(int(self._words[0]))

    @property
    def is_unique(self) -> bool:
        """Whether it is of another size each time, as text is."""
        kind = int(self._words[0])
        return kind in _OF_ANY_SIZE or (kind == Kind.DONE and self.payload.numel() > 0)

    @property
    def round(self) -> int:
        """The round that it belongs to."""
        return int(self._words[1])

    @property
    def column(self) -> int:
        """The model block that it is about."""
        return int(self._words[2])

    @property
    def lo(self) -> int:
        """The first data block that it is about."""
        return int(self._words[3])

    @property
    def hi(self) -> int:
        """The data block after the last one."""
        return int(self._words[4])

    @property
    def loss(self) -> float:
        """Sum of the losses of its data blocks."""
        return float(self._floats[5])

    @loss.setter
    def loss(self, value: float) -> None:
        self._floats[5] = value

    @property
    def covered(self) -> float:
        """Of a result: the share of the samples that it was made from."""
        return float(self._floats[6])

    @property
    def variance(self) -> float:
        """Of a result that was made from some samples: of all its elements together."""
        return float(self._floats[7])

    def estimates(self, covered: float, variance: float) -> None:
        """It is a result that was made from some samples only."""
        self._floats[6:] = covered, variance

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """The payload as elements of `dtype`."""
        if dtype not in self.cached:
            self.cached[dtype] = self.payload.view(dtype)
        found: torch.Tensor = self.cached[dtype]
        return found


class Pool:
    """Buffers that are used again, by size. For any thread.

    Args:
        allocate: makes host memory of so many bytes; pinned for gradients on a device.
        share: makes a buffer that other ranks of the node can use, while there is memory for it.
    """

    def __init__(
        self,
        allocate: Callable[[int], torch.Tensor] | None = None,
        share: Callable[[int], Buffer | None] | None = None,
    ) -> None:
        self._allocate = allocate or (lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
        self._share = share or (lambda nbytes: None)
        self._free: dict[int, list[Buffer]] = defaultdict(list)
        self._shared: dict[int, list[Buffer]] = defaultdict(list)
        self._lock = threading.Lock()
        self.made_bytes = 0

    def take(self, payload_bytes: int) -> Buffer:
        """A buffer of undefined content, held once."""
        with self._lock:
            free = self._free[payload_bytes]
            if free:
                return _held_once(free.pop())
            self.made_bytes += HEADER_BYTES + payload_bytes
        return Buffer(self._allocate(HEADER_BYTES + payload_bytes))

    def take_shared(self, payload_bytes: int) -> Buffer:
        """The same, of memory that can be lent to other ranks, if there is any left."""
        with self._lock:
            free = self._shared[payload_bytes]
            if free:
                return _held_once(free.pop())
            buffer = self._share(HEADER_BYTES + payload_bytes)
        return buffer or self.take(payload_bytes)

    def message(
        self, kind: Kind, round_: int, lo: int = 0, hi: int = 0, column: int = 0, data: bytes = b""
    ) -> Buffer:
        """A message with `data` behind its header."""
        buffer = self.take(len(data)).write(kind, round_, column, lo, hi)
        if data:
            buffer.payload.numpy()[:] = np.frombuffer(data, np.uint8)
        return buffer

    def drop(self, buffer: Buffer) -> None:
        """One holder needs it no more."""
        with self._lock:
            buffer.holders -= 1
            assert buffer.holders >= 0
            if buffer.holders:
                return
            if buffer.give_back is None:
                self._keep(buffer)
        if buffer.give_back:
            buffer.give_back()

    def _keep(self, buffer: Buffer) -> None:
        """Have the memory be used again, if it may be of the size that others need."""
        if buffer.spot:
            self._shared[buffer.payload.numel()].append(buffer)
        elif buffer.is_unique:
            self.made_bytes -= buffer.whole.numel()
        else:
            self._free[buffer.payload.numel()].append(buffer)

    def hold(self, buffer: Buffer, times: int = 1) -> None:
        """So many more need it."""
        with self._lock:
            buffer.holders += times


def _held_once(buffer: Buffer) -> Buffer:
    buffer.holders = 1
    return buffer


def content(buffer: Buffer) -> bytes:
    """What is behind the header of a message."""
    return buffer.payload.numpy().tobytes()


def add_cells(dtype: torch.dtype) -> Callable[[Buffer, Buffer], None]:
    """Adds the second cell to the first."""

    def add(left: Buffer, right: Buffer) -> None:
        left.numbers(dtype).add_(right.numbers(dtype))
        left.loss += right.loss

    return add


def balanced(sizes: Sequence[int], parts: int) -> list[int]:
    """Deal things out so that parts have nearly the same size: the part of each, largest first."""
    filled = [0] * parts
    part_of = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        part = filled.index(min(filled))
        part_of[index] = part
        filled[part] += sizes[index]
    return part_of
