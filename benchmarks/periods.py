"""Gradients and parameters of other ranks that come late: how long steps take, what is sent.

- `wall`: steps of a model that sleeps while it computes, as a GPU leaves the cores free, on two
  hosts with a link of 1 Gbit/s (cluster.py). Communication is what a bandwidth-optimal all-reduce
  of all gradients takes on the wire, measured by plain TCP; compute is as long, or a quarter.
  `wall_over_sync` is over a synchronous step, one blocking all-reduce after backward, where
  communication is as long as compute for methods that exchange in every iteration, and four times
  as long for those that do so once in a period; `wall` has both for all. The controls: the
  synchronous step, this project's own whose blocks are on the wire during backward
  (`wall_over_overlapped`), torch's averaging of parameters once a period
  (torch.distributed.algorithms.model_averaging) on gloo, and steps without any exchange.
- `bytes`: of messages of a rank, as counted, below those of synchronous steps in float32; over what
  they should be; and those that the kernel counts on the link over them.
- `loss` and `sooner`: see periods_loss.py.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cluster
import harness
import torch
from links import Bench, Stepper, Work
from periods_loss import (
    LOSS_AIMS,
    LOSS_ARMS,
    QUICK_LOSS_ARMS,
    SOONER_AIM,
    loss_figures,
    sooner_figures,
)

from hpctrain.comm.quantize import QUANTIZERS

WIRE_RATE = "1gbit"
COMMUNICATIONS = (1.0, 4.0)
"""Wire time over that of forward and backward."""
PERIOD = 8
LONG_PERIOD = 16
EVERY_STEP = ("one_late", "od_sgd", "dc_sgd")
"""Methods that exchange gradients of every iteration."""
ARMS: dict[str, dict[str, Any]] = {
    **{name: {"preset": name} for name in EVERY_STEP},
    "local": {"preset": "local", "period": PERIOD},
    "corrected": {"preset": "corrected"},
    "overlap_local": {"preset": "overlap_local", "period": PERIOD},
    "co2": {"preset": "co2", "period": PERIOD},
    "diloco": {"preset": "diloco", "period": LONG_PERIOD},
    "diloco_int8": {"preset": "diloco", "period": LONG_PERIOD, "wire": "int8"},
    "diloco_int4": {"preset": "diloco", "period": LONG_PERIOD, "wire": "int4"},
    "eager_diloco": {"preset": "eager_diloco", "period": LONG_PERIOD},
    "streaming_diloco": {"preset": "streaming_diloco", "period": LONG_PERIOD},
    "streaming_diloco_int8": {
        "preset": "streaming_diloco",
        "period": LONG_PERIOD,
        "wire": "int8",
    },
}
QUICK_ARMS = ("one_late", "corrected", "diloco_int8", "diloco_int4")
WALL_AIMS = {"one_late": 0.60, "corrected": 0.27, "overlap_local": 0.27, "co2": 0.27}
BYTES_AIMS = {"diloco_int8": 60.0, "diloco_int4": 115.0}
MOST_OVER_FORMULA = 0.01
LAYERS, QUICK_LAYERS = 6, 4
"""12 MB of float32; 8 MB for a quick look."""
ROUNDS, QUICK_ROUNDS = 5, 2
STEPS = LONG_PERIOD
"""Of a round: whole periods."""

# ---------------------------------------------------------------- worker, one process a rank


class PeriodStepper:
    """Steps of one arm; a round is as many as make whole periods."""

    def __init__(self, work: Work, rank: int, values: Mapping[str, Any]) -> None:
        import hpctrain

        self.model = work.model()
        self.input = work.input(rank)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, fused=True)
        self.periods = hpctrain.Periods(
            self.model,
            self.optimizer,
            hpctrain.PeriodsConfig(**values),
            exchange=hpctrain.ExchangeConfig(way="direct"),
        )

    def __call__(self) -> None:
        for _ in range(STEPS):
            self.optimizer.zero_grad()
            self.model(self.input).sum().backward()
            self.periods.step()


def repeated(step: Callable[[], object]) -> Callable[[], None]:
    """A round of synchronous steps."""

    def run() -> None:
        for _ in range(STEPS):
            step()

    return run


class TorchAverage:
    """torch's own local SGD: parameters are averaged once a period, by all ranks at once."""

    def __init__(self, work: Work, rank: int) -> None:
        from torch.distributed.algorithms.model_averaging import averagers

        self.stepper = Stepper(work, rank, work.model())
        self.averager = averagers.PeriodicModelAverager(period=PERIOD, warmup_steps=0)

    def __call__(self) -> None:
        for _ in range(STEPS):
            self.stepper()
            self.averager.average_parameters(self.stepper.parameters)


