"""A step whose gradients go over links of 1 Gbit/s: how near it comes to what the links allow.

Hosts are namespaces on one machine (cluster.py). The model has equal layers; their compute is
given as a share of the time that a bandwidth-optimal all-reduce needs on the wire, and is either
done by one thread a rank (`kernels`) or slept through (`sleep`), which leaves the cores free as
a GPU does. A configuration's arms take turns in one run:

- hpctrain, with bfloat16 on the wire too where compute is shortest, and with the next forward
  overlapped, for which several steps are run one after another, also with blocks in the order of
  backward, to see what overtaking is worth;
- torch's DistributedDataParallel on gloo, with buckets of 4 and 25 MB;
- Heat's DataParallel where it can be imported, blocking and not;
- the controls, which must lose: one Iallreduce a parameter after backward, and one blocking
  all-reduce of all gradients;
- the step without exchange, whose parts are timed, and the wire alone: as many bytes as a
  bandwidth-optimal all-reduce sends from each host, by plain TCP. (By MPI messages it takes twice
  as long every now and then, when Open MPI serves one direction after the other.)

To save time, a quick look leaves out Heat, the order of backward and the blocking control, and
`kernels` leave out the first two.

The step without exchange and the wire give the limit of a step that ends with averaged
gradients: forward, then the longer of backward and wire, then the optimizer. Where the next forward
may overlap as well, it is the longer of all compute, the optimizer's too, and the wire. Prints a
table, the aims, and JSON as its last line.
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cluster
import harness
import torch
from links_figures import (
    CONTROLS,
    NARROW_COMPUTE,
    NEXT,
    Case,
    draw,
    figures_of,
    judged,
    rows_of,
)
from peers import DDP, HEAT, Step, ddp, heat, plain_exchange, without_heat
from torch import nn

RATE = "1gbit"
SHAPES = ((2, 1), (2, 2), (4, 1))
"""Hosts, and ranks on each."""
COMPUTE = (0.2, 0.6, 1.0, 3.0)
"""Forward and backward, over the wire time."""
KINDS = ("sleep", "kernels")
WIDTH = 720
LAYERS, QUICK_LAYERS = 16, 6
"""33 MB of float32; 12 MB for a quick look."""
REPEATS = 7
TOLERANCE = {"bf16": 2e-2}
EXACT = 1e-4
CHAINED = 3
"""Steps in a row of an arm whose steps overlap each other."""

# ---------------------------------------------------------------- model


class _Slept(torch.autograd.Function):
    """A layer whose forward sleeps and whose backward sleeps twice as long."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, forward_s: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.forward_s = forward_s
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        time.sleep(2 * ctx.forward_s)
        return grad, torch.full_like(weight, x[0, 0].item()), None


class SleepLayer(nn.Module):
    def __init__(self, forward_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))
        self.forward_s = forward_s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Slept.apply(x, self.weight, self.forward_s)


@dataclass(frozen=True)
class Work:
    """A model and its input that compute for a given time."""

    kind: str
    layers: int
    batch: int = 1
    forward_s: float = 0.0
    """Of a layer that sleeps."""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        if self.kind == "sleep":
            return nn.Sequential(*(SleepLayer(self.forward_s) for _ in range(self.layers)))
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(self.layers)))

    def input(self, rank: int) -> torch.Tensor:
        return torch.full((self.batch, WIDTH), 1.0 + rank)


class Stepper:
    """One arm's model, and its step; remembers how long the parts of each step took.

    The learning rate is 0, so that all arms have the same parameters, and gradients that can be
    compared, in every round.
    """

    def __init__(
        self, work: Work, rank: int, wrapped: nn.Module, after: Step | None = None
    ) -> None:
        self.parameters = list(wrapped.parameters())
        self.parts_s: list[tuple[float, float, float]] = []
        self._model = wrapped
        self._input = work.input(rank)
        self._after = after
        self._optimizer = torch.optim.SGD(self.parameters, lr=0.0, fused=True)

    def __call__(self) -> None:
        """Forward, backward, exchange, optimizer."""
        begun_s = time.perf_counter()
        self._optimizer.zero_grad()
        loss = self._model(self._input).sum()
        forward_s = time.perf_counter()
        loss.backward()
        if self._after:
            self._after()
        backward_s = time.perf_counter()
        self._optimizer.step()
        ended_s = time.perf_counter()
        self.parts_s.append((forward_s - begun_s, backward_s - forward_s, ended_s - backward_s))

    def gradients(self) -> torch.Tensor:
        """Averaged gradients of the last step."""
        return torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])


class Chain(Stepper):
    """Steps that overlap each other; ends, untimed, with nothing on the wire."""

    def __init__(self, work: Work, rank: int, wrapped: Any) -> None:
        super().__init__(work, rank, wrapped)
        wrapped.overlap_step(self._optimizer)
        self.seconds: list[float] = []

    def __call__(self) -> None:
        """As many steps as there are in a chain, each timed from backward's end to backward's end.

        The first one begins without anything on the wire, and does not count.
        """
        for step in range(1 + CHAINED):
            if step == 1:
                begun_s = time.perf_counter()
            super().__call__()
        self.seconds.append((time.perf_counter() - begun_s) / CHAINED)
        self._model.wait_for_gradients()

    def gradients(self) -> torch.Tensor:
        """Averaged gradients of one more backward."""
        self._model(self._input).sum().backward()
        self._model.wait_for_gradients()
        return super().gradients()


