"""What the first root makes of deaths and of ranks that fall behind, without a network."""

from __future__ import annotations

import pytest

from hpctrain.grad.coded.cells import Buffer, Kind, Pool
from hpctrain.grad.coded.coordinator import Coordinator, Silence
from hpctrain.grad.coded.schemes import scheme_of
from hpctrain.grad.coded.worker import as_bytes

RANKS = 5


class Bench:
    """A coordinator on rank 0 for workers 1 to 4, with a clock that is set by hand."""

    def __init__(self, sends: str = "sums") -> None:
        self.now_s = 0.0
        self.pool = Pool()
        self.scheme = scheme_of(sends, "cyclic", 4, RANKS - 1, 2, None)
        self.whole = -1
        self.ends: list[tuple[int, int, int]] = []
        """Who was told that the run is over, with which last round, and whether it continues."""
        self.coordinator = Coordinator(
            *(self.post, self.pool, range(1, RANKS), RANKS, self.scheme, lambda: self.now_s),
            *(Silence(), (0,), False),
            lambda round_: round_ == self.whole,
        )

    def post(self, rank: int, buffer: Buffer) -> None:
        if buffer.kind is Kind.END:
            self.ends.append((rank, buffer.round, buffer.lo))
        self.pool.drop(buffer)

    def hear(self, rank: int, kind: Kind, round_: int = 0, lo: int = 0, hi: int = 0) -> None:
        own = self.scheme.own(rank - 1) if rank else ()
        data = as_bytes(own) if kind is Kind.JOIN else b""
        self.coordinator.receive(rank, self.pool.message(kind, round_, lo, hi, data=data))

    def join(self, round_: int, *ranks: int) -> None:
        for rank in ranks or range(RANKS):
            self.hear(rank, Kind.JOIN, round_, 4, 1)

    def done(self, *ranks: int) -> None:
        """They compute all that they are to."""
        for rank in ranks:
            for block in self.scheme.own(rank - 1):
                self.now_s += 0.1
                self.hear(rank, Kind.DONE, 0, block)

    def to(self, now_s: float, *heard: int) -> None:
        while self.now_s < now_s:
            self.now_s += 0.01
            for rank in heard:
                self.hear(rank, Kind.BEAT)
            self.coordinator.tick(self.now_s)


def test_two_coded_vectors_of_three_are_no_sum() -> None:
    """Although those who live have computed every data block."""
    bench = Bench("mds")
    bench.join(0)
    bench.done(2, 4)
    bench.coordinator.died(1)
    assert bench.coordinator.failure is None
    bench.coordinator.died(3)
    assert "no complete set" in (bench.coordinator.failure or "")


@pytest.mark.parametrize("sends", ["sums", "mds"])
def test_what_is_whole_is_not_lost(sends: str) -> None:
    """The next step is, if there is one."""
    bench = Bench(sends)
    bench.join(0)
    bench.done(1, 2, 3, 4)
    bench.whole = 0
    for rank in (1, 2, 3):
        bench.coordinator.died(rank)
    bench.to(bench.now_s + 1, 4)
    assert bench.coordinator.failure is None
    bench.join(1, 0, 4)
    bench.to(bench.now_s + 1, 4)
    assert "no complete set" in (bench.coordinator.failure or "")


def test_a_rank_whose_large_message_is_on_its_way_is_expected() -> None:
    bench = Bench()
    bench.join(0)
    bench.coordinator.hears(3, 30.0)
    bench.to(20.0, 1, 2)
    assert bench.coordinator.failure is None
    bench.to(40.0, 1, 2)
    assert "dead or silent: rank 3, 4" in (bench.coordinator.failure or "")


@pytest.mark.parametrize("has_failed", [False, True])
@pytest.mark.parametrize("continues", [False, True])
def test_whether_the_run_is_to_be_continued_is_told_to_all(
    continues: bool, has_failed: bool
) -> None:
    bench = Bench()
    bench.join(0)
    assert not bench.coordinator.is_told_to_stop
    bench.hear(3, Kind.STOP)
    assert bench.coordinator.is_told_to_stop
    bench.coordinator.end(has_failed, continues)
    assert bench.ends == [(rank, -has_failed, continues) for rank in range(RANKS)]
