"""Which block goes on the wire, and when.

The way of one step, on every rank:

1. Backward finishes a parameter's gradient; its hook moves it into the block's slab, or leaves that
   to step 2 if it is small.
2. When the last gradient of a block is there, the block is ready. Ready blocks, or parts of them,
   are *released* in the agreed order, never in the order of arrival, so that ranks cannot cross:
   the reducer (comm/reducer.py) posts them to the engine in the way (comm/reduce/) it chose.
3. When backward ends, blocks that are still incomplete (unused parameters, a branch that this
   rank did not take) are released as they are, and the call waits for all of them.

So `loss.backward()` returns with averaged gradients. The order is agreed in the first step:
blocks are laid out in the order in which the lowest rank that ran backward finished its
gradients. That first step exchanges everything after backward, which also shows how often
each parameter's gradient arrives (more than once under re-entrant checkpointing).

Gradients that the program keeps between backwards (`no_sync`, `zero_grad(set_to_none=False)`)
are views of their slab, into which autograd adds without a copy. A gradient that was set to None
is moved into its view once, and autograd's own tensor is freed at the same time. Attaching zeroed
views before backward would save that copy for the price of zeroing the slab and reading it
back: measured, within 1% of a step for a GPT and 6 to 9% slower for models with less to compute
(benchmarks/gradient_views.py and its results).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable
from torch.utils.weak import WeakIdKeyDictionary

from hpctrain.comm.channel import Channel
from hpctrain.comm.collect import all_gather, broadcast
from hpctrain.comm.device import cuda
from hpctrain.comm.device_probe import messages_take_device_memory
from hpctrain.comm.engine import Engine
from hpctrain.comm.memory import release_freed
from hpctrain.comm.reducer import OnDevice, Parts, ReduceOptions, Reducer
from hpctrain.errors import ExchangeError
from hpctrain.grad import priority
from hpctrain.grad.blocks import Block, gradient_norm, move, partition, slab_size, usable
from hpctrain.grad.config import ExchangeConfig
from hpctrain.grad.next_forward import NextForward
from hpctrain.grad.priority import StepTimes
from hpctrain.grad.replicas import BufferSync
from hpctrain.grad.trial import Trial, chosen, medians
from hpctrain.trace import COMPUTE, now_s

_log = logging.getLogger("hpctrain")

AT_ONCE_BYTES = 1 << 15
"""Gradients larger than this are moved into their slab by their own hook."""
NEXT_FORWARD_IN_FLIGHT_BYTES = 1 << 20
"""A block that is needed first cannot overtake messages that are on the wire already."""

_exchanges: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The exchange that averages each parameter's gradient, as a weak reference."""


