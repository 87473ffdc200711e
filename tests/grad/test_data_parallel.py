"""Averaged gradients equal those of one process on the whole batch, whatever the model does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpctrain import DataParallel, ExchangeConfig, World
from hpctrain.comm.collect import all_gather
from hpctrain.comm.engine import engine_of
from hpctrain.errors import ExchangeError, MismatchError

pytestmark = pytest.mark.mpi

WIDTH = 6
PER_RANK = 4


def config(**values: Any) -> ExchangeConfig:
    return ExchangeConfig(**{"block_bytes": 200, "progress": "hooks", **values})


def perceptron(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, WIDTH)
    ).to(dtype)


class Tied(nn.Module):
    """Two layers share their weight, and one of them runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))


class Recomputed(nn.Module):
    """Layers are computed again in backward; the shared one's gradient arrives twice if nested."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        self.nested = nested
        self.repeats = 2
        self.before = nn.Linear(WIDTH, WIDTH)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.after = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        for _ in range(self.repeats):
            x = checkpoint(lambda y: torch.tanh(self.shared(y)), x, use_reentrant=self.nested)
        return self.after(x)


class Partly(nn.Module):
    """Holds a layer that forward never uses and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.used = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(torch.tanh(self.used(x)))


class Mixed(nn.Module):
    """Parameters of several dtypes, of size zero and without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, WIDTH).double()
        self.narrow = nn.Linear(WIDTH, WIDTH)
        self.empty = nn.Parameter(torch.zeros(0, WIDTH))
        self.scalar = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.turn = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(x.double()) * self.scalar + self.empty.sum()
        x = (x * self.turn).abs()
        return self.narrow(x.float()).double()


class ManyTiny(nn.Module):
    def __init__(self, count: int = 2000) -> None:
        super().__init__()
        self.terms = nn.ParameterList(nn.Parameter(torch.randn(3)) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :3] * torch.stack(list(self.terms)).sum(dim=0)


def channels_last() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 1, 3)), nn.Conv2d(2, 4, 3, padding=1), nn.Flatten()
    ).to(memory_format=torch.channels_last)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron,
    "tied": Tied,
    "recomputed": lambda: Recomputed(nested=False),
    "recomputed, re-entrant": lambda: Recomputed(nested=True),
    "unused and frozen": Partly,
    "mixed dtypes and sizes": Mixed,
    "2,000 tiny": ManyTiny,
    "channels last": channels_last,
    "recurrent": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.GRU(3, 5, batch_first=True), Second()
    ),
}


class Second(nn.Module):
    """The first of a pair of outputs."""

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return pair[0]


def make(name: str, dtype: torch.dtype | None = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    model = MODELS[name]()
    return model if name.startswith("mixed") or dtype is None else model.to(dtype)


def batch_of(world: World, step: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(PER_RANK * world.size, WIDTH, generator=generator, dtype=dtype)


def own(world: World, batch: torch.Tensor) -> torch.Tensor:
    return batch[world.rank * PER_RANK : (world.rank + 1) * PER_RANK].clone().requires_grad_()


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.detach().clone() for p in model.parameters()]


def plain(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor | None]:
    """Gradients of one process on the whole batch."""
    alone = copy.deepcopy(model)
    for parameter in alone.parameters():
        parameter.grad = None
    alone(batch.clone().requires_grad_()).pow(2).mean().backward()
    return gradients(alone)


def assert_close(
    found: Sequence[torch.Tensor | None],
    expected: Sequence[torch.Tensor | None],
) -> None:
    """Relative to the largest element of each gradient: 1e-12, or 1e-6 with float32 on the way."""
    singles = [g for g in found if g is not None and g.dtype == torch.float32]
    bound = 1e-6 if singles else 1e-12
    assert [g is None for g in found] == [e is None for e in expected]
    for gradient, reference in zip(found, expected, strict=True):
        if gradient is not None and gradient.numel():
            assert reference is not None
            scale = reference.abs().max().clamp_min(1e-30)
            assert ((gradient - reference).abs().max() / scale).item() <= bound


def assert_same_bits(world: World, found: Sequence[torch.Tensor | None]) -> None:
    everyone = all_gather(engine_of(world).control, found)
    for other in everyone[1:]:
        for first, second in zip(everyone[0], other, strict=True):
            assert (first is None) == (second is None)
            assert first is None or torch.equal(first, second)


def run(world: World, module: nn.Module, steps: int = 3, **values: Any) -> list[Any]:
    """Train for a few steps, comparing each gradient with the plain one; returns all gradients."""
    model = DataParallel(module, config(**values))
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    seen = []
    for step in range(steps):
        batch = batch_of(world, step)
        dtype = next(module.parameters()).dtype
        batch = batch.to(dtype)
        optimizer.zero_grad()
        model(own(world, batch)).pow(2).mean().backward()
        found = gradients(module)
        assert_close(found, plain(module, batch))
        assert_same_bits(world, found)
        seen.append(found)
        optimizer.step()
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_overlap_on_and_off_give_the_same_bits(world: World, name: str) -> None:
    with_overlap = run(world, make(name), overlap=True)
    without = run(world, make(name), overlap=False)
    for first, second in zip(with_overlap, without, strict=True):
        for a, b in zip(first, second, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("progress", ["thread", "hooks"])
@pytest.mark.parametrize("way", ["native", "direct"])
def test_every_way_and_progress_mode(world: World, way: str, progress: str) -> None:
    run(world, make("perceptron"), way=way, progress=progress)


def test_float32(world: World) -> None:
    run(world, make("perceptron", torch.float32))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("perceptron", (1, 100, 1000, 1 << 20)),
        ("tied", (1, 100, 1 << 20)),
        ("2,000 tiny", (5000, 1 << 20)),
    ],
)
def test_deterministic_gives_the_same_bits_for_any_block_size(
    world: World, name: str, sizes: tuple[int, ...]
) -> None:
    runs = [
        run(world, make(name, torch.float32), steps=2, deterministic=True, block_bytes=size)
        for size in sizes
    ]
    for other in runs[1:]:
        for first, second in zip(runs[0], other, strict=True):
            for a, b in zip(first, second, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_16_bits_on_the_wire_are_summed_in_float32(world: World, wire: str) -> None:
    """Each rank's part is rounded once and the sum once: no error that grows with the ranks."""
    module = make("perceptron", torch.float32)
    model = DataParallel(module, config(wire=wire, way="direct", buffers="local"))
    dtype = getattr(torch, wire)
    for step in range(3):
        x = own(world, batch_of(world, step).float())
        alone = copy.deepcopy(module)
        alone.zero_grad()
        alone(x).pow(2).mean().backward()
        parts = all_gather(engine_of(world).control, gradients(alone))
        model.zero_grad()
        model(x).pow(2).mean().backward()
        for index, found in enumerate(gradients(module)):
            total = sum((part[index] / world.size).to(dtype).float() for part in parts)
            expected = total.to(dtype).float()
            assert torch.allclose(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
        assert_same_bits(world, gradients(module))


def test_shared_memory_has_no_wire_that_would_round(world: World) -> None:
    found = []
    for wire in ("same", "bfloat16"):
        module = make("perceptron", torch.float32)
        model = DataParallel(module, config(wire=wire, way="shared"))
        model(own(world, batch_of(world, 0).float())).pow(2).mean().backward()
        found.append([gradient.clone() for gradient in gradients(module)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters(world: World, dtype: torch.dtype) -> None:
    module = make("perceptron", dtype)
    model = DataParallel(module, config())
    x = own(world, batch_of(world, 0).to(dtype))
    model(x).pow(2).mean().backward()
    found = gradients(module)
    assert_same_bits(world, found)
    alone = copy.deepcopy(module)
    alone.zero_grad()
    alone(x).pow(2).mean().backward()
    parts = all_gather(engine_of(world).control, gradients(alone))
    for index, gradient in enumerate(found):
        total = parts[0][index].float()
        for part in parts[1:]:
            total = total + part[index].float()
        assert torch.equal(gradient, (total * (1 / world.size)).to(dtype))


# ---------------------------------------------------------------- views


def test_gradients_are_views_of_one_slab_a_block(world: World) -> None:
    module = make("perceptron")
    model = DataParallel(module, config())
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        model(own(world, batch_of(world, 0))).sum().backward()
        for block in model.exchange.blocks:
            slab = block.slab.tensor.untyped_storage().data_ptr()
            for parameter in block.parameters:
                assert parameter.grad.untyped_storage().data_ptr() == slab
    assert sum(len(block.parameters) for block in model.exchange.blocks) == 6


def test_kept_views_are_accumulated_in_place(world: World) -> None:
    module = make("perceptron")
    model = DataParallel(module, config())
    model(own(world, batch_of(world, 0))).pow(2).mean().backward()
    before = [p.grad for p in module.parameters()]
    model.zero_grad(set_to_none=False)
    batch = batch_of(world, 1)
    model(own(world, batch)).pow(2).mean().backward()
    assert all(p.grad is b for p, b in zip(module.parameters(), before, strict=True))
    assert_close(gradients(module), plain(module, batch))


def test_order_follows_backward_and_stays(world: World) -> None:
    module = make("perceptron")
    model = DataParallel(module, config())
    orders = []
    for step in range(3):
        model.zero_grad()
        model(own(world, batch_of(world, step))).sum().backward()
        orders.append([block.members for block in model.exchange.blocks])
    assert orders[0] == orders[1] == orders[2]
    flat = [index for members in orders[0] for index in members]
    assert flat.index(5) < flat.index(0)  # the last layer's bias is done long before the first's
    assert len(all_gather(engine_of(world).control, orders[0])) == world.size
    assert all(o == orders[0] for o in all_gather(engine_of(world).control, orders[0]))


# ---------------------------------------------------------------- steps of other shapes


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(WIDTH, WIDTH).double()
        self.right = nn.Linear(WIDTH, WIDTH).double()
        self.neither = nn.Linear(WIDTH, WIDTH).double()
        self.common = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, x: torch.Tensor, left: bool) -> torch.Tensor:
        return self.common((self.left if left else self.right)(x))


def test_branches_that_differ_between_ranks(world: World) -> None:
    """A parameter that no rank used keeps None; one that some rank used has its average."""
    module = Branches()
    model = DataParallel(module, config())
    for step in range(4):
        lefts = [(rank + step) % 2 == 0 for rank in range(world.size)]
        batch = batch_of(world, step)
        model.zero_grad()
        model(own(world, batch), lefts[world.rank]).pow(2).mean().backward()
        alone = copy.deepcopy(module)
        alone.zero_grad()
        losses = [
            alone(batch[r * PER_RANK : (r + 1) * PER_RANK], left).pow(2).mean()
            for r, left in enumerate(lefts)
        ]
        torch.stack(losses).mean().backward()
        assert_close(gradients(module), gradients(alone))
        assert_same_bits(world, gradients(module))


def test_several_backwards_a_step(world: World) -> None:
    module = make("perceptron")
    model = DataParallel(module, config())
    for step in range(3):
        batch = batch_of(world, step)
        model.zero_grad()
        out = model(own(world, batch))
        out.pow(2).mean().backward(retain_graph=True)
        out.sin().mean().backward()
        alone = copy.deepcopy(module)
        alone.zero_grad()
        out = alone(batch)
        (out.pow(2).mean() + out.sin().mean()).backward()
        assert_close(gradients(module), gradients(alone))


def test_several_forwards_in_one_backward(world: World) -> None:
    module = make("perceptron")
    model = DataParallel(module, config())
    for step in range(3):
        first, second = batch_of(world, step), batch_of(world, step + 50)
        model.zero_grad()
        (model(own(world, first)) * model(own(world, second))).mean().backward()
        alone = copy.deepcopy(module)
        alone.zero_grad()
        (alone(first) * alone(second)).mean().backward()
        assert_close(gradients(module), gradients(alone))


def test_no_sync_adds_up_and_the_next_backward_averages(world: World) -> None:
    module = make("perceptron")
    model = DataParallel(module, config())
    for step in range(3):
        first, second = batch_of(world, step), batch_of(world, step + 50)
        model.zero_grad()
        with model.no_sync():
            model(own(world, first)).pow(2).mean().backward()
        posted = model.exchange.channel.posted
        with pytest.raises(RuntimeError, match="on purpose"), model.no_sync():
            raise RuntimeError("on purpose")
        assert model.exchange.channel.posted == posted
        model(own(world, second)).pow(2).mean().backward()
        expected = [a + b for a, b in zip(plain(module, first), plain(module, second), strict=True)]
        assert_close(gradients(module), expected)


def test_parameters_that_are_trained_from_the_second_step_on(world: World) -> None:
    """The first backward sets the order; parameters that it has not seen must still be right."""
    module = Partly().double()
    model = DataParallel(module, config())
    for step in range(4):
        batch = batch_of(world, step)
        use_all = step > 0
        model.zero_grad()
        out = model(own(world, batch))
        if use_all:
            out = module.unused(out)
        out.pow(2).mean().backward()
        alone = copy.deepcopy(module)
        alone.zero_grad()
        out = alone(batch)
        (alone.unused(out) if use_all else out).pow(2).mean().backward()
        assert_close(gradients(module), gradients(alone))


def test_ranks_without_samples_take_part(world: World) -> None:
    """Rank 0 alone computes; the others have no backward in any step."""
    module = make("perceptron")
    model = DataParallel(module, config())
    for step in range(3):
        batch = batch_of(world, step)
        model.zero_grad()
        if world.rank == 0:
            (model(batch).pow(2).mean() * world.size).backward()
        else:
            model.exchange.finish()
        assert_close(gradients(module), plain(module, batch))


def test_gradient_of_a_gradient(world: World) -> None:
    """A gradient penalty: autograd accumulates out of place, into tensors that are no views."""
    module = make("perceptron")
    model = DataParallel(module, config())

    def loss(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        (inner,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return inner.pow(2).mean()

    for step in range(3):
        batch = batch_of(world, step)
        model.zero_grad()
        loss(model, own(world, batch)).backward()
        alone = copy.deepcopy(module)
        alone.zero_grad()
        loss(alone, batch.clone().requires_grad_()).backward()
        assert_close(gradients(module), gradients(alone))


# ---------------------------------------------------------------- what torch offers around it


def test_norm_and_clipping_need_no_communication(world: World) -> None:
    module = make("perceptron")
    model = DataParallel(module, config())
    for step in range(2):
        model.zero_grad()
        model(own(world, batch_of(world, step))).pow(2).mean().backward()
        posted = model.exchange.channel.posted
        norm = model.exchange.gradient_norm()
        clipped = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.01)
        assert model.exchange.channel.posted == posted
        assert abs(norm / clipped - 1) < 1e-12
        assert abs(model.exchange.gradient_norm() - 0.01) < 1e-6


def test_norm_of_16_bit_gradients_does_not_overflow(world: World) -> None:
    module = nn.Linear(100, 100, bias=False).half()
    model = DataParallel(module, config())
    (model(torch.ones(1, 100).half()).sum() * 1000).backward()
    assert model.exchange.gradient_norm().item() == pytest.approx(1000 * 100, rel=1e-3)


@pytest.mark.parametrize("foreach", [False, True])
def test_optimizers_with_and_without_foreach(world: World, foreach: bool) -> None:
    module, alone = make("perceptron"), make("perceptron")
    model = DataParallel(module, config())
    ours = torch.optim.AdamW(module.parameters(), lr=0.01, foreach=foreach)
    theirs = torch.optim.AdamW(alone.parameters(), lr=0.01, foreach=foreach)
    for step in range(4):
        batch = batch_of(world, step)
        ours.zero_grad()
        theirs.zero_grad()
        model(own(world, batch)).pow(2).mean().backward()
        alone(batch).pow(2).mean().backward()
        ours.step()
        theirs.step()
    for a, b in zip(module.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    model.check_in_sync()


def test_autocast_to_bfloat16(world: World) -> None:
    module = make("perceptron", torch.float32)
    model = DataParallel(module, config())
    for step in range(2):
        x = own(world, batch_of(world, step).float())
        alone = copy.deepcopy(module)
        alone.zero_grad()
        model.zero_grad()
        for net in (model, alone):
            with torch.autocast("cpu", torch.bfloat16):
                loss = net(x).float().pow(2).mean()
            loss.backward()
        parts = all_gather(engine_of(world).control, gradients(alone))
        expected = [sum(p[i] for p in parts) / world.size for i in range(len(parts[0]))]
        assert_close(gradients(module), expected)


@pytest.mark.parametrize("inside", [True, False])
def test_compiled(world: World, inside: bool) -> None:
    module = make("perceptron")
    if inside:
        model: Any = DataParallel(torch.compile(module, backend="aot_eager"), config())
    else:
        model = torch.compile(DataParallel(module, config()), backend="aot_eager")
    for step in range(3):
        batch = batch_of(world, step)
        module.zero_grad()
        model(own(world, batch)).pow(2).mean().backward()
        assert_close(gradients(module), plain(module, batch))
        assert_same_bits(world, gradients(module))


def test_very_large_parameter(world: World) -> None:
    rows = 27_000_000 // WIDTH  # over 100 MB in float32
    module = nn.Embedding(rows, WIDTH)
    with torch.no_grad():
        module.weight.fill_(1.0)
    model = DataParallel(module, config(block_bytes=1 << 20))
    index = torch.tensor([world.rank, rows - 1])
    model(index).sum().backward()
    gradient = module.weight.grad
    assert gradient is not None
    assert torch.allclose(gradient[: world.size], torch.tensor(1 / world.size))
    assert torch.equal(gradient[rows - 1], torch.ones(WIDTH))
    assert gradient[world.size : rows - 1].abs().max() == 0


def test_wrapped_module_is_reached_through_the_wrapper(world: World) -> None:
    module = make("tied")
    model = DataParallel(module, config())
    assert model.first is module.first
    with pytest.raises(AttributeError):
        _ = model.nothing_of_that_name


def test_two_models_in_one_backward(world: World) -> None:
    """Their blocks interleave differently on each rank, and travel on channels of their own."""
    left, right = make("perceptron"), make("tied")
    models = DataParallel(left, config()), DataParallel(right, config())
    for step in range(3):
        batch = batch_of(world, step)
        for model in models:
            model.zero_grad()
        (models[0](own(world, batch)) + models[1](own(world, batch))).pow(2).mean().backward()
        alone = copy.deepcopy(left), copy.deepcopy(right)
        for model in alone:
            model.zero_grad()
        (alone[0](batch) + alone[1](batch)).pow(2).mean().backward()
        assert_close(gradients(left), gradients(alone[0]))
        assert_close(gradients(right), gradients(alone[1]))


# ---------------------------------------------------------------- buffers and starting values


def test_ranks_start_with_the_parameters_of_rank_0(world: World) -> None:
    torch.manual_seed(world.rank)
    module = nn.Sequential(perceptron(), nn.BatchNorm1d(WIDTH).double(), nn.Linear(WIDTH, 0))
    module.register_parameter("strided", nn.Parameter(torch.randn(4, 3).t()))
    module[1].running_mean.fill_(world.rank)
    model = DataParallel(module, config())
    model.check_in_sync()
    torch.manual_seed(0)
    assert torch.equal(module[0][0].weight, perceptron()[0].weight)
    assert module[1].running_mean.abs().max() == 0


@pytest.mark.parametrize("mode", ["broadcast", "average", "local"])
def test_buffers(world: World, mode: str) -> None:
    module = nn.BatchNorm1d(WIDTH, momentum=1.0).double()
    model = DataParallel(module, config(buffers=mode))
    batch = batch_of(world, 0)
    for step in range(2):
        batch = batch_of(world, step)
        model(own(world, batch)).sum().backward()
    parts = batch.view(world.size, PER_RANK, WIDTH)
    expected = {"broadcast": parts[0], "average": batch, "local": parts[world.rank]}[mode].mean(0)
    assert torch.allclose(module.running_mean, expected, rtol=1e-12, atol=1e-12)
    assert module.num_batches_tracked == 2


def mismatched(kind: str, rank: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    if rank == 1:
        if kind == "shape":
            model = nn.Sequential(nn.Linear(WIDTH, 5))
        elif kind == "missing":
            model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
        elif kind == "extra":
            model.append(nn.Linear(2, 2))
        elif kind == "dtype":
            model = model.double()
        elif kind == "frozen":
            model[0].weight.requires_grad_(False)
        elif kind == "buffer":
            model.register_buffer("table", torch.zeros(3))
    return model


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("shape", r"0\.weight is \(5, 6\)"),
        ("missing", r"has no parameter 0\.bias"),
        ("extra", r"has parameter 1\.weight"),
        ("dtype", "float64"),
        ("frozen", "requires_grad=False"),
        ("buffer", "has buffer table"),
    ],
)
def test_models_that_differ_are_named_with_rank_and_parameter(
    world: World, kind: str, named: str
) -> None:
    with pytest.raises(MismatchError, match="rank 1.*" + named):
        DataParallel(mismatched(kind, world.rank))


def test_parameters_that_drift_apart_are_named(world: World) -> None:
    module = make("perceptron")
    model = DataParallel(module, config())
    model.check_in_sync()
    if world.rank == 1:
        with torch.no_grad():
            module[2].bias[0] += 1e-9
    with pytest.raises(MismatchError, match=r"rank 1.*parameter 2\.bias"):
        model.check_in_sync()


# ---------------------------------------------------------------- what is refused


def refused(kind: str) -> nn.Module:
    if kind == "sparse":
        return nn.Embedding(4, 4, sparse=True)
    if kind == "lazy":
        return nn.LazyLinear(4)
    if kind == "meta":
        return nn.Linear(3, 3, device="meta")
    return nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.complex32))])


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("sparse", "sparse=False"),
        ("lazy", "one forward pass before"),
        ("meta", "on the CPU"),
        ("complex32", "wider copy"),
    ],
)
def test_what_cannot_be_exchanged_is_refused_with_advice(
    world: World, kind: str, advice: str
) -> None:
    with pytest.raises(ExchangeError, match=advice):
        DataParallel(refused(kind))


