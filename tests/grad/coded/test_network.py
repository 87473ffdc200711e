"""Worker, aggregator and coordinator on a network that delays and reorders messages.

One process, virtual time, no threads: ranks are generators, and a seeded queue of events moves
them. Memory that is given back is filled with NaN, so that whoever still reads it shows. The main
loop of a rank is what `Coded.step`, `Coded.evaluate` and `Coded.end` do.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
import struct
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from hpctrain.grad.coded import dealing
from hpctrain.grad.coded.aggregator import Aggregator
from hpctrain.grad.coded.assignment import place
from hpctrain.grad.coded.cells import HEADER_BYTES, Buffer, Kind, Pool, Spot, content
from hpctrain.grad.coded.collecting import WholeSum
from hpctrain.grad.coded.coordinator import Coordinator, Silence, evaluation_assignment
from hpctrain.grad.coded.desk import Desk
from hpctrain.grad.coded.lending import Arena, Lending
from hpctrain.grad.coded.schemes import Scheme
from hpctrain.grad.coded.sums import Node, tree_of
from hpctrain.grad.coded.worker import Worker

ELEMENTS = 4
VARIANTS = 61
"""So many steps have gradients of their own; then they come again."""
LOOK_S = 0.5
"""How often ranks look at the clock. A data block takes 1 s."""
BEAT_S = 4.0
OUT_S = 15.0
LONG_S = 20.0
"""About five rounds."""
HANGS_S = 400.0


@dataclass(frozen=True)
class Scene:
    """A run."""

    name: str
    steps: int
    workers: int
    roots: int = 1
    dedicated: bool = False
    copies: int = 2
    blocks: int = 0
    columns: int = 2
    late: float = 0.003
    """Share of messages that take up to `LONG_S`."""
    slow: float = 0.1
    """Share of rounds in which a worker is slow."""
    stalls: float = 0.003
    """Share of rounds in which a rank stands still for a while."""
    deaths: int = 0
    tells: bool = True
    """Whether the MPI library tells of deaths."""
    evaluations: int = 0
    """Steps between two sets of evaluations."""
    near: bool = False
    """Whether all ranks are on one node, so that cells are lent."""

    @property
    def first(self) -> int:
        return self.roots if self.dedicated else 0

    @property
    def size(self) -> int:
        return self.first + self.workers


class Truth:
    """The cells of all steps, and their sums along the tree."""

    def __init__(self, blocks: int, columns: int) -> None:
        draw = np.random.default_rng(blocks)
        shape = (VARIANTS, columns, blocks)
        scales = 10.0 ** draw.integers(-3, 4, (*shape, 1))
        self.cells = draw.standard_normal((*shape, ELEMENTS)) * scales
        self.losses = draw.standard_normal(shape)
        root = tree_of(blocks).root
        self._totals = [
            [self._sum(self.cells[v, c], root).tobytes() for c in range(columns)]
            for v in range(VARIANTS)
        ]
        self._loss_totals = [
            [float(self._sum(self.losses[v, c], root)) for c in range(columns)]
            for v in range(VARIANTS)
        ]

    def _sum(self, values: np.ndarray, node: Node) -> Any:
        if node.is_leaf:
            return values[node.lo]
        left, right = node.halves()
        return self._sum(values, left) + self._sum(values, right)

    def check(self, step: int, column: int, result: Buffer) -> None:
        variant = step % VARIANTS
        assert words(result).tobytes() == self._totals[variant][column]
        assert result.loss == self._loss_totals[variant][column]


def words(buffer: Buffer) -> np.ndarray:
    found = buffer.cached.get("words")
    if found is None:
        found = buffer.cached["words"] = buffer.payload.numpy().view(np.float64)
    return found  # type: ignore[no-any-return]


def all_bytes(buffer: Buffer) -> np.ndarray:
    found = buffer.cached.get("bytes")
    if found is None:
        found = buffer.cached["bytes"] = buffer.whole.numpy()
    return found  # type: ignore[no-any-return]


def poisoned(nbytes: int) -> torch.Tensor:
    return torch.full((nbytes,), 255, dtype=torch.uint8)


class PoisonedPool(Pool):
    """What it is given back is NaN from then on, its header too."""

    def __init__(self, share: Callable[[int], Buffer | None] | None = None) -> None:
        super().__init__(poisoned, share)
        self.held: set[Buffer] = set()
        self.peak_bytes = 0

    def take(self, payload_bytes: int) -> Buffer:
        buffer = super().take(payload_bytes)
        self.held.add(buffer)
        self.peak_bytes = max(self.peak_bytes, self.made_bytes)
        return buffer

    def take_shared(self, payload_bytes: int) -> Buffer:
        buffer = super().take_shared(payload_bytes)
        self.held.add(buffer)
        return buffer

    def drop(self, buffer: Buffer) -> None:
        super().drop(buffer)
        if buffer.holders == 0:
            if not buffer.give_back:
                self.held.remove(buffer)
            all_bytes(buffer).fill(255)


class Column:
    def __init__(self, root: int) -> None:
        self.root = root
        self.nbytes = 8 * ELEMENTS

    def add(self, left: Buffer, right: Buffer) -> None:
        words(left)[:] += words(right)
        left.loss += right.loss

    is_linear = True

    def scale(self, cell: Buffer, factor: float) -> None:
        raise NotImplementedError

    def views(self, cell: Buffer) -> list[torch.Tensor]:
        raise NotImplementedError

    def digest(self, cell: Buffer) -> bytes:
        raise NotImplementedError

    def can_lack(self, blocks: Collection[Node]) -> bool:
        raise NotImplementedError


class Outbox:
    """What a rank sends with."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self.sent_s: dict[int, float] = {}
        self.dead = rank.network.known_dead

    def send(self, to: int, letter: Buffer) -> None:
        network = self._rank.network
        self.sent_s[to] = network.now_s
        network.post(self._rank, to, letter)


