"""Assignments of data blocks: every set of survivors that should be complete is."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, pairwise, product
from math import ceil, comb, inf, isclose

import numpy as np
import pytest

from hpctrain.errors import ExchangeError
from hpctrain.grad.coded import assignment as module
from hpctrain.grad.coded.assignment import (
    PLACEMENTS,
    Assignment,
    certify,
    certify_sufficient,
    lost,
    place,
    with_owners,
)

UNEVEN = (1.0, 1.0, 0.5, 2.0)


def backups_of(assignment: Assignment, worker: int) -> tuple[int, ...]:
    """Data blocks that the worker holds for others, ascending."""
    return tuple(block for block, (_, *rest) in enumerate(assignment.holders) if worker in rest)


def counts(assignment: Assignment) -> list[int]:
    return [len(assignment.owned(worker)) for worker in range(assignment.workers)]


def slowest(owned: Sequence[int], speeds: Sequence[float]) -> float:
    return max(count / speed for count, speed in zip(owned, speeds, strict=True) if speed)


def complete_sets(assignment: Assignment) -> np.ndarray:
    """Of each set of workers, as a number with their bits, whether it holds all data blocks."""
    words = -(-assignment.blocks // 63)
    union = np.zeros((1, words), dtype=np.int64)
    for worker in range(assignment.workers):
        held = np.zeros(words, dtype=np.int64)
        for block in assignment.held(worker):
            held[block // 63] |= np.int64(1) << np.int64(block % 63)
        union = np.concatenate([union, union | held])
    complete: np.ndarray = (union == union[-1]).all(axis=1)
    return complete


def fatal_sets(placement: str, assignment: Assignment, copies: int) -> list[set[int]]:
    """Sets of workers, by the placement's definition, one of which is gone if a block is lost."""
    workers = assignment.workers
    owners = [worker for worker, count in enumerate(counts(assignment)) if count]
    if placement == "cyclic":
        return [{(owner + step) % workers for step in range(copies)} for owner in owners]
    if placement == "fractional":
        groups = workers // copies
        cuts = [group * workers // groups for group in range(groups + 1)]
        both = [{*range(*cut)} for cut in pairwise(cuts)]
        return [group for group in both if group & {*owners}]
    return [{*holders} for holders in assignment.holders]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("workers", range(1, 13))
def test_every_set_of_survivors(placement: str, workers: int) -> None:
    """Complete if and only if no set of workers is missing that holds something alone."""
    sets = np.arange(1 << workers)
    missing = workers - np.array([int(number).bit_count() for number in sets])
    sizes = {1, workers - 1, workers, 2 * workers + 1, 4 * workers} - {0}
    for copies, blocks in product(range(1, min(workers, 4) + 1), sizes):
        made = place(placement, blocks, workers, copies)
        complete = complete_sets(made)
        assert complete[missing < copies].all()
        expected = np.ones(len(sets), dtype=bool)
        for fatal in fatal_sets(placement, made, copies):
            expected &= (sets & sum(1 << worker for worker in fatal)) > 0
        assert (complete == expected).all()
        for stragglers in range(workers):
            if complete[missing == stragglers].all():
                assert certify(made, stragglers).subsets == comb(workers, stragglers)
            else:
                with pytest.raises(ExchangeError, match="nobody holds data block"):
                    certify(made, stragglers)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_is_lost_is_what_no_survivor_holds(placement: str) -> None:
    made = place(placement, 13, 6, 2)
    for dead in (dead for size in range(7) for dead in combinations(range(6), size)):
        held = {block for worker in {*range(6)} - {*dead} for block in made.held(worker)}
        assert {*lost(made, dead)} == {*range(13)} - held


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("speeds", [None, UNEVEN, (1, 3, 3, 3), (5, 1, 1, 1)])
@pytest.mark.parametrize("copies", [1, 2, 3, 4])
def test_placements_are_consistent(
    placement: str, speeds: tuple[float, ...] | None, copies: int
) -> None:
    for blocks in (1, 3, 4, 5, 16, 18, 37):
        made = place(placement, blocks, 4, copies, speeds)
        assert made == place(placement, blocks, 4, copies, speeds)
        assert made.blocks == blocks
        assert made.copies >= copies
        if placement != "fractional":
            assert all(len(holders) == copies for holders in made.holders)
        for worker in range(4):
            owned, backups = made.owned(worker), backups_of(made, worker)
            assert made.held(worker) == tuple(sorted({*owned, *backups}))
            assert len(made.held(worker)) == len(owned) + len(backups)
            if owned:
                assert owned == tuple(range(owned[0], owned[-1] + 1))
        paces = speeds or [1] * 4
        longest = slowest(counts(made), paces)
        assert sum(ceil(longest * speed) - 1 for speed in paces) < blocks  # in any less time


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_owned_in_proportion_to_speed(placement: str) -> None:
    made = place(placement, 18, 4, 2, UNEVEN)
    assert counts(made) == [4, 4, 2, 8]
    assert [made.owned(worker)[0] for worker in (3, 0, 1, 2)] == [0, 8, 12, 16]  # aligned


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_fewer_blocks_than_workers(placement: str) -> None:
    made = place(placement, 3, 5, 2)
    assert counts(made) == [1, 1, 1, 0, 0]
    certify(made, 1)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_one_worker(placement: str) -> None:
    assert place(placement, 3, 1, 1) == Assignment(1, ((0,), (0,), (0,)))
    assert place(placement, 1, 1, 1, [0.1]).owned(0) == (0,)


def test_cyclic() -> None:
    assert place("cyclic", 4, 4, 3).holders == ((0, 1, 2), (1, 2, 3), (2, 3, 0), (3, 0, 1))


def test_fractional_groups_hold_the_same() -> None:
    """Copies 3 of 11 workers: groups of 3, 4 and 4. Like speeds are together."""
    made = place("fractional", 22, 11, 3)
    held = Counter(made.held(worker) for worker in range(11))
    assert sorted(held.values()) == [3, 4, 4]
    assert sum(map(len, held)) == 22
    made = place("fractional", 12, 4, 2, [1, 2, 1, 2])
    assert made.held(1) == made.held(3) == tuple(range(8))
    assert made.held(0) == made.held(2) == tuple(range(8, 12))


@pytest.mark.parametrize("workers", range(5, 20))
def test_spread_gives_each_block_of_a_worker_another_backup(workers: int) -> None:
    made = place("spread", 4 * workers, workers, 2)
    for worker in range(workers):
        assert len({made.holders[block][1] for block in made.owned(worker)}) == 4
        assert len(backups_of(made, worker)) == 4


@pytest.mark.parametrize("workers", range(1, 12))
def test_spread_is_even(workers: int) -> None:
    """Over all workers, and of each worker's blocks over the others, whatever does not divide."""
    for copies in range(1, workers + 1):
        for blocks in {1, 2, workers + 1, 3 * workers - 1, 4 * workers, 4 * workers + 3}:
            made = place("spread", blocks, workers, copies)
            backups = [len(backups_of(made, worker)) for worker in range(workers)]
            assert max(backups) - min(backups) <= 1
            pairs = Counter((owner, other) for owner, *rest in made.holders for other in rest)
            for worker in range(workers):
                for_me = [pairs[worker, other] for other in range(workers) if other != worker]
                assert not for_me or max(for_me) - min(for_me) <= 1


def test_spread_is_in_proportion_to_speed() -> None:
    """If any worker is late, the others share its blocks by their speeds, to whole blocks."""
    speeds = [1, 1, 1, 2, 2, 2, 4, 4]
    made = place("spread", 136, 8, 2, speeds)
    for worker in range(8):
        mine = Counter(made.holders[block][1] for block in made.owned(worker))
        rest = sum(speeds) - speeds[worker]
        for other in {*range(8)} - {worker}:
            assert abs(mine[other] - 8 * speeds[worker] * speeds[other] / rest) < 1
    backups = [len(backups_of(made, worker)) for worker in range(8)]
    assert all(
        7 * speed <= count <= 9 * speed for count, speed in zip(backups, speeds, strict=True)
    )


def test_spread_with_a_worker_that_is_faster_than_all_others() -> None:
    made = place("spread", 20, 4, 3, [100, 1, 1, 1])
    assert counts(made)[0] == 20
    assert sorted(len(backups_of(made, worker)) for worker in range(4)) == [0, 13, 13, 14]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"placement": "random"}, "unknown placement: got 'random'; allowed: spread"),
        ({"blocks": 0}, "bad number of data blocks: got 0"),
        ({"workers": 0}, "bad number of workers: got 0"),
        ({"copies": 0}, "bad number of copies: got 0; allowed: 1 to 4"),
        ({"copies": 5}, "bad number of copies: got 5; allowed: 1 to 4"),
        ({"speeds": [1, 1, 1]}, "bad speeds"),
        ({"speeds": [1, 1, 1, 0]}, "allowed: 4 finite numbers, all above 0"),
        ({"speeds": [1, 1, 1, -1]}, "bad speeds"),
        ({"speeds": [1, 1, 1, inf]}, "bad speeds"),
        ({"speeds": [1, 1, 1, float("nan")]}, "bad speeds"),
    ],
)
def test_refused(wrong: dict[str, object], message: str) -> None:
    arguments = {"placement": "spread", "blocks": 4, "workers": 4, "copies": 2, **wrong}
    with pytest.raises(ExchangeError, match=message) as error:
        place(**arguments)  # type: ignore[arg-type]
    assert error.value.everywhere


