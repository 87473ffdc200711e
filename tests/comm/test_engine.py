import threading

import numpy as np
import pytest
from mpi4py import MPI

from hpctrain.comm.channel import Channel, Steps
from hpctrain.comm.collect import barrier_on
from hpctrain.comm.engine import LONGEST_POLL_S, POLL_S, Engine, _Pace, engine_of
from hpctrain.world import World

pytestmark = pytest.mark.mpi


@pytest.fixture(params=["thread", "hooks"])
def engine(world: World, request: pytest.FixtureRequest) -> Engine:
    engine = engine_of(world)
    engine.progress = request.param
    return engine


def ring_shift(value: float) -> object:
    """Operation: send a number to the next rank, return that of the one before."""

    def steps(comm: MPI.Intracomm, tag: int) -> Steps:
        size, rank = comm.Get_size(), comm.Get_rank()
        sent, received = np.array([float(value)]), np.zeros(1)
        yield [
            comm.Irecv(received, (rank - 1) % size, tag),
            comm.Isend(sent, (rank + 1) % size, tag),
        ]
        return float(received[0])

    return steps


def test_one_engine_a_process(world: World) -> None:
    assert engine_of(world) is engine_of(world)


def test_operation_returns_its_result(engine: Engine, world: World) -> None:
    result = engine.control.run(ring_shift(world.rank), "shift")
    assert result == (world.rank - 1) % world.size


def test_many_operations_finish_in_any_order_of_waiting(engine: Engine, world: World) -> None:
    tickets = [engine.control.post(ring_shift(i), f"shift {i}") for i in range(300)]
    for number in (299, 0, *range(1, 299)):
        assert engine.wait(tickets[number]) == number
    assert not engine.busy


def test_channels_do_not_mix(engine: Engine, world: World) -> None:
    """Ranks post on two channels in opposite order, which one communicator would not survive."""
    left, right = engine.channel("left"), engine.channel("right")
    pairs = [(left, 1.0), (right, 2.0)]
    for round_number in range(50):
        order = pairs if (world.rank + round_number) % 2 else pairs[::-1]
        tickets = [(c.post(ring_shift(v), "shift"), v) for c, v in order]
        for ticket, value in tickets:
            assert engine.wait(ticket) == value


def test_window_limits_operations_in_flight(engine: Engine, world: World) -> None:
    channel = engine.channel("narrow", in_flight_bytes=20)
    running = 0
    most = 0

    def counted(comm: MPI.Intracomm, tag: int) -> Steps:
        nonlocal running, most
        running += 1
        most = max(most, running)
        yield [comm.Ibarrier()]
        running -= 1

    if world.rank == 0:
        world.comm.Barrier()
    tickets = [channel.post(counted, "counted", nbytes=10) for _ in range(20)]
    if world.rank != 0:
        for _ in range(1000):  # rank 0 has not begun, so nothing can finish
            if running == 2:
                break
            threading.Event().wait(0.01)
        world.comm.Barrier()
        assert most == 2 or world.size == 1
    for ticket in tickets:
        engine.wait(ticket)
    assert most <= 2


def test_steps_run_in_turn(engine: Engine) -> None:
    seen = []

    def steps(comm: MPI.Intracomm, tag: int) -> Steps:
        seen.append("begun")
        yield [comm.Ibarrier()]
        seen.append("between")
        yield []
        yield [comm.Ibarrier()]
        seen.append("done")
        return "result"

    assert engine.control.run(steps, "steps") == "result"
    assert seen == ["begun", "between", "done"]


@pytest.mark.parametrize("when", ["at once", "later"])
def test_failure_of_an_operation_reaches_who_waits(engine: Engine, when: str) -> None:
    def failing(comm: MPI.Intracomm, tag: int) -> Steps:
        if when == "later":
            yield [comm.Ibarrier()]
        raise ValueError("broken on purpose")

    ticket = engine.control.post(failing, "failing")
    with pytest.raises(ValueError, match="broken on purpose"):
        engine.wait(ticket)
    barrier_on(engine.control)


def test_posting_does_not_wait(engine: Engine, world: World) -> None:
    """Rank 0 posts while the others have not: it must get on with its work."""
    if world.rank == 0:
        ticket = engine.control.post(ring_shift(0), "alone")
        done_at_once = ticket.done
        world.comm.Barrier()
    else:
        world.comm.Barrier()
        ticket = engine.control.post(ring_shift(world.rank), "alone")
        done_at_once = False
    engine.wait(ticket)
    assert world.size == 1 or not done_at_once


def test_thread_moves_operations_that_nobody_waits_for(world: World) -> None:
    engine = engine_of(world)
    engine.progress = "thread"
    ticket = engine.control.post(ring_shift(1), "background")
    moved = threading.Event()
    for _ in range(1000):
        if ticket.done:
            break
        moved.wait(0.01)  # the main thread does not touch MPI here
    assert ticket.done
    assert not engine.control.busy


def test_tickets_tell_their_times(engine: Engine) -> None:
    ticket = engine.control.post(ring_shift(0), "timed", nbytes=8)
    engine.wait(ticket)
    assert ticket.begun_s <= ticket.finished_s
    assert (ticket.label, ticket.bytes) == ("timed", 8)


def test_channel_counts_what_it_posts(engine: Engine) -> None:
    channel: Channel = engine.channel("counted")
    assert not channel.busy
    for ticket in [channel.post(ring_shift(0), "shift") for _ in range(3)]:
        engine.wait(ticket)
    assert (channel.posted, channel.finished, channel.busy) == (3, 3, False)
    assert channel.oldest() is None


@pytest.mark.parametrize(
    ("between_s", "pause_s"), [(1e-6, POLL_S), (2e-3, 5e-4), (60.0, LONGEST_POLL_S)]
)
def test_polls_a_few_times_between_two_moves(between_s: float, pause_s: float) -> None:
    pace = _Pace()
    for turn in range(1, 101):
        pace.moved(turn * between_s)
    assert pace.pause_s == pytest.approx(pause_s, rel=1e-3)
