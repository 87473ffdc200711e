"""What a job chooses of how gradients are exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from hpctrain.comm import reduce
from hpctrain.comm.channel import IN_FLIGHT_BYTES
from hpctrain.comm.engine import PROGRESS_MODES
from hpctrain.comm.reducer import CHUNK_BYTES
from hpctrain.config import LONGEST_S, check, option
from hpctrain.errors import ExchangeError
from hpctrain.grad.replicas import BUFFER_MODES

USED_BY = {
    "coded": ("mode", "block_bytes", "deadline_s"),
    "periods": (
        *("mode", "way", "deterministic", "buffers", "in_flight_bytes", "chunk_bytes"),
        "deadline_s",
    ),
}
"""By mode: settings of the exchange that it heeds; it has more of its own."""
USED_BY_CHILDREN_OF_ONE = ("mode", "deterministic", "deadline_s")
"""With mode = "shared", where no child has several ranks."""


@dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """How gradients get from each rank to all ranks."""

    mode: str = option("allreduce", choices=("allreduce", "coded", "periods", "shared"))
    """`allreduce`: every rank computes its share of the batch, and gradients are averaged over all
    ranks. `coded`: several ranks hold each part of the batch, and nobody waits for a slow or dead
    one; see [coded]. `periods`: each rank takes steps of its own, and takes in those of others
    later; see [periods]. `shared`: rank 0 leads, and others train an encoder that they share, each
    with a task of its own; see [shared]."""
    overlap: bool = True
    """Send a block while backward computes the next; false sends all blocks after backward."""
    next_forward: bool = False
    """Let the next forward begin while blocks are on the wire, and update each before it is needed;
    in a loop of your own, see DataParallel.overlap_step."""
    block_bytes: int = option(1 << 20, minimum=1)
    """Largest block, unless a single parameter is larger."""
    wire: str = option("same", choices=tuple(reduce.WIRE_DTYPES))
    """Element type on the wire: the gradient's own, or a 16-bit one that is summed in float32."""
    way: str = option("auto", choices=("auto", *reduce.WAYS))
    """How a block is summed (see hpctrain.comm.reduce); auto tries it out on the first step."""
    deterministic: bool = False
    """Sum in rank order: the same bits from run to run and for any block size."""
    buffers: str = option("broadcast", choices=BUFFER_MODES)
    """What happens to the model's buffers after each step; see grad.replicas.BufferSync."""
    progress: str = option("auto", choices=("auto", *PROGRESS_MODES))
    """Who moves blocks while backward runs; auto tries it out on the first steps (grad.trial)."""
    in_flight_bytes: int = option(IN_FLIGHT_BYTES, minimum=1, maximum=1 << 32)
    """Memory for messages that are on the wire at a time; with `next_forward` at most 1 MB."""
    chunk_bytes: int = option(CHUNK_BYTES, minimum=64)
    """Size of operations by messages: larger blocks are cut evenly, so that sums overlap."""
    deadline_s: float = option(300.0, above=0, maximum=LONGEST_S)
    """An operation that is not finished by then ends the run, naming the ranks it waits for."""

    def __post_init__(self) -> None:
        check(self)
        used = USED_BY.get(self.mode)
        if used and (idle := self.set_besides(used)):
            raise ExchangeError(
                f"with mode = {self.mode!r}, {', '.join(idle)} would do nothing",
                allowed=", ".join(used),
                fix="leave them out",
            )
        if self.way == "native" and (self.deterministic or self.wire != "same"):
            raise ExchangeError(
                "way = 'native' sums in an order and a type that the MPI library chooses",
                allowed="way = 'direct' or 'auto' with deterministic = true or a 16-bit wire",
            )
        if self.way == "ring" and self.deterministic:
            raise ExchangeError(
                "way = 'ring' sums an element in an order that depends on its place in the block",
                allowed="way = 'auto', 'direct', 'shared' or 'two_level' with deterministic = true",
            )

    def set_besides(self, names: Sequence[str]) -> list[str]:
        """Settings other than these that are not as they are unless set."""
        others = [field for field in fields(self) if field.name not in names]
        return [f.name for f in others if getattr(self, f.name) != f.default]