class Rank:
    """A rank: its own pool, its side of the protocol, and a main thread."""

    def __init__(self, network: Network, number: int) -> None:
        scene = network.scene
        self.network = network
        self.number = number
        self.draw = random.Random(number * 1000 + scene.steps)
        arena = Arena(number, network.arenas, 0) if scene.near else None
        self.pool = PoisonedPool(arena.carve if arena else None)
        self.roots = tuple(range(scene.roots))
        self.workers = tuple(range(scene.first, scene.size))
        self.index = number - scene.first
        self.dead = False
        self.frozen_until_s = 0.0
        self.step = 0
        self.round = -1
        self.moves = 0
        self.columns: list[Column] = []
        self.finished = False
        self.early_bytes = 0
        """The most memory in the first quarter of all rounds."""
        self.began_s = 0.0
        self.outbox = Outbox(self)
        post = self.post = self.outbox.send
        scheme = Scheme(network.assignment, "spread")
        self.lending = Lending(arena, self.pool, post) if arena else None
        give = self.lending.lend_or_send if self.lending else post
        self.worker = Worker(give, self.pool, self.roots, scheme, self.index)
        if self.index >= 0:
            self.worker.own = network.assignment.owned(self.index)
        self.aggregator: Aggregator | None = None
        self.coordinator: Coordinator | None = None
        if number in self.roots:
            blocks = network.assignment.blocks
            self.aggregator = Aggregator(
                number, self.workers, give, self.pool, scheme, (1,) * blocks
            )
        if number == 0:
            self.coordinator = Coordinator(
                *(post, self.pool, self.workers, scene.size, scheme),
                lambda: network.now_s,
                Silence(OUT_S, float("inf")),
                self.roots,
            )
        self.desk = Desk(
            *(number, scene.size, self.roots, self.pool, lambda: network.now_s),
            beat_s=BEAT_S,
        )
        self.desk.open(self.outbox, self.worker, self.aggregator, self.coordinator, self.lending)
        self.waits = False
        self.main = self._run()

    # ------------------------------------------------------------------ messages

    def came(self, source: int, letter: Buffer) -> None:
        self.desk.came(source, letter)
        self.look()

    def look(self) -> None:
        """Go on with the main thread if what it waits for is there."""
        if self.waits:
            self.waits = False
            self.go_on()

    def go_on(self) -> None:
        pause_s = next(self.main, None)
        if pause_s is None:
            self.finished = self.desk.is_closed = True
        elif pause_s < 0:
            self.waits = True
        else:
            self.network.at(pause_s, self, self.go_on)

    # ------------------------------------------------------------------ the main thread

    def _run(self) -> Iterator[float]:
        """Yields how long it computes, or -1 to wait for a message."""
        scene, draw = self.network.scene, self.draw
        yield draw.uniform(0, 1)
        while self.step < scene.steps:
            if self.worker.ended is not None:
                return
            if (yield from self._step()):
                yield draw.uniform(0, 0.2)  # the optimizer
                if scene.evaluations and self.step % scene.evaluations == 0:
                    for number in range(2):
                        if not (yield from self._evaluate(number)):
                            break
                if draw.random() < scene.stalls:  # the program, such as a checkpoint
                    yield draw.uniform(0, 2 * LONG_S)
        if self.coordinator:
            self.coordinator.end(False)
        while self.worker.ended is None:
            yield -1

    def _step(self) -> Iterator[float]:
        scene, draw, worker = self.network.scene, self.draw, self.worker
        self._begin()
        self._help_those_behind()
        worker.begin(self.round, self.network.assignment.blocks, self.columns)
        if draw.random() < scene.stalls:  # the whole process
            self.network.freeze(self, draw.uniform(0, 2 * LONG_S))
        slow = draw.choice([1.5, 5.0]) if draw.random() < scene.slow else 1.0
        while not worker.is_over:
            self._take_layout()
            block = worker.next_block()
            if block is None:
                yield -1
                self._help_those_behind()
            else:
                yield from self._compute(block, slow * draw.uniform(0.9, 1.1))
        if not self._has_results():
            return False
        for index in range(len(self.columns)):
            self.network.truth.check(self.step, index, worker.arrived.results[index])
        assert len(worker.arrived.results) == len(self.columns)
        self.step += 1
        return True

    def _begin(self) -> None:
        self.round += 1
        self.began_s = self.network.now_s
        if not self.early_bytes and 4 * self.round > self.network.scene.steps:
            self.early_bytes = self.pool.peak_bytes

    def _compute(self, block: int, takes_s: float) -> Iterator[float]:
        worker, truth, variant = self.worker, self.network.truth, self.step % VARIANTS
        computed = worker.is_wanted
        if computed:
            yield takes_s * 0.5
            computed = worker.is_wanted
        if computed and not self.columns:
            yield takes_s * 0.5
            self.post(0, self.pool.message(Kind.ORDER, self.round, data=b"layout"))
            while self.desk.layout is None:
                yield -1
            self._take_layout()
        elif computed:
            yield takes_s * 0.25
        if computed:
            for index, column in enumerate(self.columns):
                gradient = truth.cells[variant, index, block]
                loss = float(truth.losses[variant, index, block])
                left = worker.take_left(index, block) if self.draw.random() < 0.5 else None
                if left is not None:
                    words(left)[:] += gradient
                    left.loss += loss
                    worker.put_sum(index, left, block)
                else:
                    cell = self.pool.take_shared(column.nbytes)
                    words(cell)[:] = gradient
                    cell.loss = loss
                    worker.put(index, cell, block)
                if self.draw.random() < 0.2:
                    yield takes_s * 0.1
            computed = worker.is_wanted
        if computed:
            worker.done(worker.finish())
        else:
            worker.give_up()

    def _evaluate(self, number: int) -> Iterator[float]:
        worker, blocks = self.worker, 5
        self._begin()
        own = evaluation_assignment(blocks, len(self.workers))
        mine = own.owned(self.index) if self.index >= 0 else ()
        worker.begin(self.round, blocks, None, mine)
        while not worker.is_over:
            self._take_layout()
            block = worker.next_block()
            if block is None:
                yield -1
            else:
                yield self.draw.choice([0.2, 0.3, 2.0])
                worker.done(worker.finish(), struct.pack("<qqq", self.step, number, block))
        if not self._has_results():
            return False
        expected = b"".join(struct.pack("<qqq", self.step, number, b) for b in range(blocks))
        assert worker.arrived.figures == expected
        return True

    def _take_layout(self) -> None:
        if self.desk.layout is not None and not self.columns:
            roots = self.network.scene.roots
            self.columns = [Column(n % roots) for n in range(self.network.scene.columns)]
            if self.aggregator:
                self.aggregator.lay_out(self.columns)
            self.worker.lay_out(self.columns)

    def _help_those_behind(self) -> None:
        if self.coordinator is None:
            return
        for rank in self.coordinator.take_behind():
            state = struct.pack("<q", self.step) + bytes(self.draw.randrange(100, 300))
            self.post(rank, self.pool.message(Kind.STATE, self.round, data=state))

    def _has_results(self) -> bool:
        if self.worker.is_whole:
            return True
        state = self.worker.take_state()
        if state is None:
            return False
        (self.step,) = struct.unpack_from("<q", content(state))
        self.round = state.round - 1
        self.pool.drop(state)
        self.moves += 1
        return False

    # ------------------------------------------------------------------ its memory

    def in_use(self) -> list[Buffer]:
        """What the protocol still holds, by all that can be seen of it."""
        found = [*self.worker.arrived.results.values(), *self.worker._shown]
        if self.worker.arrived.state:
            found.append(self.worker.arrived.state)
        for sum_ in self.worker._sums:
            found += sum_.nodes.values()
        if self.aggregator:
            for sums in (self.aggregator._now, self.aggregator._before):
                if sums:
                    found += sums.totals.values()
                    for one in sums.sums.values():
                        assert isinstance(one, WholeSum)
                        found += one.sum.nodes.values()
        if self.coordinator:
            found += [letter for _, letter in self.coordinator._early]
        return [buffer for buffer in found if not buffer.give_back]

    def borrowed(self) -> set[tuple[int, Spot]]:
        """Of whom it still has cells, and which."""
        seen = self.lending._seen.items() if self.lending else ()
        return {key for key, buffer in seen if buffer.holders}

    def lent(self) -> dict[tuple[int, Spot], Buffer]:
        """What others have, by rank and place."""
        return self.lending._lent if self.lending else {}


