"""Batch scripts as they are rendered, kept in slurm/: changes show in their difference."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from hpctrain.errors import JobError
from hpctrain.submit.config import SubmitConfig
from hpctrain.submit.launcher import Launcher, choose
from hpctrain.submit.packages import Packages
from hpctrain.submit.script import Submission, render

PACKAGES = Packages("d" * 64, PurePosixPath(f"runs/digits/.packages/{'d' * 64}.tar"))
KEPT = Path(__file__).parents[2] / "slurm"
SRUN = choose("Open MPI v5.0.11", ["pmix", "pmi2"], "auto", survivors=False)
SCRIPTS: dict[str, tuple[SubmitConfig, tuple[str, ...]]] = {
    "one_node": (SubmitConfig(tasks_per_node=4, time="1:00:00"), ()),
    "several_nodes": (
        SubmitConfig(
            nodes=8,
            tasks_per_node=2,
            cpus_per_task=16,
            memory="64G",
            time="2-00:00:00",
            partition="batch",
            account="physics",
            modules=["gcc/13", "openmpi/5.0"],
            restarts=3,
        ),
        (),
    ),
    "gpus": (
        SubmitConfig(nodes=2, tasks_per_node=4, gpus_per_node=4, constraint="a100"),
        ("train.device=cuda",),
    ),
    "coded": (
        SubmitConfig(nodes=3, tasks_per_node=3, survivors=True),
        ("exchange.mode=coded", "coded.root=dedicated"),
    ),
    "array": (SubmitConfig(array="0-9%3"), ()),
    "packages": (SubmitConfig(nodes=2, deps="deps", cache_gb=50), ()),
    "preemptible": (SubmitConfig(partition="scavenge", qos="low", warning_s=300), ()),
}


def submission(config: SubmitConfig, launcher: Launcher = SRUN) -> Submission:
    return Submission(
        name="digits",
        job=PurePosixPath("jobs/digits.toml"),
        folder=PurePosixPath("/home/me/a project"),
        runs=PurePosixPath("runs/digits"),
        python=PurePosixPath("/home/me/venv/bin/python"),
        overrides=("train.steps=20", "schedule.name='cosine'; echo pwned"),
        config=config,
        launcher=launcher,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_as_they_were(name: str) -> None:
    config, overrides = SCRIPTS[name]
    made = dataclasses.replace(
        submission(config, choose("Open MPI v5.0.11", ["pmix"], "auto", config.survivors)),
        folder=None,
        python=PurePosixPath("python"),
        overrides=overrides,
        packages=PACKAGES if config.deps else None,
        user=1000,
    )
    text, file = render(made), KEPT / f"{name}.sh"
    if "ACCEPT" in os.environ:
        file.write_text(text)
    assert text == file.read_text(), "ACCEPT=1 pytest tests/submit takes the new ones as right"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_valid_shell(name: str) -> None:
    subprocess.run(["bash", "-n", KEPT / f"{name}.sh"], check=True)


RUNNING = "JobId=17 JobState=RUNNING Requeue=1 PreemptTime=None"
PREEMPTED = RUNNING.replace("None", "2026-11-26T11:18:20")
CANCELLED = RUNNING.replace("RUNNING", "COMPLETING")


def ran(
    script: str,
    folder: Path,
    *,
    status: int,
    signal: str = "",
    state: str = RUNNING,
    finished: bool = True,
    launcher: str = "",
) -> tuple[int, list[str]]:
    """Run a script with a launcher and an scontrol that write down how they were called."""
    tools = folder / "tools"
    tools.mkdir()
    calls = folder / "calls"
    calls.touch()
    launcher = launcher or (
        f"#!/bin/bash\nprintf '%s\\n' \"$@\" >>{calls}\n"
        f"trap 'echo told >>{calls}; exit {status}' USR1\n"
        + (f"kill -{signal} $PPID; while :; do sleep 0.01; done\n" if signal else f"exit {status}")
    )
    for name, text in {
        "srun": launcher,
        "scontrol": "#!/bin/bash\n"
        f"case $1 in requeue) echo scontrol $@ >>{calls};; *) echo '{state}';; esac\n",
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    run = folder / "runs" / "digits" / "slurm-17"
    run.mkdir(parents=True)
    (run / "run.json").write_text(f'{{"finished": {"true" if finished else "false"}}}')
    ended = subprocess.run(
        ["bash", "-c", script], env=environment, cwd=folder, timeout=60, check=False
    )
    return ended.returncode, calls.read_text().splitlines()


@pytest.mark.parametrize("status", [0, 1, 2, 75, 137])
@pytest.mark.parametrize("state", [RUNNING, PREEMPTED, CANCELLED])
def test_status_and_requeueing(tmp_path: Path, status: int, state: str) -> None:
    """The status of the ranks is that of the job; what saved or was preempted is queued again."""
    script = render(submission(SubmitConfig()))
    ended, calls = ran(script, tmp_path, status=status, state=state)
    assert ended == status
    again = (status == 75 and state != CANCELLED) or (status != 0 and state == PREEMPTED)
    assert ("scontrol requeue 17" in calls) == again


def test_ranks_that_did_not_start_are_a_failure(tmp_path: Path) -> None:
    """Whatever srun says of it."""
    ended, _ = ran(render(submission(SubmitConfig())), tmp_path, status=0, finished=False)
    assert ended == 1


def test_what_must_not_be_requeued(tmp_path: Path) -> None:
    script = render(submission(SubmitConfig(requeue=False)))
    _, calls = ran(script, tmp_path, status=75, state=PREEMPTED)
    assert "scontrol requeue 17" not in calls


@pytest.mark.parametrize("signal", ["USR1", "TERM"])
def test_ranks_are_told_to_end(tmp_path: Path, signal: str) -> None:
    script = render(submission(SubmitConfig()))
    ended, calls = ran(script, tmp_path, status=75, signal=signal)
    assert ended == 75
    assert calls[calls.index("told") :] == ["told", "scontrol requeue 17"]


@pytest.mark.parametrize("signal", ["USR1", "TERM"])
@pytest.mark.parametrize("restarts", [0, 2])
def test_told_before_anything_is_started(tmp_path: Path, signal: str, restarts: int) -> None:
    """Nothing is, and the job goes back into the queue."""
    config = SubmitConfig(modules=["openmpi"], restarts=restarts)
    script = f"module() {{ kill -{signal} $$; }}\n{render(submission(config))}"
    assert ran(script, tmp_path, status=0) == (75, ["scontrol requeue 17"])


@pytest.mark.parametrize("state", [RUNNING, CANCELLED])
@pytest.mark.parametrize("signal", ["USR1", "TERM"])
@pytest.mark.parametrize("end", ["kill -USR1 $$", "kill -TERM $$", "exit 138", "exit 10"])
def test_told_before_ranks_listen(tmp_path: Path, state: str, signal: str, end: str) -> None:
    """They are ended by it, have saved nothing that was not saved before, and are queued again."""
    launcher = (
        f"#!/bin/bash\ntrap 'trap - USR1; {end}' USR1\nkill -{signal} $PPID\n"
        "while :; do sleep 0.01; done\n"
    )
    script = render(submission(SubmitConfig()))
    ended, calls = ran(script, tmp_path, status=0, state=state, launcher=launcher)
    assert ended == 75
    assert ("scontrol requeue 17" in calls) == (state == RUNNING)


def test_a_signal_of_its_own_is_a_failure(tmp_path: Path) -> None:
    """Nobody told the job to end."""
    script = render(submission(SubmitConfig()))
    ended, calls = ran(script, tmp_path, status=0, launcher="#!/bin/sh\nkill -USR1 $$\n")
    assert ended == 138
    assert "scontrol requeue 17" not in calls


def test_a_launcher_that_lost_what_it_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before it has started ranks: it is told again."""
    monkeypatch.setattr("hpctrain.submit.script.TOLD_EVERY_S", 0.1)
    launcher = (
        "#!/bin/bash\nn=0\ntrap 'let n++; [ $n != 3 ] || exit 75' USR1\nkill -USR1 $PPID\n"
        "while :; do sleep 0.01; done\n"
    )
    script = render(submission(SubmitConfig()))
    assert ran(script, tmp_path, status=0, launcher=launcher) == (75, ["scontrol requeue 17"])