# ---------------------------------------------------------------- worker, one process a rank


class Bench:
    """What the cases of one job share: ranks, the wire, and how to meet."""

    def __init__(self, layers: int, with_heat: bool) -> None:
        import hpctrain
        from hpctrain.comm.collect import all_gather, barrier_on
        from hpctrain.comm.engine import engine_of

        self.world = hpctrain.join()
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", rank=self.world.rank, world_size=self.world.size
        )
        self.engine = engine_of(self.world)
        control = self.engine.control
        self.gather: Callable[[Any], list[Any]] = lambda value: all_gather(control, value)
        self.together = lambda: barrier_on(control)
        self.layers = layers
        hosts = len(self.world.nodes)
        self.wire_bytes = 2 * (hosts - 1) * layers * WIDTH * WIDTH * 4 // hosts
        self._raw = self.world.comm.Dup()
        missing = without_heat() if with_heat else ""
        self.heat = HEAT if with_heat and not missing else ()
        self.left_out = {"heat": missing} if missing else {}
        self._connect()

    def slowest(self, value: float) -> float:
        return max(self.gather(value))

    def _connect(self) -> None:
        """A TCP connection from the first rank of each host to that of the next."""
        world = self.world
        roots = [ranks[0] for ranks in world.nodes]
        server = socket.create_server((socket.gethostbyname(socket.gethostname()), 0))
        doors = self.gather(server.getsockname())
        if world.rank in roots:
            self._sent = bytes(self.wire_bytes)
            self._got = bytearray(self.wire_bytes)
            self._out = socket.create_connection(doors[roots[(world.node + 1) % len(roots)]])
            self._in, _ = server.accept()
        server.close()

    def close(self) -> None:
        """Hang up."""
        if not self.world.local_rank:
            self._out.close()
            self._in.close()
        torch.distributed.destroy_process_group()

    def wire(self) -> None:
        """Send what an all-reduce must send from each host, to the next, and receive as much."""
        if self.world.local_rank:
            return
        sender = threading.Thread(target=self._out.sendall, args=(self._sent,))
        sender.start()
        rest = memoryview(self._got)
        while rest:
            rest = rest[self._in.recv_into(rest) :]
        sender.join()

    def seconds(self, run: Step, repeats: int = 3) -> float:
        """Median time of the slowest rank, after one run more."""
        times = harness.take_turns({"it": run}, repeats, self.together, self.slowest, warm_up=1)
        return statistics.median(times["it"])

    def work(self, kind: str, compute_s: float) -> Work:
        """A model whose forward and backward take about `compute_s` when all ranks compute."""
        if kind == "sleep":
            return Work(kind, self.layers, forward_s=compute_s / self.layers / 3)
        batch = 64
        for _ in range(3):
            work = Work(kind, self.layers, batch)
            alone = Stepper(work, self.world.rank, work.model())
            self.seconds(alone)
            found_s = statistics.median(sum(parts[:2]) for parts in alone.parts_s)
            batch = max(1, round(batch * compute_s / self.slowest(found_s)))
        return Work(kind, self.layers, batch)

    def naive(self, parameters: Sequence[nn.Parameter]) -> Step:
        """One all-reduce a parameter, all started after backward."""
        from mpi4py import MPI

        def exchange() -> None:
            with self.engine.exclusive():
                MPI.Request.Waitall(
                    [
                        self._raw.Iallreduce(MPI.IN_PLACE, p.grad.numpy())
                        for p in parameters
                        if p.grad is not None
                    ]
                )
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.div_(self.world.size)

        return exchange

    def plain(self, model: nn.Module) -> Step:
        """One blocking all-reduce of all gradients after backward."""
        return self.guarded(plain_exchange(model, self._raw))

    def guarded(self, step: Step) -> Step:
        """The same with MPI to itself."""

        def alone() -> None:
            with self.engine.exclusive():
                step()

        return alone

    def measure(self, case: Case, repeats: int, controls: Sequence[str]) -> dict[str, Any]:
        """All arms of a case in turn."""
        import hpctrain

        rank = self.world.rank
        work = self.work(case.kind, case.compute * self.seconds(self.wire))
        steppers = {name: Stepper(work, rank, ddp(work.model(), name)) for name in DDP}
        plain_models = {name: work.model() for name in controls}
        for name, model in plain_models.items():
            after = self.plain(model) if name == "plain" else self.naive(list(model.parameters()))
            steppers[name] = Stepper(work, rank, model, after)
        ours = {"hpctrain": hpctrain.ExchangeConfig()}
        if case.compute == NARROW_COMPUTE:
            ours["bf16"] = hpctrain.ExchangeConfig(wire="bfloat16")
        exchanges = {}
        for name, config in ours.items():
            wrapped = hpctrain.DataParallel(work.model(), config)
            steppers[name] = Stepper(work, rank, wrapped)
            exchanges[name] = wrapped.exchange
            steppers[name]()
            while wrapped.exchange.is_trying:
                steppers[name]()
        chains = {}
        is_whole = len(controls) > 1 and case.kind == KINDS[0]
        for name in NEXT if is_whole else NEXT[:1]:
            config = hpctrain.ExchangeConfig(next_forward=True)
            wrapped = hpctrain.DataParallel(work.model(), config)
            wrapped.exchange.may_reorder = name == NEXT[0]
            steppers[name] = chains[name] = Chain(work, rank, wrapped)
            exchanges[name] = wrapped.exchange
            while wrapped.exchange.is_trying or not wrapped.exchange.order_is_settled:
                chains[name]()
        heats = {
            name: Stepper(work, rank, *heat(work.model(), name, self._raw))
            for name in (self.heat if is_whole else ())
        }
        steppers |= heats
        alone = Stepper(work, rank, work.model())
        arms: dict[str, Step] = {**steppers, "no exchange": alone, "wire": self.wire}
        arms |= {name: self.guarded(stepper) for name, stepper in heats.items()}
        times = harness.take_turns(arms, repeats, self.together, self.slowest, warm_up=1)
        for name, chain in chains.items():
            turns = zip(*self.gather(chain.seconds[-repeats:]), strict=True)
            times[name] = [max(ranks) for ranks in turns]
        self._check(steppers)
        parts = [
            [max(ranks) for ranks in zip(*of_ranks, strict=True)]
            for of_ranks in zip(*self.gather(alone.parts_s[-repeats:]), strict=True)
        ]
        return {
            "times": times,
            "parts": parts,
            "wire_bytes": self.wire_bytes,
            "progress": {name: exchange.progress for name, exchange in exchanges.items()},
            "ways": {name: exchange.reducer.summary() for name, exchange in exchanges.items()},
            "order": exchanges[NEXT[0]].wire_order,
            "batch": work.batch,
            "left_out": self.left_out,
        }

    def _check(self, steppers: Mapping[str, Stepper]) -> None:
        """All arms must have averaged alike: the fastest way to be wrong is to send nothing."""
        truth = steppers["naive"].gradients()
        for name, stepper in steppers.items():
            error = float((stepper.gradients() - truth).norm() / truth.norm())
            if error > TOLERANCE.get(name, EXACT):
                raise AssertionError(f"{name}: gradients differ from the naive ones by {error:.1e}")


