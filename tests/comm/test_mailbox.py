"""Messages that nobody announced: each arrives once, whole, whoever else is sending."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from mpi4py import MPI

from hpctrain.comm.collect import barrier_on
from hpctrain.comm.engine import Engine, engine_of
from hpctrain.comm.mailbox import Letter, Mailbox
from hpctrain.world import World

pytestmark = pytest.mark.mpi

SIZES = (0, 1, 64, 4095, 4096, 4097, 70_000, 1 << 20, 4 << 20)
"""On both sides of where MPI libraries begin to ask the receiver before they send."""


class Paper:
    """A message in ordinary memory."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = bytearray(data)
        self.mpi = MPI.buffer.frombuffer(self.data)


@dataclass
class Notes:
    """A postman that writes down what happens."""

    received: list[tuple[int, Paper]] = field(default_factory=list)
    left: list[Paper] = field(default_factory=list)
    ticks: int = 0

    def room(self, source: int, nbytes: int) -> Paper:
        return Paper(bytes(nbytes))

    def came(self, source: int, letter: Letter) -> None:
        assert isinstance(letter, Paper)
        self.received.append((source, letter))

    def sent(self, letter: Letter) -> None:
        assert isinstance(letter, Paper)
        self.left.append(letter)

    def died(self, rank: int) -> None:
        raise AssertionError(f"rank {rank} is alive")

    def tick(self, now: float) -> None:
        self.ticks += 1


def content(source: int, target: int, number: int, nbytes: int) -> bytes:
    return np.random.default_rng([source, target, number]).bytes(nbytes)


@pytest.fixture(params=["thread", "hooks"])
def engine(world: World, request: pytest.FixtureRequest) -> Engine:
    engine = engine_of(world)
    engine.progress = request.param
    return engine


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def mailbox(engine: Engine, notes: Notes) -> Iterator[Mailbox]:
    mailbox = Mailbox(engine, notes)
    mailbox.open()
    yield mailbox
    mailbox.abandon()
    close_abandoned(engine)
    assert mailbox not in engine._listeners
    assert not mailbox.in_flight


def close_abandoned(engine: Engine) -> None:
    """As happens whenever a channel is made."""
    engine.channel("after a mailbox").abandon()


def test_messages_of_any_size_both_ways_at_once(
    engine: Engine, mailbox: Mailbox, notes: Notes, world: World
) -> None:
    ranks = range(world.size)
    letters = []
    for number, nbytes in enumerate(SIZES):
        for target in ranks:
            paper = Paper(content(world.rank, target, number, nbytes))
            letters.append((target, paper))
            mailbox.send(target, paper)
    engine.drive(lambda: len(notes.received) == len(letters) and not mailbox.leaving)
    barrier_on(engine.control)  # whatever would come twice has come by then
    expected = Counter(
        (source, content(source, world.rank, number, nbytes))
        for source in ranks
        for number, nbytes in enumerate(SIZES)
    )
    assert Counter((source, bytes(paper.data)) for source, paper in notes.received) == expected
    to_others = [paper for target, paper in letters if target != world.rank]
    assert sorted(map(id, notes.left)) == sorted(map(id, to_others))
    to_self = [paper for target, paper in letters if target == world.rank]
    mine = [paper for source, paper in notes.received if source == world.rank]
    assert all(a is b for a, b in zip(mine, to_self, strict=True))  # the very same memory
    assert not mailbox.in_flight


def test_many_small_messages_of_one_size_keep_their_order(
    engine: Engine, mailbox: Mailbox, notes: Notes, world: World
) -> None:
    count = 1000
    for number in range(count):
        for target in range(world.size):
            mailbox.send(target, Paper(number.to_bytes(4, "little")))
    engine.drive(lambda: len(notes.received) == count * world.size and not mailbox.leaving)
    for source in range(world.size):
        numbers = [int.from_bytes(p.data, "little") for s, p in notes.received if s == source]
        assert numbers == [*range(count)]
    assert len(notes.left) == count * (world.size - 1)


def test_all_send_to_one_that_says_nothing(
    engine: Engine, mailbox: Mailbox, notes: Notes, world: World
) -> None:
    """Also while its main thread computes, where the engine's thread is all that receives."""
    count, nbytes = 40, 100_000
    if world.rank:
        for number in range(count):
            mailbox.send(0, Paper(content(world.rank, 0, number, nbytes)))
        engine.drive(lambda: not mailbox.leaving)
        assert len(notes.left) == count
        assert not notes.received
    else:
        while len(notes.received) < count * (world.size - 1):
            np.ones(1000).sum()
        expected = {
            (source, content(source, 0, number, nbytes))
            for source in range(1, world.size)
            for number in range(count)
        }
        assert {(source, bytes(paper.data)) for source, paper in notes.received} == expected
        assert len(notes.received) == len(expected)


