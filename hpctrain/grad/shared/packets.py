"""What a root and its children tell each other: a few plain values, and maybe parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import torch

LENGTH_BYTES = 8


class Kind(Enum):
    """What a packet is for."""

    INSTRUCT = "instruct"
    """Root: which encoder is to be trained, and how."""
    CONFIRM = "confirm"
    """Child: it has samples for its task, so many."""
    REFUSE = "refuse"
    """Child: it will not take part, and why."""
    TRAIN = "train"
    """Root: a round begins, with these parameters."""
    ANSWER = "answer"
    """Child: its encoder's parameters after a round."""
    OUT = "out"
    """Root: this child takes no part any more, and why."""
    END = "end"
    """Root: the run is over, with these parameters."""
    STOP = "stop"
    """Child: it was told to end, and so the run is to."""
    BYE = "bye"
    """Child: it has done what belongs to the end."""
    ALIVE = "alive"
    """Either: nothing but a sign of life."""


@dataclass(frozen=True)
class Packet:
    """A message.

    Attributes:
        kind: what it is for.
        values: plain JSON values.
        body: flat parameters, in host memory.
    """

    kind: Kind
    values: Mapping[str, Any] = field(default_factory=dict)
    body: torch.Tensor | None = None

    def pack(self) -> np.ndarray:
        """As bytes: a length, the values as JSON, the body."""
        dtype = str(self.body.dtype).removeprefix("torch.") if self.body is not None else ""
        text = json.dumps([self.kind.value, dtype, dict(self.values)]).encode()
        head = len(text).to_bytes(LENGTH_BYTES, "little") + text
        nbytes = self.body.nbytes if self.body is not None else 0
        packed = np.empty(len(head) + nbytes, np.uint8)
        packed[: len(head)] = np.frombuffer(head, np.uint8)
        if self.body is not None:
            packed[len(head) :] = self.body.contiguous().view(torch.uint8).numpy()
        return packed

    @staticmethod
    def unpack(packed: np.ndarray) -> Packet:
        """What `pack` made the bytes of."""
        length = int.from_bytes(packed[:LENGTH_BYTES].tobytes(), "little")
        end = LENGTH_BYTES + length
        kind, dtype, values = json.loads(packed[LENGTH_BYTES:end].tobytes())
        if not dtype:
            return Packet(Kind(kind), values)
        payload = packed[end:]
        body = torch.empty(0, dtype=getattr(torch, dtype))
        if payload.size:
            body = torch.from_numpy(payload.copy()).view(body.dtype)
        return Packet(Kind(kind), values, body)