def test_gradient_that_arrives_too_late_is_refused(world: World) -> None:
    """More re-entrant segments than in the first step: the slab is on the wire already."""
    module = Recomputed(nested=True).double()
    model = DataParallel(module, config(block_bytes=1))
    module.repeats = 1
    model(own(world, batch_of(world, 0))).pow(2).mean().backward()
    module.repeats = 3
    with pytest.raises(ExchangeError, match=r"shared\.\w+ grew after block \d+ went on the wire"):
        model(own(world, batch_of(world, 1))).pow(2).mean().backward()
    with pytest.raises(ExchangeError, match="did not finish"):
        model(own(world, batch_of(world, 2)))


def test_that_model_works_without_overlap(world: World) -> None:
    module = Recomputed(nested=True).double()
    model = DataParallel(module, config(block_bytes=1, overlap=False))
    for step in range(3):
        module.repeats = 1 + step
        batch = batch_of(world, step)
        model.zero_grad()
        model(own(world, batch)).pow(2).mean().backward()
        assert_close(gradients(module), plain(module, batch))


def test_unfrozen_parameter_is_refused(world: World) -> None:
    module = Partly()
    model = DataParallel(module, config())
    module.frozen.requires_grad_(True)
    with pytest.raises(ExchangeError, match=r"frozen\.weight was frozen"):
        model(torch.zeros(1, WIDTH))


def test_parameter_frozen_later_keeps_no_gradient(world: World) -> None:
    module = make("perceptron")
    model = DataParallel(module, config())
    model(own(world, batch_of(world, 0))).pow(2).mean().backward()
    model.zero_grad()
    module[0].requires_grad_(False)
    batch = batch_of(world, 1)
    model(own(world, batch)).pow(2).mean().backward()
    assert_close(gradients(module), plain(module, batch))


def test_loss_is_unchanged_by_the_wrapper(world: World) -> None:
    module = make("perceptron")
    x = batch_of(world, 0)
    assert torch.equal(F.mse_loss(DataParallel(module, config())(x), x), F.mse_loss(module(x), x))
