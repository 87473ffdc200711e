"""Steps taken block by block, while the next forward has begun, leave the same bits."""

from __future__ import annotations

import copy
import gc
import io
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grad.plain import in_turns
from torch import nn

from hpctrain import DataParallel, ExchangeConfig, World
from hpctrain.errors import ExchangeError

pytestmark = pytest.mark.mpi

WIDTH = 8
SETTLED = 7
"""Steps after which, without a trial, no collective moves blocks in passing."""
STEPS = 24  # the trial of progress modes and the measuring of an order end within


class Attending(nn.Module):
    """Attention uses the weight of a layer whose forward never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unsqueeze(0)
        return self.last(self.attention(x, x, x)[0]).squeeze(0)


class Tied(nn.Module):
    """The last layer borrows the first one's weight, in the root's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(self.middle(torch.tanh(self.first(x)))), self.first.weight)


class Branching(nn.Module):
    """A layer that only some steps use, one that none uses, and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(WIDTH, WIDTH)
        self.sometimes = nn.Linear(WIDTH, WIDTH)
        self.never = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        x = torch.tanh(self.norm(self.always(x)))
        return self.sometimes(x) if self.calls % 3 == 2 else x


def deep() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(6)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "deep": deep,
    "attending": Attending,
    "tied": Tied,
    "branching": Branching,
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


def config(**values: Any) -> ExchangeConfig:
    return ExchangeConfig(
        **{"block_bytes": 300, "next_forward": True, "progress": "hooks", **values}
    )


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups of other settings, with parameters of most blocks in both."""
    named = list(model.named_parameters())
    weights = [p for name, p in named if name.endswith("weight")]
    others = [p for name, p in named if not name.endswith("weight")]
    return [{"params": weights, "weight_decay": 0.1}, {"params": others}]


def await_blocks(model: DataParallel) -> None:
    """Have everything arrive on this rank, while it may still be on the wire for others."""
    later = model.exchange.later
    assert later is not None
    for block in later.in_flight:
        for ticket in block.tickets:
            model.exchange.engine.wait(ticket)


def train(
    model: DataParallel,
    optimizer: torch.optim.Optimizer,
    steps: int,
    world: World,
    early: bool = False,
) -> list[float]:
    """Losses of some steps; with `early`, rank 0 has all gradients when it takes a step."""
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    losses = []
    for step in range(steps):
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(step * 8 + world.rank))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        if early and world.rank == 0:
            await_blocks(model)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def wrapped(
    make: Callable[[], nn.Module], optimizer: str, options: ExchangeConfig
) -> tuple[DataParallel, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = DataParallel(make(), options)
    updates = OPTIMIZERS[optimizer](parameter_groups(model.module))
    if options.next_forward:
        model.overlap_step(updates)
    return model, updates


def assert_same(a: nn.Module, b: nn.Module) -> None:
    theirs = b.state_dict()
    for name, value in a.state_dict().items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("progress", ["hooks", "thread"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_same_bits_as_without(
    world: World, make: Callable[[], nn.Module], optimizer: str, progress: str
) -> None:
    plain = wrapped(make, optimizer, config(next_forward=False))
    ahead = wrapped(make, optimizer, config(progress=progress))
    assert train(*plain, 12, world) == train(*ahead, 12, world, early=progress == "thread")
    assert_same(plain[0].module, ahead[0].module)
    theirs = ahead[1].state_dict()["state"]
    for index, state in plain[1].state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[index][key])), key


def test_the_order_of_the_wire_is_agreed_and_changes_no_bit(world: World) -> None:
    plain = wrapped(deep, "adamw", config(next_forward=False))
    ahead = wrapped(deep, "adamw", config(progress="auto"))
    assert train(*plain, STEPS, world) == train(*ahead, STEPS, world)
    assert_same(plain[0].module, ahead[0].module)
    exchange = ahead[0].exchange
    assert not exchange.is_trying
    if world.size > 1:
        assert exchange.order_is_settled
        sent = [(p.slab, part) for p in exchange.wire_order for part in range(p.start, p.stop)]
        parts = exchange.reducer.part_counts
        assert sorted(sent) == [
            (block, part) for block, count in enumerate(parts) for part in range(count)
        ]


@pytest.mark.parametrize("progress", ["hooks", "thread"])
@pytest.mark.parametrize(
    ("name", "wire"), [(name, "same") for name in MODELS] + [("deep", "bfloat16")]
)
def test_parts_of_blocks_take_turns_on_the_wire(
    name: str, wire: str, progress: str, world: World
) -> None:
    """In any order that ranks agree on, with other blocks between the parts of one."""
    cut = {"way": "direct", "wire": wire, "progress": progress}
    cut |= {"chunk_bytes": 64, "in_flight_bytes": 1000}
    plain = wrapped(MODELS[name], "adamw", config(next_forward=False, **cut))
    ahead = wrapped(MODELS[name], "adamw", config(**cut))
    exchange = ahead[0].exchange
    exchange.may_reorder = False
    chance = random.Random(0)
    for _ in range(3):
        assert train(*plain, SETTLED, world) == train(*ahead, SETTLED, world)
        assert_same(plain[0].module, ahead[0].module)
        ahead[0].wait_for_gradients()
        if world.size > 1:
            assert max(exchange.reducer.part_counts) > 2
            exchange.send_in(in_turns(exchange.reducer.part_counts, chance))


def test_program_that_keeps_the_module_alone(world: World) -> None:
    """The wrapper is let go of while updates are owed."""
    results = []
    for options in (config(next_forward=False), config(overlap=False)):
        model, optimizer = wrapped(deep, "adamw", options)
        train(model, optimizer, SETTLED, world)
        module = model.module
        del model
        gc.collect()
        module.state_dict()
        results.append(module)
    assert_same(*results)


def test_saved_and_copied_with_its_hooks(world: World) -> None:
    model, optimizer = wrapped(deep, "adamw", config())
    train(model, optimizer, 2, world)
    model.wait_for_gradients()
    file = io.BytesIO()
    torch.save(model.module, file)
    file.seek(0)
    x = torch.ones(2, WIDTH)
    for copied in (torch.load(file, weights_only=False), copy.deepcopy(model.module)):
        assert torch.equal(copied(x), model.module(x))


def test_other_hooks_of_the_optimizer_see_all_gradients(world: World) -> None:
    results = []
    for options in (config(next_forward=False), config(overlap=False)):
        model, optimizer = wrapped(deep, "momentum", options)
        parameters = list(model.parameters())

        def clip(*_: Any, parameters: list[nn.Parameter] = parameters) -> None:
            torch.nn.utils.clip_grad_norm_(parameters, 1e-3)

        optimizer.register_step_pre_hook(clip)
        train(model, optimizer, 4, world)
        model.wait_for_gradients()
        results.append(model.module)
    assert_same(*results)


def test_backward_without_sync_while_blocks_are_on_the_wire(world: World) -> None:
    results = []
    for options in (config(next_forward=False), config(overlap=False)):
        model, optimizer = wrapped(deep, "momentum", options)
        for step in range(SETTLED + 1):
            first = model(torch.full((2, WIDTH), 1.0 + world.rank + step)).square().sum()
            second = model(torch.full((2, WIDTH), 2.0)).square().sum()
            first.backward()
            with model.no_sync():
                second.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.module)
        model.wait_for_gradients()
    assert_same(*results)