def measured(layers: int, rounds: int, names: list[str]) -> dict[str, Any]:
    """The worker's figures."""
    import hpctrain

    bench = Bench(layers, with_heat=False)
    rank, wire_s = bench.world.rank, bench.seconds(bench.wire)
    walls: dict[str, dict[str, list[float]]] = {}
    for communication in COMMUNICATIONS:
        work = bench.work("sleep", wire_s / communication)
        plain = work.model()
        wrapped = hpctrain.DataParallel(work.model())
        overlapped = Stepper(work, rank, wrapped)
        overlapped()
        while wrapped.exchange.is_trying:
            overlapped()
        arms: dict[str, Callable[[], object]] = {
            "sync": repeated(Stepper(work, rank, plain, bench.plain(plain))),
            "overlapped": repeated(overlapped),
            "torch_local": TorchAverage(work, rank),
            "no_exchange": repeated(Stepper(work, rank, work.model())),
        }
        steppers = {name: PeriodStepper(work, rank, ARMS[name]) for name in names}
        times = harness.take_turns(
            {**arms, **steppers}, rounds, bench.together, bench.slowest, warm_up=1
        )
        for stepper in steppers.values():
            stepper.periods.finish()
        walls[f"{communication:g}"] = {name: [s / STEPS for s in of] for name, of in times.items()}
    work = Work("sleep", layers)
    sent = {"sync": sent_by(bench, work, {"preset": "every_step"})}
    sent |= {name: sent_by(bench, work, ARMS[name]) for name in names}
    everyones = bench.gather(sent)
    bench.close()
    return {"rank": rank, "wire_s": wire_s, "wall": walls, "sent": everyones}


def sent_by(bench: Bench, work: Work, values: Mapping[str, Any]) -> tuple[int, float, int]:
    """Bytes of a rank in as many steps as are in a round: counted, by the formula, on the link."""
    stepper = PeriodStepper(work, bench.world.rank, values)
    method, ranks = stepper.periods.method, bench.world.size
    elements = sum(p.numel() for p in stepper.model.parameters())
    quantizer = QUANTIZERS.get(method.wire)
    once = quantizer.nbytes(elements) if quantizer else 4 * elements
    expected = 2 * (ranks - 1) / ranks * once * STEPS / method.period
    bench.together()
    before = on_the_link()
    stepper()
    stepper.periods.state_dict()  # waits for what is on the wire
    bench.together()
    return stepper.periods.sent_bytes, expected, on_the_link() - before


