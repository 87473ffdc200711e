"""Coded steps for a program: whoever is slow or dead, every step has the exact gradient in time."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from hpctrain.comm.collect import all_gather
from hpctrain.comm.device import Device, Event, cuda
from hpctrain.comm.engine import engine_of
from hpctrain.comm.mailbox import Mailbox
from hpctrain.comm.node import shared_arenas
from hpctrain.data.generators import kept_generators, seed_by
from hpctrain.errors import ExchangeError
from hpctrain.grad import replicas
from hpctrain.grad.coded.aggregator import Aggregator
from hpctrain.grad.coded.assignment import Assignment
from hpctrain.grad.coded.backward import Backward
from hpctrain.grad.coded.catching_up import Stateful, packed, unpack
from hpctrain.grad.coded.cells import Buffer, Kind, Pool, content
from hpctrain.grad.coded.columns import column_bytes
from hpctrain.grad.coded.config import CodedConfig, Hands, LostError
from hpctrain.grad.coded.coordinator import Coordinator, Silence, evaluation_assignment
from hpctrain.grad.coded.desk import ROOT_LOST_S, Desk
from hpctrain.grad.coded.lending import LEAST_BYTES, Arena, Lending, arena_sizes
from hpctrain.grad.coded.record import Record
from hpctrain.grad.coded.schemes import scheme_of
from hpctrain.grad.coded.sums import Node
from hpctrain.grad.coded.worker import Worker, as_blocks
from hpctrain.trace import now_s
from hpctrain.world import World, join, tells_of_deaths

_log = logging.getLogger("hpctrain")

WAIT_S = 5e-4
"""Longest sleep between two polls of a rank that waits."""
LISTEN_S = 1e-2
"""How late a rank that computes may hear that a data block is not needed any more. Shorter, and
listening costs all ranks more than what is computed in vain costs a few."""

HELP_PAUSE = 10.0
"""States for ranks that fell behind take at most one part in so many of the first root's time."""
STOOD_STILL_S = 60.0
"""A rank that is silent for so long counts as dead although the MPI library would have told."""

LEAVING_S = 2.0
"""How long a run that is to be continued waits for silent ranks: it may be ended soon."""

_NONE = object()
"""Stands for a subset where there is none."""

Subset = TypeVar("Subset")


