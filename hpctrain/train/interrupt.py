"""What the user is told when a run is interrupted, and how its ranks end."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from hpctrain.stop import StopRequest
from hpctrain.streams import tell
from hpctrain.world import World

_PATIENCE_S = 1.0
_log = logging.getLogger("hpctrain")


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

    def terminate(number: int, frame: Any) -> None:
        if os.getpid() != process:
            os._exit(128 + number)
        raise _TerminatedError

    ours = stop.listen(os.environ)
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)
        ours.append(signal.SIGTERM)
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
    tell(line)
    if number == signal.SIGTERM:
        # Open MPI's mpirun forwards nothing more of its ranks once it was interrupted.
        with suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(line)
    if world.size > 1:
        world.abort(128 + number)
    sys.exit(128 + number)