@pytest.mark.parametrize(
    ("workers", "holders", "message"),
    [
        (2, ((0,), ()), "nobody holds data block 1"),
        (2, ((0, 1), (1, 1)), "bad holders of data block 1"),
        (2, ((0, 2),), "bad holders of data block 0"),
        (2, ((-1,),), "bad holders of data block 0"),
        (2, (), "bad number of data blocks"),
        (0, ((0,),), "bad number of workers"),
    ],
)
def test_bad_assignments_name_the_block(
    workers: int, holders: tuple[tuple[int, ...], ...], message: str
) -> None:
    with pytest.raises(ExchangeError, match=message):
        Assignment(workers, holders)


def test_counterexample() -> None:
    made = Assignment(5, ((0, 1, 2), (1, 3), (2, 0, 4), (3, 1)))
    assert made.copies == 2
    certify(made, 1)
    with pytest.raises(ExchangeError) as error:
        certify(made, 2)
    assert str(error.value) == (
        "without workers 1, 3, nobody holds data blocks 1, 3; "
        "allowed: at most 1 missing workers with 2 copies\n"
        "  fix: place 3 copies of each data block, or wait for 4 workers"
    )


def test_counterexample_where_sets_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SUBSETS", 5)
    made = Assignment(5, ((0, 1, 2), (1, 3), (2, 0, 4), (3, 1)))
    with pytest.raises(ExchangeError, match="without workers 0, 1, 3, nobody holds data blocks 1"):
        certify(made, 3)


