"""Coded steps for a program: whoever is slow or dead, every step has the exact gradient in time."""

from __future__ import annotations

import json
import logging
import math
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from hpctrain.comm.device import Device, Event, cuda
from hpctrain.comm.engine import engine_of
from hpctrain.comm.mailbox import Mailbox
from hpctrain.data.generators import kept_generators, seed_by
from hpctrain.errors import ExchangeError
from hpctrain.grad import replicas
from hpctrain.grad.blocks import partition
from hpctrain.grad.coded.aggregator import Aggregator
from hpctrain.grad.coded.assignment import Assignment
from hpctrain.grad.coded.catching_up import Stateful, packed, unpack
from hpctrain.grad.coded.cells import HEADER_BYTES, Buffer, Kind, Pool, balanced, content
from hpctrain.grad.coded.columns import BufferColumn, GradientColumn, buffer_columns
from hpctrain.grad.coded.config import CodedConfig, Hands, LostError
from hpctrain.grad.coded.coordinator import Coordinator, Silence, evaluation_assignment
from hpctrain.grad.coded.schemes import scheme_of
from hpctrain.grad.coded.sums import Node
from hpctrain.grad.coded.worker import Worker, as_blocks
from hpctrain.trace import CODED, DATA_BLOCKS, now_s
from hpctrain.world import World, join

_log = logging.getLogger("hpctrain")

BEAT_S = 0.25
"""How often a rank says that it lives, if it has nothing else to say."""
ROOT_LOST_S = 10.0
"""A root that is silent for so long is dead, where the MPI library does not say."""
WAIT_S = 5e-4
"""Longest sleep between two polls of a rank that waits."""
LISTEN_S = 2e-2
"""How late a rank that computes may hear that a data block is not needed any more. Shorter, and
listening costs all ranks more than what is computed in vain costs a few."""

_NONE = object()
"""Stands for a subset where there is none."""

Subset = TypeVar("Subset")


