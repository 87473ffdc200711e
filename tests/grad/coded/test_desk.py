"""Who gets which message, who is told that this rank lives, and which ranks count as gone."""

from __future__ import annotations

from typing import Any

from hpctrain.grad.coded.cells import Buffer, Kind, Pool, content
from hpctrain.grad.coded.desk import BEAT_S, ROOT_LOST_S, SLOWEST_BYTES_PER_S, Desk

RANKS = 4


class Outbox:
    """Keeps what is sent. To ranks that are stuck, nothing leaves."""

    def __init__(self) -> None:
        self.desk: Desk | None = None
        self.sent_s: dict[int, float] = {}
        self.dead: set[int] = set()
        self.stuck: set[int] = set()
        self.beats: list[int] = []

    def send(self, rank: int, letter: Buffer) -> None:
        assert letter.kind is Kind.BEAT
        self.beats.append(rank)
        if rank not in self.stuck:
            assert self.desk
            self.desk.sent(letter)


class Ears:
    """Worker, aggregator and coordinator in one: keeps what it is handed."""

    round = 7

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def receive(self, *what: Any) -> None:
        *source, letter = what
        self.heard.append((*source, letter.kind))

    def joined(self, rank: int, round_: int, now: float) -> None:
        self.heard.append((rank, round_, "joined"))

    def died(self, rank: int) -> None:
        self.heard.append((rank, "died"))

    def hears(self, rank: int, until_s: float) -> None:
        self.heard.append((rank, until_s))

    def tick(self, now: float) -> None:
        pass


class Bench:
    """A desk with a clock that is set by hand."""

    def __init__(self, rank: int, roots: tuple[int, ...] = (0,)) -> None:
        self.now_s = 0.0
        self.pool, self.outbox = Pool(), Outbox()
        self.worker, self.aggregator, self.coordinator = Ears(), Ears(), Ears()
        self.desk = Desk(rank, RANKS, roots, self.pool, lambda: self.now_s)
        adds_up: Any = self.aggregator if rank in roots else None
        decides: Any = self.coordinator if rank == roots[0] else None
        worker: Any = self.worker
        self.desk.open(self.outbox, worker, adds_up, decides)
        self.outbox.desk = self.desk

    def to(self, now_s: float, *heard: int) -> None:
        """Go on to a time, in small steps, in which these ranks are heard of."""
        while self.now_s < now_s:
            self.now_s += BEAT_S / 2
            for rank in heard:
                self.desk.came(rank, self.pool.message(Kind.BEAT, 0))
            self.desk.tick(self.now_s)


def test_messages_go_to_whom_they_are_for() -> None:
    bench = Bench(0)
    for kind in (Kind.CELL, Kind.DONE, Kind.RESULT, Kind.STATE):
        bench.desk.came(2, bench.pool.message(kind, 3))
    assert bench.aggregator.heard == [(2, Kind.CELL)]
    assert bench.coordinator.heard == [(2, Kind.DONE)]
    assert bench.worker.heard == [(Kind.RESULT,), (Kind.STATE,)]
    bench.desk.came(2, bench.pool.message(Kind.JOIN, 3, hi=1))
    assert bench.aggregator.heard[1:] == [(2, 3, "joined")]
    bench.desk.came(1, bench.pool.message(Kind.JOIN, 4, hi=0))  # an evaluation: nothing to add up
    assert bench.aggregator.heard[2:] == []


def test_the_first_order_of_parameters_stays() -> None:
    bench = Bench(1)
    for data in (b"first", b"second"):
        bench.desk.came(0, bench.pool.message(Kind.LAYOUT, 0, data=data))
    assert bench.desk.layout == b"first"
    assert content(bench.pool.message(Kind.LAYOUT, 0, data=b"later")) == b"later"


def test_beats_do_not_pile_up_to_a_rank_that_stands_still() -> None:
    bench = Bench(0)
    bench.outbox.stuck = {2}
    bench.outbox.dead = {3}
    bench.to(20 * BEAT_S)
    assert bench.outbox.beats.count(2) == 1
    assert 5 < bench.outbox.beats.count(1) <= 20
    assert 3 not in bench.outbox.beats


