"""What happens to runs that are killed, stopped, told to end, or find their checkpoints damaged.

- `kill_portable`: kill -9 of a random rank at a random moment, without any help from the MPI
  library. The launch must end with a failure within 5 s, and the same command must then end with
  the bits of an undisturbed run.
- `kill_ulfm`: the same under `--with-ft ulfm`. The others must go on and end with equal parameters.
- `stop`: SIGSTOP of a random rank. It must be named within the deadline + 2 s.
- `signals`: SIGUSR1 to the launcher while a rank computes, while gradients are exchanged, in an
  evaluation and while a checkpoint is written, in turn, at a random step. The run must end with
  status 75, saved after that step or the next, and with the bits of an undisturbed run when it is
  started again.
- `corruption`: one random damage of a checkpoint at a time. It must be found, and the one before be
  loaded.
- `kill_in_save`: kill -9 of a process that does nothing but save. A whole checkpoint must be there.

Each with how many were tried and how many were ok. `stall` has what a checkpoint costs training,
written meanwhile and at once. Needs Open MPI.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness

RANKS = 3
STEPS, EVAL_EVERY, SAVE_EVERY = 150, 25, 10
END_S = 5.0
DEADLINE_S = 3.0
LIMIT_S = 120.0
POLL_S = 0.005
COUNTS = {
    "kill_portable": (50, 2),
    "kill_ulfm": (50, 2),
    "stop": (10, 1),
    "signals": (50, 4),
    "corruption": (1000, 50),
    "kill_in_save": (200, 5),
}
"""How many to try, and with --quick."""
STALL_STEPS, STALL_EVERY = 60, 10
PHASES = ("compute", "exchange", "evaluation", "save")

MODULE = """
import atexit, hashlib, os, signal, time
import torch
from torch import nn
from hpctrain.launched import launched_rank
RANK = launched_rank(os.environ)
open(f"pid-{RANK}", "w").write(str(os.getpid()))
PHASE, AT = os.environ.get("SIGNAL_IN"), int(os.environ.get("SIGNAL_AT", "0"))
steps, told = 0, False
def phase(name):
    global told
    if RANK == 0 and name == PHASE and steps >= AT and not told:
        told = True
        open("told-at", "w").write(str(steps))
        os.kill(os.getppid(), signal.SIGUSR1)  # the launcher
def save(*arguments, write=torch.save):
    phase("save")
    return write(*arguments)
torch.save = save
def model(width=32):
    net = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(width, 1))
    net[0].bias.register_post_accumulate_grad_hook(lambda _: phase("exchange"))
    atexit.register(end, net)
    return net
def end(net):
    state = torch.cat([p.detach().flatten() for p in net.parameters()]).numpy().tobytes()
    open(f"end-{RANK}", "w").write(hashlib.sha256(state).hexdigest())
def train_data(): return list(torch.randn(240, 8, generator=torch.Generator().manual_seed(0)))
validation_data = train_data
def loss(model, batch):
    global steps
    steps += model.training
    phase("compute" if model.training else "evaluation")
    time.sleep(float(os.environ.get("SLEEP_S", "0.005")))
    return model(batch).square().mean()