class Coded:
    """Trains a module with data blocks that several workers hold. Construction is collective.

        coded = hpctrain.Coded(model, optimizer)
        while coded.step_number < steps:
            coded.step(read, loss)
            optimizer.step()

    Every rank runs this loop; ranks that fall behind are moved on to where the others are, so that
    `step_number` may jump. Gradients, and so parameters, have the same bits on all ranks, for any
    number of ranks, stragglers and dead workers, as long as data blocks have on any worker.

    Args:
        module: on the host or on one CUDA device.
        optimizer: of the module's parameters; its state is given to ranks that fell behind.
        config: who holds and computes what.
        world: the ranks; by default those of `hpctrain.join()`.
        samples: number of samples of each data block, or what gives them for a number of data
            blocks; equal by default.
        seed: of what is drawn while a data block is computed, such as dropout.
        block_bytes: largest model block, unless a parameter is larger.
        extra: what else has a state that must be the same on all ranks.

    Raises:
        MismatchError: the module is not the same on all ranks.
        ExchangeError: there are too few ranks, or too few copies of data blocks.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: CodedConfig | None = None,
        *,
        world: World | None = None,
        samples: Sequence[int] | Callable[[int], Sequence[int]] | None = None,
        seed: int = 0,
        block_bytes: int = 1 << 20,
        extra: Stateful | None = None,
        assignment: Assignment | None = None,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.config = config = config or CodedConfig()
        self.world = world or join()
        self._seed = seed
        self._block_bytes = block_bytes
        self._extra = extra
        rank, size = self.world.rank, self.world.size
        hands = self.hands = Hands.of(config, size)
        workers = len(hands.workers)
        copies = min(config.copies, workers)
        self._scheme = scheme_of(
            config.sends, config.placement, config.blocks, workers, copies, assignment
        )
        self._scheme.wrong = self._name_wrong
        self.assignment = self._scheme.assignment
        self.blocks = self.assignment.blocks
        enough = config.enough or self._scheme.fewest
        self.certificate = self._scheme.certificate(enough)
        if callable(samples):
            samples = samples(self.blocks)
        self.samples = tuple(samples) if samples else (1,) * self.blocks
        if len(self.samples) != self.blocks or min(self.samples) < 0 or not sum(self.samples):
            raise ExchangeError(
                "samples of data blocks do not fit",
                value=f"{len(self.samples)} numbers, {sum(self.samples)} samples in all",
                allowed=f"{self.blocks} numbers from 0 on, not all of them 0",
                everywhere=True,
            )

        self.engine = engine_of(self.world)
        control = self.engine.control
        replicas.check_same_model(control, self.world, module)
        replicas.broadcast_state(control, module)
        self._named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._device = device_of([p for _, p in self._named])
        self._pool = Pool(self._device.host_memory if self._device else None)
        self._columns: list[GradientColumn] = []
        self._buffers = buffer_columns(module, hands.roots[0])
        self._layout: bytes | None = None
        self.step_number = 0
        """Steps done, by the run as a whole."""
        self.moved = False
        """Whether the last call did not compute but was moved on to where the others are."""
        self.loss = 0.0
        """The loss of the last step, summed over all data blocks."""
        self.covered = 1.0
        """Share of the samples that the last gradient was made from; below 1 after a deadline."""
        self.error = 0.0
        """Standard error of the last gradient as an estimate, as a Euclidean norm; NaN if too
        little was there to tell."""
        self.wrong: Counter[int] = Counter()
        """By rank: how often it sent something else than most. On a root."""
        self.exposed_s = 0.0
        """How long this rank had nothing to compute in the last step."""
        self._begun_blocks = -1
        self._round = -1
        self._trouble: str | None = None
        self._ended = False
        self._is_left = False
        """Whether the run has gone on to its end without this rank."""
        self._finished: dict[int, tuple[int, float]] = {}
        """By round: the step that it was, and when its last sum was there."""
        self._heard_s = dict.fromkeys(hands.roots, now_s())
        self._beaten_s = 0.0
        self._ticked_s = now_s()

        self.engine.tolerate_deaths()
        self._mailbox = Mailbox(self.engine, _Desk(self), LISTEN_S)
        post = self._mailbox.send
        index = hands.workers.index(rank) if rank in hands.workers else -1
        holds_back = not config.deadline_s  # else what is held back would be missing then
        self.worker = Worker(post, self._pool, hands.roots, self._scheme, index, holds_back)
        if index >= 0:
            self.worker.own = self._scheme.own(index)
        self.aggregator: Aggregator | None = None
        if rank in hands.roots:
            self.aggregator = Aggregator(
                *(rank, hands.workers, post, self._pool, self._scheme, self.samples),
                config.deadline_s,
            )
        self.coordinator: Coordinator | None = None
        if rank == hands.roots[0]:
            self.coordinator = Coordinator(
                *(post, self._pool, hands.workers, size, self._scheme, now_s),
                Silence(config.silent_s, config.lost_s),
                hands.roots,
                config.relearn,
            )
        self._mailbox.open()
        self._order: dict[int, None] = {}
        self._arrivals = [0] * len(self._named)
        self._due: list[int] = []
        self._block = _BlockInWork(-1)
        self._column_of: list[int] = []
        self._copies: deque[tuple[Event, int, Buffer, int]] = deque()
        self._shown: list[Event] = []
        """The ends of the copies of results to the device."""
        this = weakref.ref(self)
        for index, (_, parameter) in enumerate(self._named):
            parameter.register_post_accumulate_grad_hook(partial(_hook, this, index))

    # ------------------------------------------------------------------ a step

    def step(
        self,
        read: Callable[[int], Iterable[Subset]],
        loss: Callable[[Subset], torch.Tensor],
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> bool:
        """Compute what this rank should, and wait until the gradient of all data blocks is there.

        Afterwards every parameter's `grad` is the sum over all data blocks; it is valid until the
        next step. Not collective: ranks that are late or dead keep nobody waiting.

        Args:
            read: gives the subsets of a data block of the present step, one after another; a data
                block that is not needed any more is given up between two.
            loss: of a subset, with its weight in the whole step, so that all losses of a step add
                up to the mean over its samples.
            around: makes a context manager in which each backward runs.

        Returns:
            Whether there is a gradient. If not, this rank had fallen behind: module, optimizer and
            `step_number` are now those of the others; or the run is over.

        Raises:
            LostError: a root is dead, or data blocks were held by dead workers alone. Module and
                optimizer are as the last step left them.
        """
        if self._is_left:
            return False
        self._trace_rounds(self._round - 1)
        self.moved = False
        self.exposed_s = 0.0
        self._begun_blocks = -1
        for _, parameter in self._named:
            parameter.grad = None
        for buffers in self._buffers:
            buffers.keep()
        self._round += 1
        self._help_those_behind()
        worker = self.worker
        self._end_copies()
        worker.begin(self._round, self.blocks, self._all_columns if self._columns else ())
        try:
            with kept_generators():
                while not worker.is_over:
                    block = worker.next_block()
                    if block is None:
                        self._wait()
                        self._help_those_behind()
                    else:
                        self._compute(block, read, loss, around)
        finally:  # whatever comes instead of results finds the module as it was
            for buffers in self._buffers:
                buffers.restore()
        if not self._has_results():
            return False
        self._finished[self._round] = self.step_number + 1, worker.arrived.whole_s
        results = worker.arrived.results
        for column in self._all_columns:
            result = results[column.index]
            if result.covered == 0:
                continue  # an estimate that has nothing to go by
            copied = column.show(result)
            if copied is not None:
                self._shown.append(copied)
        gradients = [results[column.index] for column in self._columns]
        self.covered = min((result.covered for result in gradients), default=1.0)
        self.error = math.sqrt(sum(result.variance for result in gradients))
        if results:
            self.loss = results[0].loss
        self.step_number += 1
        return True

    def evaluate(
        self, blocks: int, figures: Callable[[int], Mapping[str, float]]
    ) -> dict[str, float] | None:
        """Sum of figures over blocks of validation data, whoever computes them.

        Args:
            blocks: their number, the same on all ranks.
            figures: of a block; with the same names for all.

        Returns:
            The sums; None if this rank had fallen behind, as `step` tells. It goes on with a step.
        """
        if self.moved:
            return None
        self._round += 1
        workers = self.hands.workers
        own: Sequence[int] = ()
        if self.world.rank in workers:
            index = workers.index(self.world.rank)
            own = evaluation_assignment(blocks, len(workers)).owned(index)
        worker = self.worker
        self._end_copies()
        worker.begin(self._round, blocks, None, own)
        while not worker.is_over:
            block = worker.next_block()
            if block is None:
                self._wait()
            else:
                worker.done(json.dumps(dict(figures(block))).encode() + b"\n")
        if not self._has_results():
            return None
        assert worker.arrived.figures is not None
        sums: dict[str, float] = {}
        for line in worker.arrived.figures.splitlines():
            for name, value in json.loads(line).items():
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def end(self) -> None:
        """The loop is over on this rank: wait until it is for the run. Ranks may leave then."""
        coordinator = self.coordinator
        if coordinator and not self._ended:
            self.engine.drive(lambda: coordinator.knows_who_is_left, WAIT_S)
            with self.engine.exclusive():
                coordinator.end(self._has_trouble())
        self._mailbox.abandon()  # closed at the next meeting of all ranks, after what follows
        self.engine.drive(lambda: self.worker.ended is not None or self._has_trouble(), WAIT_S)
        self._raise_trouble()
        self._trace_rounds(self._round)
        self._leave()

    @property
    def summary(self) -> str:
        """Who does what, in one line."""
        config, workers = self.config, len(self.hands.workers)
        return (
            f"{self.blocks} data blocks on {workers} workers, {self.assignment.copies} copies "
            f"({self._scheme.title}), summed up by {len(self.hands.roots)} {config.root} root(s); "
            f"{self.certificate}"
        )

    @property
    def is_wanted(self) -> bool:
        """Whether the data block that this rank computes is still needed."""
        return self.worker.is_wanted

    @property
    def worked_on(self) -> int:
        """How many data blocks this rank has begun in the present step, before this one."""
        return self._begun_blocks

    def gradient_norm(self) -> float:
        """Euclidean norm of all gradients of the step; the same bits on all ranks."""
        norms = [
            torch.linalg.vector_norm(
                p.grad, dtype=torch.complex128 if p.is_complex() else torch.float64
            )
            for _, p in self._named
            if p.grad is not None
        ]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    def state_dict(self) -> dict[str, Any]:
        """The agreed order of parameters, so that a resumed run needs not find it anew."""
        return {"layout": self._layout.decode() if self._layout else ""}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the order of an earlier run, before the first step."""
        if state.get("layout") and not self._columns:
            order, _ = json.loads(state["layout"])
            if sorted(order) == list(range(len(self._named))):
                self._lay_out(state["layout"].encode())

    # ------------------------------------------------------------------ data blocks

    def _compute(
        self,
        block: int,
        read: Callable[[int], Iterable[Subset]],
        loss: Callable[[Subset], torch.Tensor],
        around: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Compute the gradient of a data block, unless it turns out that it is not needed."""
        begun_s = now_s()
        worker = self.worker
        self._begun_blocks += 1
        work = self._block = _BlockInWork(block)
        for buffers in self._buffers:
            buffers.restore()
        seed_by(self._seed, self.step_number, block)
        subsets = iter(read(block))
        subset: Any = next(subsets, _NONE)
        computed = worker.is_wanted
        while subset is not _NONE and computed:
            following: Any = next(subsets, _NONE)
            computed = self._backward(subset, loss, around, following is _NONE)
            computed = computed and worker.is_wanted
            subset = following
        if computed:
            self._finish(work)
            worker.done()
        else:
            worker.give_up()
        for _, parameter in self._named:
            parameter.grad = None
        work.streams = False
        self._trace_block(block, begun_s, computed)

    def _backward(
        self,
        subset: Subset,
        loss: Callable[[Subset], torch.Tensor],
        around: Callable[[], AbstractContextManager[None]],
        is_last: bool,
    ) -> bool:
        """Forward and backward of a subset; whether the data block was still needed between."""
        value = loss(subset)
        if not self.worker.is_wanted:
            return False
        work = self._block
        work.loss += float(value.detach())
        if is_last and self._columns:
            work.streams = True
            self._due = list(self._arrivals)
            for column in self._columns:
                column.missing = len(column.members)
        if not self._columns:  # the order and number of gradients are those of one backward
            self._order.clear()
            self._arrivals = [0] * len(self._named)
        with around():
            value.backward()
        return True

    def _finish(self, work: _BlockInWork) -> None:
        """Put in what hooks have not: all of it in the first step, or unused parameters."""
        if not self._columns:
            self._agree()
        for column in self._columns:
            if column.index not in work.packed:
                self._put(column, work)
        for buffers in self._buffers:
            cell = self._pool.take(buffers.nbytes)
            buffers.pack(cell, work.number, self.samples[work.number] / sum(self.samples))
            cell.loss = 0.0
            self.worker.put(buffers.index, cell, work.number)

    def _arrived(self, index: int) -> None:
        """Backward has accumulated the gradient of a parameter, perhaps not for the last time."""
        if not self._columns:
            self._order.pop(index, None)
            self._order[index] = None
            self._arrivals[index] += 1
            return
        work = self._block
        if not work.streams:
            return
        column = self._columns[self._column_of[index]]
        self._due[index] -= 1
        if self._due[index] == 0:
            column.missing -= 1
            if column.missing == 0:
                self._put(column, work)
        elif column.index in work.packed:
            raise ExchangeError(
                f"the gradient of parameter {self._named[index][0]} grew after it was sent: its "
                "gradient arrives more often than in the first step",
                fix="checkpoint with use_reentrant=False",
            )

    def _put(self, column: GradientColumn, work: _BlockInWork) -> None:
        work.packed.add(column.index)
        left = self.worker.take_left(column.index, work.number) if column.adds else None
        if left is not None:
            column.pack_onto(left)
            left.loss += work.loss
            self.worker.put_sum(column.index, left, work.number)
            return
        cell = self._pool.take(column.nbytes)
        copied = column.pack(cell)
        cell.loss = work.loss
        if copied is None:
            self.worker.put(column.index, cell, work.number)
        else:
            self._copies.append((copied, column.index, cell, work.number))
            self._move_copies()

    # ------------------------------------------------------------------ order of model blocks

    @property
    def _all_columns(self) -> list[GradientColumn | BufferColumn]:
        return [*self._columns, *self._buffers]

    def _agree(self) -> None:
        """In the first step: propose the order that backward showed, and take the one agreed on."""
        seen = list(self._order)
        unseen = [i for i in reversed(range(len(self._named))) if i not in self._order]
        # Of a data block without samples, nothing is known: 0 never sends before the end.
        arrivals = [max(1, n) if seen else 0 for n in self._arrivals]
        proposal = json.dumps([seen + unseen, arrivals]).encode()
        self._mailbox.send(
            self.hands.roots[0], self._pool.message(Kind.ORDER, self._round, data=proposal)
        )
        self.engine.drive(lambda: self._layout is not None or self._has_trouble(), WAIT_S)
        self._raise_trouble()
        self._take_layout()

    def _take_layout(self) -> None:
        if self._layout is not None and not self._columns:
            self._lay_out(self._layout)

    def _lay_out(self, layout: bytes) -> None:
        """Make the columns. The same on all ranks."""
        order, self._arrivals = json.loads(layout)
        parameters = [p for _, p in self._named]
        groups = partition(
            order,
            [p.numel() * p.element_size() for p in parameters],
            [p.dtype for p in parameters],
            self._block_bytes,
            self._block_bytes,  # a short first one would begin nothing: sums wait for the last
        )
        sizes = [sum(parameters[i].numel() for i in group) for group in groups]
        root_of = balanced(sizes, len(self.hands.roots))
        columns = []
        self._column_of = [0] * len(parameters)
        for number, group in enumerate(groups):
            names, members = [self._named[i][0] for i in group], [parameters[i] for i in group]
            root = self.hands.roots[root_of[number]]
            columns.append(GradientColumn(number, group, names, members, root, self._device))
            for index in group:
                self._column_of[index] = number
        for offset, buffers in enumerate(self._buffers):
            buffers.index = len(columns) + offset
        with self.engine.exclusive():
            self._columns, self._layout = columns, layout
            if self.aggregator:
                self.aggregator.lay_out(self._all_columns)
            self.worker.lay_out(self._all_columns)

    # ------------------------------------------------------------------ waiting

    def _wait(self) -> None:
        """Until there is something to compute, or the round is over."""
        begun_s = now_s()
        worker = self.worker

        def something() -> bool:
            self._move_copies()
            new_layout = self._layout is not None and not self._columns
            helps = self.coordinator is not None and self.coordinator.behind and worker.trains
            is_done = worker.is_over or worker.has_work or new_layout or helps
            return bool(is_done) or self._has_trouble()

        self.engine.drive(something, WAIT_S)
        self.exposed_s += now_s() - begun_s
        self._raise_trouble()
        self._take_layout()

    def _move_copies(self) -> None:
        """Put in cells whose copies from the device have ended, in order."""
        while self._copies and self._copies[0][0].query():
            _, column, cell, block = self._copies.popleft()
            self.worker.put(column, cell, block)

    def _end_copies(self) -> None:
        """Before a round: no copy from or to the device may use a buffer that is used again.

        What is still copied from it came too late for the last round.
        """
        events = [*self._shown, *(event for event, *_ in self._copies)]
        if events:
            self.engine.drive(lambda: all(event.query() for event in events), WAIT_S)
        self._shown = []
        while self._copies:
            self._pool.drop(self._copies.popleft()[2])

    def _has_trouble(self) -> bool:
        if self.coordinator and self.coordinator.failure:
            self._trouble = self.coordinator.failure
        if self.aggregator and self.config.sends == "vote" and self._trouble is None:
            for column, node in self.aggregator.undecided(self._mailbox.dead):
                self._trouble = (
                    f"the copies of model block {column}, data blocks {node.lo} to {node.hi - 1}, "
                    "differ, and no majority agrees"
                )
        if self._trouble is None and self.world.rank not in self.hands.roots:
            for root, heard_s in self._heard_s.items():
                if now_s() - heard_s > ROOT_LOST_S:
                    self._trouble = f"rank {root}, which adds up gradients, is silent"
        return self._trouble is not None

    def _raise_trouble(self) -> None:
        if self._has_trouble():
            assert self._trouble is not None
            raise LostError(
                f"step {self.step_number + 1} cannot be completed: {self._trouble}",
                fix="start the job again: it continues from the last checkpoint; raise "
                "coded.copies to tolerate more",
                everywhere=True,
            )

    def _name_wrong(self, worker: int, column: int, node: Node) -> None:
        rank = self.hands.workers[worker]
        self.wrong[rank] += 1
        _log.warning(
            "rank %d sent a wrong gradient of model block %d, data blocks %d to %d, in step %d",
            *(rank, column, node.lo, node.hi - 1, self.step_number + 1),
        )

    # ------------------------------------------------------------------ ranks that fell behind

    def _help_those_behind(self) -> None:
        """On the first root, in a step: send the state before it to ranks that need it.

        At once: the others may hold nothing of what those are to compute.
        """
        if self.coordinator is None or not self.coordinator.behind:
            return
        for buffers in self._buffers:
            buffers.restore()
        with self.engine.exclusive():
            behind = self.coordinator.take_behind()
        if behind:
            state = packed(self.module, self.optimizer, self._extra, self.step_number)
            for rank in behind:
                _log.info("rank %d fell behind: it goes on at step %d", rank, self.step_number + 1)
                self._mailbox.send(rank, self._pool.message(Kind.STATE, self._round, data=state))

    def _has_results(self) -> bool:
        """Whether the round gave what it should; else go on where the others are."""
        worker = self.worker
        self.moved = not worker.is_whole
        if worker.is_whole:
            return True
        buffer = worker.take_state()
        if buffer is None:
            self._is_left = True
            return False
        self.step_number = unpack(content(buffer), self.module, self.optimizer, self._extra)
        self._round = buffer.round - 1
        self._pool.drop(buffer)
        return False

    @property
    def is_over(self) -> bool:
        """Whether the run has ended without this rank, which had fallen behind."""
        return self.worker.ended is not None

    def _leave(self) -> None:
        self._ended = True
        gone = as_blocks(self.worker.ended or b"")
        if gone:
            self._mailbox.dead.update(gone)
            self.engine.leave_behind()

    def _beat(self, now: float) -> None:
        """Say that this rank lives, to whom it has said nothing for a while."""
        roots, rank = self.hands.roots, self.world.rank
        if self._ended:
            return
        for other in range(self.world.size) if rank in roots else roots[:1]:
            said_s = self._mailbox.sent_s.get(other, 0.0)
            if other != rank and other not in self._mailbox.dead and now - said_s > BEAT_S:
                self._mailbox.send(other, self._pool.message(Kind.BEAT, self._round))

    # ------------------------------------------------------------------ trace

    def _trace_block(self, block: int, begun_s: float, computed: bool) -> None:
        self.world.trace.add(
            *(DATA_BLOCKS, f"data block {block}", begun_s, now_s()),
            step=self.step_number + 1,
            round=self._round,
            block=block,
            computed=computed,
        )

    def _trace_rounds(self, last: int) -> None:
        """On the first root: record rounds up to `last`, of which late news have come by now."""
        if self.coordinator is None or self.aggregator is None:
            return
        ranks = self.hands.workers
        with self.engine.exclusive():
            ended = [e for e in self.coordinator.ended if e.number <= last]
            self.coordinator.ended = [e for e in self.coordinator.ended if e.number > last]
            tallies = [self.aggregator.tallies.pop(e.number, None) for e in ended]
        here = [c for c in self._all_columns if c.root == self.world.rank]
        for round_, tally in zip(ended, tallies, strict=True):
            step, whole_s = self._finished.pop(round_.number, (0, 0.0))
            if not step or tally is None or not self.world.trace.active:
                continue
            done_by = {block: ranks[worker] for block, worker in round_.done_by.items()}
            sources = [tally.sources.get(b, done_by.get(b, -1)) for b in range(self.blocks)]
            if -1 in sources:
                continue  # an estimate: there is no time by which all data blocks were there
            self.world.trace.add(
                *(CODED, "step", round_.begun_s, whole_s),
                step=step,
                round=round_.number,
                holders=[[ranks[w] for w in holders] for holders in round_.assignment.holders],
                sources=sources,
                redundant=[[block, ranks[worker]] for block, worker in round_.redundant],
                vectors=tally.nbytes / sum(column.nbytes for column in here),
                samples=list(self.samples),
                dead=sorted(self.coordinator.dead),
            )


class _BlockInWork:
    """The data block that is being computed."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.loss = 0.0
        self.packed: set[int] = set()
        self.streams = False
        """Whether backward of its last subset runs, so that what is complete goes out."""


class _Desk:
    """Hands messages to whom they are for; see comm.mailbox.Postman."""

    def __init__(self, coded: Coded) -> None:
        self._coded = coded

    def room(self, nbytes: int) -> Buffer:
        """A buffer for a message."""
        return self._coded._pool.take(nbytes - HEADER_BYTES)

    def came(self, source: int, letter: Any) -> None:
        """A message is there."""
        coded, kind = self._coded, letter.kind
        if source in coded._heard_s:
            coded._heard_s[source] = now_s()
        if kind is Kind.CELL:
            assert coded.aggregator
            coded.aggregator.receive(source, letter)
        elif kind in (Kind.JOIN, Kind.DONE, Kind.ORDER, Kind.BEAT, Kind.BEHIND):
            if kind is Kind.JOIN and letter.hi and coded.aggregator:
                coded.aggregator.joined(source, letter.round, now_s())
            if coded.coordinator:
                coded.coordinator.receive(source, letter)
            else:
                coded._pool.drop(letter)
        elif kind is Kind.LAYOUT:
            coded._layout = coded._layout or content(letter)
            coded._pool.drop(letter)
        else:
            coded.worker.receive(letter)

    def sent(self, letter: Any) -> None:
        """A message has left."""
        self._coded._pool.drop(letter)

    def died(self, rank: int) -> None:
        """A rank is dead."""
        coded = self._coded
        if coded.coordinator:
            coded.coordinator.died(rank)
        elif rank in coded.hands.roots and not coded._ended:
            coded._trouble = f"rank {rank}, which adds up gradients, is dead"

    def tick(self, now: float) -> None:
        """Look at the clock: say that this rank lives, and see whether others need help."""
        coded = self._coded
        if coded.coordinator:
            coded.coordinator.tick(now)
        if coded.aggregator:
            coded.aggregator.tick(now)
        deaf_s, coded._ticked_s = now - coded._ticked_s, now
        if deaf_s > BEAT_S:  # it is not the others that were silent
            coded._heard_s = {root: s + deaf_s for root, s in coded._heard_s.items()}
        if now - coded._beaten_s > BEAT_S:
            coded._beaten_s = now
            coded._beat(now)


def _hook(coded: weakref.ReferenceType[Coded], index: int, parameter: torch.Tensor) -> None:
    this = coded()
    if this is not None:
        this._arrived(index)


def device_of(parameters: Sequence[nn.Parameter]) -> Device | None:
    """The device that parameters are on; None for the host."""
    where = parameters[0].device if parameters else torch.device("cpu")
    return cuda(where) if where.type == "cuda" else None
