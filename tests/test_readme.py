"""Every command and every example of the README runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from conftest import Launch

pytestmark = [pytest.mark.launch, pytest.mark.any_mpi]

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
LOOP, MODULE, REUSE = (text for kind, text in BLOCKS if kind == "python")
(JOB,) = (text for kind, text in BLOCKS if kind == "toml")


def shell(launch: Launch, command: str, folder: Path, **environment: str) -> str:
    """Run a command as a user's shell would, with this environment's commands on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        ["sh", "-ec", command],
        cwd=folder,
        env=launch.environment | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout + ended.stderr


def test_examples_are_short() -> None:
    essential = LOOP[LOOP.index("world = ") :]
    assert len([line for line in essential.splitlines() if line]) < 15
    assert re.findall(r"# (\d):", LOOP) == ["1", "2"]
    assert len(README.splitlines()) <= 230
    assert len([line for line in MODULE.splitlines() if line]) < 15
    assert len(JOB.splitlines()) <= 15


def test_commands_are_those_that_are_tested_below() -> None:
    assert COMMANDS == [
        "make train",
        "make test",
        ". .venv/bin/activate",
        "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_osc=^ucx",
        "export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe",
        "mpirun -n 2 python train.py",
        "mpirun -n 2 hpctrain run product.toml",
        "mpirun -n 2 hpctrain run product.toml --set train.steps=20 --set exchange.wire=bfloat16",
        "module load openmpi",
        "pip install .",
        "mpirun -n 2 hpctrain doctor",
    ]


def test_make_train(launch: Launch) -> None:
    """In this environment instead of a fresh one, and with fewer steps."""
    prefix = Path(sys.prefix)
    if not (prefix / ".train").exists():
        pytest.skip("these tests do not run in an environment that make has made for training")
    text = shell(
        launch, "make train", ROOT, VENV=str(prefix), NP="2",
        ARGS=f"--set train.steps=3 --set run.folder={launch.folder}",
    )  # fmt: skip
    assert "validation loss" in text
    assert (launch.folder / "stdlib_lm/001/report.html").is_file()


def test_make_test_runs_all_that_it_says(launch: Launch) -> None:
    """These tests are run by it, so only its plan is looked at."""
    plan = shell(
        launch, "env -u MAKEFLAGS -u TEST_RANKS -u TEST_RANKS_MPICH make --dry-run test", ROOT
    )
    for part in (
        '-m "not mpi and not slow and not alone"',
        '-m "alone and not slow"',
        "ruff",
        "mypy",
        "lint-imports",
    ):
        assert part in plan
    for ranks in ("for n in 2 3 4", "for n in 1 5 6"):
        assert plan.count(ranks) == 2


def test_loop(launch: Launch) -> None:
    """Pasted into a shell that knows nothing but the system's commands."""
    if not (Path(sys.prefix) / "bin/activate").exists():
        pytest.skip("the tests do not run in a virtual environment")
    (launch.folder / "train.py").write_text(LOOP)
    (launch.folder / ".venv").symlink_to(sys.prefix)
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(launch.folder), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        ["sh", "-ec", "\n".join(COMMANDS[2:6])],
        cwd=launch.folder, env=bare, capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    state = torch.load(launch.folder / "model.pt", weights_only=True)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "weight": (1, 2),
        "bias": (1,),
    }


def test_job(launch: Launch) -> None:
    (launch.folder / "product.py").write_text(MODULE)
    (launch.folder / "product.toml").write_text(JOB)
    assert "step 200/200" in shell(launch, COMMANDS[6], launch.folder)
    assert "step 20/20" in shell(launch, COMMANDS[7], launch.folder)
    (launch.folder / "reuse.py").write_text(REUSE)
    shell(launch, "python reuse.py", launch.folder)


def test_the_sites_own_mpi(launch: Launch) -> None:
    """In an environment without an MPI from PyPI, the library comes from where a module puts it.

    `module` is a stand-in that sets what environment modules set, and the packages, which
    `pip install .` would fetch, are those of the environment that runs the tests.
    """
    prefix, venv = Path(sys.prefix), launch.folder / "venv"
    if not (prefix / "lib/libmpi.so").exists():
        pytest.skip("this environment has no MPI of its own to play the site's")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "of_the_tests.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    command = venv / "bin/hpctrain"
    command.write_text(
        f"#!{venv}/bin/python\nimport sys\nfrom hpctrain.cli import main\nsys.exit(main())\n"
    )
    command.chmod(0o755)
    module = (
        "module() {\n"
        f'  export PATH="{venv}/bin:{prefix}/bin:$PATH" LD_LIBRARY_PATH="{prefix}/lib"\n'
        "}\n"
    )
    text = shell(launch, module + "\n".join([COMMANDS[8], COMMANDS[10]]), launch.folder)
    assert "2 rank(s)" in text
    assert text.strip().endswith("fit")
    without = shell(launch, f"! {command} doctor", launch.folder, LD_LIBRARY_PATH="")
    assert "no MPI library can be loaded" in without


@pytest.mark.slow
def test_coded_job_of_the_digits(launch: Launch) -> None:
    shutil.copytree(ROOT / "jobs", launch.folder / "jobs")
    killed = """ --set train.steps=40 --set 'inject={kind="kill",ranks=[2],step=20}'"""
    command = "mpirun --with-ft ulfm -n 4 hpctrain run jobs/digits.toml --set exchange.mode=coded"
    text = shell(launch, command + killed, launch.folder)
    assert "rank 2 is dead" in text
    assert "step 40/40" in text
