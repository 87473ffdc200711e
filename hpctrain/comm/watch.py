"""Who is missing, and where does it stand? The answer to an operation that does not finish.

A rank whose oldest operation has waited for half of its deadline tells the *watchers*, ranks 0
and 1; two, so that either may be the one that is stuck. A watcher asks every rank where it is.
The engine's thread answers, also while the main thread hangs in a loop; a rank that is stopped
or cut off does not, which is an answer too. At the deadline the watcher says so once more and
ends the run. A rank that leaves its program tells the watchers, which need not wait for a deadline
then: what it has not posted will never finish. The traffic is a few small messages a rank, and
only when something is wrong.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from mpi4py import MPI

from hpctrain.errors import ExitCode
from hpctrain.streams import tell
from hpctrain.trace import now_s
from hpctrain.world import World

WATCHERS = (0, 1)
GRACE_S = 1.0
"""How long a watcher waits for answers. Engines look at their mail every 50 ms."""
LEFT_S = 2.0
"""How long a watcher waits in an operation of which a rank that left can never be part."""
SELF_HELP_S = 4.0
"""How long after its deadline a rank waits for the watchers to speak before it ends the run."""

FAILED = tuple(getattr(MPI, name, -1) for name in ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING"))
"""Error classes by which an MPI library with ULFM tells that a rank is dead."""
REVOKED = getattr(MPI, "ERR_REVOKED", -1)
"""Error class of a communicator that some rank has given up, since another one is dead."""
_MAIL_BYTES = 65_536
_LIBRARIES = tuple(
    str(Path(file).parents[level]) + os.sep
    for file, level in ((__file__, 1), (str(torch.__file__), 0), (threading.__file__, 0))
)
_log = logging.getLogger("hpctrain")


@dataclass(frozen=True)
class Pending:
    """An operation in flight on some rank."""

    channel: str
    number: int
    """How many operations were posted on the channel before it."""
    label: str
    age_s: float


@dataclass(frozen=True)
class Status:
    """Where a rank stands."""

    rank: int
    position: str
    main: str
    """Place in the source where the main thread is."""
    posted: Mapping[str, int]
    """Operations posted so far, by channel."""
    left: bool
    """Whether the rank is ending its program."""


class Watch:
    """Reports this rank's stalls, and answers other ranks. Driven by the engine's thread."""

    def __init__(
        self,
        world: World,
        comm: MPI.Intracomm,
        pending: Callable[[], Pending | None],
        posted: Callable[[], dict[str, int]],
    ) -> None:
        self._world = world
        self._comm = comm
        self._pending = pending
        self._posted = posted
        self.tolerates_deaths = False
        self._left = False
        self._said_goodbye = False
        self._gone: list[Mapping[str, int]] = []
        self._told: set[tuple[str, int, bool]] = set()
        self._inquiry: _Inquiry | None = None
        self._outbox: list[tuple[MPI.Request, bytes]] = []
        self._mail = bytearray(_MAIL_BYTES)
        self._inbox = self._receive()

    def advance(self, deadline_s: float) -> None:
        """Read mail, answer, and look whether an operation of this rank is late."""
        for kind, body in self._read_mail():
            self._handle(kind, body)
        self._outbox = [(request, mail) for request, mail in self._outbox if not request.Test()]
        if self._left and not self._said_goodbye:
            self._say_goodbye()
        pending = None if self._left else self._pending()
        if pending and pending.age_s > LEFT_S and self._waits_for_the_gone(pending):
            self._tell_watchers(pending, final=True)
        elif pending and pending.age_s > deadline_s / 2:
            self._tell_watchers(pending, final=pending.age_s > deadline_s)
            if pending.age_s > deadline_s + SELF_HELP_S:
                self._end_run(describe(pending, {}, self._names()))
        if self._inquiry and self._inquiry.is_over(self._world.size):
            inquiry, self._inquiry = self._inquiry, None
            self._conclude(inquiry)

    def leave(self) -> None:
        """This rank ends its program: from now on it is never late itself."""
        self._left = True

    def close(self) -> None:
        """Stop receiving. Receives are completed by a message to oneself, never cancelled."""
        self._send(self._world.rank, "bye", {})
        while not any(kind == "bye" for kind, _ in self._read_mail()):
            pass

    def _names(self) -> list[str]:
        return [self._world.name_of(rank) for rank in range(self._world.size)]

    def _status(self) -> Status:
        return Status(
            rank=self._world.rank,
            position=str(self._world.position),
            main=main_thread_place(),
            posted=self._posted(),
            left=self._left,
        )

    def _say_goodbye(self) -> None:
        self._said_goodbye = True
        for watcher in WATCHERS[: self._world.size]:
            if watcher != self._world.rank:
                self._send(watcher, "left", {"posted": self._posted()})

    def _waits_for_the_gone(self, pending: Pending) -> bool:
        return any(posted.get(pending.channel, 0) <= pending.number for posted in self._gone)

    def _tell_watchers(self, pending: Pending, final: bool) -> None:
        key = (pending.channel, pending.number, final)
        if key in self._told:
            return
        self._told.add(key)
        for watcher in WATCHERS[: self._world.size]:
            if watcher == self._world.rank:
                self._inquire(pending, final)
            else:
                self._send(watcher, "stall", {"pending": asdict(pending), "final": final})

    def _inquire(self, pending: Pending, final: bool) -> None:
        """Ask every rank where it is, unless that is being done already."""
        if self._inquiry and self._inquiry.same_operation(pending):
            self._inquiry.final |= final
            return
        status = self._status()
        self._inquiry = _Inquiry(pending, final, {status.rank: status})
        for rank in range(self._world.size):
            if rank != self._world.rank:
                self._send(rank, "ask", {})

    def _handle(self, kind: str, body: dict[str, Any]) -> None:
        if kind == "ask":
            self._send(body["from"], "status", asdict(self._status()))
        elif kind == "status" and self._inquiry:
            status = Status(**{k: v for k, v in body.items() if k != "from"})
            self._inquiry.answers[status.rank] = status
        elif kind == "left":
            self._gone.append(body["posted"])
        elif kind == "stall":
            pending = Pending(**body["pending"])
            key = (pending.channel, pending.number, body["final"])
            if key not in self._told:
                self._told.add(key)
                self._inquire(pending, body["final"])

    def _conclude(self, inquiry: _Inquiry) -> None:
        """Say what the inquiry found; the second watcher speaks only if the first is silent."""
        if self._world.rank != WATCHERS[0] and WATCHERS[0] in inquiry.answers:
            return
        report = describe(inquiry.pending, inquiry.answers, self._names())
        missing, _, _ = sort_ranks(inquiry.pending, inquiry.answers, self._world.size)
        if inquiry.final or any(inquiry.answers[rank].left for rank in missing):
            self._end_run(report)
        _log.warning(report, extra={"shown": True})
        tell(f"hpctrain: {report}\n")

    def _end_run(self, report: str) -> None:
        _log.error(report, extra={"shown": True})
        tell(f"hpctrain: {report}\n  ending the run\n")
        self._world.abort(ExitCode.CRASH)

    def _receive(self) -> MPI.Request:
        return self._comm.Irecv([self._mail, MPI.BYTE], MPI.ANY_SOURCE, MPI.ANY_TAG)

    def _send(self, rank: int, kind: str, body: Mapping[str, object]) -> None:
        mail = json.dumps({"kind": kind, "from": self._world.rank, **body}).encode()
        self._outbox.append((self._comm.Isend([mail, MPI.BYTE], rank), mail))

    def _read_mail(self) -> Iterable[tuple[str, dict[str, Any]]]:
        status = MPI.Status()
        while self._has_mail(status):
            body = json.loads(bytes(self._mail[: status.Get_count(MPI.BYTE)]))
            kind = body.pop("kind")
            if kind != "bye":
                self._inbox = self._receive()
            yield kind, body
            if kind == "bye":
                return

    def _has_mail(self, status: MPI.Status) -> bool:
        try:
            return self._inbox.Test(status)
        except MPI.Exception as error:
            if not self.tolerates_deaths or error.Get_error_class() not in FAILED:
                raise
            failed_ranks(self._comm)  # acknowledged, so that mail of others comes again
            return False


class _Inquiry:
    """A question that a watcher has put to all ranks."""

    def __init__(self, pending: Pending, final: bool, answers: dict[int, Status]) -> None:
        self.pending = pending
        self.final = final
        self.answers = answers
        self.asked_s = now_s()

    def same_operation(self, pending: Pending) -> bool:
        mine, other = self.pending, pending
        return (mine.channel, mine.number) == (other.channel, other.number)

    def is_over(self, size: int) -> bool:
        return len(self.answers) == size or now_s() - self.asked_s > GRACE_S


def sort_ranks(
    pending: Pending, answers: Mapping[int, Status], size: int
) -> tuple[list[int], list[int], list[int]]:
    """Split the ranks into those that have not posted the operation, have, and do not answer."""
    missing, there, silent = [], [], []
    for rank in range(size):
        if rank not in answers:
            silent.append(rank)
        elif answers[rank].posted.get(pending.channel, 0) <= pending.number:
            missing.append(rank)
        else:
            there.append(rank)
    return missing, there, silent


def describe(pending: Pending, answers: Mapping[int, Status], names: list[str]) -> str:
    """The report of a stall.

    Args:
        pending: the operation that does not finish.
        answers: status by rank, of the ranks that answered.
        names: how to call each rank.
    """
    missing, there, silent = sort_ranks(pending, answers, len(names))
    lines = [f"{pending.label} has not finished for {pending.age_s:.0f} s"]
    for rank in missing:
        status = answers[rank]
        if status.left:
            lines.append(f"  gone: {names[rank]} has left the program ({status.position})")
        else:
            lines.append(f"  missing: {names[rank]}: {status.position}, at {status.main}")
    if any(answers[rank].left for rank in missing):
        lines.append("  do all ranks take the same number of steps?")
    if answers:
        lines += [f"  no answer: {names[rank]}: stopped, dead or cut off" for rank in silent]
    if there and (missing or silent):
        lines.append("  waiting in it: " + ", ".join(names[rank] for rank in there))
    elif there:
        lines.append("  all ranks are in it: the network or the MPI library does not move it")
        lines += [f"    {names[rank]}: {answers[rank].position}" for rank in there]
    return "\n".join(lines)


def failed_ranks(comm: MPI.Intracomm) -> list[int]:
    """Ranks of `comm` that are dead as far as the MPI library knows; from now on acknowledged."""
    failed = comm.Get_failed()
    comm.Ack_failed(failed.Get_size())
    mine = comm.Get_group()
    ranks = MPI.Group.Translate_ranks(failed, list(range(failed.Get_size())), mine)
    mine.Free()
    failed.Free()
    return [int(rank) for rank in ranks]


def main_thread_place() -> str:
    """Where the main thread is: the innermost line that is not this package's or torch's."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "no main thread"
    place = _place(frame)
    while frame is not None:
        if not _is_library(frame.f_code.co_filename):
            return _place(frame)
        frame = frame.f_back
    return place


def _is_library(file: str) -> bool:
    installed = "site-packages" in file and not file.startswith(_LIBRARIES[:2])
    return file.startswith((*_LIBRARIES, "<")) and not installed


def _place(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_filename[-80:]}:{frame.f_lineno} in {code.co_name}"
