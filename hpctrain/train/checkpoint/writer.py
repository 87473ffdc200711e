"""The thread that writes a checkpoint while training goes on.

Each rank has one, which writes that rank's files. It makes no MPI call: what it has written, or why
it could not, it leaves as a *receipt* beside the files. The thread of rank 0 waits for the receipts
of all, or for the word of its main thread that all have told each other, and publishes.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from hpctrain.trace import CHECKPOINT, Trace, now_s
from hpctrain.train.checkpoint.config import CheckpointConfig
from hpctrain.train.checkpoint.copies import Copies
from hpctrain.train.checkpoint.format import unreadable_entry, write_object, write_shared
from hpctrain.train.checkpoint.manifest import Entry, manifest_of, own_name
from hpctrain.train.checkpoint.store import name_of, publish, settle

LOOK_S = 2e-3
"""Time between the first two looks for the receipts of other ranks; it grows with each ..."""
LONGEST_LOOK_S = 0.25
"""... up to this."""
PATIENCE_S = 60.0
"""A receipt that is missing for so long is told."""
_RECEIPT = "receipt-{:05d}.json"
_log = logging.getLogger("hpctrain")


@dataclass(frozen=True)
class Part:
    """What one rank has written of a checkpoint, or why it could not."""

    files: dict[str, Entry] = field(default_factory=dict)
    failure: str = ""
    is_unreadable: bool = False
    """Whether it was written, and could not be read again."""


@dataclass
class Making:
    """A checkpoint in the making: what the main thread and the writer's have to do with each other.

    The main thread sets what stands first, before the writer begins.
    """

    step: int
    side: Path
    """Where it is written."""
    facts: Mapping[str, Any]
    reads_back: bool
    gone_back_from: frozenset[str]
    copies: Copies
    shared: dict[str, Any] = field(default_factory=dict)
    own: Any = None
    held: dict[str, Any] = field(default_factory=dict)
    """More that is shared, which the program leaves as it is until it is copied."""
    begun_s: float = field(default_factory=now_s)
    on_thread: bool = False
    stall_s: float = 0.0
    hooks: list[Any] = field(default_factory=list)

    copied: threading.Event = field(default_factory=threading.Event)
    """Nothing of the program is read any more."""
    written: threading.Event = field(default_factory=threading.Event)
    """This rank has done its part, or failed."""
    part: Part = field(default_factory=Part)
    known: threading.Event = field(default_factory=threading.Event)
    """The main thread knows the parts of all ranks, ..."""
    everyone: list[Part] | None = None
    """... which are these."""
    over: threading.Event = field(default_factory=threading.Event)
    outcome: Part = field(default_factory=Part)
    """On rank 0: why it was not published."""
    ended_s: float = 0.0

    def fail(self, failure: str, is_unreadable: bool = False) -> None:
        """This rank's part has failed."""
        self.part = Part({}, failure, is_unreadable)
        self.say(failure)

    def say(self, failure: str) -> None:
        """Tell of a failure at once: it is raised later."""
        if self.on_thread:
            _log.error(
                "the checkpoint of step %d could not be written: %s; the next save ends the run",
                *(self.step, failure),
            )


