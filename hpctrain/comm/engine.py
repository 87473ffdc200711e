"""The one place of a process that calls MPI.

The *engine* drives the operations of all channels (see `channel`) under one lock, so that never two
threads are inside MPI: nonblocking collectives of Open MPI 5.0 crash when one thread starts them
while another tests them, at any thread level.

MPI moves data only while it is called. Who calls is the progress mode:

- ``thread``: a thread of the engine polls, as often as things move, and sleeps in between. Works
  while the main thread is anywhere, as long as it lets go of the interpreter lock.
- ``hooks``: gradient hooks poll in passing. Costs no thread switch, but nothing moves while a
  long kernel runs.

In both modes the thread that waits for an operation drives it, and a slow watch answers other
ranks that ask where this one is, and ends the run when an operation misses its deadline.

Where the MPI library tells of deaths, every rank that is left is told by itself, and whoever waits
then gets a `RankDiedError`: operations with the dead never end, and the engine is of no more use.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from mpi4py import MPI

from hpctrain.comm.channel import IN_FLIGHT_BYTES, Channel, Ticket, barrier
from hpctrain.comm.watch import FAILED, REVOKED, Pending, Watch, failed_ranks
from hpctrain.errors import RankDiedError
from hpctrain.trace import now_s
from hpctrain.world import World, fail, leave_behind, tells_of_deaths

_yield_core = getattr(os, "sched_yield", lambda: time.sleep(0))

POLL_S = 1e-4
"""Shortest sleep of the progress thread between two polls while operations are in flight."""
LONGEST_POLL_S = 5e-4
"""Longest sleep: an operation that takes many polls a move seems slow, and must not become so."""
POLLS_A_MOVE = 4
"""Polls in the usual time between two that move something. A link of 1 Gbit/s needs few of them,
and each takes time from the ranks' own computation."""
PACE_MOVES = 8
"""Moves over which the time between two is averaged."""
QUIET_POLLS = 1
"""Polls without a sleep after the last one that moved something."""
HOOK_POLL_S = 5e-5
"""Shortest time between two polls from hooks, for models with thousands of small parameters."""
SPIN_S = 5e-4
"""How long a waiting thread polls without a sleep after the last time that something moved. Longer,
and it takes the core from the kernel, which moves what comes over a network."""
PATIENT_POLL_S = 2e-4
"""Shortest sleep of a thread that waits for what may take long, on a core that ranks share."""
NEWS_S = 1.0
"""How long after an error of MPI the news of a death may come that explains it."""
WATCH_S = 0.05
"""Sleep of the engine's thread while it has nothing to move."""
LISTEN_S = 2e-3
"""Sleep between two polls while a mailbox is open, from which anything may come at any time. It
grows while nothing comes, since polls take the core from who computes, ..."""
LISTEN_POLLS = 10
"""... up to the mailbox's longest, which it reaches after so many polls."""
SWITCH_S = 2e-4
"""Interpreter switch interval: how long a pure-Python main thread may keep the progress thread
from its poll. The default of 5 ms would leave the wire idle between polls."""

PROGRESS_MODES = ("thread", "hooks")


class Listener(Protocol):
    """What is polled whether or not this rank has posted anything; see comm.mailbox."""

    @property
    def longest_listen_s(self) -> float:
        """Longest sleep between two polls while nothing comes and nobody waits."""

    @property
    def in_flight(self) -> bool:
        """Whether messages are under way."""

    @property
    def leaving(self) -> bool:
        """Whether messages have not left yet."""

    @property
    def number(self) -> int:
        """The same on all ranks, and of no other listener."""

    @property
    def abandoned(self) -> bool:
        """Whether this rank needs it no more."""

    def advance(self) -> bool:
        """Move what can be moved; whether anything did."""

    def close(self) -> None:
        """Receive, for nobody, what is on its way, and end. Collective."""