def test_more_parameters_for_the_optimizer_between_step_and_forward(world: World) -> None:
    model, optimizer = wrapped(deep, "momentum", config(overlap=False))
    train(model, optimizer, SETTLED, world)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    train(model, optimizer, 2, world)
    model.check_in_sync()


def test_evaluation_in_inference_mode_and_of_a_part(world: World) -> None:
    found = []
    for options in (config(next_forward=False), config(overlap=False)):
        model, optimizer = wrapped(deep, "adamw", options)
        train(model, optimizer, 1, world)
        with torch.inference_mode():
            seen = model(torch.ones(2, WIDTH)).clone()
        train(model, optimizer, SETTLED, world)
        assert isinstance(model.module, nn.Sequential)
        part = model.module[0].state_dict()
        found.append(torch.cat([seen.flatten(), *(value.flatten() for value in part.values())]))
    assert torch.equal(*found)


def test_updates_are_owed_until_they_are_needed(world: World) -> None:
    model, optimizer = wrapped(deep, "momentum", config(overlap=False))
    train(model, optimizer, SETTLED, world)
    later = model.exchange.later
    assert later is not None
    assert bool(later.owed) == (world.size > 1)
    before = [p.detach().clone() for p in model.module.parameters()]
    model.wait_for_gradients()
    assert not later.owed
    changed = [
        not torch.equal(a, b) for a, b in zip(before, model.module.parameters(), strict=True)
    ]
    assert any(changed) == (world.size > 1)


@pytest.mark.parametrize("read", ["state", "optimizer", "evaluation", "load", "check"])
def test_whoever_reads_parameters_sees_the_last_step(world: World, read: str) -> None:
    plain = wrapped(deep, "adamw", config(next_forward=False))
    ahead = wrapped(deep, "adamw", config(overlap=False))
    x = torch.ones(2, WIDTH)
    found = []
    for model, optimizer in (plain, ahead):
        train(model, optimizer, SETTLED, world)
        if read == "state":
            found.append(model.module.state_dict()["0.0.weight"].clone())
        elif read == "optimizer":
            found.append(optimizer.state_dict()["state"][0]["exp_avg"].clone())
        elif read == "evaluation":
            with torch.no_grad():
                found.append(model(x))
        elif read == "load":  # what comes late must not be applied to the state that is loaded
            model.module.load_state_dict(copy.deepcopy(deep().state_dict()))
            model.wait_for_gradients()
            found.append(torch.cat([p.flatten() for p in model.module.parameters()]).sum() * 0)
        else:
            model.check_in_sync()
            found.append(torch.cat([p.detach().flatten() for p in model.module.parameters()]))
    assert torch.equal(*found)


