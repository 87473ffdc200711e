"""Delayed gradients and local updates for a program: `Periods.step` in place of the optimizer's."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import nn

from hpctrain.comm import reduce
from hpctrain.comm.channel import Channel
from hpctrain.comm.engine import engine_of
from hpctrain.comm.memory import Slab
from hpctrain.comm.quantize import QUANTIZERS
from hpctrain.comm.reducer import ReduceOptions
from hpctrain.errors import ExchangeError
from hpctrain.grad import replicas
from hpctrain.grad.config import ExchangeConfig
from hpctrain.grad.flat import Flat, dtype_of, elements_of
from hpctrain.grad.periods.averaging import Averager
from hpctrain.grad.periods.late import Check, LateGradients, take_all
from hpctrain.grad.periods.merging import Changes
from hpctrain.grad.periods.method import PeriodsConfig
from hpctrain.grad.periods.schedule import Act, Action, Schedule, fragments_of
from hpctrain.grad.periods.together import Together
from hpctrain.trace import now_s
from hpctrain.world import World, join

_numbers = count(1)


class Periods:
    """Trains a module on this rank's own gradients, and takes in those of other ranks late.

        periods = hpctrain.Periods(model, optimizer, hpctrain.PeriodsConfig(preset="diloco"))
        for batch in batches:
            optimizer.zero_grad()
            loss(model(batch)).backward()
            periods.step()
        periods.finish()

    Parameters start as those of rank 0, and so does what the optimizer has gathered, where it takes
    steps on the gradient of all ranks. Construction, `finish` and `shared` are collective; all
    ranks call `step` as often, but none waits there for what others do in the same iteration.

    Args:
        module: on the host, with dense gradients. Do not wrap it in `DataParallel`.
        optimizer: of the module's parameters, all of them.
        config: what is exchanged when.
        exchange: how means are made: way, chunk_bytes, deterministic, buffers and deadline_s count.
        world: the ranks; by default those of `hpctrain.join()`.

    Attributes:
        iteration: how many were done.
        exposed_s: how long the last step waited for the wire.
        weight: this rank's share of the step's samples, for averaging buffers.

    Raises:
        MismatchError: the module is not the same on all ranks.
        ExchangeError: the memory limit is too low, or the module cannot be trained so.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: PeriodsConfig | None = None,
        *,
        exchange: ExchangeConfig | None = None,
        world: World | None = None,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.world = world or join()
        self.config = config = config or PeriodsConfig()
        self.exchange = exchange = exchange or ExchangeConfig()
        self.method = method = config.method
        self.iteration = 0
        self._pulls_from = method.warmup + 1
        self.exposed_s = 0.0
        self._schedule = Schedule(method)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        _check(self._parameters, optimizer)
        if method.wire in QUANTIZERS and exchange.way not in ("auto", "direct"):
            raise ExchangeError(
                "exchange.way does nothing with integers on the wire",
                value=exchange.way,
                allowed="auto or direct",
                fix="leave it out, or choose another periods.wire",
                everywhere=True,
            )
        self._engine = engine_of(self.world)
        self._engine.progress = "thread"
        self._engine.deadline_s = exchange.deadline_s
        control = self._engine.control
        replicas.check_same_model(control, self.world, module)
        replicas.broadcast_state(control, module)
        if method.sends == "gradients" or method.warmup:  # all take the same steps with it
            replicas.broadcast_gathered(control, optimizer)
        self._buffers = replicas.BufferSync(module, control, exchange.buffers)
        self.weight = 1.0 / self.world.size
        cuts = fragments_of([p.numel() for p in self._parameters], method.fragments)
        self._fragments = [self._parameters[cut] for cut in cuts]
        self._late: LateGradients | None = None
        self._check_memory()
        self.check: Check = take_all
        """Asked before each step of the optimizer."""
        self._changes: list[Changes] = []
        if method.sends == "gradients":
            self._late = LateGradients(
                method, self._parameters, optimizer, lambda *step: self.check(*step)
            )
        else:
            ranks = self.world.size
            self._changes = [Changes(method, part, ranks) for part in self._fragments]
        self._number = next(_numbers)
        self._together = self._make_together() if method.warmup else None
        """Of the warm-up."""
        self._warmup_bytes = 0
        self._averagers = self._make_averagers()
        self._staged = [
            torch.zeros_like(averager.tensor) if self._stages else averager.tensor
            for averager in self._averagers
        ]

    # ------------------------------------------------------------------ a step

    def step(self) -> None:
        """Take this rank's gradient in place of `optimizer.step()`, and what has come of others.

        Gradients are as backward left them on this rank.

        Raises:
            RankDiedError: another rank has died.
        """
        self.exposed_s = 0.0
        self.iteration += 1
        if self.is_warming_up:
            self._step_together()
            return
        own = [p.grad for p in self._parameters if p.grad is not None]
        if self._late is None and self.check(own, False):
            self.optimizer.step()
        with torch.no_grad():
            for action in self._schedule.after(self.iteration):
                if action.of >= self._pulls_from:
                    self._act(action)
        if self._late and self.method.pull_lag == 0:
            self._average_buffers()
        if self.iteration <= self.method.warmup + self.method.pull_lag + 2:
            self._check_memory()  # with copies of what the optimizer has made in its first step
        self._engine.poll()

    @property
    def is_warming_up(self) -> bool:
        """Whether the present iteration, or that which is next, belongs to the warm-up."""
        return self._together is not None

    def _step_together(self) -> None:
        """A step on the gradient of all ranks in this iteration."""
        assert self._together
        with torch.no_grad():
            self.exposed_s = self._together.step(self.iteration)
            self._average_buffers()
        if self.iteration >= self.method.warmup:
            self.begin_anew(self.iteration)

    def begin_anew(self, iteration: int) -> None:
        """Go on after so many iterations from the module's parameters, with nothing on the wire.

        All ranks must, and hold the same parameters.
        """
        self.iteration = iteration
        self._pulls_from = max(iteration, self.method.warmup) + 1
        with torch.no_grad():
            for changes in self._changes:
                changes.begin_anew()
        self._end_warmup()

    def _end_warmup(self) -> None:
        """Give up what only the warm-up needs, once it is over."""
        if self._together and self.iteration >= self.method.warmup:
            self._warmup_bytes = self._together.sent_bytes
            self._together = None

    def finish(self) -> None:
        """The last iteration is done: wait for all that is on its way, and agree. Collective.

        Parameters are the same on all ranks afterwards. Training may go on from there.
        """
        if self.is_warming_up:
            self._average_buffers()
            return
        with torch.no_grad():
            for action in self._schedule.in_flight(self.iteration):
                if action.of < self._pulls_from:
                    continue
                if self._is_to_be_pushed(action):
                    self._act(Action(Act.PUSH, action.fragment, action.of))
                self._act(Action(Act.PULL, action.fragment, action.of), is_last=True)
            self._pulls_from = self.iteration + 1  # of a run that goes on after its end
            for changes in self._changes:
                ahead = Slab(changes.ahead())
                whole = reduce.all_reduce("direct", ahead, 1.0 / self.world.size)
                self._engine.control.run(whole, "parameters at the end")
                changes.agree(ahead.tensor)
        self._average_buffers()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside, parameters are those that all ranks agree on, as for an evaluation. Collective.

        So are buffers. With merge = "eager" no rank has the same parameters; each has its own there
        too.
        """
        own: list[Flat] = []
        before = self._late.before if self._late else None
        with torch.no_grad():
            if before and before.is_taken:
                own = [Flat(self._parameters)]
                own[0].gather(self._parameters)
                for p, value in zip(self._parameters, before.values, strict=True):
                    p.copy_(value)
            ahead = [] if self.is_warming_up else self._changes
            for part, changes in zip(self._fragments, ahead, strict=False):
                flat = Flat(part)
                flat.gather(part)
                own.append(flat)
                changes.anchor.scatter(part)
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        self._average_buffers()
        try:
            yield
        finally:
            parts = self._fragments if self._changes else [self._parameters]
            with torch.no_grad():
                for part, flat in zip(parts, own, strict=False):
                    flat.scatter(part)
                for name, buffer in self.module.named_buffers():
                    buffer.copy_(buffers[name])

    @property
    def summary(self) -> str:
        """What is exchanged when, in one line."""
        method = self.method
        warmup = f"together for {method.warmup} iteration(s), then " if method.warmup else ""
        return (
            f"{warmup}{method.sends} of {method.period} iteration(s), "
            f"taken in {method.pull_lag} later "
            f"({method.merge}), in {method.fragments} fragment(s), {method.wire} on the wire; "
            f"{self.held_bytes() / 1e6:.1f} MB of copies a rank"
        )

    @property
    def sent_bytes(self) -> int:
        """Of messages of this rank so far, but for those at the end; see `Reducer.sent_bytes`."""
        warmup = self._together.sent_bytes if self._together else self._warmup_bytes
        return warmup + sum(averager.sent_bytes for averager in self._averagers)

    # ------------------------------------------------------------------ parts

    def _act(self, action: Action, is_last: bool = False) -> None:
        slot = self._slot(action)
        averager, staged = self._averagers[slot], self._staged[slot]
        if action.act is Act.CAPTURE:
            if self._late:
                self._late.capture(staged)
            else:
                self._changes[action.fragment].capture(staged)
        elif action.act is Act.PUSH:
            if staged is not averager.tensor:
                averager.tensor.copy_(staged)
            averager.post(f"fragment {action.fragment} of iteration {action.of}")
        else:
            begun_s = now_s()
            mean = averager.wait()
            self.exposed_s += now_s() - begun_s
            if self._late:
                self._late.pull(mean)
            else:
                self._changes[action.fragment].pull(mean, is_last)

    def _slot(self, action: Action) -> int:
        """Which averager an action is for: gradients of several iterations are on the wire."""
        return action.of % len(self._averagers) if self._late else action.fragment

    def _is_to_be_pushed(self, action: Action) -> bool:
        return action.of + self.method.push_lag > self.iteration

    @property
    def _stages(self) -> bool:
        """Whether something is captured while the one before may be on the wire."""
        method = self.method
        replaced = method.merge == "replace" and method.pull_lag == method.period
        return method.sends == "changes" and (method.push_lag > 0 or replaced)

    def _options(self, wire: str) -> ReduceOptions:
        exchange = self.exchange
        return ReduceOptions(
            way=exchange.way,
            wire=wire,
            ordered=exchange.deterministic,
            in_flight_bytes=exchange.in_flight_bytes,
            chunk_bytes=exchange.chunk_bytes,
        )

    def _channel(self, place: str) -> Channel:
        name = f"periods {self._number}, {place}"
        channel = self._engine.channel(name, self.exchange.in_flight_bytes)
        weakref.finalize(self, channel.abandon)
        return channel

    def _make_together(self) -> Together:
        wire = self.method.wire
        return Together(
            self._channel("warm-up"),
            self._parameters,
            self.optimizer,
            self._options("same" if wire in QUANTIZERS else wire),
            lambda *step: self.check(*step),
        )

    def _make_averagers(self) -> list[Averager]:
        method, options = self.method, self._options(self.method.wire)
        if method.sends == "gradients":
            counts = [LateGradients.count(self._parameters)] * LateGradients.slots(method)
        else:
            counts = [elements_of(part) for part in self._fragments]
        made: list[Averager] = []
        for place, elements in enumerate(counts):
            channel, ways = self._channel(str(place)), made[0].ways if made else ()
            flags = len(self._parameters) if method.sends == "gradients" else 0
            dtype = dtype_of(self._parameters)
            made.append(Averager(channel, elements, dtype, options, ways, exact=flags))
        return made

    def _average_buffers(self) -> None:
        self._buffers.post(self.weight)
        self._buffers.finish()

    def _check_memory(self) -> None:
        """Refuse what needs more than the limit, before it is made.

        Raises:
            ExchangeError: with what is needed.
        """
        needed, limit = self.held_bytes(), self.config.memory_limit_mb * 1e6
        if limit and needed > limit:
            raise ExchangeError(
                "periods.memory_limit_mb: copies of gradients and parameters need more",
                value=f"{needed / 1e6:.4g} MB",
                allowed=f"{self.config.memory_limit_mb:g} MB",
                fix="lower pull_lag, use more fragments with a smaller lag, a merge that keeps no "
                "copies ('replace' or 'mix'), or raise the limit",
                everywhere=True,
            )

    def held_bytes(self) -> int:
        """Memory for copies of gradients and parameters on this rank, and of the optimizer's state.

        Not counted are messages on their way, which `exchange.in_flight_bytes` limits.
        """
        method, ranks = self.method, self.world.size
        dtype = dtype_of(self._parameters)
        none = [[p.detach().to("meta") for p in part] for part in self._fragments]
        total = 0
        if method.warmup:
            whole = [p for part in none for p in part]
            total += LateGradients.count(whole) * dtype.itemsize
        if method.sends == "gradients":
            (whole,) = none
            slot = Averager.held_bytes(LateGradients.count(whole), dtype, method.wire, ranks)
            total += slot * LateGradients.slots(method)
            total += elements_of(whole) * LateGradients.copies(method) * dtype.itemsize
            if self._late and self._late.before:
                total += self._late.before.state_bytes
            return total
        for part in none:
            changes, count = Changes(method, part, ranks), elements_of(part)
            held = [*changes.tensors().values(), *changes.scratch]
            total += sum(tensor.nbytes for tensor in held)
            total += Averager.held_bytes(count, dtype, method.wire, ranks)
            total += count * dtype.itemsize * self._stages
        return total

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, with what is on the wire, which is waited for.

        All ranks must call it after the same iteration.
        """
        tensors: dict[str, torch.Tensor] = {}
        for place, averager in enumerate(self._averagers):
            tensors[f"wire {place}"] = averager.wait()
            if self._staged[place] is not averager.tensor:
                tensors[f"staged {place}"] = self._staged[place]
            tensors |= {f"{name} {place}": each for name, each in averager.lost.items()}
        for place, changes in enumerate(self._changes):
            tensors |= {f"{name} {place}": each for name, each in changes.tensors().items()}
        for place, p in enumerate(self._parameters):
            tensors[f"parameter {place}"] = p.detach()
        state: dict[str, Any] = {
            "iteration": self.iteration,
            "pulls_from": self._pulls_from,
            "method": str(self.method),
            "tensors": {name: tensor.clone() for name, tensor in tensors.items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }
        if self._late:
            state["late"] = self._late.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what this rank saved. Collective.

        Raises:
            ExchangeError: it is the state of another method or of another model.
        """
        if state["method"] != str(self.method):
            raise ExchangeError(
                "what was on the wire was sent by another method",
                value=state["method"],
                allowed=str(self.method),
                fix="keep [periods] as it was, or start anew",
                everywhere=True,
            )
        for averager in self._averagers:
            averager.wait()  # what was on the wire of what is given up
        self.iteration = int(state["iteration"])
        self._pulls_from = int(state["pulls_from"])
        if self.iteration < self.method.warmup and not self._together:
            self._together = self._make_together()
        self._end_warmup()
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it keeps the tensors
        kept = state["tensors"]
        with torch.no_grad():
            for place, averager in enumerate(self._averagers):
                averager.tensor.copy_(kept[f"wire {place}"])
                if self._staged[place] is not averager.tensor:
                    self._staged[place].copy_(kept[f"staged {place}"])
                for name, tensor in averager.lost.items():
                    tensor.copy_(kept[f"{name} {place}"])
            for place, changes in enumerate(self._changes):
                for name, tensor in changes.tensors().items():
                    tensor.copy_(kept[f"{name} {place}"])
            for place, p in enumerate(self._parameters):
                p.copy_(kept[f"parameter {place}"])
        if self._late:
            self._late.load_state_dict(state["late"])


def _check(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    if devices := {p.device.type for p in parameters} - {"cpu"}:
        raise ExchangeError(
            "late gradients and parameters are exchanged from the host's memory only",
            value=f"a model on {', '.join(sorted(devices))}",
            fix="use train.device = 'cpu', or another exchange.mode",
            everywhere=True,
        )
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if {*map(id, parameters)} != updated:
        raise ExchangeError(
            "the optimizer does not update exactly the parameters that are trained",
            fix="give it all parameters of the module with requires_grad, and no others",
            everywhere=True,
        )
