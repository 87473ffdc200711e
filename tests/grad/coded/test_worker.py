"""A worker's side, message by message; the protocol as a whole is tested in test_network."""

from __future__ import annotations

from typing import Any

import pytest

from hpctrain.grad.coded.cells import Buffer, Kind, Pool
from hpctrain.grad.coded.schemes import scheme_of
from hpctrain.grad.coded.worker import Worker, as_bytes


class Bench:
    """One of two workers that hold three data blocks each."""

    def __init__(self) -> None:
        self.pool = Pool()
        self.sent: list[Buffer] = []
        scheme = scheme_of("sums", "spread", 6, 2, 2, None)
        self.worker = Worker(self._post, self.pool, (0,), scheme, 0)
        self.worker.own = (0, 1, 2)

    def _post(self, rank: int, letter: Buffer) -> None:
        assert rank == 0
        self.sent.append(letter)

    def tell(self, kind: Kind, round_: int, block: int = 0, order: int = 0) -> Buffer:
        letter = self.pool.message(kind, round_, block, column=order)
        self.worker.receive(letter)
        return letter


class Column:
    root, nbytes, is_linear = 0, 8, True

    def add(self, left: Buffer, right: Buffer) -> None:
        pass


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_results_are_kept_until_the_next_step(bench: Bench) -> None:
    """The module's gradients are views of them: an evaluation between does not take them."""
    columns: Any = [Column()]
    bench.worker.begin(0, 6, columns)
    result = bench.tell(Kind.RESULT, 0)
    assert bench.worker.is_whole
    for round_ in (1, 2):
        bench.worker.begin(round_, 6, None, ())
        assert result.holders == 1
    bench.worker.begin(3, 6, columns)
    assert result.holders == 0


def test_a_second_state_is_not_taken_for_an_order(bench: Bench) -> None:
    """Several roots may each say that this rank has fallen behind."""
    bench.tell(Kind.STATE, 5)
    assert bench.worker.take_state()
    bench.worker.begin(5, 6, ())
    late = bench.tell(Kind.STATE, 5)
    assert late.holders == 0
    assert [bench.worker.next_block() for _ in range(3)] == [0, 1, 2]


def test_an_old_deal_is_not_taken_for_an_order(bench: Bench) -> None:
    letter = bench.pool.message(Kind.OWN, 7, data=as_bytes((0, 1)))
    bench.worker.receive(letter)
    bench.worker.begin(5, 6, ())
    late = bench.pool.message(Kind.OWN, 5, data=as_bytes((4,)))
    bench.worker.receive(late)
    assert late.holders == 0
    assert [bench.worker.next_block() for _ in range(3)] == [0, 1, None]


@pytest.mark.parametrize("rounds", [(6, 9), (9, 6)])
def test_the_newest_state_counts(bench: Bench, rounds: tuple[int, int]) -> None:
    bench.worker.begin(5, 6, ())
    letters = [bench.tell(Kind.STATE, round_) for round_ in rounds]
    state = bench.worker.take_state()
    assert state and state.round == 9
    assert sorted(letter.holders for letter in letters) == [0, 1]


def test_the_last_order_about_a_data_block_counts(bench: Bench) -> None:
    bench.worker.begin(0, 6, ())
    bench.tell(Kind.LEAVE, 0, block=1, order=8)
    bench.tell(Kind.HELP, 0, block=1, order=7)  # came late
    assert [bench.worker.next_block() for _ in range(3)] == [0, 2, None]
