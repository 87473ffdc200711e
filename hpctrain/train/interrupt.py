"""What the user is told when a run is interrupted, and how its ranks end.

Batch systems tell a job ahead of time that it will be ended. Such a word only sets a flag: the
training loop looks at it, saves, and ends with a status that asks to be started again.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from hpctrain.world import World

_PATIENCE_S = 1.0
_log = logging.getLogger("hpctrain")


class StopRequest:
    """Whether this rank was told that it will be ended soon."""

    def __init__(self) -> None:
        self.has_come = False


def is_in_batch(environment: Mapping[str, str]) -> bool:
    """Whether SIGTERM means that a batch system is about to end the job, as Slurm's preemption."""
    return "SLURM_JOB_ID" in environment


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM has come, which is what Open MPI's mpirun makes of Ctrl-C."""


@contextmanager
def told_when_interrupted(
    world: World, text: Callable[[], str], stop: StopRequest
) -> Iterator[None]:
    """End all ranks on Ctrl-C or SIGTERM, after one line that says what to do next.

    On SIGUSR1, and on SIGTERM inside a batch job, it is only written down that this was asked for.

    Args:
        world: the ranks.
        text: makes the line.
        stop: told of it.
    """
    process = os.getpid()
    in_batch = is_in_batch(os.environ)

    def ask(number: int, frame: Any) -> None:
        if os.getpid() == process:
            stop.has_come = True
        elif number == signal.SIGTERM:  # a child that inherited this handler: its parent ends it
            os._exit(128 + number)

    def terminate(number: int, frame: Any) -> None:
        if os.getpid() != process:
            os._exit(128 + number)
        raise _TerminatedError

    handlers = {signal.SIGTERM: ask if in_batch else terminate, signal.SIGUSR1: ask}
    is_main = threading.current_thread() is threading.main_thread()
    ours = [n for n in handlers if is_main and signal.getsignal(n) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, handlers[number])
    try:
        yield
    except KeyboardInterrupt as interrupt:
        _end(
            world,
            text,
            signal.SIGTERM if isinstance(interrupt, _TerminatedError) else signal.SIGINT,
        )
    finally:
        for number in ours:  # what comes again while this rank ends must not change its status
            signal.signal(number, signal.SIG_IGN if stop.has_come else signal.SIG_DFL)


def _end(world: World, text: Callable[[], str], number: int) -> None:
    if not world.is_root:
        time.sleep(_PATIENCE_S)  # the root, which was interrupted as well, speaks and ends all
    line = f"\nhpctrain: {text()}\n"
    _log.warning(line.strip(), extra={"shown": True})
    os.write(2, line.encode())
    if number == signal.SIGTERM:
        # Open MPI's mpirun forwards nothing more of its ranks once it was interrupted.
        with suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(line)
    if world.size > 1:
        world.abort(128 + number)
    sys.exit(128 + number)
