"""Which launcher is taken, for the MPI libraries and Slurms that there are."""

from __future__ import annotations

import pytest

from hpctrain.errors import UnfitError
from hpctrain.submit.launcher import choose, read_types

OPEN_MPI, MPICH = "Open MPI v5.0.11", "MPICH Version: 4.3.0"


@pytest.mark.parametrize(
    ("text", "types"),
    [
        (
            "MPI plugin types are...\n\tnone\n\tcray_shasta\n\tpmi2\n\tpmix\n"
            "specific pmix plugin versions available: pmix_v4,pmix_v5\n",
            ("cray_shasta", "pmi2", "pmix", "pmix_v4", "pmix_v5"),
        ),
        ("srun: MPI types are...\nsrun: none\nsrun: pmi2\nsrun: openmpi\n", ("pmi2", "openmpi")),
        ("srun: error: Unable to contact slurm controller", ()),
        ("", ()),
    ],
)
def test_types_of_old_and_new_versions(text: str, types: tuple[str, ...]) -> None:
    assert read_types(text) == types


@pytest.mark.parametrize(
    ("library", "types", "wanted", "first"),
    [
        (OPEN_MPI, ("pmi2", "pmix"), "auto", ("srun", "--mpi=pmix")),
        (OPEN_MPI, ("pmi2",), "auto", ("mpirun", "-n")),
        (OPEN_MPI, ("pmix",), "mpirun", ("mpirun", "-n")),
        (MPICH, ("pmi2", "pmix"), "auto", ("srun", "--mpi=pmi2")),
        (MPICH, ("pmi2",), "srun", ("srun", "--mpi=pmi2")),
        (MPICH, (), "auto", ("mpiexec", "-n")),
    ],
)
def test_the_launcher_belongs_to_the_library(
    library: str, types: tuple[str, ...], wanted: str, first: tuple[str, ...]
) -> None:
    assert choose(library, types, wanted, survivors=False).words[:2] == first


def test_survivors_need_open_mpi() -> None:
    assert choose(OPEN_MPI, ("pmix",), "auto", True).words[:3] == ("mpirun", "--with-ft", "ulfm")
    for library, wanted in ((MPICH, "auto"), (OPEN_MPI, "srun")):
        with pytest.raises(UnfitError, match="cannot outlive"):
            choose(library, ("pmix", "pmi2"), wanted, True)


def test_srun_that_cannot_start_the_library_is_refused() -> None:
    with pytest.raises(UnfitError, match=r"srun cannot start ranks of Open MPI.*got 'pmi2'"):
        choose(OPEN_MPI, ("pmi2",), "srun", False)
