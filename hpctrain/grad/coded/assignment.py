"""Who holds which data blocks, who computes them first, and a proof that losing workers is safe.

A data block is held by several workers. The first, its owner, computes it unless late; the others
are its backups. Owners have contiguous runs, so that what a worker owns is added up before it is
sent, and longer runs come first, so that those of a power of two begin at a multiple of it.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations

import numpy as np

from hpctrain.errors import ExchangeError

PLACEMENTS = ("spread", "cyclic", "fractional")
MOST_SUBSETS = 20_000
"""Up to so many sets of missing workers, `certify` tries every one."""


@dataclass(frozen=True)
class Assignment:
    """Of each data block: the workers that hold it, its owner first."""

    workers: int
    holders: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        check_whole("number of workers", self.workers, 1)
        check_whole("number of data blocks", self.blocks, 1)
        for block, holders in enumerate(self.holders):
            if not holders:
                raise ExchangeError(f"nobody holds data block {block}", everywhere=True)
            if len({*holders}) < len(holders) or not {*holders} <= {*range(self.workers)}:
                raise ExchangeError(
                    f"bad holders of data block {block}",
                    value=holders,
                    allowed=f"different workers from 0 to {self.workers - 1}",
                    everywhere=True,
                )

    @property
    def blocks(self) -> int:
        """Number of data blocks."""
        return len(self.holders)

    @property
    def copies(self) -> int:
        """Number of holders of the data block that has the fewest."""
        return min(map(len, self.holders))

    def owned(self, worker: int) -> tuple[int, ...]:
        """Data blocks that the worker computes first, ascending."""
        return tuple(block for block, (owner, *_) in enumerate(self.holders) if owner == worker)

    def held(self, worker: int) -> tuple[int, ...]:
        """Data blocks that the worker can compute, ascending."""
        return tuple(block for block, holders in enumerate(self.holders) if worker in holders)


def place(
    placement: str, blocks: int, workers: int, copies: int, speeds: Sequence[float] | None = None
) -> Assignment:
    """Share out data blocks, so that the largest owned / speed is as small as it can be.

    Args:
        placement: where the backups are. `spread`: those of a worker on as many others as possible,
            in proportion to speed, so that nobody has to do all the work of a slow one. `cyclic`:
            on the workers numbered next. `fractional`: in groups of workers of like speed that
            hold the same (fractional repetition, Tandon et al., 'Gradient Coding', ICML 2017).
        blocks: number of data blocks.
        workers: number of workers; some own nothing if there are fewer data blocks.
        copies: how many workers hold each data block; with `fractional` at least, since groups
            are larger where `copies` does not divide `workers`.
        speeds: relative, of each worker.
    """
    if placement not in PLACEMENTS:
        raise ExchangeError(
            "unknown placement", value=placement, allowed=", ".join(PLACEMENTS), everywhere=True
        )
    check_whole("number of data blocks", blocks, 1)
    check_whole("number of workers", workers, 1)
    check_whole("number of copies", copies, 1, workers)
    speeds = [1.0] * workers if speeds is None else speeds
    _check_speeds(speeds, workers, dead=False)
    counts = _shares(blocks, speeds)
    line = sorted(range(workers), key=lambda worker: (-counts[worker], worker))
    if placement == "spread":
        backups = _spread(counts, speeds, copies)
    elif placement == "cyclic":
        backups = [
            [[(owner + step) % workers for step in range(1, copies)]] * counts[owner]
            for owner in range(workers)
        ]
    else:
        backups = _fractional(counts, line, copies)
    return Assignment(
        workers, tuple((owner, *others) for owner in line for others in backups[owner])
    )


def with_owners(
    assignment: Assignment, speeds: Sequence[float], tolerance: float = 0.05
) -> Assignment:
    """The same holders, with owners for these speeds: the largest owned / speed is the smallest.

    Present owners stay where they can, and who owns a neighbour comes first where they cannot.
    A worker with speed 0 is dead: it owns nothing but what is `lost`.

    Args:
        assignment: who holds what.
        speeds: relative, of each worker.
        tolerance: by how much the largest owned / speed may exceed the smallest possible, so that
            fewer data blocks move.
    """
    _check_speeds(speeds, assignment.workers, dead=True)
    if not 0 <= tolerance < math.inf:
        raise ExchangeError("bad tolerance", value=tolerance, allowed="0 or more", everywhere=True)
    held = [len(assignment.held(worker)) for worker in range(assignment.workers)]
    dead = [worker for worker, speed in enumerate(speeds) if speed == 0]
    gone = {*lost(assignment, dead)}
    kept = [block for block in range(assignment.blocks) if block not in gone]
    if not kept:
        return assignment
    choices = [_by_nearness(assignment, block) for block in kept]

    def owners(most: float) -> list[list[int]] | None:
        """Of each block that is not lost its owner, if nobody's owned / speed exceeds `most`."""
        room = [
            min(count, math.floor(most * speed * (1 + 1e-9)))
            for count, speed in zip(held, speeds, strict=True)
        ]
        chosen: list[list[int]] = []
        left = list(room)
        for block in kept:
            owner = assignment.holders[block][0]
            left[owner] -= 1
            chosen.append([owner] if left[owner] >= 0 else [])
        return chosen if _match(chosen, choices, [1] * len(kept), room) else None

    times = sorted(
        {
            count / speed
            for most, speed in zip(held, speeds, strict=True)
            if speed
            for count in range(1, most + 1)
        }
    )
    least = times[bisect_left(times, True, key=lambda most: owners(most) is not None)]
    chosen = owners(least * (1 + tolerance))
    assert chosen is not None
    holders = list(assignment.holders)
    for block, (owner,) in zip(kept, chosen, strict=True):
        holders[block] = (owner, *(other for other in holders[block] if other != owner))
    return Assignment(assignment.workers, tuple(holders))


