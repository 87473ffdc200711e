from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import pytest

from hpctrain import cli, doctor
from hpctrain.doctor import Finding, binding, same_everywhere
from hpctrain.errors import ExitCode, UnfitError
from hpctrain.world import Seat, World

# ---------------------------------------------------------------------- binding


def bound(*nodes: Sequence[Sequence[int]], hosts: Sequence[str] = ()) -> list[Finding]:
    """Findings for nodes given as the cores of each of their ranks; one host unless told."""
    seats: list[Seat] = []
    members = []
    for node, ranks in enumerate(nodes):
        host, first = hosts[node] if hosts else "a", len(seats)
        seats += [Seat(host, first, tuple(cores)) for cores in ranks]
        members.append(range(first, len(seats)))
    return binding(seats, members)


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


ALL = range(8)


@pytest.mark.parametrize(
    "nodes",
    [
        [[ALL]],
        [[[0], [1], [2], [3]]],
        [[[0, 1], [2, 3]]],
        [[ALL] * 8],
        [[[0, 1], [0, 1], [2, 3], [2, 3]]],
        [[[0]], [[1]]],
        [[ALL, ALL], [ALL, ALL]],
        [[[0], ALL]],
    ],
    ids=[
        *("alone", "own core", "own cores", "all free", "shared evenly", "two daemons"),
        *("two daemons, all free", "one bound, one free"),
    ],
)
def test_own_cores_and_fair_shares_are_fine(nodes: list[list[list[int]]]) -> None:
    (finding,) = bound(*nodes)
    assert finding.verdict == doctor.OK and not finding.fix


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([[[0]], [[0]]], "a: 2 ranks may run on 1 of 8 core(s)"),
        ([[[0], [1]], [[0], [1]]], "a: 4 ranks may run on 2 of 8 core(s)"),
        ([[[0], [0], [0]]], "a: 3 ranks may run on 1 of 8 core(s)"),
        ([[[0], [0], [1, 2, 3]]], "a: ranks [0, 1] are bound to core(s) [0], "),
        ([[[0], [1], ALL], [[1]]], "a: ranks [1, 3] are bound to core(s) [1], "),
        ([[ALL] * 9], "a: 9 ranks share 8 core(s): oversubscribed"),
    ],
    ids=[
        *("two daemons from core 0", "two daemons from core 0, two ranks each"),
        *("one core", "two of three", "one rank of each daemon", "oversubscribed"),
    ],
)
def test_ranks_on_the_same_cores_are_told(nodes: list[list[list[int]]], expected: str) -> None:
    (finding,) = bound(*nodes)
    assert finding.verdict == doctor.WARNING
    assert expected in finding.text and finding.fix


def test_same_cores_of_other_machines_are_not_shared() -> None:
    assert bound([[0]], [[0]], hosts="ab")[0].verdict == doctor.OK


def test_each_machine_is_told() -> None:
    findings = bound([[0], [0]], [[0], [1]], [[3], [3]], hosts="abc")
    assert [finding.text[:2] for finding in findings] == ["a:", "c:"]


# ---------------------------------------------------------------------- versions


def test_equal_versions_are_listed() -> None:
    (finding,) = same_everywhere(["rank 0", "rank 1"], [{"torch": "2.4", "numpy": "2.0"}] * 2)
    assert finding == Finding("versions", doctor.OK, "torch 2.4, numpy 2.0")


def test_odd_versions_are_unfit_and_named() -> None:
    usual = {"torch": "2.4", "numpy": "2.0", "Python": "3.12"}
    facts = [usual, usual | {"torch": "2.5", "numpy": "1.26"}, usual]
    torch_finding, numpy_finding = same_everywhere(["rank 0", "rank 1 (b)", "rank 2"], facts)
    assert torch_finding.verdict == numpy_finding.verdict == doctor.UNFIT
    assert torch_finding.text == "torch is 2.4 on most ranks, but rank 1 (b) has 2.5"
    assert numpy_finding.text == "numpy is 2.0 on most ranks, but rank 1 (b) has 1.26"


# ---------------------------------------------------------------------- the whole


def test_world_of_one_is_fit_as_text(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert doctor.run(world, as_json=False) == ExitCode.DONE
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "fit"
    names = [line.split("  ")[0] for line in lines if line[0] != " "]
    assert names == [
        *("launcher", "thread level", "versions", "binding"),
        *("torch threads", "links", "device buffers", "deaths"),
    ]


def test_how_a_batch_job_would_start_ranks_is_told(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/srun")
    monkeypatch.setattr(doctor, "srun_types", lambda: ("pmi2", "pmix"))
    doctor.run(world, as_json=False)
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("Slurm"))
    kind = "pmix" if "Open MPI" in world.library else "pmi2"
    assert f"`srun --mpi={kind} --kill-on-bad-exit=1`" in line and "pmi2, pmix" in line


def test_world_of_one_is_fit_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["fit"], told["ranks"], told["nodes"]) == (True, 1, [[0]])
    assert told["seats"][0]["cores"]
    assert {f["verdict"] for f in told["findings"]} <= {doctor.OK, doctor.WARNING}


def test_ranks_that_cannot_join_are_unfit_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with Open MPI's mpirun around another MPI's Python; one of the processes tells."""

    def refuse() -> World:
        raise UnfitError("the wrong one", value="MPICH", fix="use its own", everywhere=True)

    monkeypatch.setattr("hpctrain.world.join", refuse)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert cli.main(["doctor", "--json"]) == ExitCode.UNFIT
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert (told["fit"], told["ranks"]) == (False, 4)
    (finding,) = told["findings"]
    assert (finding["verdict"], finding["text"]) == ("unfit", "the wrong one: MPICH")
    assert finding["fix"] == "use its own" and "the wrong one" in shown.err

    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    assert cli.main(["doctor", "--json"]) == ExitCode.UNFIT
    assert capsys.readouterr().out == ""


def test_unfit_world_has_its_exit_status(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Finding("thread level", doctor.UNFIT, "none at all", "get some")
    monkeypatch.setattr(doctor, "_threads", lambda world: broken)
    assert doctor.run(world, as_json=False) == ExitCode.UNFIT
    shown = capsys.readouterr().out
    assert "unfit    none at all\n" in shown and "fix: get some\n" in shown
    assert shown.endswith("unfit: see above\n")


@pytest.mark.launch
@pytest.mark.any_mpi
def test_killed_rank_tells_whether_the_others_live(launch: Any, world: World) -> None:
    if "Open MPI" not in world.library:
        pytest.skip("MPICH's launcher ends all ranks when one is killed")
    ended = launch(3, "-m", "hpctrain", "doctor", "--kill-a-rank", options=("--with-ft", "ulfm"))
    assert (ended.status, "the others live" in ended.out) == (0, True), ended