"""
JOB = f"""
module = "job.py"
train = {{ steps = {STEPS}, batch = 12, eval_every = {EVAL_EVERY} }}
optimizer = {{ name = "adamw", lr = 0.01 }}
checkpoint = {{ every = {SAVE_EVERY} }}
run = {{ report = false, log_every = 5 }}
"""


class Bench:
    """A folder with a job, and launches of it."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder = folder
        self.draw = draw
        (folder / "job.py").write_text(MODULE)
        (folder / "job.toml").write_text(JOB)
        self._made = self.signals = 0
        begun_s = time.monotonic()
        self.reference = self.ended(self.start(self.new_run()))
        assert self.reference.returncode == 0, self.reference.stderr
        self.took_s = time.monotonic() - begun_s
        self.digest = digest(self.run)

    def new_run(self) -> Path:
        """Take another run folder."""
        self._made += 1
        self.run = self.folder / f"run-{self._made}"
        for left in (*self.folder.glob("pid-*"), *self.folder.glob("end-*")):
            left.unlink()
        return self.run

    def start(
        self,
        run: Path,
        *options: str,
        ranks: int = RANKS,
        sets: tuple[str, ...] = (),
        **environment: str,
    ) -> subprocess.Popen[str]:
        """Start the job on its ranks."""
        mpiexec = Path(sys.executable).with_name("mpiexec")
        values = [word for value in sets for word in ("--set", value)]
        return subprocess.Popen(
            [
                *(str(mpiexec), *options, "-n", str(ranks), sys.executable, "-m", "hpctrain"),
                *("run", "job.toml", "--run-dir", str(run), *values),
            ],
            cwd=self.folder,
            env=os.environ | harness.RUNTIME | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def ended(self, process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
        """Wait for the end of a launch."""
        try:
            _, err = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, None, err)

    def in_training(self, process: subprocess.Popen[str]) -> bool:
        """Wait until the first step has begun, and then for a random part of the run."""
        until_s = time.monotonic() + LIMIT_S
        while not (self.run / "step").exists() or not (self.run / "step").read_text().strip():
            if process.poll() is not None or time.monotonic() > until_s:
                return False
            time.sleep(POLL_S)
        wait_s = self.draw.random() * STEPS * 0.006
        while wait_s > 0 and process.poll() is None:
            time.sleep(min(POLL_S, wait_s))
            wait_s -= POLL_S
        return process.poll() is None

    def kill(self, number: int) -> bool:
        """Signal a random rank; whether it was there."""
        self.victim = self.draw.randrange(len(list(self.folder.glob("pid-*"))))
        try:
            os.kill(int((self.folder / f"pid-{self.victim}").read_text()), number)
        except (OSError, ValueError):
            return False
        return True

    def ends_as_reference(self) -> bool:
        """Start the same command again: whether it ends with the same parameters."""
        again = self.ended(self.start(self.run))
        return again.returncode == 0 and digest(self.run) == self.digest


def digest(run: Path) -> bytes:
    """The parameters at the end of a run."""
    newest = max((run / "checkpoints").glob("step-*"))
    return (newest / "model.safetensors").read_bytes()


Outcome = dict[str, Any]


def struck(
    bench: Bench, number: int, *options: str, ranks: int = RANKS, sets: tuple[str, ...] = ()
) -> subprocess.Popen[str] | None:
    """A launch of which a random rank was just signalled; None if it was over before."""
    process = bench.start(bench.new_run(), *options, ranks=ranks, sets=sets)
    if bench.in_training(process) and bench.kill(number):
        return process
    bench.ended(process)
    return None


def kill_portable(bench: Bench) -> Outcome | None:
    """One kill; None if the run was over before, as with all of these."""
    process = struck(bench, signal.SIGKILL)
    if process is None:
        return None
    begun_s = time.monotonic()
    ended = bench.ended(process)
    took_s = time.monotonic() - begun_s
    failed = ended.returncode not in (0, 75)
    return {"took_s": took_s, "ok": failed and took_s <= END_S and bench.ends_as_reference()}


def kill_ulfm(bench: Bench) -> Outcome | None:
    """One kill where survivors live."""
    process = struck(bench, signal.SIGKILL, "--with-ft", "ulfm", ranks=RANKS + 1)
    if process is None:
        return None
    begun_s = time.monotonic()
    metrics, took_s = bench.run / "metrics.jsonl", float("inf")
    while process.poll() is None and time.monotonic() - begun_s < LIMIT_S:
        if metrics.exists() and '"recovery"' in metrics.read_text(errors="replace"):
            took_s = time.monotonic() - begun_s
            break
        time.sleep(POLL_S)
    bench.ended(process)
    facts = json.loads((bench.run / "run.json").read_text())
    if took_s == float("inf") and facts["finished"]:
        return None  # it died when all was done
    ends = [path.read_text() for path in bench.folder.glob("end-*")]
    ok = facts["finished"] and facts["ranks"] == RANKS == len(ends) and len(set(ends)) == 1
    return {"took_s": took_s, "ok": ok}


def stop(bench: Bench) -> Outcome | None:
    """One rank that stands still."""
    sets = (f"exchange.deadline_s={DEADLINE_S}", "train.steps=100000")
    process = struck(bench, signal.SIGSTOP, sets=sets)
    if process is None:
        return None
    begun_s = time.monotonic()
    ended = bench.ended(process)
    took_s = time.monotonic() - begun_s
    is_named = f"no answer: rank {bench.victim} " in ended.stderr
    ok = is_named and ended.returncode != 0 and took_s <= DEADLINE_S + 2
    return {"took_s": took_s, "ok": ok}


def signals(bench: Bench) -> Outcome | None:
    """One word to end, in one of the phases."""
    bench.signals += 1
    phase = PHASES[bench.signals % len(PHASES)]
    at = bench.draw.randrange(1, STEPS - EVAL_EVERY)
    told_at = bench.folder / "told-at"
    told_at.unlink(missing_ok=True)
    ended = bench.ended(bench.start(bench.new_run(), SIGNAL_IN=phase, SIGNAL_AT=str(at)))
    saved = max((bench.run / "checkpoints").glob("step-*"), default=None)
    step = int(saved.name.removeprefix("step-")) if saved else -1
    later = step - int(told_at.read_text())
    ok = ended.returncode == 75 and later in (0, 1) and bench.ends_as_reference()
    return {"what": phase, "steps_later": later, "ok": ok}


def corruption(bench: Bench, count: int) -> Iterator[Outcome]:
    """Damage the newest checkpoint of a run in many ways, one at a time.

    Of one rank, which reads all files of it.
    """
    assert bench.ended(bench.start(bench.new_run(), ranks=1)).returncode == 0
    arguments = [sys.executable, __file__, "--worker", "corruption"]
    whole = [*arguments, str(bench.run / "checkpoints"), str(count)]
    told = subprocess.run(whole, capture_output=True, text=True, check=True).stdout
    yield from json.loads(told.splitlines()[-1])


def corrupt(folder: Path, count: int) -> None:
    """In a process of its own: damage, load, mend, again and again."""
    import logging

    import hpctrain
    from hpctrain.comm.engine import engine_of
    from hpctrain.train.checkpoint.loading import load_newest

    logging.disable()
    control, draw = engine_of(hpctrain.join()).control, random.Random(1)
    before, newest = sorted(folder.glob("step-*"))[-2:]
    good = {path.name: path.read_bytes() for path in newest.iterdir()}
    outcomes = []
    for _ in range(count):
        what = _damage(newest, good, draw)
        try:
            loaded = load_newest(control, folder)
            step = int(loaded[1]["step"]) if loaded else -1
        except Exception as error:
            what, step = f"{what}: {error}", -1
        outcomes.append({"what": what, "ok": step == int(before.name.removeprefix("step-"))})
        shutil.rmtree(newest, ignore_errors=True)
        newest.mkdir()
        for name, content in good.items():
            (newest / name).write_bytes(content)
    print(json.dumps(outcomes))


def _damage(newest: Path, good: dict[str, bytes], draw: random.Random) -> str:
    """One random damage; what it was."""
    name, other = draw.sample(sorted(good), 2)
    content = bytearray(good[name])
    kind = draw.choice(("bit", "cut", "grown", "zeros", "swapped", "gone"))
    place = draw.randrange(len(content))
    if kind == "bit":
        content[place] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "grown":
        content += b"\0" * draw.randrange(1, 100)
    elif kind == "zeros":
        end = min(len(content), place + draw.randrange(1, 64))
        if not any(content[place:end]):
            content[place] ^= 255
        else:
            content[place:end] = bytes(end - place)
    elif kind == "swapped":
        (newest / other).write_bytes(good[name])
        content = bytearray(good[other])
    if kind == "gone":
        (newest / name).unlink()
    else:
        (newest / name).write_bytes(content)
    return f"{kind} {name}"


def kill_in_save(bench: Bench) -> Outcome | None:
    """Kill a process that saves, at a random moment."""
    folder = bench.new_run()
    process = subprocess.Popen([sys.executable, __file__, "--worker", "save", str(folder)])
    while not folder.exists() or len(list(folder.glob("step-*"))) < 2:
        if process.poll() is not None:
            return None
        time.sleep(POLL_S)
    time.sleep(bench.draw.random() * 0.05)
    process.kill()
    process.wait()
    arguments = [sys.executable, __file__, "--worker", "load", str(folder)]
    loaded = subprocess.run(arguments, capture_output=True, text=True)
    return {"ok": loaded.returncode == 0 and loaded.stdout.strip().isdigit()}


def save_for_ever(folder: Path) -> None:
    """In a process of its own, which is killed."""
    import torch

    import hpctrain
    from hpctrain.comm.engine import engine_of
    from hpctrain.train.checkpoint.config import CheckpointConfig
    from hpctrain.train.checkpoint.saver import Saver

    world = hpctrain.join()
    saver = Saver(engine_of(world).control, folder, CheckpointConfig(), world.trace)
    step = 0
    while True:
        step += 1
        value = torch.full((50_000,), float(step))
        saver.save(step, {"model": {"w": value}, "exchange": {}}, {"step": step}, {"samples": 0})


def load(folder: Path) -> None:
    """In a process of its own: the step of the newest checkpoint, if all of it fits together."""
    import hpctrain
    from hpctrain.comm.engine import engine_of
    from hpctrain.train.checkpoint.loading import load_newest

    loaded = load_newest(engine_of(hpctrain.join()).control, folder)
    assert loaded is not None
    state, manifest = loaded
    step = int(manifest["step"])
    assert bool((state["model"]["w"] == step).all())
    assert state["own"]["step"] == step
    print(step)


def stall(bench: Bench, asynchronous: bool) -> dict[str, float]:
    """What checkpoints of 25 MB cost a run whose steps take half a second on a device."""
    sets = (
        *("model.width=500000", f"train.steps={STALL_STEPS}", f"checkpoint.every={STALL_EVERY}"),
        *("train.eval_every=0", f"checkpoint.asynchronous={str(asynchronous).lower()}"),
    )
    os.environ["SLEEP_S"] = "0.25"
    process = bench.start(bench.new_run(), ranks=2, sets=sets)
    ended = bench.ended(process)
    del os.environ["SLEEP_S"]
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in (bench.run / "metrics.jsonl").read_text().splitlines()]
    saves = [line["checkpoint"] for line in lines if "checkpoint" in line][1:]  # one is read back
    steps = statistics.median(line["step_s"] for line in lines if "step_s" in line)
    newest = max((bench.run / "checkpoints").glob("step-*"))
    nbytes = sum(path.stat().st_size for path in newest.iterdir())
    stall_s = statistics.median(save["stall_s"] for save in saves)
    written_s = statistics.median(save["written_s"] for save in saves)
    return {
        "stall_over_step": stall_s / steps,
        "bytes": nbytes,
        "bytes_per_s": nbytes / written_s,
        "over_disk": nbytes / written_s / _disk_bytes_per_s(bench.folder, nbytes),
    }