def test_ranks_that_fail_are_started_again() -> None:
    """By a process in the launcher's place, which is given it."""
    launcher = Launcher(("mpirun", "-n", "$SLURM_NTASKS"), "as asked for")
    text = render(submission(SubmitConfig(restarts=2), launcher))
    (line,) = (line for line in text.splitlines() if line.endswith("--no-live &"))
    program, _, rest = line.partition(" --restarts ")
    assert program == "/home/me/venv/bin/python -m hpctrain run jobs/digits.toml"
    assert rest.startswith('2 --launcher "mpirun -n $SLURM_NTASKS" --set ')
    assert rest.endswith('--run-dir "$run" --no-live &')


def test_what_others_say_of_themselves_stays_a_comment() -> None:
    text = render(submission(SubmitConfig(), Launcher(("srun",), "MPICH\nreboot\0")))
    assert "# Launcher: MPICH reboot\n" in text
    odd = dataclasses.replace(submission(SubmitConfig()), job=PurePosixPath("a\nreboot"))
    assert "# Rendered by hpctrain submit a reboot\n" in render(odd)


def test_no_value_runs_a_command(tmp_path: Path) -> None:
    odd = 'a\'b "c" $(touch pwned) `touch pwned` ; touch pwned # \\'
    script = render(
        dataclasses.replace(
            submission(SubmitConfig()), job=PurePosixPath(odd), overrides=(odd, "\n")
        )
    )
    _, calls = ran(script, tmp_path, status=0)
    expected = ["-m", "hpctrain", "run", odd, "--set", odd, "--set", "", ""]
    assert calls[3:] == [*expected, "--run-dir", "runs/digits/slurm-17", "--no-live"]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"partition": "a b"},
        {"partition": "a|b"},
        {"constraint": 'a"'},
        {"constraint": "a100 --wrap=reboot"},
        {"constraint": "a`reboot`"},
        {"constraint": "$(reboot)"},
        {"constraint": "a\nreboot"},
        {"constraint": "a;b"},
        {"gpus_per_node": "a100"},
        {"gpus_per_node": "a100:"},
        {"gpus_per_node": "a100:4 --x"},
        {"gpus_per_node": -1},
        {"gpus_per_node": True},
        {"cache_gb": 1e300},
        {"partition": "x\n#SBATCH --wrap=reboot"},
        {"account": "$(reboot)"},
        {"time": "tomorrow"},
        {"memory": "1 G"},
        {"array": "0-"},
        {"array_key": "seed=1 --fresh"},
        {"modules": ["gcc; reboot"]},
        {"modules": [3]},
        {"modules": [""]},
        {"modules": ["--force"]},
        {"time": "1:30"},
    ],
)
def test_values_that_could_mean_something_else_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(JobError, match=re.escape(next(iter(values)))):
        SubmitConfig(**values)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"constraint": "a100|h100"}, '#SBATCH --constraint="a100|h100"'),
        ({"constraint": "[(a&b)|c*2]"}, '#SBATCH --constraint="[(a&b)|c*2]"'),
        ({"gpus_per_node": 4}, "#SBATCH --gpus-per-node=4"),
        ({"gpus_per_node": "a100:4"}, "#SBATCH --gpus-per-node=a100:4"),
        ({"gpus_per_node": "a100:2,h100:2"}, "#SBATCH --gpus-per-node=a100:2,h100:2"),
    ],
)
def test_values_of_ordinary_slurm(values: dict[str, Any], line: str) -> None:
    assert line in render(submission(SubmitConfig(**values))).splitlines()


def test_a_home_in_the_name_of_the_cache_is_none(tmp_path: Path) -> None:
    """The shell replaces ~ behind a colon as well, unless it is quoted."""
    config = SubmitConfig(deps="deps", cache=f"{tmp_path}/a:~root/x")
    script = render(dataclasses.replace(submission(config), packages=PACKAGES))
    _, calls = ran(script, tmp_path, status=0)
    assert f"{tmp_path}/a:~root/x" in calls
    assert not any(":/root" in call for call in calls)


@pytest.mark.parametrize("folder", ["/home/\n/x", '/home/"/x', "/home/$x", "/home/%j"])
def test_folders_that_slurm_would_not_take_for_themselves(folder: str) -> None:
    with pytest.raises(JobError, match="cannot name this folder"):
        render(dataclasses.replace(submission(SubmitConfig()), folder=PurePosixPath(folder)))