@dataclass(order=True)
class Event:
    at_s: float
    number: int
    rank: Rank = field(compare=False)
    do: Callable[[], None] = field(compare=False)
    letter: tuple[Rank, Buffer] | None = field(compare=False, default=None)
    """What has not left its sender yet."""


class Network:
    """Delivers messages, each after a time of its own, and moves the clock."""

    def __init__(self, scene: Scene, seed: int = 0) -> None:
        self.scene = scene
        self.draw = random.Random(seed)
        self.now_s = 0.0
        self._events: list[Event] = []
        self._numbers = itertools.count()
        blocks = scene.blocks or 2 * scene.workers
        self.assignment = place("spread", blocks, scene.workers, scene.copies)
        self.truth = Truth(blocks, scene.columns)
        nbytes = int(2.5 * scene.columns * (HEADER_BYTES + 64))  # not quite enough
        self.arenas = {number: poisoned(nbytes) for number in range(scene.size)}
        self.known_dead: set[int] = set()
        self.stuck: dict[Rank, set[Buffer]] = defaultdict(set)
        """Messages that never leave, since nobody tells that who is to take them is dead."""
        self.ends = False
        self.ranks = [Rank(self, number) for number in range(scene.size)]
        for rank in self.ranks:
            self.at(0, rank, rank.go_on)
            self._tick(rank)
        for death in range(scene.deaths):
            rank = self.ranks[scene.size - 1 - death]
            self.at(self.draw.uniform(20, 6 * scene.steps), rank, lambda rank=rank: self._die(rank))

    def at(
        self,
        after_s: float,
        rank: Rank,
        do: Callable[[], None],
        letter: tuple[Rank, Buffer] | None = None,
    ) -> None:
        event = Event(self.now_s + after_s, next(self._numbers), rank, do, letter)
        heapq.heappush(self._events, event)

    def freeze(self, rank: Rank, for_s: float) -> None:
        rank.frozen_until_s = self.now_s + for_s

    def post(self, source: Rank, to: int, letter: Buffer) -> None:
        rank, draw = self.ranks[to], self.draw
        if rank is source:
            self.at(0, rank, lambda: rank.came(to, letter))
            return
        if to in self.known_dead:
            source.desk.sent(letter)
            return
        delay_s = draw.uniform(0, LONG_S) if draw.random() < self.scene.late else draw.random() / 5
        if draw.random() < 0.5:  # small ones leave at once, and may arrive after a death
            data = all_bytes(letter).copy()
            source.desk.sent(letter)
            self.at(delay_s, rank, lambda: self._deliver(source, rank, data))
        else:
            self.at(delay_s, rank, lambda: self._fetch(source, rank, letter), (source, letter))

    def _fetch(self, source: Rank, rank: Rank, letter: Buffer) -> None:
        if source.dead:
            return
        data = all_bytes(letter).copy()
        source.desk.sent(letter)
        self._deliver(source, rank, data)

    def _deliver(self, source: Rank, rank: Rank, data: np.ndarray) -> None:
        if source.dead and self.draw.random() < 0.5:
            return
        there = rank.pool.take(len(data) - HEADER_BYTES)
        all_bytes(there)[:] = data
        rank.came(source.number, there)

    def _die(self, rank: Rank) -> None:
        rank.dead = True
        for other in self.ranks if self.scene.tells else ():
            self.at(self.draw.uniform(0, 10), other, lambda other=other: self._tell(other, rank))

    def _tell(self, other: Rank, dead: Rank) -> None:
        self.known_dead.add(dead.number)
        other.desk.died(dead.number)

    def _lose(self, event: Event) -> None:
        """It was for a rank that is dead."""
        if event.letter:
            source, letter = event.letter
            if self.scene.tells:
                source.desk.sent(letter)
            else:
                self.stuck[source].add(letter)

    def _tick(self, rank: Rank) -> None:
        if self.ends:
            return
        assert rank.finished or self.now_s - rank.began_s < HANGS_S, f"{rank.number} hangs"
        rank.desk.tick(self.now_s)
        self.at(LOOK_S if rank.coordinator else BEAT_S, rank, lambda: self._tick(rank))

    def run(self) -> None:
        """To the end of all ranks, and of all messages."""
        while self._events:
            event = heapq.heappop(self._events)
            rank = event.rank
            if rank.dead:
                self._lose(event)
            elif event.at_s < rank.frozen_until_s:
                event.at_s, event.number = rank.frozen_until_s, next(self._numbers)
                heapq.heappush(self._events, event)
            else:
                self.now_s = event.at_s
                event.do()
            self.ends = self.ends or all(rank.finished or rank.dead for rank in self.ranks)


