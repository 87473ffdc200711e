"""What a launcher has told this process before MPI is initialised."""

from __future__ import annotations

from collections.abc import Mapping


def launched_rank(environment: Mapping[str, str]) -> int:
    """This process's rank as the launcher tells it, before MPI is initialised; 0 without one."""
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"):
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    return 0


def launched_size(environment: Mapping[str, str]) -> tuple[str, int]:
    """The launcher and the number of processes that it says it started; ("none", 1) without one.

    Open MPI's daemons are themselves started by srun on a Slurm cluster, so that a rank of
    theirs sees the daemons' step size too: the innermost launcher is asked first.
    """
    for variable, launcher in (
        ("OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
        ("PMI_SIZE", "a PMI launcher (MPICH's or Intel's mpiexec, srun --mpi=pmi2)"),
        ("SLURM_STEP_NUM_TASKS", "srun"),
    ):
        if environment.get(variable, "").isdecimal():
            return launcher, int(environment[variable])
    return "none", 1