def test_several_threads_send(engine: Engine, mailbox: Mailbox, notes: Notes, world: World) -> None:
    count, threads = 100, 4
    target = (world.rank + 1) % world.size

    def send(thread: int) -> None:
        for number in range(count):
            mailbox.send(target, Paper(bytes([thread, number])))

    workers = [threading.Thread(target=send, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    engine.drive(lambda: len(notes.received) == count * threads and not mailbox.leaving)
    for worker in workers:
        worker.join()
    for thread in range(threads):
        numbers = [paper.data[1] for _, paper in notes.received if paper.data[0] == thread]
        assert numbers == [*range(count)]


def test_answers_to_answers(engine: Engine, mailbox: Mailbox, notes: Notes, world: World) -> None:
    """Sent from within the engine, as soon as the question is there."""
    laps = 50
    following = (world.rank + 1) % world.size
    keep = notes.came

    def pass_on(source: int, letter: Letter) -> None:
        keep(source, letter)
        assert isinstance(letter, Paper)
        if letter.data[0] < laps * world.size:
            mailbox.send(following, Paper(bytes([letter.data[0] + 1])))

    notes.came = pass_on  # type: ignore[method-assign]
    barrier_on(engine.control)  # or the engine's thread takes the first in before it is passed on
    if world.rank == 0:
        mailbox.send(following, Paper(b"\1"))
    engine.drive(lambda: len(notes.received) == laps)
    came = [paper.data[0] for _, paper in notes.received]
    first = (world.rank - 1) % world.size + 1
    assert came == [*range(first, laps * world.size + 1, world.size)]


def test_messages_to_the_dead_count_as_sent(
    engine: Engine, mailbox: Mailbox, notes: Notes, world: World
) -> None:
    others = {*range(world.size)} - {world.rank}
    mailbox.dead.update(others)
    letters = [Paper(bytes(5_000_000)) for _ in others]
    for other, letter in zip(others, letters, strict=True):
        mailbox.send(other, letter)
    engine.drive(lambda: not mailbox.leaving)
    assert notes.left == letters
    barrier_on(engine.control)
    assert not notes.received


def test_it_is_polled_while_nobody_waits(
    engine: Engine, mailbox: Mailbox, notes: Notes, world: World
) -> None:
    """By the engine's thread in every progress mode; there is none where there are no others."""
    if world.size == 1:
        return
    before = notes.ticks
    while notes.ticks < before + 10:
        pass


def test_it_stays_open_until_all_have_abandoned_it(engine: Engine, world: World) -> None:
    notes = Notes()
    mailbox = Mailbox(engine, notes)
    mailbox.open()
    if world.rank:
        mailbox.abandon()
        close_abandoned(engine)
        mailbox.send(0, Paper(b"late"))
        engine.drive(lambda: not mailbox.leaving)
    else:
        close_abandoned(engine)
        engine.drive(lambda: len(notes.received) == world.size - 1)
        mailbox.abandon()
    assert mailbox in engine._listeners
    close_abandoned(engine)
    assert mailbox not in engine._listeners
    ticks = notes.ticks
    barrier_on(engine.control)
    assert notes.ticks == ticks


def test_what_is_on_its_way_at_the_end_is_received_for_nobody(engine: Engine, world: World) -> None:
    """Two mailboxes at once; ranks abandon them in different orders."""
    all_notes = [Notes(), Notes()]
    mailboxes = [Mailbox(engine, notes) for notes in all_notes]
    for mailbox in mailboxes[:: 1 if world.rank % 2 else -1]:
        mailbox.open()
        for number, nbytes in enumerate(SIZES):
            for target in range(world.size):
                mailbox.send(target, Paper(content(world.rank, target, number, nbytes)))
        mailbox.abandon()
    close_abandoned(engine)
    for mailbox, notes in zip(mailboxes, all_notes, strict=True):
        assert mailbox not in engine._listeners
        assert not mailbox.in_flight
        assert len(notes.left) == len(SIZES) * (world.size - 1)
        assert len({id(paper) for paper in notes.left}) == len(notes.left)
        seen = [(source, bytes(paper.data)) for source, paper in notes.received]
        assert len(seen) == len({*seen})
        assert {*seen} <= {
            (source, content(source, world.rank, number, nbytes))
            for source in range(world.size)
            for number, nbytes in enumerate(SIZES)
        }