class Engine:
    """Drives the operations of all channels of this process. Use `engine_of` to get it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.progress = "thread"
        self.deadline_s = 300.0
        self._lock = threading.Lock()
        self._channels: list[Channel] = []
        self._listeners: list[Listener] = []
        self._left_behind = False
        self._is_told_of_deaths = world.size > 1 and tells_of_deaths(os.environ)
        self._dead: tuple[int, ...] | None = None
        """Ranks that are dead, once some are and nobody tolerates it."""
        self._made = 0
        self._wake = threading.Event()
        self._entries: list[Callable[[], object]] = []
        self._waiters = 0
        self._closing = False
        self._owner = os.getpid()
        self._polled_s = 0.0
        self._shares_core = world.oversubscribed
        self._watch: Watch | None = None
        self._thread: threading.Thread | None = None
        if world.size > 1:
            sys.setswitchinterval(min(SWITCH_S, sys.getswitchinterval()))
            self._watch = Watch(world, self._duplicated(), self._pending, self._posted)
            self._thread = threading.Thread(target=self._run, name="hpctrain-engine", daemon=True)
        self.control = self.channel("control")
        """Channel of small collectives: agreement, broadcasts, metrics."""
        if self._thread:
            threads = torch.get_num_threads()
            self._single_threaded = threading.Event()
            self._thread.start()
            # What a thread sets becomes the default of threads that have not computed yet.
            self._single_threaded.wait()
            torch.set_num_threads(threads)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """MPI to oneself, for set-up that is no operation. No operation may be in flight."""
        with self._lock:
            yield

    def channel(self, name: str, in_flight_bytes: int = IN_FLIGHT_BYTES) -> Channel:
        """Make a channel over all ranks. Collective, in the same order on all ranks.

        Channels and listeners that all ranks have let go of are freed here.
        """
        if self._channels:  # a rank that does not come is reported, as in any operation
            self.control.run(barrier, f"making of channel {name!r}")
        with self.exclusive():
            self._free_abandoned()
            channel = Channel(self, self._duplicated(), name, in_flight_bytes, number=self._made)
            self._made += 1
            self._channels.append(channel)
        return channel

    def alone(self, name: str) -> Channel:
        """Make a channel of this rank only, for what others need not take part in."""
        with self.exclusive():
            channel = Channel(self, MPI.COMM_SELF.Dup(), name, IN_FLIGHT_BYTES, number=-1)
            self._channels.append(channel)
        return channel

    def split(self, part: int) -> MPI.Intracomm:
        """A communicator over the ranks that give the same number, in their order. Collective."""
        self.control.run(barrier, "parting of the ranks")
        with self.exclusive():
            comm = self.world.comm.Split(part, key=self.world.rank)
            assert isinstance(comm, MPI.Intracomm)
            comm.Barrier()
        return comm

    def add(self, channel: Channel) -> None:
        """Move the operations of this channel too."""
        with self.exclusive():
            self._channels.append(channel)

    def forget(self, channels: Sequence[Channel]) -> None:
        """Move these no more: what is in flight there stays with the MPI library as it is."""
        with self.exclusive():
            self._channels = [c for c in self._channels if c not in channels]

    def duplicate(self, name: str) -> tuple[MPI.Intracomm, int]:
        """A communicator over all ranks for a listener, and its number. As `channel`."""
        self.control.run(barrier, f"making of {name!r}")
        with self.exclusive():
            self._free_abandoned()
            comm, number = self._duplicated(), self._made
            self._made += 1
        return comm, number

    def _duplicated(self) -> MPI.Intracomm:
        """A communicator over all ranks. Collective; the caller holds the lock."""
        comm: MPI.Intracomm | None = None
        try:
            comm = self.world.comm.Dup()
            # The first collective of a communicator sets up its connections, with the
            # interpreter lock held: have that happen here and not in the first step.
            comm.Barrier()
        except MPI.Exception as error:
            if not self._is_death(error):
                raise
            if comm is not None:
                comm.Revoke()  # others wait in it for who has failed here
            self.world.comm.Revoke()
            raise self._death() from error
        return comm

    def listen(self, listener: Listener) -> None:
        """Poll it from now on, in every progress mode by the engine's thread and whoever waits."""
        self._listeners.append(listener)
        self._wake.set()

    def enter(self, device: Callable[[], object]) -> None:
        """Have the engine's thread call this before it calls MPI again.

        Args:
            device: makes a device that of the thread which calls it.
        """
        with self._lock:
            self._entries.append(device)

    def push(self, start: Callable[[], object]) -> None:
        """Start sends now, if nobody else is inside MPI; else whoever is there does it soon."""
        if self._lock.acquire(blocking=False):
            try:
                start()
            finally:
                self._lock.release()

    def tolerate_deaths(self) -> None:
        """Go on when other ranks die, where the MPI library lets survivors live.

        Who uses the engine sees to it that nothing waits for them: `RankDiedError` is not raised.
        """
        self._is_told_of_deaths = False
        if self._watch:
            self._watch.tolerates_deaths = True

    def leave_behind(self) -> None:
        """Some rank is dead: wait for nobody at the end of the program."""
        self._left_behind = True
        leave_behind()

    def give_up(self) -> None:
        """Some rank is dead: call MPI no more. Not collective.

        What is in flight is left to the MPI library as it is, and so stays in memory.
        """
        self.leave_behind()
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _is_death(self, error: BaseException) -> bool:
        """Whether an error comes from deaths, which are noted then. With the lock held.

        With some operations the library says no more than that something went wrong.
        """
        given_up_s = now_s() + NEWS_S
        while isinstance(error, MPI.Exception) and self._is_told_of_deaths:
            if error.Get_error_class() in (*FAILED, REVOKED):
                self._note_deaths()
            else:
                self._look_for_deaths()
            if self._dead is not None:
                return True
            if now_s() > given_up_s:
                break
            time.sleep(POLL_S * 10)
        return False

    def _look_for_deaths(self) -> None:
        """Ask the MPI library, which answers from what it has been told. With the lock held."""
        if self._is_told_of_deaths:
            failed = self.world.comm.Get_failed()
            is_any = failed.Get_size() > 0
            failed.Free()
            if is_any or self.world.comm.Is_revoked():
                self._note_deaths()

    def _note_deaths(self) -> None:
        if self._dead is None:
            self._dead = tuple(failed_ranks(self.world.comm))

    def _death(self) -> RankDiedError:
        ranks = self._dead or ()
        who = ", ".join(map(self.world.name_of, ranks)) or "another rank"
        return RankDiedError(
            f"{who} has died",
            ranks,
            where=f"noticed by {self.world.name_of(self.world.rank)} at {self.world.position}",
            fix="look for what ended it above or in the system's log: often memory ran out",
            everywhere=True,
        )

    def _free_abandoned(self) -> None:
        """Free the communicators that no rank needs any more. Collective."""
        if not self._channels:
            return
        mine = {c.number for c in self._channels if c.abandoned and not c.busy and c.number >= 0}
        mine |= {listener.number for listener in self._listeners if listener.abandoned}
        everyones = self.control.comm.allgather(mine)
        freed = set.intersection(*everyones)
        for channel in self._channels:
            if channel.number in freed:
                channel.comm.Free()
        self._channels = [c for c in self._channels if c.number not in freed]
        self._close_listeners(freed)

    def _close_listeners(self, numbers: set[int]) -> None:
        """Close those listeners. Collective; the caller holds the lock."""
        for listener in sorted(self._listeners, key=lambda each: each.number):
            if listener.number in numbers:
                listener.close()
        self._listeners = [each for each in self._listeners if each.number not in numbers]

    def attend(self, channel: Channel) -> None:
        """An operation was queued: begin it now if nobody else is inside MPI."""
        if self._lock.acquire(blocking=False):
            try:
                channel.begin()
            finally:
                self._lock.release()
        if channel.busy and self.progress == "thread" and not self._wake.is_set():
            self._wake.set()

    @property
    def busy(self) -> bool:
        """Whether an operation of any channel is queued or in flight."""
        return any(channel.busy for channel in self._channels)

    def poll(self) -> None:
        """Move what can be moved, if the progress mode asks for it and nobody else is at it.

        Meant for gradient hooks: cheap when there is nothing to do.
        """
        if self.progress != "hooks" or now_s() - self._polled_s < HOOK_POLL_S or not self.busy:
            return
        if self._lock.acquire(blocking=False):
            try:
                self._advance()
            finally:
                self._lock.release()

    def wait(self, ticket: Ticket) -> Any:
        """Drive all operations until `ticket` is done; returns its result.

        Raises:
            RankDiedError: some rank is dead, so that the operation may never end.
            Exception: what the operation raised on this rank.
        """
        if not ticket.done:
            self.drive(lambda: ticket.done)
        if ticket.error is not None:
            with self._lock:
                is_death = self._is_death(ticket.error)
            if is_death:
                raise self._death() from ticket.error
            raise ticket.error
        return ticket.result

    def drive(self, until: Callable[[], bool], longest_s: float = POLL_S) -> None:
        """Drive all operations and listeners until `until` says so.

        Args:
            until: looked at after each poll.
            longest_s: longest sleep between two polls, where what is waited for may take long; on a
                core that ranks share, it does not spin then either.
        """
        moved_s = now_s()
        self._waiters += 1
        try:
            while True:
                with self._lock:  # blocking, so that a thread inside MPI gets the interpreter
                    moved = self._advance()
                if until():
                    return
                if self._dead is not None:
                    raise self._death()
                if moved:
                    moved_s = self._polled_s
                self._back_off(self._polled_s - moved_s, longest_s)
        finally:
            self._waiters -= 1
            if self._listeners or (self.busy and self.progress == "thread"):
                self._wake.set()  # what is left is the thread's again

    def _back_off(self, idle_s: float, longest_s: float = POLL_S) -> None:
        """Leave the core to ranks that compute, and to the kernel."""
        if self._shares_core and longest_s > POLL_S:
            time.sleep(min(max(PATIENT_POLL_S, idle_s / 8), longest_s))
        elif idle_s > SPIN_S:
            # What is under way needs polls of both sides, though it counts only when it is there.
            is_idle = not any(listener.in_flight for listener in self._listeners)
            time.sleep(min(max(POLL_S, idle_s / 8), longest_s) if is_idle else POLL_S)
        elif self._shares_core:
            _yield_core()

    def _advance(self) -> bool:
        """Poll all channels; whether anything moved."""
        self._polled_s = now_s()
        moved = False
        for channel in self._channels:
            if channel.busy:
                moved |= channel.advance()
        for listener in self._listeners:
            moved |= listener.advance()
        return moved

    def _run(self) -> None:
        """The engine's thread: polls while there is traffic, and keeps the watch."""
        torch.get_num_threads()  # or the first sum would take the default
        torch.set_num_threads(1)  # its sums must not wake a second team of threads
        self._single_threaded.set()
        watched_s = now_s()
        pace = _Pace()
        quiet = 0
        try:
            while not self._closing:
                polls = (self.busy and self.progress == "thread") or bool(self._listeners)
                if polls and not self._waiters:
                    # Where something has just moved, more is about to.
                    if quiet < QUIET_POLLS:
                        _yield_core()
                    elif self.busy or any(listener.in_flight for listener in self._listeners):
                        time.sleep(pace.pause_s)
                    else:
                        longest_s = min(
                            (each.longest_listen_s for each in self._listeners), default=LISTEN_S
                        )
                        share = min(1.0, quiet / LISTEN_POLLS)
                        time.sleep(LISTEN_S + share * max(0.0, longest_s - LISTEN_S))
                else:
                    pace.interrupt()
                    self._wake.wait(WATCH_S)
                    self._wake.clear()
                    if self._waiters:
                        time.sleep(POLL_S * 10)
                with self._lock:
                    if MPI.Is_finalized():  # by the program itself
                        return
                    while self._entries:
                        self._entries.pop(0)()
                    if polls and not self._waiters:
                        if self._advance():
                            quiet = 0
                            pace.moved(self._polled_s)
                        else:
                            quiet += 1
                    if now_s() - watched_s >= WATCH_S:
                        self._keep_watch(now_s() - watched_s)
                        watched_s = now_s()
                    if self._dead is not None:
                        return
        except BaseException as error:
            fail(self.world, error, error.__traceback__)

    def _keep_watch(self, since_s: float) -> None:
        assert self._watch is not None
        if since_s > max(5.0, 20 * WATCH_S):
            for channel in self._channels:
                channel.excuse(since_s)
        if self.progress != "thread":
            self._advance()
        try:
            self._watch.advance(self.deadline_s)
        except MPI.Exception as error:
            if not self._is_death(error):
                raise
        self._look_for_deaths()

    def _pending(self) -> Pending | None:
        """The operation of this process that has been in flight for longest."""
        oldest = [(c.oldest(), c.name) for c in self._channels if c.number >= 0]
        tickets = [(t.begun_s, t, name) for t, name in oldest if t is not None]
        if not tickets:
            return None
        begun_s, ticket, name = min(tickets, key=lambda entry: entry[0])
        return Pending(name, ticket.number, ticket.label, now_s() - begun_s)

    def _posted(self) -> dict[str, int]:
        return {channel.name: channel.posted for channel in self._channels}

    def close(self) -> None:
        """Leave: wait until all ranks leave, then stop. Collective; called at interpreter exit."""
        forked = os.getpid() != self._owner
        if self._thread is None or self._closing or forked or MPI.Is_finalized():
            return
        self.world.position.phase = "leaving"
        assert self._watch is not None
        self._watch.leave()
        polled = now_s()
        # MPI must not end with messages on the wire.
        while self._dead is None and (
            self.busy or any(listener.leaving for listener in self._listeners)
        ):
            with self._lock:
                self._advance()
            self._back_off(now_s() - polled)
        if not self._left_behind:
            try:
                self.control.run(barrier, "the end of the program")
                with self._lock:
                    self._close_listeners({listener.number for listener in self._listeners})
            except RankDiedError:  # between the end of the run and this
                self.leave_behind()
            except MPI.Exception:
                if not self._watch.tolerates_deaths:
                    raise
                self.leave_behind()
        self._closing = True
        self._wake.set()
        self._thread.join()
        if not self._left_behind:
            self._watch.close()