def run_worker(specification: str) -> dict[str, Any]:
    """Figures of each case, by position."""
    wanted = json.loads(specification)
    bench = Bench(wanted["layers"], wanted["heat"])
    cases = [Case(**case) for case in wanted["cases"]]
    found = []
    for case in cases:
        begun_s = time.monotonic()
        found.append(bench.measure(case, wanted["repeats"], wanted["controls"]))
        if bench.world.is_root:
            took_s = time.monotonic() - begun_s
            print(f"{case.kind}, compute {case.compute}: {took_s:.0f} s", file=sys.stderr)
    bench.close()
    return {"rank": bench.world.rank, "cases": found}


# ---------------------------------------------------------------- parent


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--only", default="", help="configurations whose name has this text")
    options = parser.parse_args()
    if options.worker:
        harness.tell(run_worker(options.worker[0]))
        return
    cluster.exit_if_unfit("links")
    quick = [Case("sleep", compute) for compute in (1.0, 0.2)]
    whole = [Case(kind, compute) for kind in KINDS for compute in COMPUTE]
    specification: dict[str, Any] = {
        "layers": QUICK_LAYERS if options.quick else LAYERS,
        "repeats": REPEATS,
        "controls": CONTROLS[:1] if options.quick else CONTROLS,
        "heat": not options.quick,
    }
    figures: dict[str, dict[str, Any]] = {}
    cases: dict[str, Case] = {}
    for hosts, ranks in SHAPES[:1] if options.quick else SHAPES:
        wanted = {
            case.key(hosts, ranks): case
            for case in (quick if options.quick else whole)
            if options.only in case.key(hosts, ranks)
        }
        if not wanted:
            continue
        specification["cases"] = [asdict(case) for case in wanted.values()]
        with cluster.Cluster(hosts, RATE) as made:
            found = harness.launch(ranks, json.dumps(specification), on=made)
        for key, of_case in zip(wanted, found["cases"], strict=True):
            figures[key] = figures_of(of_case)
        cases |= wanted
    if not figures:
        sys.exit(f"links: no configuration has {options.only!r} in its name")
    rows = [row for key, of_key in figures.items() for row in rows_of(key, of_key)]
    reasons = {name: why for of in figures.values() for name, why in of["left_out"].items()}
    text = "\n".join([harness.table(rows), *judged(figures, cases), *harness.left_out(reasons)])
    harness.finish(text, figures, options.save, lambda path: draw(figures, cases, path))


if __name__ == "__main__":
    main()