def lost(assignment: Assignment, dead: Collection[int]) -> tuple[int, ...]:
    """Data blocks all of whose holders are dead."""
    dead = {*dead}
    return tuple(block for block, holders in enumerate(assignment.holders) if dead >= {*holders})


@dataclass(frozen=True)
class Certificate:
    """That any `workers` - `stragglers` workers hold all data blocks, and how this is known."""

    workers: int
    stragglers: int
    method: str
    """'exhaustive': every set of missing workers was tried; 'proof': holders were counted."""
    subsets: int
    """How many sets of missing workers were tried."""

    def __str__(self) -> str:
        how = (
            f"each of the {self.subsets} sets of {self.stragglers} missing workers was tried"
            if self.method == "exhaustive"
            else f"each data block has more than {self.stragglers} holders"
        )
        sufficient = self.workers - self.stragglers
        return f"any {sufficient} of {self.workers} workers hold all data blocks: {how}"


def certify(assignment: Assignment, stragglers: int) -> Certificate:
    """Prove that the others hold all data blocks whichever `stragglers` workers are missing."""
    workers = assignment.workers
    check_whole("number of stragglers", stragglers, 0, workers - 1)
    subsets = math.comb(workers, stragglers)
    if subsets <= MOST_SUBSETS:
        held_by = {sum(1 << worker for worker in holders) for holders in assignment.holders}
        for missing in combinations(range(workers), stragglers):
            present = ~sum(1 << worker for worker in missing)
            if not all(holders & present for holders in held_by):
                raise _incomplete(assignment, missing)
        return Certificate(workers, stragglers, "exhaustive", subsets)
    # A data block is lost if and only if all of its holders are among the missing workers.
    rarest = min(assignment.holders, key=len)
    if len(rarest) <= stragglers:
        others = [worker for worker in range(workers) if worker not in rarest]
        raise _incomplete(assignment, sorted([*rarest, *others][:stragglers]))
    return Certificate(workers, stragglers, "proof", 0)