class _Pace:
    """How often to poll: a few times between two polls that move something."""

    def __init__(self) -> None:
        self.pause_s = POLL_S
        self._between_s = 0.0
        self._moved_s: float | None = None

    def moved(self, now: float) -> None:
        """A poll at this time moved something."""
        if self._moved_s is not None:
            between_s = min(now - self._moved_s, POLLS_A_MOVE * LONGEST_POLL_S)
            self._between_s += (between_s - self._between_s) / PACE_MOVES
            self.pause_s = max(POLL_S, self._between_s / POLLS_A_MOVE)
        self._moved_s = now

    def interrupt(self) -> None:
        """Nothing is on the wire, or another thread polls: forget when the last move was."""
        self._moved_s = None


_engines: dict[int, Engine] = {}


def engine_of(world: World) -> Engine:
    """The engine of this process. Collective at the first call."""
    if id(world) not in _engines:
        _engines[id(world)] = engine = Engine(world)
        atexit.register(engine.close)
    return _engines[id(world)]


def register(world: World, engine: Engine) -> None:
    """Have `engine_of` find this engine for a world."""
    _engines[id(world)] = engine


def give_up_engine(world: World) -> None:
    """Some rank of it is dead: have nobody call MPI for this world any more. Not collective."""
    leave_behind()
    if id(world) in _engines:  # not if somebody died while it was being made
        _engines[id(world)].give_up()