def test_certificates() -> None:
    made = place("spread", 64, 16, 3)
    assert str(certify(made, 2)) == (
        "any 14 of 16 workers hold all data blocks: "
        "each of the 120 sets of 2 missing workers was tried"
    )
    assert certify_sufficient(made, 14) == certify(made, 2)
    certificate = certify(place("cyclic", 128, 64, 5), 4)
    assert (certificate.method, certificate.subsets) == ("proof", 0)
    assert str(certificate) == (
        "any 60 of 64 workers hold all data blocks: each data block has more than 4 holders"
    )


def test_exhaustive_and_proof_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    made = place("fractional", 12, 8, 3)
    for stragglers in range(8):
        for most in (0, 1000):
            monkeypatch.setattr(module, "MOST_SUBSETS", most)
            if stragglers < 4:  # two groups of 4
                certify(made, stragglers)
            else:
                with pytest.raises(ExchangeError, match="without workers"):
                    certify(made, stragglers)


def test_certify_refuses_numbers_out_of_range() -> None:
    made = place("spread", 4, 4, 2)
    for stragglers in (-1, 4):
        with pytest.raises(ExchangeError, match="bad number of stragglers"):
            certify(made, stragglers)
    for sufficient in (0, 5):
        with pytest.raises(ExchangeError, match="bad number of workers that must suffice"):
            certify_sufficient(made, sufficient)