def _disk_bytes_per_s(folder: Path, nbytes: int) -> float:
    """What the disk takes from one writer that syncs at the end."""
    content, times = os.urandom(nbytes), []
    for _ in range(5):
        begun_s = time.perf_counter()
        with (folder / "disk").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        times.append(time.perf_counter() - begun_s)
    return nbytes / statistics.median(times)


def tally(outcomes: list[Outcome]) -> dict[str, Any]:
    """How many were ok, and how long they took."""
    times = sorted(outcome["took_s"] for outcome in outcomes if "took_s" in outcome)
    found: dict[str, Any] = {"tried": len(outcomes), "ok": sum(o["ok"] for o in outcomes)}
    for phase in PHASES:
        of_phase = [outcome["ok"] for outcome in outcomes if outcome.get("what") == phase]
        if of_phase:
            found[f"ok in {phase}"] = sum(of_phase)
    if times:
        found["median_s"] = statistics.median(times)
        found["p95_s"] = times[min(len(times) - 1, int(0.95 * len(times)))]
    return found


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=(*COUNTS, "stall"), help="some of them")
    parser.add_argument("--seed", type=int, default=1)
    options: argparse.Namespace = parser.parse_args()
    if options.worker:
        what, folder, *count = options.worker
        {
            "corruption": lambda: corrupt(Path(folder), int(count[0])),
            "save": lambda: save_for_ever(Path(folder)),
            "load": lambda: load(Path(folder)),
        }[what]()
        return
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    found: dict[str, Any] = {}
    one_at_a_time: dict[str, Callable[[Bench], Outcome | None]] = {
        each.__name__: each for each in (kill_portable, kill_ulfm, stop, signals, kill_in_save)
    }
    try:
        bench = Bench(folder, random.Random(options.seed))
        for name, counts in COUNTS.items():
            if options.only and name not in options.only:
                continue
            count = counts[options.quick]
            outcomes: list[Outcome] = []
            if name == "corruption":
                outcomes = list(corruption(bench, count))
            while len(outcomes) < count:
                outcome = one_at_a_time[name](bench)
                if outcome is not None:
                    outcomes.append(outcome)
                    if not outcome["ok"]:
                        sys.stderr.write(f"{name} {len(outcomes)}: {outcome}, {bench.run}\n")
            found[name] = tally(outcomes)
            sys.stderr.write(f"{name}: {found[name]}\n")
        if not options.only or "stall" in options.only:
            found["stall"] = {
                name: stall(bench, asynchronous)
                for name, asynchronous in {"meanwhile": True, "at_once": False}.items()
            }
    finally:
        if all(each.get("tried") == each.get("ok") for each in found.values()):
            shutil.rmtree(folder)
    rows = [{"what": name, **row} for name, row in found.items() if name != "stall"]
    rows += [{"what": f"stall, {name}", **row} for name, row in found.get("stall", {}).items()]
    names = list(dict.fromkeys(key for row in rows for key in row))
    text = harness.table([{key: row.get(key, "") for key in names} for row in rows])
    harness.finish(text, found, options.save)


if __name__ == "__main__":
    main()