SCENES = [
    Scene("calm", 1000, workers=4, late=0.0, slow=0.05, stalls=0.0, near=True),
    Scene("one root", 2500, workers=3),
    Scene("many late", 1000, workers=3, late=0.1, stalls=0.01, near=True),
    Scene("three roots", 500, workers=4, roots=3, columns=3, late=0.03, near=True),
    Scene("dedicated", 1000, workers=3, dedicated=True, blocks=7),
    Scene(
        "two dedicated", 1000, workers=2, roots=2, dedicated=True, columns=3, late=0.03, near=True
    ),
    Scene("odd", 500, workers=5, blocks=13, copies=3, columns=1, slow=0.3, near=True),
    Scene("deaths", 500, workers=6, copies=3, deaths=2, blocks=9, slow=0.3, near=True),
    Scene(
        "silent deaths",
        1000,
        workers=4,
        roots=2,
        copies=3,
        blocks=6,
        deaths=2,
        tells=False,
        near=True,
    ),
    Scene("evaluations", 1000, workers=3, roots=2, evaluations=3, stalls=0.02, near=True),
]


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name.replace(" ", "-"))
def test_every_result_is_the_canonical_sum(scene: Scene) -> None:
    network = Network(scene)
    network.run()
    for rank in network.ranks:
        if rank.dead:
            continue
        assert rank.worker.ended is not None
        assert rank.step > scene.steps - 20
        # Nothing is lost, and nothing kept that nobody needs.
        lent = rank.lent()
        assert rank.pool.held == {*rank.in_use(), *lent.values()} | network.stuck[rank]
        for borrower, spot in lent:
            other = network.ranks[borrower]
            assert not scene.tells if other.dead else (rank.number, spot) in other.borrowed()
        assert rank.pool.peak_bytes < 1.5 * rank.early_bytes + 1000
    assert sum(rank.dead for rank in network.ranks) == scene.deaths
    moves = sum(rank.moves for rank in network.ranks)
    assert moves == 0 if scene.name == "calm" else moves > 0
    assert any(rank.lending and rank.lending._seen for rank in network.ranks) == scene.near
    print(f"{network.now_s:.0f} s, {moves} moves")


@pytest.mark.parametrize("name", ["odd", "deaths", "silent deaths"])
def test_sums_are_the_same_where_most_helpers_are_asked_ahead(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dealing, "AHEAD_S", LONG_S)
    (scene,) = (scene for scene in SCENES if scene.name == name)
    network = Network(dataclasses.replace(scene, steps=200))
    network.run()
    assert all(rank.dead or rank.step > 180 for rank in network.ranks)
