"""A process that is told to end while it ends anyway keeps its status."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import atexit, os, signal
from hpctrain.stop import StopRequest
atexit.register(lambda: print(signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN))
StopRequest().listen({})
assert signal.getsignal(signal.SIGUSR1) is not signal.SIG_IGN
"""


def test_told_after_its_end() -> None:
    """Python sets signals with handlers of its own back to what ends the process."""
    ended = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert ended.stdout == "True\n"