def certify_sufficient(assignment: Assignment, sufficient: int) -> Certificate:
    """Prove that any `sufficient` workers hold all data blocks."""
    check_whole("number of workers that must suffice", sufficient, 1, assignment.workers)
    return certify(assignment, assignment.workers - sufficient)


def check_whole(what: str, value: int, least: int, most: int | None = None) -> None:
    """Refuse a number that is out of range."""
    if value < least or (most is not None and value > most):
        allowed = f"{least} or more" if most is None else f"{least} to {most}"
        raise ExchangeError(f"bad {what}", value=value, allowed=allowed, everywhere=True)


def _check_speeds(speeds: Sequence[float], workers: int, *, dead: bool) -> None:
    if len(speeds) != workers or not all(
        0 <= speed < math.inf and (speed or dead) for speed in speeds
    ):
        raise ExchangeError(
            "bad speeds",
            value=list(speeds),
            allowed=f"{workers} finite numbers, {'none negative' if dead else 'all above 0'}",
            everywhere=True,
        )


def _incomplete(assignment: Assignment, missing: Collection[int]) -> ExchangeError:
    gone = lost(assignment, missing)
    return ExchangeError(
        f"without {_named('worker', missing)}, nobody holds {_named('data block', gone)}",
        allowed=f"at most {assignment.copies - 1} missing workers with {assignment.copies} copies",
        fix=f"place {len(missing) + 1} copies of each data block, "
        f"or wait for {assignment.workers - assignment.copies + 1} workers",
        everywhere=True,
    )


def _named(what: str, numbers: Collection[int], most: int = 8) -> str:
    shown = ", ".join(map(str, [*numbers][:most]))
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"{what}{'s' if len(numbers) > 1 else ''} {shown}{more}"


def _shares(blocks: int, speeds: Sequence[float]) -> list[int]:
    """How many data blocks each worker owns: one by one to who would have done it first."""
    counts = [0] * len(speeds)
    queue = [(1 / speed, worker) for worker, speed in enumerate(speeds)]
    heapq.heapify(queue)
    for _ in range(blocks):
        _, worker = queue[0]
        counts[worker] += 1
        heapq.heapreplace(queue, ((counts[worker] + 1) / speeds[worker], worker))
    return counts


