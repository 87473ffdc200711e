from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from hpctrain.errors import ExitCode, UnfitError
from hpctrain.world import (
    Position,
    Role,
    Seat,
    World,
    core_share,
    describe_failure,
    launched_rank,
    launched_size,
    refuse_foreign_launcher,
    refuse_lone_ranks,
)

OMPI, PMI, SLURM = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"


def world_of(seats: Sequence[Seat], rank: int = 0) -> World:
    return World(
        comm=cast(Any, None),
        rank=rank,
        size=len(seats),
        seats=tuple(seats),
        roles=(Role.ROOT | Role.WORKER, *[Role.WORKER] * (len(seats) - 1)),
        device=torch.device("cpu"),
        library="Open MPI v5",
        thread_level=3,
    )


def node_of(cores: Sequence[Sequence[int]]) -> list[Seat]:
    """Seats of ranks of one node, which may run on these cores."""
    return [Seat("node-a", 0, tuple(mine)) for mine in cores]


# Ranks dealt out to two nodes in turn; both nodes number their cores from 0.
DEALT = [Seat(f"node-{'ab'[rank % 2]}", rank % 2, (rank // 2,)) for rank in range(5)]


@pytest.mark.parametrize(
    ("rank", "node", "local_rank", "local_size"),
    [(0, 0, 0, 3), (1, 1, 0, 2), (2, 0, 1, 3), (3, 1, 1, 2), (4, 0, 2, 3)],
)
def test_ranks_dealt_out_to_nodes_know_their_place(
    rank: int, node: int, local_rank: int, local_size: int
) -> None:
    world = world_of(DEALT, rank)
    assert world.nodes == ((0, 2, 4), (1, 3))
    assert (world.node, world.local_rank, world.local_size) == (node, local_rank, local_size)


def test_torchrun_is_no_launcher_of_mpi_ranks() -> None:
    environment = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0"}
    with pytest.raises(UnfitError, match="torchrun started 2 processes"):
        refuse_lone_ranks(environment, 1, "Open MPI")
    refuse_lone_ranks({"WORLD_SIZE": "2"}, 1, "Open MPI")  # left over from something else


def test_nodes_are_told_apart_by_shared_memory_not_by_name() -> None:
    seats = [Seat("localhost", 0, (0,)), Seat("localhost", 1, (0,))]
    assert world_of(seats).nodes == ((0,), (1,))


def test_cores_are_those_of_a_machine_whoever_shares_memory_there() -> None:
    """As under srun's pmix, where Open MPI takes each rank for a node."""
    apart = [Seat("a", rank, (0, 1), boot="1") for rank in range(2)]
    assert world_of(apart).cores_per_rank == 1
    assert world_of(apart).split_machines == ("a",)
    namesakes = [Seat("localhost", rank, (0, 1), boot=str(rank)) for rank in range(2)]
    assert world_of(namesakes).cores_per_rank == 2
    assert world_of(namesakes).split_machines == ()
    assert world_of(DEALT).split_machines == ()


def test_nodes_are_ordered_by_their_smallest_rank() -> None:
    seats = [Seat("b", 0, (0,)), Seat("a", 1, (0,)), Seat("a", 1, (1,)), Seat("b", 0, (1,))]
    assert world_of(seats).nodes == ((0, 3), (1, 2))


def test_cores_of_other_nodes_are_not_shared() -> None:
    assert [world_of(DEALT, rank).cores_per_rank for rank in range(5)] == [1] * 5


@pytest.mark.parametrize("ranks", [1, 2, 3, 6, 12, 48, 49])
@pytest.mark.parametrize("cores_each", [1, 2])
def test_unbound_ranks_share_their_cores_evenly(ranks: int, cores_each: int) -> None:
    """Not a hair less than evenly: 0.9999 cores would count as oversubscribed."""
    world = world_of(node_of([range(ranks * cores_each)] * ranks))
    assert world.cores_per_rank == cores_each
    assert not world.oversubscribed


@pytest.mark.parametrize(
    ("cores", "share"),
    [
        ([[0], [0]], 0.5),
        ([[0, 1]] * 4, 0.5),
        ([[0, 1], [1, 2]], 1.5),
        ([[0, 1], [0], [0], [0]], 1.25),
        ([[3, 5], [0], [1, 2]], 2),
    ],
)
def test_a_core_is_shared_by_the_ranks_that_may_run_on_it(
    cores: list[list[int]], share: float
) -> None:
    assert core_share(cores[0], cores) == share
    assert world_of(node_of(cores)).oversubscribed == (share < 1)


def test_only_the_root_speaks_for_the_job() -> None:
    assert [world_of(DEALT, rank).is_root for rank in range(5)] == [True] + [False] * 4
    assert all(Role.WORKER in world_of(DEALT, rank).role for rank in range(5))


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"OMPI_COMM_WORLD_RANK": "3", "SLURM_PROCID": "0"}, 3),
        ({"PMIX_RANK": "2"}, 2),
        ({"PMI_RANK": "12", "SLURM_PROCID": "1"}, 12),
        ({"SLURM_PROCID": "7"}, 7),
        ({"PMI_RANK": "", "SLURM_PROCID": "7"}, 7),
        ({"PMI_RANK": "none"}, 0),
    ],
)
def test_the_rank_is_the_innermost_launchers(environment: dict[str, str], rank: int) -> None:
    assert launched_rank(environment) == rank