def on_the_link() -> int:
    """Bytes that the kernel has sent from this host."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    (line,) = (line for line in lines if line.strip().startswith(f"{cluster.LINK}:"))
    return int(line.split(":")[1].split()[8])


# ---------------------------------------------------------------- parent


def wall_figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """Ratios of medians, by communication and arm; what was sent, by arm."""
    figures: dict[str, Any] = {"wall": {}, "wall_over_overlapped": {}}
    for communication, times in found["wall"].items():
        medians = {name: statistics.median(of) for name, of in times.items()}
        for key, peer in (("wall", "sync"), ("wall_over_overlapped", "overlapped")):
            figures[key][communication] = {n: m / medians[peer] for n, m in medians.items()}
    few, much = (figures["wall"][f"{communication:g}"] for communication in COMMUNICATIONS)
    sent = {name: [of_rank[name] for of_rank in found["sent"]] for name in found["sent"][0]}
    most = {name: max(counted for counted, _, _ in of) for name, of in sent.items()}
    names = [name for name in most if name != "sync"]
    return figures | {
        "wall_over_sync": {name: (few if name in EVERY_STEP else much)[name] for name in names},
        "bytes_below_sync": {name: most["sync"] / most[name] for name in names},
        "bytes_over_formula": {n: max(c / e for c, e, _ in of) for n, of in sent.items()},
        "link_over_bytes": {n: max(on / c for c, _, on in of) for n, of in sent.items()},
        "wire_s": found["wire_s"],
    }


def judged(figures: Mapping[str, Any]) -> list[str]:
    """Aims, and whether they are met."""
    lines = []
    for key, aims, sign in (
        ("wall_over_sync", WALL_AIMS, 1),
        ("loss_over_sync", LOSS_AIMS, 1),
        ("bytes_below_sync", BYTES_AIMS, -1),
    ):
        for arm, aim in aims.items():
            value = figures.get(key, {}).get(arm)
            if value is not None:
                lines.append(_line(f"{key}, {arm}", value, aim, sign * value <= sign * aim))
    if over := figures.get("bytes_over_formula"):
        off = max(abs(value - 1) for value in over.values())
        lines.append(_line("bytes off the formula", off, MOST_OVER_FORMULA, off <= 0.01))
    for name in ("sooner", "sooner_with_evaluations"):
        if name in figures:
            value = figures[name]
            lines.append(_line(name, value, SOONER_AIM, value >= SOONER_AIM))
    return lines


def _line(what: str, value: float, aim: float, is_met: bool) -> str:
    return f"{what}: {value:.3f}, aim {aim:g}: {'met' if is_met else 'MISSED'}"


def rows_of(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line for each arm: times over the synchronous step, bytes below it, loss over it."""
    few, much = (figures["wall"][f"{communication:g}"] for communication in COMMUNICATIONS)
    return [
        {
            "arm": name,
            "communication 1": few[name],
            "communication 4": much[name],
            "bytes below": figures["bytes_below_sync"].get(name, ""),
            "loss over": figures.get("loss_over_sync", {}).get(name, ""),
        }
        for name in few
    ]


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=("wall", "loss", "sooner"))
    parser.add_argument(
        "--runs", metavar="FOLDER", help="keep the main job's runs here, and find them again"
    )
    parser.add_argument("--arms", nargs="+", choices=LOSS_ARMS, help="of the losses; all if none")
    options = parser.parse_args()
    if options.worker:
        layers, rounds, *names = options.worker
        harness.tell(measured(int(layers), int(rounds), names))
        return
    wanted = options.only or (("wall", "loss") if options.quick else ("wall", "loss", "sooner"))
    folder = Path(options.runs or tempfile.mkdtemp(prefix="periods-"))
    figures: dict[str, Any] = {}
    try:
        if "wall" in wanted:
            cluster.exit_if_unfit("periods")
            sizes = (QUICK_LAYERS, QUICK_ROUNDS) if options.quick else (LAYERS, ROUNDS)
            names = QUICK_ARMS if options.quick else ARMS
            with cluster.Cluster(2, WIRE_RATE) as made:
                found = harness.launch(1, *map(str, sizes), *names, on=made)
            figures |= wall_figures(found)
        if "loss" in wanted:
            arms = options.arms or (QUICK_LOSS_ARMS if options.quick else LOSS_ARMS)
            figures |= loss_figures(options.quick, list(arms), folder)
        if "sooner" in wanted:
            figures |= sooner_figures(options.quick, folder)
    finally:
        if not options.runs:
            shutil.rmtree(folder)
    table = [harness.table(rows_of(figures))] if "wall" in figures else []
    # Losses after a few steps say nothing.
    unjudged = ("loss_over_sync", "sooner", "sooner_with_evaluations") if options.quick else ()
    meant = {key: of for key, of in figures.items() if key not in unjudged}
    harness.finish("\n".join([*table, *judged(meant)]), figures, options.save)


if __name__ == "__main__":
    main()
