"""What a job chooses of the coded mode, and who does what then."""

from __future__ import annotations

from dataclasses import dataclass

from hpctrain.config import LONGEST_S, check, option
from hpctrain.errors import ExchangeError, HpctrainError, JobError
from hpctrain.grad.coded.assignment import PLACEMENTS
from hpctrain.grad.coded.schemes import SCHEMES


class LostError(HpctrainError):
    """Too many ranks are dead, or a root is: the run cannot go on without them."""


@dataclass(frozen=True, kw_only=True)
class CodedConfig:
    """How data blocks are held by several workers, and who adds up."""

    blocks: int = option(0, minimum=0, maximum=1 << 20)
    """Data blocks of a step; 0 for 4 times the number of workers."""
    copies: int = option(2, minimum=1, maximum=1 << 20)
    """How many workers hold each data block; at most all of them."""
    enough: int = option(0, minimum=0, maximum=1 << 20)
    """Any so many workers must hold a complete set, which is certified at the start; at most all
    of them, 0 for what `copies` gives."""
    placement: str = option("spread", choices=PLACEMENTS)
    """Where the backups of a worker's data blocks lie, if it sends sums: on as many other workers
    as possible, on the next ones, or all on those of its group (fractional repetition)."""
    sends: str = option("sums", choices=SCHEMES)
    """What workers send: sums over data blocks; one coded vector a worker, which is exact up to
    rounding (cyclic MDS code); or copies of everything, to vote on, which names a rank that sends
    wrong gradients (3 copies or more, each computed in any case)."""
    deadline_s: float = option(0.0, minimum=0, maximum=LONGEST_S)
    """After so many seconds a step goes on with an unbiased estimate from what is there, and tells
    its error; 0 to wait for the exact gradient."""
    root: str = option("working", choices=("working", "dedicated"))
    """Whether the ranks that add up compute data blocks as well."""
    aggregators: int = option(1, minimum=1, maximum=1 << 20)
    """How many ranks, from rank 0 on, add up, each some of the model blocks."""
    relearn: bool = True
    """Whether workers get fewer data blocks of their own when they turn out slow."""
    silent_s: float = option(1.0, minimum=0.3, maximum=LONGEST_S)
    """Of a worker that has said nothing for so long nothing is expected in the present step."""
    lost_s: float = option(4.0, above=0, maximum=LONGEST_S)
    """A worker that has said nothing for so long counts as dead, or for a minute where the MPI
    library tells of deaths: when then nobody is left who holds some data block, the run ends."""

    def __post_init__(self) -> None:
        check(self)
        if self.lost_s < self.silent_s:
            raise JobError(
                "coded.lost_s: a rank is silent before it is lost",
                value=self.lost_s,
                allowed=f"at least coded.silent_s, {self.silent_s}",
                everywhere=True,
            )
        idle = [
            name
            for name, unset in (("placement", "spread"), ("relearn", True))
            if self.sends != "sums" and getattr(self, name) != unset
        ]
        if idle:
            raise JobError(
                f"coded.{', coded.'.join(idle)}: does nothing with coded.sends = {self.sends!r}",
                fix="remove it, or set coded.sends = 'sums'",
                everywhere=True,
            )
        if self.deadline_s and self.sends != "sums":
            raise JobError(
                "coded.deadline_s: sums can be estimated only from sums of data blocks",
                value=self.deadline_s,
                allowed="0",
                fix="remove it, or set coded.sends = 'sums'",
                everywhere=True,
            )


@dataclass(frozen=True)
class Hands:
    """Who does what: ranks that add up, and ranks that compute."""

    roots: tuple[int, ...]
    workers: tuple[int, ...]

    @classmethod
    def of(cls, config: CodedConfig, size: int) -> Hands:
        """Those of `size` ranks.

        Raises:
            ExchangeError: there are too few ranks.
        """
        roots = tuple(range(config.aggregators))
        first = config.aggregators if config.root == "dedicated" else 0
        workers = tuple(range(first, size))
        if len(roots) > size or not workers:
            raise ExchangeError(
                "too few ranks for the coded mode",
                value=f"{size} ranks, {config.aggregators} of them to add up ({config.root})",
                fix="start more ranks, lower coded.aggregators, or set coded.root = 'working'",
                everywhere=True,
            )
        return cls(roots, workers)