def test_workers_tell_all_roots_that_they_live() -> None:
    bench = Bench(3, roots=(0, 1))
    bench.to(2 * BEAT_S)
    assert {*bench.outbox.beats} == {0, 1}
    bench.outbox.beats.clear()
    bench.outbox.sent_s = dict.fromkeys(range(RANKS), bench.now_s + 9)  # it says other things
    bench.to(bench.now_s + 4 * BEAT_S)
    assert not bench.outbox.beats
    bench.outbox.sent_s.clear()
    bench.desk.is_closed = True
    bench.to(bench.now_s + 4 * BEAT_S)
    assert not bench.outbox.beats


def test_gone_are_the_dead_and_the_silent() -> None:
    bench = Bench(0)
    bench.outbox.dead = {3}
    bench.to(5.0, 1)
    assert bench.desk.gone(4.0) == {2, 3}
    bench.to(6.0, 1, 2)
    assert bench.desk.gone(4.0) == {3}


def test_nobody_was_silent_while_this_rank_stood_still() -> None:
    bench = Bench(0)
    bench.to(1.0, 1, 2, 3)
    bench.now_s += 100
    bench.desk.tick(bench.now_s)
    assert bench.desk.gone(4.0) == set()


def test_a_root_that_is_silent_or_dead() -> None:
    bench = Bench(2, roots=(0, 1))
    bench.to(ROOT_LOST_S, 0)
    assert bench.desk.lost_root() is None
    bench.to(ROOT_LOST_S + 1, 0)
    assert bench.desk.lost_root() == "rank 1, which adds up gradients, is silent"
    bench.desk.died(3)
    bench.desk.died(0)
    bench.to(bench.now_s + BEAT_S)
    assert bench.desk.lost_root() == "rank 0, which adds up gradients, is dead"


def test_a_rank_whose_large_message_is_on_its_way_is_not_silent() -> None:
    bench = Bench(0)
    seconds = 20.0
    bench.desk.room(2, int(seconds * SLOWEST_BYTES_PER_S))
    bench.desk.room(2, 100)
    bench.to(seconds, 1)
    assert bench.desk.gone(4.0) == {3}
    assert (2, seconds) in bench.coordinator.heard
    bench.to(seconds + 5, 1)
    assert bench.desk.gone(4.0) == {2, 3}


def test_roots_watch_each_other() -> None:
    bench = Bench(0, roots=(0, 1))
    bench.to(ROOT_LOST_S - 1)
    assert bench.desk.lost_root() is None
    bench.to(ROOT_LOST_S + 1)
    assert bench.desk.lost_root() == "rank 1, which adds up gradients, is silent"


def test_a_root_that_leaves_after_the_end_is_not_missed() -> None:
    bench = Bench(2)
    bench.desk.is_closed = True
    bench.desk.died(0)
    assert bench.desk.lost_root() is None


class Lender:
    """Keeps what it is told."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.told: list[tuple[Any, ...]] = []

    def fetch(self, source: int, note: Buffer) -> Buffer:
        self.told.append((source, "fetch"))
        return self.pool.message(Kind.CELL, 3)

    def came_back(self, source: int, note: Buffer) -> None:
        self.told.append((source, "back"))

    def died(self, rank: int) -> None:
        self.told.append((rank, "died"))


def test_what_a_dead_root_was_lent_stays_lent() -> None:
    """It may have lent it on, to ranks that have not read it yet."""
    bench = Bench(0, roots=(0, 1))
    lender: Any = Lender(bench.pool)
    bench.desk._lending = lender
    bench.desk.came(2, bench.pool.message(Kind.LENT, 3))
    bench.desk.came(3, bench.pool.message(Kind.BACK, 3))
    for rank in (1, 2):
        bench.desk.died(rank)
    assert bench.aggregator.heard == [(2, Kind.CELL)]
    assert lender.told == [(2, "fetch"), (3, "back"), (2, "died")]


def test_what_a_dead_root_has_sent_is_taken_in_first() -> None:
    bench = Bench(2)
    bench.desk.tick(0.0)
    bench.desk.died(0)
    assert bench.desk.lost_root() is None
    for _ in range(2):
        bench.desk.came(0, bench.pool.message(Kind.RESULT, 3))
        bench.desk.tick(0.0)
        assert bench.desk.lost_root() is None
    bench.desk.tick(0.0)
    assert "rank 0" in str(bench.desk.lost_root())
