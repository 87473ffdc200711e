"""What programs do to a model around DataParallel: wrap again, replace, keep, differentiate."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from hpctrain import DataParallel, ExchangeConfig, World
from hpctrain.comm.collect import all_gather
from hpctrain.comm.engine import engine_of
from hpctrain.errors import ExchangeError, MismatchError

pytestmark = pytest.mark.mpi

CONFIG = ExchangeConfig(block_bytes=64, progress="hooks")


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def batch(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(3, 4, generator=generator, dtype=torch.float64)


def assert_averaged(model: nn.Module, world: World) -> None:
    """One more backward of `model` gives the gradient of all ranks' samples."""
    module = model.module if isinstance(model, DataParallel) else model
    alone = copy.deepcopy(module)
    alone.zero_grad()
    for rank in range(world.size):
        (alone(batch(rank)).pow(2).sum() / world.size).backward()
    model.zero_grad()
    model(batch(world.rank)).pow(2).sum().backward()
    for mine, expected in zip(module.parameters(), alone.parameters(), strict=True):
        if expected.requires_grad:
            assert mine.grad is not None and expected.grad is not None
            assert torch.allclose(mine.grad, expected.grad, rtol=1e-12, atol=1e-14)


def train(model: nn.Module, world: World, steps: int = 3) -> None:
    for _ in range(steps):
        model.zero_grad()
        model(batch(world.rank)).pow(2).sum().backward()


def test_wrapping_again_after_unfreezing_gives_right_gradients(world: World) -> None:
    module = perceptron()
    module[0].requires_grad_(False)
    model = DataParallel(module, CONFIG)
    train(model, world)
    module[0].requires_grad_(True)
    model = DataParallel(module, CONFIG)
    for _ in range(3):
        assert_averaged(model, world)


def test_the_older_of_two_wrappers_refuses_to_go_on(world: World) -> None:
    encoder = perceptron()
    older = DataParallel(nn.Sequential(encoder, nn.Linear(2, 1).double()), CONFIG)
    newer = DataParallel(encoder, CONFIG)
    with pytest.raises(ExchangeError, match="belong to another one") as caught:
        older(batch(world.rank))
    assert "ModuleList" in str(caught.value)
    assert_averaged(newer, world)


def test_wrapper_and_slabs_are_freed_with_the_model(world: World) -> None:
    module = perceptron()
    model = DataParallel(module, CONFIG)
    train(model, world)
    gone = [weakref.ref(model.exchange), weakref.ref(module[0].weight)]
    channel = model.exchange.channel
    del module, model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert channel.abandoned
    before = len(engine_of(world)._channels)
    engine_of(world).channel("next")
    assert len(engine_of(world)._channels) <= before


def test_memory_formats_that_differ_between_ranks_are_refused(world: World) -> None:
    if world.size == 1:
        pytest.skip("needs ranks that differ")
    module = nn.Conv2d(3, 4, 3)
    if world.rank == 1:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with pytest.raises(MismatchError, match="strides"):
        DataParallel(module, CONFIG)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_gradient_to_be_differentiated_again_is_refused(world: World, steps: int) -> None:
    model = DataParallel(perceptron(), CONFIG)
    train(model, world, steps)
    model.zero_grad()
    with pytest.raises(ExchangeError, match="create_graph"):
        model(batch(world.rank)).pow(2).sum().backward(create_graph=True)


@pytest.mark.parametrize("change", ["head", "assign", "thawed"])
def test_parameters_that_are_not_averaged_are_refused(world: World, change: str) -> None:
    module = perceptron()
    module[0].bias.requires_grad_(False)
    model = DataParallel(module, CONFIG)
    train(model, world, steps=1)
    if change == "head":
        module[2] = nn.Linear(8, 2).double()
    elif change == "assign":
        module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)
    else:
        module[0].bias.requires_grad_(True)
    with pytest.raises(ExchangeError, match="would not be averaged"):
        model(batch(world.rank))


def test_a_gradient_that_another_hook_replaces_is_refused(world: World) -> None:
    model = DataParallel(perceptron(), CONFIG)
    train(model, world, steps=2)

    def replace(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad = parameter.grad.clone()

    model.module[2].weight.register_post_accumulate_grad_hook(replace)
    with pytest.raises(ExchangeError, match="replaced by another hook"):
        train(model, world, steps=1)


class Scaled(nn.Module):
    """Saves its buffer for backward, and replaces another one in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1).double()
        self.register_buffer("scale", torch.full((1,), 2.0, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.5 * self.mean + x.detach().mean()
        scaled: torch.Tensor = self.linear(x) * self.scale
        return scaled


@pytest.mark.parametrize("mode", ["broadcast", "average"])
def test_buffers_saved_for_backward_survive_another_backward(world: World, mode: str) -> None:
    model = DataParallel(Scaled(), ExchangeConfig(buffers=mode))
    for _ in range(2):
        first, second = model(batch(world.rank)).sum(), model(batch(world.rank)).pow(2).sum()
        first.backward()
        second.backward()


def test_buffers_that_a_forward_replaces_are_kept_equal(world: World) -> None:
    module = Scaled()
    model = DataParallel(module, ExchangeConfig(buffers="broadcast"))
    for _ in range(3):
        model(batch(world.rank)).sum().backward()
        values = all_gather(engine_of(world).control, float(module.mean))
        assert len(set(values)) == 1
    expected = 0.0
    for _ in range(3):
        expected = 0.5 * expected + float(batch(0).mean())
    assert values[0] == pytest.approx(expected)


def test_a_buffer_that_changes_its_shape_is_refused(world: World) -> None:
    if world.size == 1:
        pytest.skip("a single rank synchronises nothing")
    module = Scaled()
    model = DataParallel(module, ExchangeConfig(buffers="broadcast"))
    loss = model(batch(world.rank)).sum()
    module.mean = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(MismatchError, match="buffer mean changed"):
        loss.backward()


def test_no_hooks_pile_up_on_a_parameter_that_is_returned(world: World) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.ones(()))

        def forward(self) -> torch.Tensor:
            return self.value

    model = DataParallel(Constant(), CONFIG)
    for _ in range(5):
        model().backward()
    assert not model.module.value._backward_hooks


def test_squares_that_overflow_do_not_make_the_norm_infinite(world: World) -> None:
    module = nn.Linear(3, 1)
    model = DataParallel(module, CONFIG)
    model(torch.full((1, 3), 1e25)).sum().backward()
    assert float(model.exchange.gradient_norm()) == pytest.approx(3**0.5 * 1e25)


def test_a_program_without_trainer_is_told_where_it_stands(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.position, "step", None)
    monkeypatch.setattr(world.position, "phase", "setting up")
    model = DataParallel(perceptron(), CONFIG)
    assert str(world.position) == "setting up"
    loss = model(batch(world.rank)).sum()
    assert str(world.position) == "step 1, forward"
    loss.backward()
    model(batch(world.rank))
    assert str(world.position) == "step 2, forward"