@pytest.mark.parametrize("seed", range(60))
def test_new_owners_against_every_choice(seed: int) -> None:
    """Nobody's owned / speed could be less. Fewer moves would rarely do, and then one fewer."""
    draw = random.Random(seed)
    workers, blocks = draw.randint(1, 4), draw.randint(1, 7)
    speeds = [draw.choice([0.0, 0.5, 1.0, 1.5, 2.0, 3.0]) for _ in range(workers)]
    holders = tuple(
        tuple(draw.sample(range(workers), draw.randint(1, min(3, workers)))) for _ in range(blocks)
    )
    before = Assignment(workers, holders)
    after = with_owners(before, speeds, tolerance=0)
    assert [{*some} for some in after.holders] == [{*some} for some in before.holders]
    dead = [worker for worker, speed in enumerate(speeds) if not speed]
    gone = lost(before, dead)

    def outcome(owners: Sequence[int]) -> tuple[float, int]:
        owned = Counter(owner for block, owner in enumerate(owners) if block not in gone)
        moves = sum(owner != some[0] for owner, some in zip(owners, before.holders, strict=True))
        return max((owned[w] / speeds[w] for w in owned), default=0.0), moves

    allowed = [
        some[:1] if block in gone else [worker for worker in some if speeds[worker]]
        for block, some in enumerate(before.holders)
    ]
    longest, moves = outcome([some[0] for some in after.holders])
    least, fewest = min(map(outcome, product(*allowed)))
    assert longest == least
    assert moves <= fewest + 1
    assert all(after.holders[block] == before.holders[block] for block in gone)


def test_new_owners_move_nothing_without_need() -> None:
    made = place("spread", 16, 4, 2)
    assert with_owners(made, [1.0, 1.01, 0.98, 0.99]) == made
    uneven = place("cyclic", 18, 4, 2, UNEVEN)
    assert with_owners(uneven, UNEVEN) == uneven


def test_tolerance_saves_moves() -> None:
    made = place("cyclic", 40, 2, 2)
    speeds = [1.0, 0.94]
    exact, near = with_owners(made, speeds, tolerance=0), with_owners(made, speeds)
    assert counts(exact) == [21, 19]
    assert near == made
    assert slowest(counts(near), speeds) <= 1.05 * slowest(counts(exact), speeds)
    with pytest.raises(ExchangeError, match="bad tolerance"):
        with_owners(made, speeds, tolerance=-1)


def test_dead_workers_own_nothing() -> None:
    made = place("spread", 32, 8, 2)
    after = with_owners(made, [1, 0, 1, 1, 1, 1, 1, 1])
    assert counts(after)[1] == 0
    assert max(counts(after)) == ceil(32 / 7)
    assert sum(a[0] != b[0] for a, b in zip(made.holders, after.holders, strict=True)) == 4
    back = with_owners(after, [1] * 8)
    assert isclose(slowest(counts(back), [1] * 8), 4)


def test_what_is_lost_keeps_its_owner() -> None:
    made = place("fractional", 8, 4, 2)
    after = with_owners(made, [0, 0, 1, 1])
    assert after == made
    assert lost(after, [0, 1]) == (0, 1, 2, 3)
    assert with_owners(made, [0, 0, 0, 0]) == made


def test_moved_blocks_go_to_owners_of_neighbours() -> None:
    """Everybody holds everything; worker 1 is half as fast, and its last block moves to 2."""
    made = place("cyclic", 9, 3, 3)
    after = with_owners(made, [1, 0.5, 1])
    assert [some[0] for some in after.holders] == [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_many_workers_take_little_time() -> None:
    made = place("spread", 1024, 256, 3)
    after = with_owners(made, [1 + worker % 3 for worker in range(256)])
    assert after.copies == 3
    assert str(certify(made, 2)).startswith("any 254 of 256 workers")
