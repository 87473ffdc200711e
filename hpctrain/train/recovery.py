"""Going on without ranks that have died, where the MPI library lets the others live.

Every rank that is left gets a `RankDiedError` where it waits next. It gives its engine up and joins
the others in a smaller world, where they compare how far they are. The furthest step that one of
them has taken as a whole is where all go on: who is behind gets the state of one who is not. From
there on the run is one that was resumed on so many ranks, but that nothing is read or made anew.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hpctrain.comm.collect import all_gather, broadcast
from hpctrain.comm.engine import engine_of, give_up_engine
from hpctrain.comm.node import leave_windows
from hpctrain.data.generators import seed_generators
from hpctrain.errors import RankDiedError, StallError, TrainingError
from hpctrain.grad.replicas import load_gathered
from hpctrain.trace import COMPUTE, now_s
from hpctrain.train import resume
from hpctrain.train.loop import Trainer
from hpctrain.train.optimizer import build_optimizer
from hpctrain.train.shared_loop import SharedTrainer
from hpctrain.train.standing import Standing, leader_of
from hpctrain.world import World, fail, survivors_of

_log = logging.getLogger("hpctrain")


def run(trainer: Trainer | SharedTrainer) -> dict[str, float]:
    """Train to the end, with the ranks that are left if some die. As `Trainer.run`.

    Raises:
        RankDiedError: ranks died where the others cannot be told together, as in the coded mode.
        TrainingError: on all ranks that are left, where they cannot go on.
    """
    recovers = trainer.may_recover
    while True:
        try:
            return trainer.run()
        except RankDiedError:
            if not recovers or isinstance(trainer, SharedTrainer):
                raise
        _recover(trainer)


def _recover(trainer: Trainer) -> None:
    """Have the ranks that are left go on together, whoever dies meanwhile. Collective."""
    begun_s, before = now_s(), trainer.world
    step = before.position.step
    with _limit(trainer):
        while True:
            try:
                _regroup(trainer)
                took_s = max(all_gather(trainer.control, now_s() - begun_s, label="recovery"))
                break
            except RankDiedError as another:
                _log.warning("while ranks were joining again: %s", another)
    trainer.world.trace.add(COMPUTE, "recovery", begun_s, now_s(), step=trainer.step_number)
    text = _text(before, trainer.world, step, trainer.step_number, took_s)
    trainer.recording.recovery(trainer.step_number, took_s, text)


def _text(
    before: World, after: World, died_in: int | None, goes_on_from: int, took_s: float
) -> str:
    """What is told of a recovery."""
    left = {seat.launched_as for seat in after.seats}
    dead = [n for n, seat in enumerate(before.seats) if seat.launched_as not in left]
    left_as = [n for n, seat in enumerate(before.seats) if seat.launched_as in left]
    who = ", ".join(map(before.name_of, dead))
    return (
        f"{who} died in step {died_in}; ranks {', '.join(map(str, left_as))} go on as "
        f"{after.size} rank(s) from step {goes_on_from}, after {took_s:.2f} s"
    )


@contextmanager
def _limit(trainer: Trainer) -> Iterator[None]:
    """End the run if the block takes longer than any operation may, whatever it is caught in."""
    limit_s = trainer.settings.exchange.deadline_s

    def give_up() -> None:
        error = StallError(
            f"ranks that are left have not joined again for {limit_s:.0f} s",
            fix="start the job again: it goes on from the last checkpoint",
        )
        fail(trainer.world, error)

    timer = threading.Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _regroup(trainer: Trainer) -> None:
    """Continue in a world of the ranks that are left. Collective among them."""
    old = trainer.world
    old.position.phase = "recovering"
    later = trainer.parallel.exchange.later
    if later and not later.salvage():
        trainer.undo_step()
    trainer.let_checkpoint_go()
    old.trace.close()
    give_up_engine(old)
    leave_windows()
    trainer.world = world = survivors_of(old)
    engine = engine_of(world)
    engine.deadline_s = trainer.settings.exchange.deadline_s
    engine.leave_behind()
    trainer.control = engine.control
    if world.size < trainer.settings.run.min_ranks:
        raise TrainingError(
            "ranks have died, and fewer are left than the run is to go on with",
            value=world.size,
            allowed=f"run.min_ranks = {trainer.settings.run.min_ranks} or more",
            fix="start the job again: it goes on from the last checkpoint",
            everywhere=True,
        )
    mine = trainer.standing(old.rank)
    standings: list[Standing] = all_gather(trainer.control, mine, label="where ranks stand")
    _join_exchange(trainer, _take_state(trainer, standings))
    trainer.record_anew()


def _take_state(trainer: Trainer, standings: Sequence[Standing]) -> dict[str, Any]:
    """Have what the furthest rank has: step, model and optimizer. Collective.

    Returns:
        What the exchange of gradients had agreed on.
    """
    channel, model = trainer.control, trainer.parts.model
    leader = leader_of(standings)
    step = standings[leader].step
    is_there = standings[channel.rank].step == step
    if is_there and trainer.before_step:
        trainer.before_step.put_back(step)
    agreed = trainer.parallel.exchange.state_dict()
    order: dict[str, Any] = broadcast(channel, agreed, root=leader, label="order of blocks")
    gathered = trainer.optimizer.state_dict() if is_there else {}
    if any(each.step != step for each in standings):
        state = (model.state_dict(), gathered) if channel.rank == leader else None
        everything, others = broadcast(channel, state, root=leader, label="state of the run")
        if not is_there:
            own = _own_buffers(trainer)
            model.load_state_dict(everything)
            resume.restore_local_buffers(model, own)
            gathered = others
    trainer.stand_with(standings, step)
    for parameter in model.parameters():
        parameter.grad = None  # part of a sum that will never be whole
    trainer.optimizer = build_optimizer(
        [p for p in model.parameters() if p.requires_grad], trainer.settings.optimizer
    )
    load_gathered(trainer.optimizer, gathered)
    return order


def _own_buffers(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Buffers that differ from rank to rank, if there are such."""
    if trainer.settings.exchange.buffers != "local":
        return {}
    buffers = resume.local_buffers(trainer.parts.model)
    return {name: buffer.detach().clone() for name, buffer in buffers.items()}


def _join_exchange(trainer: Trainer, order: Mapping[str, Any]) -> None:
    """Exchange gradients among the ranks that are left. Collective."""
    world = trainer.world
    own = _own_buffers(trainer)
    trainer.open_exchange()
    resume.restore_local_buffers(trainer.parts.model, own)
    trainer.parallel.exchange.load_state_dict(dict(order))
    trainer.batches.deal(world.rank, world.size)
    # As after resuming on another number of ranks.
    seed = trainer.settings.seed + 1 + world.rank + 1_000_003 * trainer.step_number
    seed_generators(seed)
