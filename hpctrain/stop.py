"""Whether this process was told that it will be ended soon.

Batch systems tell a job ahead of time that it will be ended. Such a word only sets a flag: the
training loop looks at it, saves, and ends with a status that asks to be started again. It may come
before there is a loop, so that a program listens for it first of all.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Mapping
from typing import Any


class StopRequest:
    """A flag that signals set."""

    def __init__(self) -> None:
        self.has_come = False
        self._process = os.getpid()

    def listen(self, environment: Mapping[str, str]) -> list[int]:
        """Have signals set the flag from now on, but those that the program handles itself.

        In a thread that is not the main one nothing can be set up.

        Args:
            environment: tells whether a batch system started the process.

        Returns:
            The signals that do.
        """
        if threading.current_thread() is not threading.main_thread():
            return []
        asking = [n for n in signals_to_stop(environment) if signal.getsignal(n) is signal.SIG_DFL]
        for number in asking:
            signal.signal(number, self._ask)
        if signal.SIGUSR1 in asking:
            # Batch scripts repeat it, and Python gives up its handlers before the process ends.
            atexit.register(signal.signal, signal.SIGUSR1, signal.SIG_IGN)
        return asking

    def _ask(self, number: int, frame: Any) -> None:
        del frame
        if os.getpid() == self._process:
            self.has_come = True
        elif number == signal.SIGTERM:  # a child that inherited this handler: its parent ends it
            os._exit(128 + number)


def signals_to_stop(environment: Mapping[str, str]) -> tuple[int, ...]:
    """Signals that ask to save and end: in a batch job also SIGTERM, by which Slurm preempts."""
    if "SLURM_JOB_ID" in environment:
        return signal.SIGUSR1, signal.SIGTERM
    return (signal.SIGUSR1,)


def broken_off(*signals: int) -> tuple[int, ...]:
    """Statuses of a launch whose ranks, or whose launcher, one of these signals has ended.

    As a shell has them, and as MPICH's mpiexec does.
    """
    return tuple(status for number in signals for status in (int(number), 128 + number))