def _fractional(counts: Sequence[int], line: Sequence[int], copies: int) -> list[list[list[int]]]:
    """Of each worker's data blocks the backups: the rest of a group of neighbours in line."""
    workers, groups = len(line), len(line) // copies
    backups: list[list[list[int]]] = [[] for _ in line]
    for group in range(groups):
        members = line[group * workers // groups : (group + 1) * workers // groups]
        for index, owner in enumerate(members):
            backups[owner] = [[*members[index + 1 :], *members[:index]]] * counts[owner]
    return backups


def _spread(counts: Sequence[int], speeds: Sequence[float], copies: int) -> list[list[list[int]]]:
    """Of each worker's data blocks the backups: all others, in proportion to their speeds."""
    workers = len(counts)
    shares = [
        _proportional(count * (copies - 1), [*speeds[:owner], 0, *speeds[owner + 1 :]], most=count)
        for owner, count in enumerate(counts)
    ]
    whole = _rounded(np.array(shares), np.array(speeds))
    backups = []
    for owner, count in enumerate(counts):
        others = [(owner + step) % workers for step in range(1, workers)]
        line = [other for other in others for _ in range(whole[owner, other])]
        # Nobody is in line more often than `count`, so a data block gets different backups.
        backups.append([line[block::count] for block in range(count)])
    return backups


def _proportional(total: int, weights: Sequence[float], most: int) -> list[float]:
    """A total in parts that are in proportion to weights, but none above `most`."""
    parts = [0.0] * len(weights)
    rest = float(total)
    order = sorted(range(len(weights)), key=weights.__getitem__)
    sums = [*accumulate(weights[index] for index in order)]
    # Largest first: what is above `most` goes to those that are left.
    for index, weight in zip(reversed(order), reversed(sums), strict=True):
        if weights[index]:
            parts[index] = min(most, rest * weights[index] / weight)
            rest -= parts[index]
    return parts


def _rounded(matrix: np.ndarray, speeds: np.ndarray) -> np.ndarray:
    """Every number, every sum of a column and, exactly, of a row rounded up or down.

    The numbers to round up are found by matching rows with columns: first until each column has
    the least that it may have, then until each row has what it needs, column sums in proportion to
    speeds as far as that goes. They can be found: the fractions are a flow from rows to columns, so
    there is one in whole numbers.
    """
    workers = len(matrix)
    whole = np.floor(matrix + 1e-9).astype(int)
    up = matrix - whole > 1e-9
    # Beginning with the next worker makes the choice cyclic where all workers are alike.
    choices = [
        [column % workers for column in range(row + 1, row + workers) if up[row, column % workers]]
        for row in range(workers)
    ]
    needed = (np.rint(matrix.sum(axis=1)) - whole.sum(axis=1)).astype(int).tolist()
    least, most = np.floor(matrix.sum(axis=0) + 1e-6), np.ceil(matrix.sum(axis=0) - 1e-6)
    chosen: list[list[int]] = [[] for _ in choices]
    for level in sorted({0, *(most / speeds)}):
        sums = np.clip(np.floor(level * speeds * (1 + 1e-9)), least, most)
        complete = _match(chosen, choices, needed, (sums - whole.sum(axis=0)).astype(int).tolist())
    assert complete
    for row, columns in enumerate(chosen):
        whole[row, columns] += 1
    return whole


def _by_nearness(assignment: Assignment, block: int) -> list[int]:
    """A data block's holders: its owner, then owners of neighbours, then the others."""
    holders = assignment.holders
    near = [pair[0] for pair in (*holders[max(0, block - 1) : block], *holders[block + 1 :][:1])]
    owner, *others = holders[block]
    return [owner, *sorted(others, key=lambda other: other not in near)]


def _match(
    chosen: list[list[int]],
    choices: Sequence[Sequence[int]],
    needed: Sequence[int],
    room: Sequence[int],
) -> bool:
    """Let each item choose as many different choices as it needs, if there is room in them.

    Where a choice is full, the fewest items give up one for another (augmenting paths).

    Args:
        chosen: of each item, what it has chosen; begins with what is chosen already.
        choices: of each item, what it may choose, best first.
        needed: of each item, how many it needs.
        room: of each choice, how many items it has room for.

    Returns:
        Whether every item has what it needs. If not, as many as possible are chosen.
    """
    members: list[list[int]] = [[] for _ in room]
    for item, some in enumerate(chosen):
        for choice in some:
            members[choice].append(item)
    for item, count in enumerate(needed):
        while len(chosen[item]) < count and _augment(item, chosen, choices, members, room):
            pass
    return all(len(some) >= count for some, count in zip(chosen, needed, strict=True))


def _augment(
    first: int,
    chosen: list[list[int]],
    choices: Sequence[Sequence[int]],
    members: list[list[int]],
    room: Sequence[int],
) -> bool:
    """Give an item one more choice, by a shortest path of items that give up one for another."""
    gives_up: dict[int, int | None] = {first: None}
    wanted_by: dict[int, int] = {}
    queue = [first]
    for item in queue:  # grows
        for choice in choices[item]:
            if choice in wanted_by or choice in chosen[item]:
                continue
            wanted_by[choice] = item
            if len(members[choice]) < room[choice]:
                free: int | None = choice
                while free is not None:
                    taker = wanted_by[free]
                    chosen[taker].append(free)
                    members[free].append(taker)
                    free = gives_up[taker]
                    if free is not None:
                        chosen[taker].remove(free)
                        members[free].remove(taker)
                return True
            for member in members[choice]:
                if member not in gives_up:
                    gives_up[member] = choice
                    queue.append(member)
    return False