@pytest.mark.parametrize(
    ("environment", "launcher", "size"),
    [
        ({}, "none", 1),
        ({OMPI: "4"}, "Open MPI's mpirun", 4),
        ({OMPI: "4", PMI: "2", SLURM: "2"}, "Open MPI's mpirun", 4),
        ({PMI: "8", SLURM: "2"}, "a PMI launcher", 8),
        ({SLURM: "16"}, "srun", 16),
        ({OMPI: "", SLURM: "16"}, "srun", 16),
    ],
)
def test_the_size_is_the_innermost_launchers(
    environment: dict[str, str], launcher: str, size: int
) -> None:
    told_launcher, told_size = launched_size(environment)
    assert told_launcher.startswith(launcher)
    assert told_size == size


@pytest.mark.parametrize("environment", [{OMPI: "4"}, {PMI: "4"}, {SLURM: "4"}])
def test_ranks_that_mpi_believes_alone_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UnfitError, match="started 4 processes, but MPICH 4 sees a world of 1") as e:
        refuse_lone_ranks(environment, 1, "MPICH 4")
    assert e.value.everywhere and e.value.fix and e.value.exit_code == ExitCode.UNFIT


@pytest.mark.parametrize(
    ("environment", "size"), [({}, 1), ({OMPI: "4"}, 4), ({OMPI: "4", SLURM: "2"}, 4)]
)
def test_a_launcher_that_mpi_agrees_with_is_accepted(
    environment: dict[str, str], size: int
) -> None:
    refuse_lone_ranks(environment, size, "Open MPI v5")


def test_a_world_without_its_launcher_is_refused() -> None:
    with pytest.raises(UnfitError, match="none started 1 processes"):
        refuse_lone_ranks({}, 4, "MPICH 4")


@pytest.mark.parametrize("size", ["1", "4"])
def test_open_mpis_mpirun_around_another_mpi_is_refused(size: str) -> None:
    with pytest.raises(UnfitError, match=r"Open MPI's mpirun.*got 'MPICH 4'"):
        refuse_foreign_launcher({OMPI: size}, is_open_mpi=False, library="MPICH 4")


@pytest.mark.parametrize(
    ("environment", "is_open_mpi"), [({OMPI: "4"}, True), ({PMI: "4"}, False), ({}, False)]
)
def test_a_launcher_of_the_same_mpi_is_accepted(
    environment: dict[str, str], is_open_mpi: bool
) -> None:
    refuse_foreign_launcher(environment, is_open_mpi, "the library")


@pytest.mark.parametrize(
    ("position", "text"),
    [
        (Position(), "setting up"),
        (Position(phase="saving"), "saving"),
        (Position(step=0, phase="forward"), "step 0, forward"),
    ],
)
def test_position_reads_as_a_phrase(position: Position, text: str) -> None:
    assert str(position) == text


def test_a_failure_names_rank_host_and_step_and_shows_the_traceback() -> None:
    world = world_of(DEALT, rank=3)
    world.position.step, world.position.phase = 12, "backward"
    try:
        raise ValueError("too large")
    except ValueError as error:
        lines = describe_failure(world, error, error.__traceback__).splitlines()
    assert lines[0] == "hpctrain: rank 3 (node-b) of 5 failed at step 12, backward"
    assert lines[1].startswith("Traceback")
    assert f'File "{__file__}"' in lines[2]
    assert lines[-1] == "ValueError: too large"
