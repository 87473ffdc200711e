"""Who computes what: nothing twice without stragglers, and close to the best with them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf, isclose

import pytest

from hpctrain.grad.coded.assignment import Assignment, place
from hpctrain.grad.coded.dealing import (
    AHEAD,
    AHEAD_S,
    MARGIN,
    OVERDUE,
    PATIENCE,
    Act,
    Order,
    Owners,
    Paces,
    Round,
)
from hpctrain.straggling import smallest_time

WORKERS, BLOCKS = 8, 32
LOOK_S = 0.05
"""How often the root looks at the clock; a data block takes 1 s."""


# ---------------------------------------------------------------------- a run in virtual time


def is_complete(round_: Round) -> bool:
    return len(round_.done_by) == round_.assignment.blocks


@dataclass
class Outcome:
    """What became of a round."""

    took_s: float
    best_s: float
    redundant: int
    asked: int
    given_up_s: float
    """Time spent on data blocks that were given up."""

    @property
    def ratio(self) -> float:
        return self.took_s / self.best_s


@dataclass
class _Hand:
    """A worker that does as it is told, at once."""

    queue: list[int] = field(default_factory=list)
    block: int | None = None
    since_s: float = 0.0
    ends_s: float = inf


class Run:
    """Rounds of workers that take so long for each data block, with messages that take no time."""

    def __init__(self, workers: int = WORKERS, blocks: int = BLOCKS, copies: int = 2) -> None:
        self.holders = place("spread", blocks, workers, copies).holders
        self.owners = Owners(place("spread", blocks, workers, copies))
        self.paces = Paces(workers)
        self.now_s = 0.0
        self.deals = 0
        self.log: list[tuple[float, Order]] = []

    @property
    def counts(self) -> list[int]:
        owners = self.owners.assignment
        return [len(owners.owned(worker)) for worker in range(owners.workers)]

    def round(
        self,
        durations: Sequence[float],
        dead: Collection[int] = (),
        noise: Callable[[], float] = lambda: 1.0,
    ) -> Outcome:
        assignment, begun_s = self.owners.assignment, self.now_s
        self.log = []
        round_ = Round(assignment, self.paces, begun_s, sorted(dead))
        hands = [_Hand() for _ in range(assignment.workers)]
        asked, given_up_s = 0, 0.0

        def follow(orders: Sequence[Order]) -> None:
            nonlocal asked, given_up_s
            for order in orders:
                self.log.append((self.now_s - begun_s, order))
                hand = hands[order.worker]
                if order.act is Act.HELP:
                    asked += 1
                    hand.queue.append(order.block)
                elif order.block in hand.queue:
                    hand.queue.remove(order.block)
                elif order.act is Act.DROP and hand.block == order.block:
                    given_up_s += self.now_s - hand.since_s
                    hand.block, hand.ends_s = None, inf
            for worker, hand in enumerate(hands):
                if hand.block is None and hand.queue:
                    hand.block, hand.since_s = hand.queue.pop(0), self.now_s
                    hand.ends_s = self.now_s + durations[worker] * noise()

        for worker, hand in enumerate(hands):
            if worker not in dead:
                hand.queue = [*assignment.owned(worker)]
                follow(round_.joined(worker, assignment.owned(worker), self.now_s))
        look_s = begun_s
        while not is_complete(round_):
            look_s += LOOK_S
            while True:
                worker = min(range(len(hands)), key=lambda w: hands[w].ends_s)
                hand = hands[worker]
                if hand.ends_s > look_s:
                    break
                self.now_s, block = hand.ends_s, hand.block
                assert block is not None
                hand.block, hand.ends_s = None, inf
                follow(round_.done(worker, block, self.now_s))
                if is_complete(round_):
                    break
                follow(round_.decide(self.now_s))
            if not is_complete(round_):
                self.now_s = look_s
                follow(round_.decide(self.now_s))
                assert self.now_s - begun_s < 1000
        took_s = self.now_s - begun_s
        for worker, hand in enumerate(hands):
            if hand.block is not None and hand.ends_s < self.now_s + 1e-9:  # at the same instant
                round_.done(worker, hand.block, self.now_s)
            elif hand.block is not None:
                given_up_s += self.now_s - hand.since_s
        round_.end(self.now_s)
        self.deals += self.owners.learn(self.paces, sorted(dead))
        alive = {w: duration for w, duration in enumerate(durations) if w not in dead}
        best_s = smallest_time(alive, self.holders)
        return Outcome(took_s, best_s, len(round_.redundant), asked, given_up_s)


Rounds = Iterator[tuple[list[float], tuple[int, ...]]]


def slow(*workers: int, factor: float) -> list[float]:
    return [factor if worker in workers else 1.0 for worker in range(WORKERS)]


def none(draw: random.Random) -> Rounds:
    while True:
        yield slow(factor=1), ()


def persistent(draw: random.Random, factor: float = 5.0) -> Rounds:
    while True:
        yield slow(2, factor=factor), ()


def much_slower(draw: random.Random) -> Rounds:
    return persistent(draw, 20.0)


def rotating(draw: random.Random) -> Rounds:
    while True:
        for worker in range(WORKERS):
            yield slow(worker, factor=5), ()


def one_dead(draw: random.Random) -> Rounds:
    while True:
        yield slow(factor=1), (2,)


def bernoulli(draw: random.Random) -> Rounds:
    while True:
        yield [5.0 if draw.random() < 0.1 else 1.0 for _ in range(WORKERS)], ()


def exponential(draw: random.Random) -> Rounds:
    while True:
        yield [1 + draw.expovariate(2) for _ in range(WORKERS)], ()


def half_speed(draw: random.Random) -> Rounds:
    while True:
        yield slow(1, 5, factor=2), ()


SCENARIOS = [
    (none, 1.0),
    (persistent, 1.1),
    (much_slower, 1.1),
    (rotating, 1.1),
    (one_dead, 1.1),
    (bernoulli, 1.25),
    (exponential, 1.25),
    (half_speed, 1.1),
]


@pytest.mark.parametrize(("scenario", "most"), SCENARIOS, ids=lambda s: getattr(s, "__name__", ""))
def test_close_to_the_best(scenario: Callable[[random.Random], Rounds], most: float) -> None:
    run, rounds = Run(), scenario(random.Random(1))
    outcomes = [run.round(*next(rounds)) for _ in range(60)]
    ratio = statistics.fmean(outcome.ratio for outcome in outcomes)
    redundant = sum(outcome.redundant for outcome in outcomes) / len(outcomes) / BLOCKS
    given_up = sum(outcome.given_up_s for outcome in outcomes) / sum(
        outcome.took_s * WORKERS for outcome in outcomes
    )
    print(
        f"{scenario.__name__}: T/T* {ratio:.3f}, redundant {redundant:.2%} of the data blocks, "
        f"time on what was given up {given_up:.2%}, new deals {run.deals}"
    )
    assert ratio <= most + 1e-9
    assert redundant <= 0.02
    assert all(outcome.ratio > 1 - 1e-9 for outcome in outcomes)
    if scenario is none:
        assert redundant == given_up == run.deals == sum(o.asked for o in outcomes) == 0


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_asked_while_all_are_equally_fast(seed: int) -> None:
    draw, run = random.Random(seed), Run()
    outcomes = [run.round(slow(factor=1), noise=lambda: draw.uniform(0.9, 1.1)) for _ in range(20)]
    assert sum(outcome.asked for outcome in outcomes) == 0
    assert run.deals == 0


def test_a_straggler_in_a_run_of_equals_is_helped_by_several() -> None:
    run = Run()
    for _ in range(3):
        run.round(slow(factor=1))
    outcome = run.round(slow(2, factor=5))
    helpers = [order.worker for _, order in run.log if order.act is Act.HELP]
    assert len(helpers) == len({*helpers}) == 4
    assert outcome.took_s == 5


# ---------------------------------------------------------------------- one round, step by step


def orders(*said: tuple[Act, int, int]) -> set[Order]:
    return {Order(*each) for each in said}


class Clock:
    """A round of workers 0, 1, 2, of which each holds everything; a data block takes so long."""

    def __init__(
        self, owned: int = 2, workers: int = 3, known: bool = True, seconds: float = 1.0
    ) -> None:
        others = {w: [v for v in range(workers) if v != w] for w in range(workers)}
        holders = tuple((w, *others[w]) for w in range(workers) for _ in range(owned))
        self.assignment = Assignment(workers, holders)
        self.paces = Paces(workers)
        if known:
            for worker in range(workers):
                self.paces.record(worker, [seconds], 0)
        self.round = Round(self.assignment, self.paces, 0.0)

    def join(self, *workers: int, now: float = 0.0) -> None:
        for worker in workers:
            assert not self.round.joined(worker, self.assignment.owned(worker), now)

    def done(self, worker: int, *blocks: int, now: float) -> set[Order]:
        return {order for block in blocks for order in self.round.done(worker, block, now)}

    def decide(self, now: float) -> set[Order]:
        return {*self.round.decide(now)}


def test_the_straggler_is_told_what_others_do() -> None:
    clock = Clock()
    clock.join(0, 1, 2)
    clock.done(0, 0, now=1)
    clock.done(1, 2, now=1)
    assert not clock.decide(1)
    clock.done(0, 1, now=2)
    # Worker 2 is at block 4, and 1 s late: the one behind it is expected last. Then block 4, which
    # it may well finish first. It goes on. Worker 1 is expected to be done by now.
    assert clock.decide(2) == orders(
        (Act.HELP, 0, 5), (Act.LEAVE, 2, 5), (Act.HELP, 1, 4), (Act.TAKEN, 2, 4)
    )
    clock.done(1, 3, now=2)
    assert not clock.decide(2)
    assert clock.done(0, 5, now=3) == set()
    assert clock.done(2, 4, now=3.5) == orders((Act.DROP, 1, 4))
    assert is_complete(clock.round)
    assert clock.round.done_by == {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 0}
    assert not clock.round.redundant
    assert not clock.decide(4)


def one_helper_too_few() -> Clock:
    """Worker 2 is at its first data block for 1.9 s; worker 0 helps, and worker 1 will soon."""
    clock = Clock()
    clock.join(0, 1, 2)
    clock.done(0, 0, now=1)
    clock.done(1, 2, now=1)
    clock.done(0, 1, now=1.9)
    clock.decide(1.9)
    return clock


def test_a_helper_is_asked_before_it_has_nothing_to_do() -> None:
    clock = one_helper_too_few()
    assert not clock.decide(2 - 2 * AHEAD_S)
    assert clock.decide(2 - AHEAD_S / 2) == orders((Act.HELP, 1, 4), (Act.TAKEN, 2, 4))
    # It still has to finish its own, and has begun the other only then.
    assert not clock.done(1, 3, now=2)
    assert clock.round.expected_s(1, 2.5) == [(4, 3.0)]
    assert clock.done(1, 4, now=3) == orders((Act.DROP, 2, 4))


def test_what_a_helper_still_has_to_finish_counts() -> None:
    clock = Clock(owned=1)
    clock.join(1)
    now = 1 - AHEAD_S * 2 / 3
    # Worker 2 is expected a little later than an idle helper would be, by the margin.
    clock.join(2, now=now - 1 - (1 + MARGIN + AHEAD_S / 3) / OVERDUE)
    assert not clock.decide(now)
    assert not clock.done(1, 1, now=now)
    assert clock.decide(now) == orders((Act.HELP, 1, 2), (Act.TAKEN, 2, 2))


def test_whoever_is_free_first_is_asked_first() -> None:
    clock = Clock(owned=1)
    clock.join(0, now=AHEAD_S / 2)
    clock.join(1, 2)
    clock.done(1, 1, now=1)
    clock.round.went_out(2)
    assert clock.decide(1) == orders((Act.HELP, 1, 2), (Act.TAKEN, 2, 2))


def test_what_a_lost_worker_was_not_alone_to_compute_is_there() -> None:
    clock = Clock(owned=1)
    clock.join(0, 1, 2)
    clock.done(0, 0, now=1)
    assert clock.decide(3)
    assert clock.done(0, 2, now=4) == orders((Act.DROP, 2, 2))
    clock.done(2, 2, now=4)  # which had not heard of it
    clock.round.went_out(0)
    assert clock.round.done_by == {2: 2}


def test_what_a_helper_has_not_begun_is_taken_back_when_it_is_there() -> None:
    clock = one_helper_too_few()
    assert (Act.HELP, 1, 4) in {(o.act, o.worker, o.block) for o in clock.decide(2 - AHEAD_S / 2)}
    assert clock.done(2, 4, now=1.999) == orders((Act.DROP, 1, 4))
    assert clock.round.expected_s(1, 1.999) == [(3, 2.0)]
    assert not clock.done(1, 3, now=2)
    assert not clock.round.redundant


def test_short_data_blocks_are_asked_for_later() -> None:
    clock = Clock(seconds=AHEAD_S)
    clock.join(0, 1, 2)
    clock.done(0, 0, now=AHEAD_S)
    clock.done(1, 2, now=AHEAD_S)
    asked = {order.worker for order in clock.decide(AHEAD_S) | clock.decide(1.4 * AHEAD_S)}
    assert not asked
    assert 0 in {order.worker for order in clock.decide((2 - AHEAD / 2) * AHEAD_S)}


def test_one_helper_is_enough_while_it_is_on_time() -> None:
    clock = Clock(owned=1)
    clock.join(0, 1, 2)
    clock.done(0, 0, now=1)
    clock.done(1, 1, now=1)
    # At 1 s worker 2 is as fast as expected; later and later it is expected later and later.
    now = 1.0
    while not (said := clock.decide(now)):
        now += 0.01
    assert 1.3 < now < 2
    assert said == orders((Act.HELP, 0, 2), (Act.TAKEN, 2, 2))
    asked_s = now
    while now < asked_s + 1:
        assert not clock.decide(now)
        now += 0.01
    # The helper is late as well. The next one is asked, but nobody is asked twice.
    while not (said := clock.decide(now)):
        now += 0.01
    assert asked_s + 1 < now < asked_s + 2
    assert said == orders((Act.HELP, 1, 2), (Act.TAKEN, 0, 2), (Act.TAKEN, 2, 2))
    while now < 20:
        assert not clock.decide(now)
        now += 0.1
    assert clock.done(1, 2, now=now) == orders((Act.DROP, 0, 2), (Act.DROP, 2, 2))


def test_helpers_are_asked_only_for_what_they_hold() -> None:
    paces = Paces(3)
    for worker in range(3):
        paces.record(worker, [1.0], 0)

    def begun() -> Round:
        round_ = Round(Assignment(3, ((0, 1), (1, 2), (2, 0))), paces, 0.0)
        for worker in range(3):
            round_.joined(worker, [worker], 0.0)
        return round_

    round_ = begun()
    round_.done(1, 1, 1.0)
    assert {*round_.decide(5)} == orders((Act.HELP, 1, 0), (Act.TAKEN, 0, 0))
    round_ = begun()
    round_.done(0, 0, 1.0)
    round_.done(1, 1, 1.0)
    assert {*round_.decide(5)} == orders((Act.HELP, 0, 2), (Act.TAKEN, 2, 2))


def test_what_is_computed_twice_is_redundant() -> None:
    clock = Clock(owned=1)
    clock.join(0, 1, 2)
    clock.done(0, 0, now=1)
    clock.done(1, 1, now=1)
    assert clock.decide(3) == orders(
        (Act.HELP, 0, 2),
        (Act.TAKEN, 2, 2),
    )
    assert clock.done(2, 2, now=3.9) == orders((Act.DROP, 0, 2))
    assert clock.done(0, 2, now=4) == set()  # before it was told
    assert clock.round.redundant == [(2, 0)]
    assert clock.round.done_by[2] == 2
    clock.round.end(4.0)
    # That it came right after it was to be given up makes nobody fast.
    assert [clock.paces.of(worker) for worker in range(3)] == [1, 1, 1]
    assert clock.paces.last(2) == 3.9


def test_who_goes_out_has_done_nothing() -> None:
    clock = Clock(owned=2)
    clock.join(0, 1, 2)
    clock.done(0, 0, 1, now=2)
    clock.done(1, 2, 3, now=2)
    clock.done(2, 4, now=2)
    clock.round.went_out(0)
    assert clock.round.done_by == {2: 1, 3: 1, 4: 2}
    assert clock.round.expected_s(0, 2.0) == []
    # One is asked for each, even where it has computed something all the time.
    assert clock.decide(2) == orders((Act.HELP, 1, 0))
    clock.done(2, 5, now=2.1)
    assert clock.decide(2.1) == orders((Act.HELP, 2, 1))
    clock.done(1, 0, now=3)
    clock.done(2, 1, now=3)
    assert is_complete(clock.round)


def test_who_comes_back_has_done_what_it_did() -> None:
    clock = Clock(owned=2)
    clock.join(0, 1, 2)
    clock.done(0, 0, 1, now=2)
    clock.done(1, 2, 3, now=2)
    clock.done(2, 4, 5, now=2)
    assert is_complete(clock.round)
    clock.round.went_out(0)
    clock.round.went_out(1)
    assert not is_complete(clock.round)
    assert clock.decide(2) == orders((Act.HELP, 2, 0))
    assert {*clock.round.came_back(0, 2.5)} == orders((Act.DROP, 2, 0))
    assert not is_complete(clock.round)
    assert clock.decide(3) == orders((Act.HELP, 0, 2), (Act.HELP, 2, 3))
    clock.done(2, 3, now=4)
    assert {*clock.round.came_back(1, 4)} == orders((Act.DROP, 0, 2))
    assert is_complete(clock.round)
    assert clock.round.done_by == {0: 0, 1: 0, 2: 1, 3: 2, 4: 2, 5: 2}


def test_all_were_silent() -> None:
    """Nobody is asked then, and everybody is counted on again who is heard."""
    clock = Clock(owned=1)
    clock.join(0, 1, 2)
    for worker in range(3):
        clock.round.went_out(worker)
    assert not clock.decide(1)
    for worker in range(3):
        assert not clock.round.came_back(worker, 2)
    clock.done(0, 0, now=2)
    assert clock.decide(9) == orders((Act.HELP, 0, 1), (Act.TAKEN, 1, 1))


def test_what_nobody_else_will_compute_is_asked_for_at_once() -> None:
    """Although nobody knows yet how long a data block takes, as in a first evaluation."""
    round_ = Round(Assignment(2, ((0, 1),)), Paces(2), 0.0)
    round_.joined(1, [], 0)
    assert not round_.decide(1)
    round_.went_out(0)
    assert round_.decide(2) == [Order(Act.HELP, 1, 0)]


def test_what_was_computed_may_have_gone_with_who_computed_it() -> None:
    round_ = Round(Assignment(3, ((0, 1), (1, 2), (2, 0))), Paces(3), 0.0, dead=[0])
    for worker in (1, 2):
        round_.joined(worker, [worker], 0)
        round_.done(worker, worker, 1)
    round_.went_out(2)
    assert round_.done_by == {1: 1}
    round_.went_out(1)
    assert round_.done_by == {}


def test_late_ones_need_not_compute_what_is_there_or_taken() -> None:
    clock = Clock(owned=3)
    clock.join(0, 1)
    clock.done(0, 0, 1, 2, now=3)
    clock.done(1, 3, 4, 5, now=3)
    # Worker 2 has not come. What it might be at is taken over too.
    assert clock.decide(3) == orders((Act.HELP, 0, 8), (Act.HELP, 1, 7))
    clock.done(0, 8, now=4)
    said = clock.round.joined(2, [6, 7, 8], 4.0)
    assert {*said} == orders((Act.DROP, 2, 8), (Act.LEAVE, 2, 7))
    assert clock.round.expected_s(2, 4.0) == [(6, 5.0)]
    assert clock.done(1, 7, now=4.2) == set()  # who has not begun it need not be told again
    clock.round.went_out(0)
    assert clock.round.joined(0, [0, 1, 2], 4.3) == []


def test_what_one_who_is_out_was_asked_for_is_not_taken() -> None:
    clock = Clock(owned=1)
    clock.join(0, 1)
    clock.done(0, 0, now=1)
    clock.done(1, 1, now=1)
    assert clock.decide(9) == orders((Act.HELP, 0, 2))
    clock.round.went_out(0)
    assert clock.round.joined(2, [2], 9.5) == []


def test_others_own_what_a_worker_joins_with() -> None:
    """Owners may change while it is under way."""
    clock = Clock(owned=1)
    clock.join(0, 1)
    assert clock.round.joined(2, [], 0.0) == []
    clock.done(0, 0, now=1)
    assert clock.decide(1) == orders((Act.HELP, 0, 2))  # which nobody is at


def test_nobody_knows_how_long_it_takes_at_first() -> None:
    clock = Clock(known=False)
    clock.join(0, 1, 2)
    assert not clock.decide(100)
    clock.done(0, 0, 1, now=100)
    assert clock.decide(100)


# ---------------------------------------------------------------------- paces and owners


def test_pace_is_the_usual_one() -> None:
    paces = Paces(3)
    assert not paces.known
    assert paces.of(0) == paces.last(0) == 0
    paces.record(0, [], 0.0)
    assert not paces.known
    paces.record(0, [1.0, 3.0], 9.0)
    assert paces.known
    assert paces.of(0) == paces.of(1) == paces.last(2) == 2
    for took_s in (2.0, 2.0, 50.0, 50.0):
        paces.record(0, [took_s], 0.0)
    assert paces.of(0) == 2
    assert paces.last(0) == 50
    paces.record(0, [50.0], 0.0)
    paces.record(0, [50.0], 0.0)
    assert paces.of(0) == 50


def test_pace_of_one_that_finishes_nothing() -> None:
    paces = Paces(2)
    paces.record(0, [1.0], 0.0)
    paces.record(1, [], 0.5)
    assert paces.of(1) == 1  # no news
    paces.record(1, [], 7.0)
    assert paces.of(1) == 7
    paces.record(1, [], 6.0)
    assert paces.of(1) == 7


def test_who_had_to_give_up_is_known_to_be_slow() -> None:
    clock = Clock(owned=1)
    clock.join(0, 1, 2)
    clock.done(0, 0, now=1)
    clock.done(1, 1, now=1)
    assert clock.decide(6) == orders((Act.HELP, 0, 2), (Act.TAKEN, 2, 2))
    assert clock.done(0, 2, now=7) == orders((Act.DROP, 2, 2))
    clock.round.end(7.0)
    assert clock.paces.last(2) == 7


def learned(run: Run, rounds: Rounds, count: int) -> list[int]:
    for _ in range(count):
        run.round(*next(rounds))
    return run.counts


def test_two_at_half_speed_are_learned() -> None:
    run = Run()
    counts = learned(run, half_speed(random.Random(0)), 20)
    assert counts[1] == counts[5] == 2
    assert max(counts) == 5
    assert run.deals == 1
    for durations, dead in [next(half_speed(random.Random(0)))] * 3:
        outcome = run.round(durations, dead)
        assert outcome.ratio == 1
        assert outcome.redundant == outcome.asked == 0


def test_uneven_speeds_are_learned_as_well_as_holders_allow() -> None:
    run = Run(workers=4, blocks=18, copies=3)
    for _ in range(20):
        outcome = run.round([1.0, 1.0, 2.0, 0.5])
    assert run.counts == [4, 4, 2, 8]
    assert run.deals == 1
    assert outcome.ratio == 1
    assert outcome.redundant == outcome.asked == 0


def test_one_that_becomes_slow_and_fast_again_is_learned() -> None:
    run = Run()
    for _ in range(50):
        run.round(slow(factor=1))
    assert run.deals == 0
    for _ in range(20):
        run.round(slow(3, factor=2))
    assert run.deals == 1
    assert run.counts[3] == 2
    for _ in range(20):
        run.round(slow(factor=1))
    assert run.deals == 2
    assert max(run.counts) == 4


NOISES: dict[str, Callable[[random.Random], Rounds]] = {
    "rotating": rotating,
    "bernoulli": bernoulli,
    "exponential": exponential,
}


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("seed", range(4))
def test_chance_is_not_learned(name: str, seed: int) -> None:
    rounds = NOISES[name](random.Random(seed))
    paces, owners = Paces(WORKERS), Owners(place("spread", BLOCKS, WORKERS, 2))
    deals = 0
    for _ in range(200):
        durations, _ = next(rounds)
        for worker, took_s in enumerate(durations):
            paces.record(worker, [took_s], 0.0)
        deals += owners.learn(paces, [])
    assert deals <= (2 if name == "exponential" else 0)


def test_a_dead_worker_owns_nothing_at_once_and_is_taken_back() -> None:
    run = Run()
    for _ in range(6):
        run.round(slow(factor=1))
    outcome = run.round(slow(factor=1), dead=(2,))
    assert run.deals == 1
    assert run.counts[2] == 0
    assert max(run.counts) == 5
    assert outcome.ratio == 1
    outcome = run.round(slow(factor=1), dead=(2,))
    assert outcome.asked == 0
    assert outcome.took_s == 5
    run.round(slow(factor=1))
    assert run.deals == 2
    assert run.counts == [4] * WORKERS
    assert run.round(slow(factor=1)).took_s == 4


def test_all_but_one_dead() -> None:
    run = Run(workers=3, blocks=6, copies=3)
    run.round([1.0] * 3)
    run.round([1.0] * 3, dead=(0, 2))
    assert run.counts == [0, 6, 0]
    assert run.round([1.0] * 3, dead=(0, 2)).took_s == 6


def test_small_gains_and_short_ones_change_nothing() -> None:
    paces, owners = Paces(4), Owners(place("spread", 16, 4, 2))
    for _ in range(30):
        for worker in range(4):
            paces.record(worker, [1.09 if worker == 1 else 1.0], 0.0)
        assert not owners.learn(paces, [])
    for _ in range(2):
        for number in range(PATIENCE - 1 + 4):  # the median needs a while
            for worker in range(4):
                paces.record(worker, [2.0 if worker == 1 and number >= 4 else 1.0], 0.0)
            assert not owners.learn(paces, [])


def test_margin_is_what_it_says() -> None:
    clock = Clock(owned=1, workers=2)
    clock.join(0)
    clock.round.joined(1, [1], 0.0)
    clock.done(0, 0, now=1)
    low, high = 1.0, 3.0
    while not isclose(low, high, rel_tol=1e-9):
        middle = (low + high) / 2
        others = [s for _, s in clock.round.expected_s(1, middle)]
        if others[0] > middle + 1 + MARGIN:
            high = middle
        else:
            low = middle
    assert not clock.decide(low - 1e-6)
    assert clock.decide(high + 1e-6) == orders((Act.HELP, 0, 1), (Act.TAKEN, 1, 1))