class Coded:
    """Trains a module with data blocks that several workers hold. Construction is collective.

        coded = hpctrain.Coded(model, optimizer)
        while coded.step_number < steps and not coded.is_over:
            if coded.step(read, loss):
                optimizer.step()
        coded.end()

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
        block_bytes: largest model block, unless a parameter is larger; smaller ones are made where
            all roots would not have one, or gradients travel between nodes.
        extra: what else has a state that must be the same on all ranks.
        assignment: who holds which data blocks, if made by hand.

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
        if config.enough > workers:
            raise ExchangeError(
                "coded.enough: there are not so many workers",
                value=config.enough,
                allowed=f"0 to {workers}",
                fix="lower coded.enough, or start more ranks",
                everywhere=True,
            )
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
        device = device_of(module)
        arena = self._open_arena(device)
        pool = self._pool = Pool(
            device.host_memory if device else None, arena.carve if arena else None
        )
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
        self._helps_from_s = 0.0
        self._begun_blocks = -1
        self._round = -1
        self._layout = b""
        """The order of parameters that all agreed on, once columns follow it."""
        self._found_trouble: str | None = None
        self._has_asked = False
        self._has_given_up = False
        """Whether this rank, the first root, left an evaluation."""
        self._is_left = False
        """Whether the run has gone on to its end without this rank."""
        self._shown: list[Event] = []
        """The ends of the copies of results to the device."""

        self.engine.tolerate_deaths()
        lost_s, root_lost_s = config.lost_s, ROOT_LOST_S
        if tells_of_deaths(os.environ):
            lost_s, root_lost_s = max(lost_s, STOOD_STILL_S), STOOD_STILL_S
        self._lost_s = lost_s
        self._desk = Desk(rank, size, hands.roots, pool, root_lost_s=root_lost_s)
        self.mailbox = Mailbox(self.engine, self._desk, LISTEN_S)
        post = self.mailbox.send
        lending = Lending(arena, pool, post) if arena else None
        give = lending.lend_or_send if lending else post
        index = hands.workers.index(rank) if rank in hands.workers else -1
        holds_back = not config.deadline_s  # else what is held back would be missing then
        self.worker = Worker(give, pool, hands.roots, self._scheme, index, holds_back)
        if index >= 0:
            self.worker.own = self._scheme.own(index)
        self.aggregator: Aggregator | None = None
        if rank in hands.roots:
            self.aggregator = Aggregator(
                *(rank, hands.workers, give, pool, self._scheme, self.samples),
                config.deadline_s,
            )
        self.coordinator: Coordinator | None = None
        if rank == hands.roots[0]:
            self.coordinator = Coordinator(
                *(post, pool, hands.workers, size, self._scheme, now_s),
                Silence(config.silent_s, lost_s),
                hands.roots,
                config.relearn,
                self.worker.has_all,
            )
        model_bytes = sum(p.nbytes for p in module.parameters() if p.requires_grad)
        self._backward = Backward(
            *(module, device, pool, self.worker, hands.roots),
            column_bytes(model_bytes, block_bytes, len(hands.roots), len(self.world.nodes) > 1),
        )
        self._record = Record(
            self.engine, hands.workers, self.samples, self.aggregator, self.coordinator
        )
        self._desk.open(
            *(self.mailbox, self.worker, self.aggregator, self.coordinator, lending),
            self._backward.move_copies,
        )
        self.mailbox.open()

    def _open_arena(self, device: Device | None) -> Arena | None:
        """Memory to lend gradients on the host in, on the node of a root. Collective."""
        world, hands = self.world, self.hands
        sizes = arena_sizes(self.module, world.nodes, hands.roots, hands.workers)
        are_here = all_gather(self.engine.control, device is None, label="where gradients are")
        # What is voted on must not lie where a voter may change it.
        if not all(are_here) or max(sizes) < LEAST_BYTES or self.config.sends == "vote":
            return None
        parts = shared_arenas(self.engine, sizes)
        return Arena(world.rank, parts, LEAST_BYTES) if parts else None

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
        worker, backward = self.worker, self._backward
        self._record.rounds(self._round - 1, backward.all_columns)
        self.moved = False
        self.exposed_s = 0.0
        self._begun_blocks = -1
        backward.forget()
        backward.keep_buffers()
        self._round += 1
        self._help_those_behind()
        self._end_copies()
        worker.begin(self._round, self.blocks, backward.all_columns if self._layout else ())
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
            backward.restore_buffers()
        if not self._has_results():
            return False
        self.step_number += 1
        self._record.finished(self.step_number, self._round, worker.arrived.whole_s)
        self._show(worker.arrived.results)
        return True

    def evaluate(
        self,
        blocks: int,
        figures: Callable[[int], Mapping[str, float]],
        unless: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """Sum of figures over blocks of validation data, whoever computes them.

        Args:
            blocks: their number, the same on all ranks.
            figures: of a block; with the same names for all.
            unless: on the first root, whether to give it up; only `end` may follow then.

        Returns:
            The sums; None if this rank had fallen behind, as `step` tells, and goes on with a step,
            or if it was given up.
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
            self._has_given_up = unless() and self.coordinator is not None
            if self._has_given_up:
                return None
            block = worker.next_block()
            if block is None:
                self._wait(unless)
            else:
                found = json.dumps(dict(figures(block))).encode() + b"\n"
                worker.done(worker.finish(), found)
        if not self._has_results():
            return None
        assert worker.arrived.figures is not None
        sums: dict[str, float] = {}
        for line in worker.arrived.figures.splitlines():
            for name, value in json.loads(line).items():
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def ask_to_stop(self) -> None:
        """Have the first root know that the run should end soon. Not collective."""
        if not self._has_asked:
            self._has_asked = True
            self.mailbox.send(self.hands.roots[0], self._pool.message(Kind.STOP, self._round))

    @property
    def is_told_to_stop(self) -> bool:
        """On the first root: whether a rank has asked that the run end soon."""
        return self.coordinator is not None and self.coordinator.is_told_to_stop

    @property
    def continues(self) -> bool:
        """Whether the run is over for now, and to be continued by another launch."""
        return self.worker.continues

    def end(self, continues: bool = False) -> None:
        """The loop is over on this rank: wait until it is for the run. Ranks may leave then.

        Args:
            continues: on the first root, whether another launch is to continue the run.
        """
        coordinator = self.coordinator
        if coordinator and not self._desk.is_closed:
            until_s = now_s() + (LEAVING_S if continues else math.inf)
            self.engine.drive(lambda: coordinator.knows_who_is_left or now_s() >= until_s, WAIT_S)
            has_failed = self._trouble() is not None or self._has_given_up
            with self.engine.exclusive():
                coordinator.end(has_failed, continues)
        self.mailbox.abandon()  # closed at the next meeting of all ranks, after what follows
        self.engine.drive(lambda: self.worker.ended is not None or bool(self._trouble()), WAIT_S)
        # Once it is over, a root may leave; what is saved and continues has no trouble any more.
        if (coordinator and not continues) or self.worker.ended is None:
            self._raise_trouble()
        self._record.rounds(self._round, self._backward.all_columns)
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
            for p in self._backward.parameters
            if p.grad is not None
        ]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    def state_dict(self) -> dict[str, Any]:
        """The agreed order of parameters, so that a resumed run needs not find it anew."""
        return {"layout": self._layout.decode()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the order of an earlier run, before the first step."""
        layout = state.get("layout", "").encode()
        if layout and not self._layout and self._backward.fits(layout):
            self._lay_out(layout)

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
        self._backward.begin(block)
        seed_by(self._seed, self.step_number, block)
        subsets = iter(read(block))
        subset: Any = next(subsets, _NONE)
        computed = worker.is_wanted
        while subset is not _NONE and computed:
            following: Any = next(subsets, _NONE)
            computed = self._compute_subset(subset, loss, around, following is _NONE)
            computed = computed and worker.is_wanted
            subset = following
        if computed and not self._layout:
            computed = self._agree()
        if computed:
            self._backward.finish(self.samples[block] / sum(self.samples))
        else:
            worker.give_up()
        self._backward.forget()
        self._record.block(self.step_number + 1, self._round, block, begun_s, computed)

    def _compute_subset(
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
        self._backward.begin_subset(float(value.detach()), is_last)
        with around():
            value.backward()
        return True

    def _show(self, results: Mapping[int, Buffer]) -> None:
        """Make what came the gradients of the parameters, and the buffers of the module."""
        for column in self._backward.all_columns:
            result = results[column.index]
            if result.covered == 0:
                continue  # an estimate that has nothing to go by
            copied = column.show(result)
            if copied is not None:
                self._shown.append(copied)
        gradients = [results[column.index] for column in self._backward.columns]
        self.covered = min((result.covered for result in gradients), default=1.0)
        self.error = math.sqrt(sum(result.variance for result in gradients))
        if results:
            self.loss = results[0].loss

    # ------------------------------------------------------------------ order of model blocks

    def _agree(self) -> bool:
        """In the first step: propose the order that backward showed, and take the one agreed on.

        Returns:
            Whether there is one: the run may end in its first step.
        """
        desk, proposal = self._desk, self._backward.proposal()
        self.mailbox.send(
            self.hands.roots[0], self._pool.message(Kind.ORDER, self._round, data=proposal)
        )
        worker = self.worker
        self.engine.drive(
            lambda: desk.layout is not None or worker.is_over or bool(self._trouble()), WAIT_S
        )
        if not worker.is_over:
            self._raise_trouble()
        self._take_layout()
        return bool(self._layout)

    def _take_layout(self) -> None:
        if self._desk.layout and not self._layout:
            self._lay_out(self._desk.layout)

    def _lay_out(self, layout: bytes) -> None:
        with self.engine.exclusive():
            self._layout = layout
            self._backward.lay_out(layout)
            columns = self._backward.all_columns
            if self.aggregator:
                self.aggregator.lay_out(columns)
            self.worker.lay_out(columns)

    # ------------------------------------------------------------------ waiting

    def _wait(self, unless: Callable[[], bool] = lambda: False) -> None:
        """Until there is something to compute, or the round is over, or it is to be given up."""
        begun_s = now_s()
        worker = self.worker

        def something() -> bool:
            new_layout = bool(self._desk.layout) and not self._layout
            helps = worker.trains and self._may_help
            is_done = worker.is_over or worker.has_work or new_layout or helps
            return bool(is_done) or unless() or bool(self._trouble())

        self.engine.drive(something, WAIT_S)
        self.exposed_s += now_s() - begun_s
        if not worker.is_over:
            self._raise_trouble()
        self._take_layout()

    def _end_copies(self) -> None:
        """Before a round: no copy from or to the device may use a buffer that is used again."""
        events = [*self._shown, *self._backward.events]
        if events:
            self.engine.drive(lambda: all(event.query() for event in events), WAIT_S)
        self._shown = []
        self._backward.drop_copies()

    def _trouble(self) -> str | None:
        """Why the run cannot go on, if so; once found, it stays."""
        self._found_trouble = self._found_trouble or self._find_trouble()
        return self._found_trouble

    def _find_trouble(self) -> str | None:
        if self.coordinator and self.coordinator.failure:
            return self.coordinator.failure
        if self.aggregator and self.config.sends == "vote":
            with self.engine.exclusive():  # whose thread takes votes in
                undecided = self.aggregator.undecided(self._desk.gone(self._lost_s))
            for column, node in undecided:
                return (
                    f"the copies of model block {column}, data blocks {node.lo} to {node.hi - 1}, "
                    "differ, and no majority agrees"
                )
        return self._desk.lost_root()

    def _raise_trouble(self) -> None:
        trouble = self._trouble()
        if trouble is not None:
            raise LostError(
                f"step {self.step_number + 1} cannot be completed: {trouble}",
                fix="start the job again: it continues from the last checkpoint; raise "
                "coded.copies to tolerate more",
                everywhere=True,
            )

    def _name_wrong(self, worker: int, column: int, node: Node) -> None:
        rank = self.hands.workers[worker]
        self.wrong[rank] += 1
        _log.warning(
            "rank %d sent a wrong gradient of model block %d, data blocks %d to %d, by step %d",
            *(rank, column, node.lo, node.hi - 1, self.step_number + 1),
        )

    # ------------------------------------------------------------------ ranks that fell behind

    def _help_those_behind(self) -> None:
        """On the first root, in a step: send the state before it to ranks that need it.

        At once: the others may hold nothing of what those are to compute.
        """
        if self.coordinator is None or not self._may_help:
            return
        begun_s = now_s()
        self._backward.restore_buffers()
        with self.engine.exclusive():
            behind = self.coordinator.take_behind()
        if behind:
            state = packed(self.module, self.optimizer, self._extra, self.step_number)
            for rank in behind:
                _log.info("rank %d fell behind: it goes on at step %d", rank, self.step_number + 1)
                self.mailbox.send(rank, self._pool.message(Kind.STATE, self._round, data=state))
        self._helps_from_s = now_s() + HELP_PAUSE * (now_s() - begun_s)

    @property
    def _may_help(self) -> bool:
        """Whether a rank waits for a state, and the last one was not just now."""
        waits = self.coordinator is not None and bool(self.coordinator.behind)
        return waits and now_s() >= self._helps_from_s

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
        self._desk.is_closed = True
        gone = as_blocks(self.worker.ended or b"")
        if gone:
            self.mailbox.dead.update(gone)
            self.engine.leave_behind()


def device_of(module: nn.Module) -> Device | None:
    """The device that the module's parameters are on; None for the host."""
    where = next((p.device for p in module.parameters() if p.requires_grad), torch.device("cpu"))
    return cuda(where) if where.type == "cuda" else None
