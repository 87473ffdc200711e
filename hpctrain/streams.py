"""Standard input, output and error of the command line: whatever they are, they do no harm.

They may be closed, a full disk, or a pipe that nobody reads any more.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

from hpctrain.errors import ExitCode, HpctrainError


def open_missing() -> None:
    """Put the null device in the place of standard streams that are closed.

    Else the next file that is opened, a checkpoint say, gets their number, and messages with it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what an ASCII terminal lacks is spelled out
        sys.stdout.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print a command's answer.

    Raises:
        HpctrainError: it cannot be written.
        SystemExit: nobody reads it any more, as `head` does.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        silence()
        sys.exit(ExitCode.CRASH)
    except (OSError, ValueError) as error:
        silence()
        raise HpctrainError(
            f"standard output cannot be written: {error}", everywhere=True
        ) from None


def flush() -> None:
    """Write what is left to standard output.

    Raises:
        HpctrainError: it cannot be written.
    """
    say("")


def silence() -> None:
    """Lose what is still to be written to standard output: at its end Python would try again."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def tell(text: str) -> None:
    """Write to standard error in one piece, whatever it is and however the text is spelled."""
    with suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))