class Exchange:
    """Averages the gradients of a fixed list of parameters over all ranks.

    Made by `DataParallel`. Collective in the same order on all ranks.

    Args:
        named: name and parameter of everything that is trained.
        engine: the process's engine.
        config: how to exchange.
        name: names the channel in reports.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        engine: Engine,
        config: ExchangeConfig,
        name: str = "gradients",
    ) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.config = config
        self.engine = engine
        self.world = engine.world
        in_flight_bytes = config.in_flight_bytes
        if config.next_forward:
            in_flight_bytes = min(in_flight_bytes, NEXT_FORWARD_IN_FLIGHT_BYTES)
        self.channel: Channel = engine.channel(name, in_flight_bytes)
        self.reducer = Reducer(
            self.channel,
            ReduceOptions(
                way=config.way,
                wire=config.wire,
                ordered=config.deterministic,
                in_flight_bytes=in_flight_bytes,
                chunk_bytes=config.chunk_bytes,
            ),
            device_of(self.parameters, engine),
        )
        self.buffers: BufferSync | None = None
        self.weight = 1.0 / self.world.size
        """This rank's share of the step's samples, for averaging buffers."""
        self.exposed_s = 0.0
        """How long the last step waited for the wire after its backward had ended."""
        engine.deadline_s = config.deadline_s
        self._trial: Trial | None = None
        self.progress = config.progress if config.overlap else "after"
        """How blocks are moved; while it is being found out, that of the current step."""
        if self.progress == "auto":
            self._trial = Trial(config.next_forward) if self.world.size > 1 else None
            self.progress = "hooks"
        self._begun_s = 0.0
        self._finished_s = now_s()
        self.later: NextForward | None = None
        """Lets the next forward begin before all blocks are there; set by `overlap_step`."""

        self._blocks: list[Block] | None = None
        self._local = False
        self._armed = False
        self.wire_order: list[Parts] = []
        """Parts of blocks in the order in which they go on the wire."""
        self._by_last_part: list[Block] = []
        self._seen_times: list[StepTimes] | None = []
        self.may_reorder = True
        """Whether blocks that the next forward needs first may overtake others."""
        self._next = 0
        self._arrivals: list[int] = [1] * len(self.parameters)
        self._due: list[int] = []
        self._observed: dict[int, None] = {}  # keys in the order of their last arrival
        self._observed_arrivals = [0] * len(self.parameters)
        self._replaced = False
        for parameter in self.parameters:
            earlier = _exchanges.get(parameter)
            if earlier is not None and (exchange := earlier()) is not None:
                exchange.retire()
            _exchanges[parameter] = weakref.ref(self)
        weakref.finalize(self, self.channel.abandon)
        self._position_is_mine = False
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._observer(index))
            for index, parameter in enumerate(self.parameters)
        ]

    def retire(self) -> None:
        """Exchange nothing any more: another wrapper has taken over a parameter."""
        self._replaced = True
        for hook in self._hooks:
            hook.remove()

    @property
    def blocks(self) -> Sequence[Block]:
        """Blocks in the agreed order; empty before the first step."""
        return self._blocks or ()

    @property
    def order_is_settled(self) -> bool:
        """Whether the order of the wire will not change any more, with `next_forward`."""
        return self._seen_times is None

    @property
    def is_trying(self) -> bool:
        """Whether the way in which blocks are moved is still being tried out."""
        return self._trial is not None

    @contextmanager
    def local(self) -> Iterator[None]:
        """Backward calls inside keep their gradients on this rank, to be added up."""
        before, self._local = self._local, True
        try:
            yield
        finally:
            self._local = before

    def begin(self) -> None:
        """A backward has begun: exchange when it ends. Called from inside backward."""
        if self.later and not self._armed:
            self.later.before_backward()
        if not self._local and not self._armed:
            self._armed = True
            self._begun_s = now_s()
            if self._position_is_mine:
                self.world.position.phase = "backward"
            self.engine.progress = "thread" if self.progress == "thread" else "hooks"
            Variable._execution_engine.queue_callback(self.finish)

    def check_idle(self) -> None:
        """Refuse to go on after a backward that failed with blocks already on the wire.

        Called at the beginning of a forward.
        """
        if self._replaced:
            raise ExchangeError(
                "parameters of this DataParallel belong to another one that was made later",
                fix="use the newer one; to share layers, put all modules into one "
                "(nn.ModuleList, nn.ModuleDict) and wrap that",
            )
        position = self.world.position
        if position.step is None:  # the program's own loop: count its backwards
            self._position_is_mine = True
            position.step, position.phase = 1, "forward"
        if self._armed and self.world.size == 1:
            self._reset()
        elif self._armed and torch._C._current_graph_task_id() == -1:
            raise ExchangeError(
                "the last backward did not finish, so this rank and the others no longer "
                "agree on which gradients were exchanged",
                where=f"{self.world.name_of(self.world.rank)}, {self.world.position}",
                fix="let the exception end the run, and resume from a checkpoint",
            )

    def finish(self) -> None:
        """Release what is left and wait until every gradient is the average. Collective.

        Runs by itself at the end of backward. A rank that has no samples in a step, and so no
        backward, calls it instead.
        """
        ended_s = now_s()
        later = self.later
        if self.config.next_forward and not later:
            raise ExchangeError(
                "next_forward = true needs the optimizer, to update each block when it has come",
                fix="call model.overlap_step(optimizer) once, before the first backward",
                everywhere=True,
            )
        if later and not self._armed:  # this rank has had no forward that needed the updates
            later.settle()
        if self._blocks is None:
            self._build()
        assert self._blocks is not None
        for parts in self.wire_order[self._next :]:
            block = self._blocks[parts.slab]
            if not block.released:
                if block.missing or self.progress == "after":
                    block.ready_s = ended_s - self._begun_s if self._armed else 0.0
                block.fill()
            self._release(parts)
        if self.buffers:
            self.buffers.post(self.weight)
        if later:
            self._put_in_order(later)
            later.owe(self._by_last_part, self.buffers)
        else:
            for block in self._by_last_part:
                self._wait(block)
                block.settle()
            if self.buffers:
                self.buffers.finish()
        waited_s = now_s() - ended_s
        self.exposed_s = waited_s
        if later:
            self.exposed_s += later.waited_s
            later.waited_s = 0.0
        if self._trial:
            # Where the next forward overlaps, a step has no other end than that of the next.
            begun_s = self._finished_s if later else self._begun_s if self._armed else ended_s
            self._take_turns(self._trial, now_s() - begun_s)
        self._finished_s = now_s()
        self._reset()
        if self._position_is_mine:
            position = self.world.position
            position.step, position.phase = (position.step or 0) + 1, "forward"
        self.world.trace.add(COMPUTE, "wait for the wire", ended_s, ended_s + waited_s)

    def _wait(self, block: Block) -> None:
        for ticket in block.tickets:
            self.engine.wait(ticket)
        block.slab.take_back()

    def gradient_norm(self) -> torch.Tensor:
        """Euclidean norm of all averaged gradients together, float64. The same bits on all ranks.

        Between `finish` and the next backward; needs no communication.
        """
        return gradient_norm(self.blocks)

    def scale_gradients(self, factor: float) -> None:
        """Multiply every averaged gradient by `factor`."""
        for block in self.blocks:
            block.gradients.mul_(factor)

    def state_dict(self) -> dict[str, Any]:
        """The agreed order and ways, so that a resumed run overlaps from its first step on."""
        order = [index for block in self.blocks for index in block.members]
        return {"order": order, "arrivals": list(self._arrivals), "ways": list(self.reducer.ways)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the order of an earlier run. Collective, before the first backward."""
        if (
            sorted(state.get("order", ())) == list(range(len(self.parameters)))
            and self._blocks is None
        ):
            self._arrivals = list(state["arrivals"])
            self._lay_out(state["order"], state.get("ways", ()))

    # ------------------------------------------------------------------ hooks

    # A parameter holds its hook in a place that the garbage collector does not see into, so hooks
    # refer to the exchange, which holds the parameters, weakly.

    def _observer(self, index: int) -> Callable[[torch.Tensor], None]:
        """Hook of the first step: note when and how often the gradient arrives."""
        this = weakref.ref(self)

        def observe(parameter: torch.Tensor) -> None:
            exchange = this()
            if exchange is not None:
                exchange._observe(index, parameter)

        return observe

    def _observe(self, index: int, parameter: torch.Tensor) -> None:
        usable(parameter.grad, self.names[index])
        if not self._local:
            self.begin()
            self._observed.pop(index, None)
            self._observed[index] = None
            self._observed_arrivals[index] += 1

    def _deliverer(self, index: int, number: int, view: torch.Tensor) -> Callable[..., None]:
        """Hook of all later steps. Runs once a parameter and step, so it looks nothing up twice."""
        this = weakref.ref(self)
        poll = self.engine.poll
        # A large gradient is moved at once, while it is in the cache; small ones with their block.
        is_large = view.numel() * view.element_size() > AT_ONCE_BYTES

        def deliver(parameter: nn.Parameter) -> None:
            exchange = this()
            if exchange is None:
                return
            if exchange.later:
                exchange.later.check_used(index, exchange.names[index])
            if is_large and parameter.grad is not view:
                move(parameter, view, exchange.names[index])
            if exchange._local:
                return
            if not exchange._armed:
                exchange.begin()
            if exchange.progress == "after":
                return
            exchange._arrived(index, number)
            poll()

        return deliver

    def _arrived(self, index: int, number: int) -> None:
        """A gradient of block `number` has arrived: release what is complete."""
        block = self.blocks[number]
        self._due[index] -= 1
        if self._due[index] == 0:
            block.missing -= 1
            if block.missing == 0:
                block.ready_s = now_s() - self._begun_s
                if self.wire_order[self._next].slab == number:
                    self._release_ready()
        elif block.released:
            raise _late(self.names[index], block)

    # ------------------------------------------------------------------ blocks

    def _build(self) -> None:
        """Agree on the order that the first backward showed, and make the blocks."""
        seen = list(self._observed)
        unseen = [i for i in reversed(range(len(self.parameters))) if i not in self._observed]
        ran = all_gather(self.engine.control, len(seen), label="order of blocks")
        speaker = ran.index(max(ran))
        order, arrivals = broadcast(
            self.engine.control,
            (seen + unseen, self._observed_arrivals),
            speaker,
            label="order of blocks",
        )
        self._arrivals = [max(1, count) for count in arrivals]
        self._lay_out(order)

    def _lay_out(self, order: Sequence[int], ways: Sequence[str] = ()) -> None:
        """Make the blocks, and choose how each is summed. Collective."""
        groups = partition(
            order,
            [p.numel() * p.element_size() for p in self.parameters],
            [p.dtype for p in self.parameters],
            self.config.block_bytes,
            self.config.block_bytes // 4,
        )
        members = [[self.parameters[i] for i in group] for group in groups]
        sizes = [slab_size(parameters) for parameters in members]
        slabs = self.reducer.allocate([size for size, _ in sizes], [dtype for _, dtype in sizes])
        self._blocks = []
        for group, parameters, slab in zip(groups, members, slabs, strict=True):
            names = [self.names[i] for i in group]
            block = Block(len(self._blocks), group, names, parameters, slab)
            for index, parameter, view in zip(group, parameters, block.views, strict=True):
                self._hooks[index].remove()
                self._hooks[index] = parameter.register_post_accumulate_grad_hook(
                    self._deliverer(index, block.index, view)
                )
                if parameter.grad is not None:
                    move(parameter, view, self.names[index])
            self._blocks.append(block)
        release_freed()  # the gradients of the first step, which were tensors of their own
        self.reducer.plan(slabs, ways)
        self._take_order([Parts(number) for number in range(len(slabs))])
        self._reset()

    def _take_turns(self, trial: Trial, took_s: float) -> None:
        """Go on to the trial's next mode, or to the best one when it is over. Collective."""
        trial.record(took_s)
        if not trial.is_over:
            self.progress = trial.mode
            return
        found = medians(all_gather(self.engine.control, trial.times_s, label="progress trial"))
        self.progress = chosen(found)
        self._trial = None
        figures = ", ".join(f"{mode} {seconds * 1e3:.2f} ms" for mode, seconds in found.items())
        _log.info("blocks are moved by %r; backward and exchange took: %s", self.progress, figures)

    def _put_in_order(self, later: NextForward) -> None:
        """Have blocks that are needed first overtake, once steps are measured. Collective."""
        if self._seen_times is None or self._trial or self.world.size == 1 or not self._blocks:
            return
        times = later.times(self._blocks)
        if times:
            self._seen_times.append(times)
        seen = (self._seen_times[-priority.STEPS :], later.needed(self._blocks))
        everyones = all_gather(self.engine.control, seen, label="order of blocks")
        if min(len(steps) for steps, _ in everyones) < priority.STEPS:
            return
        self._seen_times = None
        if not self.may_reorder:
            return
        needed = next((order for _, order in everyones if order), None)
        if needed is None:  # no forward came through the wrapper
            return
        for block in self._blocks:  # the plan's scratch is in use
            self._wait(block)
        measured = [steps for steps, _ in everyones]
        self.send_in(priority.agreed_order(measured, needed, self.reducer.part_counts))
        order = ", ".join(f"{p.slab}[{p.start}:{p.stop}]" for p in self.wire_order)
        _log.info("parts of blocks go on the wire in the order %s", order)

    def send_in(self, order: Sequence[Parts]) -> None:
        """From now on, send parts of blocks in this order, the same on all ranks. Collective.

        With no block on the wire. Parts of one block come in their own order.
        """
        self.reducer.plan([b.slab for b in self.blocks], self.reducer.ways, order)
        self._take_order(order)

    def _take_order(self, order: Sequence[Parts]) -> None:
        self.wire_order = list(order)
        self._by_last_part = [self.blocks[n] for n in priority.by_last_part(order)]

    def _release_ready(self) -> None:
        """Release every block from the next one on that is complete, in order."""
        assert self._blocks is not None
        while self._next < len(self.wire_order):
            parts = self.wire_order[self._next]
            block = self._blocks[parts.slab]
            if block.missing:
                return
            if not block.released:
                block.deliver()
            self._release(parts)

    def _release(self, parts: Parts) -> None:
        """Post parts of a block that holds all that this rank has for it."""
        assert self._blocks is not None
        block = self._blocks[parts.slab]
        self._next += 1
        is_first, block.released = not block.released, True
        if self.world.size == 1:
            return
        if is_first:
            block.slab.hand_over()
            block.tickets = []
        block.tickets += self.reducer.post(parts, block.label)

    def _reset(self) -> None:
        self._armed = False
        self._next = 0
        self._due = list(self._arrivals)
        for block in self.blocks:
            block.missing = len(block.members)
            block.delivered = block.released = False
            if not self.later:  # which waits for them
                block.tickets = []


def device_of(parameters: Sequence[nn.Parameter], engine: Engine) -> OnDevice | None:
    """The device that parameters are on, and what MPI can do there; None for the host. Collective.

    All parameters are on one device.
    """
    where = parameters[0].device if parameters else torch.device("cpu")
    if where.type != "cuda":
        return None
    return OnDevice(where, cuda(where), messages_take_device_memory(engine))


def _late(name: str, block: Block) -> ExchangeError:
    return ExchangeError(
        f"the gradient of parameter {name} grew after {block.label} went on the wire: its "
        "gradient arrives more often than in the first step",
        fix="checkpoint with use_reentrant=False, or exchange after backward with overlap = false",
    )
