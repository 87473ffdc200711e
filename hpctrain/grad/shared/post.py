"""Packets between a root and the ranks that speak for its children, and who of them lives."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hpctrain.comm.engine import Engine
from hpctrain.comm.mailbox import Mailbox
from hpctrain.comm.memory import buffer_of
from hpctrain.grad.shared.packets import Kind, Packet
from hpctrain.trace import now_s

BEATS = 8
"""Signs of life in the time after which a rank counts as dead."""
LONGEST_BEAT_S = 1.0
PATIENT_S = 0.01
"""Longest sleep between two looks for packets that may take long to come."""


class Letter:
    """A packet's bytes."""

    def __init__(self, packed: torch.Tensor, beat_to: int | None = None) -> None:
        self.packed = packed
        self.mpi = buffer_of(packed)
        self.beat_to = beat_to


class Post:
    """Sends and receives packets. Construction is collective.

    Args:
        engine: of all ranks.
        peers: ranks that hear from this one that it lives.
        silent_s: after which a rank counts as dead.

    Attributes:
        dead: ranks that the MPI library says are dead.
        heard_s: when each rank last gave a sign of life.
    """

    def __init__(self, engine: Engine, peers: Sequence[int], silent_s: float) -> None:
        self._engine = engine
        self._peers = tuple(peers)
        self._beat_s = min(LONGEST_BEAT_S, silent_s / BEATS)
        self._beaten_s = now_s()
        self._ticked_s = now_s()
        self._beating: set[int | None] = set()
        """Ranks to which a sign of life is on its way: one at a time, or they would pile up."""
        self._came: deque[tuple[int, Packet]] = deque()
        self.dead: set[int] = set()
        self.heard_s = dict.fromkeys(range(engine.world.size), now_s())
        self.is_closed = False
        self._mailbox = Mailbox(engine, self)
        self._mailbox.open()

    def send(self, rank: int, packet: Packet) -> None:
        """Send; returns at once."""
        self._mailbox.send(rank, Letter(torch.from_numpy(packet.pack())))

    def take(self, most: int | None = None) -> list[tuple[int, Packet]]:
        """What has come, or the first of it, with the rank that sent it."""
        taken: list[tuple[int, Packet]] = []
        while self._came and len(taken) != most:
            taken.append(self._came.popleft())
        return taken

    def has(self, kind: Kind) -> bool:
        """Whether a packet of a kind has come and was not taken yet."""
        return any(packet.kind is kind for _, packet in list(self._came))

    def reason_to_be_out(self) -> str:
        """Why the root leaves this child out, if a packet that was not taken yet says so."""
        reasons = (p.values["reason"] for _, p in list(self._came) if p.kind is Kind.OUT)
        return str(next(reasons, ""))

    def wait(self, until: Callable[[], bool]) -> None:
        """Wait patiently until a packet is there or something else is so."""
        self._engine.drive(lambda: bool(self._came) or until(), PATIENT_S)

    def close(self) -> None:
        """Say no more that this rank lives, and let the engine close what is left."""
        self.is_closed = True
        self._mailbox.abandon()

    # ------------------------------------------------------------------ inside the engine

    def room(self, source: int, nbytes: int) -> Letter:
        """Memory for a message."""
        self.heard_s[source] = now_s()
        return Letter(torch.empty(nbytes, dtype=torch.uint8))

    def came(self, source: int, letter: Any) -> None:
        """A message is there."""
        self.heard_s[source] = now_s()
        packet = Packet.unpack(letter.packed.numpy())
        if packet.kind is not Kind.ALIVE:
            self._came.append((source, packet))

    def sent(self, letter: Any) -> None:
        """A message has left."""
        self._beating.discard(letter.beat_to)

    def died(self, rank: int) -> None:
        """A rank is dead."""
        self.dead.add(rank)

    def tick(self, now: float) -> None:
        """Say that this rank lives."""
        deaf_s, self._ticked_s = now - self._ticked_s, now
        if deaf_s > self._beat_s:  # it is not the others that were silent
            for rank in self.heard_s:
                self.heard_s[rank] += deaf_s
        if now - self._beaten_s < self._beat_s or self.is_closed:
            return
        self._beaten_s = now
        for rank in self._peers:
            if rank not in self.dead and rank not in self._beating:
                self._beating.add(rank)
                packed = torch.from_numpy(Packet(Kind.ALIVE).pack())
                self._mailbox.send(rank, Letter(packed, rank))
