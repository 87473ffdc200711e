"""Error classes, exit codes, and the one form in which a mistake is told."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

MOST_SHOWN = 200
"""Characters of a value in a message."""


class ExitCode(IntEnum):
    """What a job's exit status means to the shell, to Slurm and to a relauncher."""

    DONE = 0
    CRASH = 1
    BAD_JOB = 2
    UNFIT = 3
    REQUEUE = 75


def shown(value: object, most: int = MOST_SHOWN) -> str:
    """A value as a message shows it: in one line, without control characters, and never long.

    Made for what users write and their code returns: it bears values whose `repr` fails.
    """
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception as error:
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    if not text.isprintable():  # a repr of the user's own
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return shortened(text, most)


def shortened(text: str, most: int = MOST_SHOWN) -> str:
    """A text for a message: its begin and its end, if it is longer than `most` characters."""
    if len(text) <= most:
        return text
    end = most // 4
    return f"{text[: most - end]} ... {text[-end:]} ({len(text)} characters)"


def told(error: BaseException) -> str:
    """`ValueError: no such weights`: an exception of the user's code in a message."""
    try:
        text = shortened(str(error), 600)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class HpctrainError(Exception):
    """A failure that the user can act on.

    The message answers, in this order: what is wrong, which value was met, what is allowed,
    where it was met, and how to mend it. Parts that do not apply are left out.

    Attributes:
        exit_code: the status with which a command ends when nobody catches the error.
        everywhere: true when every rank is expected to raise the same error at the same point, so
            that rank 0 may speak for all. A rank that meets it alone speaks a little later.
    """

    exit_code: ExitCode = ExitCode.CRASH

    def __init__(
        self,
        what: str,
        *,
        value: object = None,
        allowed: str | None = None,
        where: str | None = None,
        fix: str | None = None,
        everywhere: bool = False,
    ) -> None:
        self.what = what
        self.value = value
        self.allowed = allowed
        self.where = where
        self.fix = fix
        self.everywhere = everywhere
        super().__init__(self._text())

    def _text(self) -> str:
        text = self.what
        if self.value is not None:
            text += f": got {shown(self.value)}"
        if self.allowed:
            text += f"; allowed: {self.allowed}"
        if self.where:
            text += f"\n  where: {self.where}"
        if self.fix:
            text += f"\n  fix: {self.fix}"
        if text.isprintable():
            return text
        # Names of files may hold anything, also what a terminal would obey.
        return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class JobError(HpctrainError):
    """The job file or the job module is wrong. Raised before MPI starts work."""

    exit_code = ExitCode.BAD_JOB


class UnfitError(HpctrainError):
    """The environment cannot run the job: launcher, MPI library, thread level, devices."""

    exit_code = ExitCode.UNFIT


class MismatchError(HpctrainError):
    """Ranks hold different models where they must hold the same one."""


class ExchangeError(HpctrainError):
    """Gradients cannot be exchanged the way the program asks for."""


class StallError(HpctrainError):
    """An operation did not finish within its deadline."""


class RankDiedError(HpctrainError):
    """Other ranks have died, and the MPI library tells so. Raised on every rank that is left.

    Attributes:
        ranks: those that are known to be dead; may be empty where another rank knows.
    """

    def __init__(self, what: str, ranks: tuple[int, ...] = (), **parts: Any) -> None:
        super().__init__(what, **parts)
        self.ranks = ranks


class CheckpointError(HpctrainError):
    """A checkpoint cannot be written, or none that is complete can be read."""


class StoppedError(HpctrainError):
    """The run was told to end, has saved its state, and is to be continued."""

    exit_code = ExitCode.REQUEUE


class TrainingError(HpctrainError):
    """Training cannot go on: a loss or gradient that is not finite, data that ends early."""