class Writer:
    """Writes checkpoints of a run, one after another, on a thread that waits for them.

    Args:
        rank: of those that write together.
        size: their number.
        folder: of all checkpoints.
        config: how.
        trace: receives what it costs.
    """

    def __init__(
        self, rank: int, size: int, folder: Path, config: CheckpointConfig, trace: Trace
    ) -> None:
        self._rank, self._size = rank, size
        self._folder = folder
        self._config = config
        self._trace = trace
        self._begun: SimpleQueue[Making | None] = SimpleQueue()
        if config.asynchronous:  # now, since it takes long where cores are busy
            threading.Thread(target=self._run, name="hpctrain-checkpoint", daemon=True).start()

    def start(self, making: Making) -> None:
        """Write, and publish, on the thread."""
        self._begun.put(making)

    def stop(self) -> None:
        """Have the thread end when it has nothing to write."""
        self._begun.put(None)

    def _run(self) -> None:
        while (making := self._begun.get()) is not None:
            self.write(making)
            if self._rank == 0:
                self.complete(making)
            making.ended_s = now_s()
            making.over.set()
            del making  # with the copies in it

    def write(self, making: Making) -> None:
        """Write this rank's files."""
        try:
            if not making.part.failure:
                with self._span("copy", making):
                    for key, value in making.held.items():
                        making.shared[key] = making.copies.of(key, value, alone=True)
                    making.copies.finish()
                making.copied.set()
                with self._span("write", making):
                    self._write_files(making)
        except Exception as error:
            making.fail(f"{type(error).__name__}: {error}")
        finally:
            making.shared, making.held, making.own = {}, {}, None
            making.copied.set()
            if self._rank and making.on_thread:
                self._leave_receipt(making)
            making.written.set()

    def _write_files(self, making: Making) -> None:
        side, own = making.side, own_name(self._rank)
        self._folder.mkdir(exist_ok=True)  # not its parents: a run folder that is gone stays so
        side.mkdir(exist_ok=True)  # whichever rank comes first
        files = write_shared(side, making.shared)
        files[own] = write_object(side / own, making.own)
        making.part = Part(files)
        if making.reads_back:
            entry = unreadable_entry(side, making.shared, (own, making.own))
            if entry:
                making.fail(entry, is_unreadable=True)

    def complete(self, making: Making) -> None:
        """On rank 0: publish when all ranks have written their parts, if they could."""
        try:
            parts = self._parts(making)
            failed = [(rank, part) for rank, part in enumerate(parts) if part.failure]
            if not failed:
                with self._span("publish", making):
                    self._publish(making, {k: v for part in parts for k, v in part.files.items()})
                return
            rank, part = failed[0]
            place = f"rank {rank}: " if self._size > 1 else ""
            making.outcome = Part({}, place + part.failure, part.is_unreadable)
            if rank:
                making.say(making.outcome.failure)
            for name in making.part.files:  # which take space until the others are done
                (making.side / name).unlink(missing_ok=True)
        except Exception as error:
            making.outcome = Part({}, f"{type(error).__name__}: {error}")
            making.say(making.outcome.failure)
        finally:
            making.over.set()

    def _publish(self, making: Making, files: Mapping[str, Entry]) -> None:
        for rank in range(1, self._size):
            (making.side / _RECEIPT.format(rank)).unlink(missing_ok=True)
        name = name_of(making.step)
        manifest = manifest_of(making.step, self._size, making.facts, files)
        publish(making.side, self._folder / name, manifest)
        settle(self._folder, name, self._config.keep, making.gone_back_from)

    def _parts(self, making: Making) -> list[Part]:
        """What each rank has written; nothing of those that have said nothing when one failed."""
        parts = {0: making.part}
        look_s, told_s = LOOK_S, now_s() + PATIENCE_S
        while len(parts) < self._size and not any(part.failure for part in parts.values()):
            if making.known.wait(look_s):
                break
            parts.update(self._receipts(making.side, parts))
            look_s = min(1.5 * look_s, LONGEST_LOOK_S)
            if now_s() > told_s:
                told_s = float("inf")
                missing = ", ".join(str(rank) for rank in range(self._size) if rank not in parts)
                _log.warning("the checkpoint of step %d waits for rank %s", making.step, missing)
        if making.everyone is not None:
            return making.everyone
        return [parts.get(rank, Part()) for rank in range(self._size)]

    def _leave_receipt(self, making: Making) -> None:
        path = making.side / _RECEIPT.format(self._rank)
        with suppress(OSError):  # then rank 0 learns it from the main threads
            side = path.with_suffix(".partial")
            side.write_text(json.dumps(asdict(making.part)))
            side.rename(path)

    def _receipts(self, side: Path, known: Mapping[int, Part]) -> dict[int, Part]:
        """The receipts that have come since."""
        found = {}
        for rank in range(1, self._size):
            if rank not in known:
                with suppress(OSError, ValueError, TypeError):  # not there yet
                    found[rank] = Part(**json.loads((side / _RECEIPT.format(rank)).read_text()))
        return found

    def _span(self, name: str, making: Making) -> Any:
        return self._trace.span(name, track=CHECKPOINT, step=making.step)