def test_a_gradient_on_the_wire_may_not_be_looked_at(world: World) -> None:
    model, optimizer = wrapped(deep, "momentum", config(overlap=False))
    train(model, optimizer, SETTLED, world)
    model(torch.ones(2, WIDTH)).sum().backward()
    if world.size > 1:
        with pytest.raises(ExchangeError, match="wait_for_gradients"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with pytest.raises(ExchangeError, match="on the wire"):
            next(model.module.parameters()).grad.norm()  # type: ignore[union-attr]
    model.wait_for_gradients()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    optimizer.zero_grad()


def test_clipping_after_waiting_has_the_bits_of_plain_clipping(world: World) -> None:
    results = []
    for options in (config(next_forward=False), config()):
        model, optimizer = wrapped(deep, "adamw", options)
        for _ in range(4):
            model(torch.full((2, WIDTH), 1.0 + world.rank)).square().sum().backward()
            model.wait_for_gradients()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.module)
    assert_same(*results)


def test_several_backwards_and_steps_that_are_left_out(world: World) -> None:
    """Accumulated, discarded and repeated backwards, with and without a step after them."""
    results = []
    for options in (config(next_forward=False), config(), config(overlap=False)):
        model, optimizer = wrapped(deep, "momentum", options)
        for step in range(9):
            x = torch.full((2, WIDTH), 1.0 + world.rank + step)
            if step % 3 == 1:
                with model.no_sync():
                    model(x).square().sum().backward()
            loss = model(x).sum()
            loss.backward(retain_graph=True)
            if step % 3 == 2:
                optimizer.zero_grad()  # thrown away, perhaps on the wire
                model(x).sum().backward()
                model(x).square().mean().backward()  # added to
            if step % 4 != 3:
                optimizer.step()
                if step % 2 and options.next_forward:
                    optimizer.step()  # again: gradients that a step has taken are gone
                optimizer.zero_grad()
        model.wait_for_gradients()
        results.append([p.detach().clone() for p in model.module.parameters()])
        del model
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_a_use_past_the_wrapper_is_refused(world: World) -> None:
    if world.size == 1:
        return
    model, optimizer = wrapped(deep, "momentum", config(overlap=False))
    train(model, optimizer, SETTLED, world)
    assert isinstance(model.module, nn.Sequential)
    y = F.linear(torch.ones(2, WIDTH), next(model.module.parameters()))
    with pytest.raises(ExchangeError, match="before the last step had updated it"):
        y.sum().backward()
    model.wait_for_gradients()


class Sneaky(nn.Module):
    """Uses a layer's weight by itself once its wire is settled."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.odd = nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.first(x)
        return F.linear(x, self.odd.weight, self.odd.bias) if self.calls > SETTLED else self.odd(x)


def test_a_use_in_another_place_than_first_is_refused(world: World) -> None:
    if world.size == 1:
        return
    model, optimizer = wrapped(Sneaky, "momentum", config(overlap=False))
    train(model, optimizer, SETTLED, world)
    with pytest.raises(ExchangeError, match=r"odd\.\w+ was used before"):
        train(model, optimizer, 1, world)
    del model
    gc.collect()


class Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(WIDTH, WIDTH)
        self.right = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, goes_left: bool) -> torch.Tensor:
        return self.left(x) if goes_left else self.right(x)


def test_two_forwards_of_other_branches_before_a_backward(world: World) -> None:
    results = []
    for options in (config(next_forward=False), config(overlap=False)):
        model, optimizer = wrapped(Forked, "momentum", options)
        for step in range(SETTLED + 2):
            x = torch.full((2, WIDTH), 1.0 + world.rank + step)
            loss = model(x, True).square().mean() + model(x, False).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.module)
    assert_same(*results)


def test_ranks_without_samples_update_alike(world: World) -> None:
    results = []
    for options in (config(next_forward=False), config()):
        model, optimizer = wrapped(deep, "adamw", options)
        for step in range(6):
            if world.rank == 0 or step % 2 == 0:
                model(torch.ones(2, WIDTH)).square().sum().backward()
            else:
                model.exchange.finish()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.module)
    assert_same(*results)


def test_refused_optimizers_and_settings(world: World) -> None:
    model = DataParallel(deep(), config())
    with pytest.raises(ExchangeError, match="LBFGS"):
        model.overlap_step(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ExchangeError, match="needs the optimizer"):
        model(torch.ones(1, WIDTH)).sum().backward()
    part = torch.optim.SGD(list(model.parameters())[:3], lr=0.1)
    with pytest.raises(ExchangeError, match="does not update all parameters"):
        model.overlap_step(part)
    model.overlap_step(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ExchangeError, match="was called before"):
        model.overlap_step(torch.optim.SGD(model.parameters(), lr=0.1))
    other = DataParallel(deep(), config(next_forward=False))
    with pytest.raises(ExchangeError, match="without next_forward"):
        other.overlap_step(torch.optim.SGD(other.parameters(), lr=0.1))


def test_let_go_of_with_the_model(world: World) -> None:
    model, optimizer = wrapped(deep, "adamw", config())
    train(model, optimizer, 3, world)
    model.wait_for_gradients()
    seen = weakref.ref(model.exchange)
    del model
    gc.collect()
    assert seen() is None
    optimizer.step()
