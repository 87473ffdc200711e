"""How ranks are started on this cluster: by srun or by the MPI library's own launcher."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass

from hpctrain.errors import UnfitError

PROBE_LIMIT_S = 20.0
_PREFERRED = {"Open MPI": ("pmix",), "MPICH": ("pmi2", "cray_shasta", "pmix")}
"""By family of MPI libraries: types of srun's that it can be started with, best first."""


@dataclass(frozen=True)
class Launcher:
    """A command that starts ranks, and why it was taken.

    Attributes:
        words: the command, without the program to start.
        reason: one line.
    """

    words: tuple[str, ...]
    reason: str


def srun_types() -> tuple[str, ...]:
    """The `--mpi` types of this cluster's srun; none where there is no srun, or it fails.

    A type is listed also where the library that it needs is not installed: each is tried.
    """
    if shutil.which("srun") is None:
        return ()
    return tuple(name for name in read_types(_answer("--mpi=list")) if _loads(name))


def _loads(name: str) -> bool:
    """Whether srun can start anything with this type; it may have other reasons not to."""
    told = _answer(f"--mpi={name}", "--test-only", "true")
    return re.search(rf"mpi/{name}|Invalid MPI type", told) is None


def _answer(*arguments: str) -> str:
    try:
        ended = subprocess.run(
            ["srun", *arguments], capture_output=True, text=True, timeout=PROBE_LIMIT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout + ended.stderr


def read_types(text: str) -> tuple[str, ...]:
    """The types in what `srun --mpi=list` says, of old versions (a line each) and new ones."""
    found: list[str] = []
    for line in text.splitlines():
        name = line.removeprefix("srun:").strip()
        if name.startswith("specific pmix plugin versions available:"):
            found += [each.strip() for each in name.partition(":")[2].split(",")]
        elif re.fullmatch(r"[a-z0-9_]+", name):
            found.append(name)
    return tuple(dict.fromkeys(each for each in found if each and each != "none"))


def family_of(library: str) -> str:
    """The family of an MPI library, by its version string: Open MPI, or MPICH with its kin."""
    return "Open MPI" if "Open MPI" in library else "MPICH"


def choose(library: str, types: Collection[str], wanted: str, survivors: bool) -> Launcher:
    """What starts ranks.

    Args:
        library: version string of the MPI library that ranks use.
        types: srun's `--mpi` types.
        wanted: one of `config.LAUNCHERS`.
        survivors: whether ranks are to outlive others.

    Raises:
        UnfitError: what was asked for cannot start ranks of this library.
    """
    family = family_of(library)
    usable = [name for name in _PREFERRED[family] if name in types]
    if survivors:
        if family != "Open MPI" or wanted == "srun":
            raise UnfitError(
                "ranks cannot outlive others when started this way",
                value=f"{wanted} with {library}",
                allowed="Open MPI's mpirun",
                fix="set submit.survivors = false, or use Open MPI and submit.launcher = 'mpirun'",
            )
        return Launcher(
            ("mpirun", "--with-ft", "ulfm", "-n", "$SLURM_NTASKS"),
            "survivors live under Open MPI's mpirun alone",
        )
    if wanted == "srun" and not usable:
        raise UnfitError(
            f"srun cannot start ranks of {library}",
            value=", ".join(types) or "no --mpi types",
            allowed=" or ".join(_PREFERRED[family]),
            where="srun --mpi=list",
            fix="set submit.launcher = 'mpirun', or ask for a Slurm built with one of these",
        )
    if usable and wanted != "mpirun":
        return Launcher(
            ("srun", f"--mpi={usable[0]}", "--kill-on-bad-exit=1"),
            f"{library} is started by srun's {usable[0]}",
        )
    launcher = "mpirun" if family == "Open MPI" else "mpiexec"
    reason = "as asked for" if wanted == "mpirun" else f"srun has no type for {library}"
    return Launcher((launcher, "-n", "$SLURM_NTASKS"), reason)
