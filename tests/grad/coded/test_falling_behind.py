"""Ranks that are late or fall behind, in steps and in evaluations; see also test_deaths."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grad.coded.side_by_side import (
    POLL_S,
    Run,
    Subset,
    adamw,
    loss_of,
    make,
)

from hpctrain.grad.coded import exchange
from hpctrain.world import World

pytestmark = pytest.mark.mpi


@pytest.fixture(autouse=True)
def lends_also_what_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "LEAST_BYTES", 1)


# ---------------------------------------------------------------------- ranks that are late


@pytest.mark.parametrize("who", ["the last rank", "rank 0", "each in turn"])
def test_what_a_late_rank_should_compute_is_computed_by_others(world: World, who: str) -> None:
    """It is not done with any data block before somebody else is."""
    if world.size == 1:
        pytest.skip("there are no others")
    steps = 12

    def loss(subset: Subset) -> torch.Tensor:
        late = {"the last rank": world.size - 1, "rank 0": 0}.get(who)
        if world.rank == (run.coded.step_number % world.size if late is None else late):
            while run.coded.is_wanted:
                time.sleep(POLL_S)
        return loss_of(run.module, subset)

    run = Run(world, make("convolution with batch norm"), loss=loss, copies=2)
    run.to(steps)
    if world.rank == 0:
        assert run.checked == steps


def far_behind(
    world: World,
    folder: Path,
    first_step: int,
    read: Callable[[Run], object] = lambda run: None,
    **config: Any,
) -> Run:
    """The last rank computes until the others are steps ahead; all go on until it rejoins.

    Args:
        first_step: in which it does so.
        read: what else every rank does after each step.
    """
    late = world.size - 1

    def loss(subset: Subset) -> torch.Tensor:
        ahead = folder / "ahead"  # it may have been moved beyond the first by chance
        if world.rank == late and run.coded.step_number >= first_step:
            while not ahead.exists():
                time.sleep(POLL_S)
        return loss_of(run.module, subset)

    run = Run(world, make("convolution with batch norm"), loss=loss, copies=2, **config)
    while not run.coded.is_over:
        run.step()
        read(run)
        number = run.coded.step_number
        far = max((to for _, to in run.jumps), default=0) >= first_step + 4
        if world.rank == late and far and number > run.jumps[-1][1]:
            (folder / "rejoined").touch()
        if world.rank == 0:
            if number == first_step + 4:
                (folder / "ahead").touch()
            if (folder / "rejoined").exists():
                break
    return run


@pytest.mark.parametrize("first_step", [0, 3])
def test_a_rank_that_fell_behind_goes_on_where_the_others_are(
    world: World, shared_folder: Path, first_step: int
) -> None:
    """Also if it has missed the first step, in which the order of parameters is agreed on."""
    if world.size == 1:
        pytest.skip("there are no others")
    run = far_behind(world, shared_folder, first_step, make_optimizer=adamw)
    run.end()
    if world.rank == world.size - 1:
        assert run.checked > 0
    if world.rank == 0:
        assert not run.jumps


def test_what_else_has_a_state_is_given_to_a_rank_that_fell_behind(
    world: World, shared_folder: Path
) -> None:
    if world.size == 1:
        pytest.skip("there are no others")

    class Count:
        value = 0

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value, "as": [1.5, "text", torch.tensor([self.value])]}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            assert state["as"][:2] == [1.5, "text"]
            assert state["as"][2].item() == state["value"]
            self.value = state["value"]

    count = Count()

    def follow(run: Run) -> None:
        if run.jumps and run.coded.moved:
            assert count.value == run.coded.step_number
        count.value = run.coded.step_number

    far_behind(world, shared_folder, 1, follow, extra=count).end()


# ---------------------------------------------------------------------- evaluation


def figures(block: int) -> dict[str, float]:
    return {"loss": 0.1 * block, "correct": float(block % 3), "third": 1 / 3}


def summed(blocks: int) -> dict[str, float]:
    """In the order of blocks."""
    sums = dict.fromkeys(figures(0), 0.0)
    for block in range(blocks):
        for name, value in figures(block).items():
            sums[name] += value
    return sums


@pytest.mark.parametrize("root", ["working", "dedicated"])
def test_evaluation(world: World, root: str) -> None:
    """Exact, whoever is late, between steps, twice, and of any number of blocks."""
    if root == "dedicated" and world.size == 1:
        pytest.skip("a dedicated root needs another rank")
    run = Run(world, make("perceptron"), root=root, copies=2)
    late = False

    def slowly(block: int) -> dict[str, float]:
        while late and world.rank == world.size - 1 > 1 and run.coded.is_wanted:
            time.sleep(POLL_S)
        return figures(block)

    def evaluate(blocks: int) -> None:
        found = run.coded.evaluate(blocks, slowly)
        if found is None:
            assert run.coded.moved or run.coded.is_over
            run.assert_state()
        else:
            assert found == summed(blocks)
        assert found is not None or world.rank > 0

    while run.coded.step_number < 3 and not run.coded.is_over:
        run.step()
        number = run.coded.step_number
        late = False
        evaluate((1, 7, 20)[number - 1])
        late = True
        evaluate(20 + number)
    run.end()


def test_an_evaluation_that_a_rank_missed(world: World, shared_folder: Path) -> None:
    if world.size == 1:
        pytest.skip("there are no others")

    def evaluate(run: Run) -> None:
        if run.coded.is_over:
            return
        found = run.coded.evaluate(5, figures)
        assert found in (summed(5), None)
        if found is None and not run.coded.is_over:
            run.jumps.append((-1, run.coded.step_number))
            run.assert_state()

    far_behind(world, shared_folder, 2, evaluate).end()
