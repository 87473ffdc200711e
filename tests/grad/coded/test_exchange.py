"""Coded steps on real ranks: the bits of one process, whoever computes and whoever is late."""

from __future__ import annotations

import gc
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from grad import plain
from grad.coded.alone import Alone, Step
from grad.plain import WIDTH, assert_close
from torch import nn

from hpctrain.comm.collect import all_gather, barrier_on
from hpctrain.comm.engine import engine_of
from hpctrain.errors import ExchangeError, JobError
from hpctrain.grad.coded.assignment import PLACEMENTS
from hpctrain.grad.coded.config import CodedConfig, LostError
from hpctrain.grad.coded.exchange import Coded
from hpctrain.trace import now_s
from hpctrain.world import World

pytestmark = pytest.mark.mpi

BLOCKS = 6
PER_BLOCK = 4
STEPS = 4
POLL_S = 1e-4

Subset = tuple[torch.Tensor, float, int]
"""Samples, their share of the step's, and the data block."""


class Sometimes(nn.Module):
    """One layer is used on every third data block, one on none."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(WIDTH, WIDTH)
        self.rarely = nn.Linear(WIDTH, WIDTH)
        self.always = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, block: int) -> torch.Tensor:
        x = torch.tanh(self.always(x))
        return self.rarely(x) if block % 3 == 1 else x


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 1, 3)),
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        nn.Linear(12, WIDTH),
    )


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 20), nn.Dropout(0.4), nn.Linear(20, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: model for name, model in plain.MODELS.items() if "tiny" not in name},
    "300 tiny": lambda: plain.ManyTiny(300),
    "convolution with batch norm": convolution,
    "dropout": dropping,
    "parameters used by some data blocks": Sometimes,
    "one parameter": lambda: nn.Linear(WIDTH, 2, bias=False),
}
OF_ITS_OWN = ("convolution with batch norm", "dropout")
"""Models whose data blocks do not simply add up to the whole batch."""


def make(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    model = MODELS[name]()
    return model if name.startswith("mixed") else model.to(dtype)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


class Data:
    """Samples of each data block of each step, in subsets.

    Args:
        samples: their number in each data block.
        most: in a subset.
    """

    def __init__(
        self,
        samples: Sequence[int] = (PER_BLOCK,) * BLOCKS,
        most: int = PER_BLOCK,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.samples = tuple(samples)
        self._most = most
        self._dtype = dtype

    def batch(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 + step)
        return torch.randn(sum(self.samples), WIDTH, generator=generator, dtype=torch.float64).to(
            self._dtype
        )

    def read(self, step: int, block: int) -> Iterable[Subset]:
        first, count = sum(self.samples[:block]), self.samples[block]
        for part in self.batch(step)[first : first + count].split(self._most) if count else ():
            yield part.clone().requires_grad_(), len(part) / sum(self.samples), block


def loss_of(module: nn.Module, subset: Subset) -> torch.Tensor:
    x, share, block = subset
    out = module(x, block) if isinstance(module, Sometimes) else module(x)
    return out.pow(2).mean() * share


class Run:
    """A Coded and the same in one process.

    Args:
        loss: of a subset, if it is to do more than `loss_of`.
    """

    def __init__(
        self,
        world: World,
        module: nn.Module,
        data: Data | None = None,
        make_optimizer: Callable[..., torch.optim.Optimizer] = sgd,
        loss: Callable[[Subset], torch.Tensor] | None = None,
        seed: int = 0,
        block_bytes: int = 200,
        extra: Any = None,
        **config: Any,
    ) -> None:
        self.world = world
        self.data = data or Data()
        self.module = module
        self.optimizer = make_optimizer(module.parameters())
        self.loss = loss or partial(loss_of, module)
        config = {"blocks": len(self.data.samples), "copies": 1, **config}
        self.coded = Coded(
            module,
            self.optimizer,
            CodedConfig(**config),
            world=world,
            samples=self.data.samples,
            seed=seed,
            block_bytes=block_bytes,
            extra=extra,
        )
        self._alone = Alone(
            module, make_optimizer, self.data.read, loss_of, self.data.samples, seed
        )
        self._expected: list[Step] = []
        self.checked = 0
        """Steps whose gradients this rank got."""
        self.jumps: list[tuple[int, int]] = []
        """From where to where this rank was moved."""

    def expected(self, step: int) -> Step:
        """What step number `step`, counted from 0, gives in one process."""
        while len(self._expected) <= step:
            self._expected.append(self._alone.step())
        return self._expected[step]

    def step(self) -> bool:
        """One step, compared."""
        coded, number = self.coded, self.coded.step_number
        if not coded.step(lambda block: self.data.read(number, block), self.loss):
            if not coded.is_over:
                assert coded.moved
                self.jumps.append((number, coded.step_number))
                self.assert_state()
            return False
        assert not coded.moved
        assert coded.step_number == number + 1
        expected = self.expected(number)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        assert_same([p.grad for p in trained], expected.gradients)
        assert coded.loss == expected.loss
        self.optimizer.step()
        self.checked += 1
        self.assert_state()
        return True

    def assert_state(self) -> None:
        """Compare module and optimizer with those of one process after as many steps."""
        if self.coded.step_number == 0:
            return
        expected = self.expected(self.coded.step_number - 1)
        assert_same([*self.module.buffers()], expected.buffers)
        assert_same([*self.module.parameters()], expected.parameters)
        assert_equal(self.optimizer.state_dict(), expected.optimizer)

    def to(self, steps: int) -> None:
        """Steps up to so many, and the end of the run."""
        while self.coded.step_number < steps and not self.coded.is_over:
            self.step()
        self.end()

    def end(self) -> None:
        """End the run. All ranks whose number of steps is the same have the same of everything."""
        self.coded.end()
        ends = all_gather(engine_of(self.world).control, (self.coded.step_number, self._checksum()))
        last = max(number for number, _ in ends)
        assert ends[0][0] == last  # a root is never left behind
        assert len({checksum for number, checksum in ends if number == last}) == 1

    def _checksum(self) -> int:
        state = self.optimizer.state_dict()["state"]
        moments = [t for each in state.values() for t in each.values() if torch.is_tensor(t)]
        checksum = 0
        for tensor in (*self.module.parameters(), *self.module.buffers(), *moments):
            checksum = zlib.crc32(bits(tensor.detach()), checksum)
        return checksum


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(
    found: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None]
) -> None:
    assert [g is None for g in found] == [e is None for e in expected]
    for gradient, reference in zip(found, expected, strict=True):
        if gradient is not None and reference is not None:
            assert gradient.shape == reference.shape
            assert gradient.dtype == reference.dtype
            assert bits(gradient.detach()) == bits(reference.detach())


def assert_equal(found: Any, expected: Any) -> None:
    """Of state dicts, bit by bit."""
    if torch.is_tensor(expected):
        assert_same([found], [expected])
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


def sizes_up_to(size: int) -> list[int]:
    return sorted({1, min(2, size), size})


# ---------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("name", MODELS)
def test_gradients_have_the_bits_of_one_process(world: World, name: str) -> None:
    """And are those of the whole batch. With one copy, no rank can be left behind."""
    run = Run(world, make(name))
    for number in range(STEPS):
        expected = plain.plain(run.module, run.data.batch(number)) if simple(name) else None
        assert run.step()
        if expected is not None:
            assert_close(
                [g for g in run.expected(number).gradients if g is not None],
                [g for g in expected if g is not None],
            )
    run.end()


def simple(name: str) -> bool:
    return name not in OF_ITS_OWN and not name.startswith("parameters")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_gradients(world: World, dtype: torch.dtype) -> None:
    """16-bit ones are summed as float32, and rounded once."""
    run = Run(world, make("perceptron", dtype), Data(dtype=dtype))
    for number in range(STEPS):
        expected = plain.plain(run.module, run.data.batch(number))
        assert run.step()
        if dtype == torch.float32:
            assert_close(run.expected(number).gradients, expected)
    run.end()


@pytest.mark.parametrize("block_bytes", [1, 1 << 30])
def test_model_blocks_of_any_size(world: World, block_bytes: int) -> None:
    run = Run(world, make("perceptron"), block_bytes=block_bytes)
    run.to(STEPS)
    assert run.checked == STEPS
    assert len(run.coded._backward.columns) == (6 if block_bytes == 1 else 1)


@pytest.mark.parametrize("root", ["working", "dedicated"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_whoever_holds_and_whoever_adds_up(world: World, placement: str, root: str) -> None:
    for aggregators in sizes_up_to(world.size):
        workers = world.size - (aggregators if root == "dedicated" else 0)
        for copies in sizes_up_to(workers) if workers else ():
            run = Run(
                *(world, make("perceptron"), Data((3,) * 7)),
                placement=placement,
                root=root,
                aggregators=aggregators,
                copies=copies,
            )
            run.to(3)
            assert run.checked == 3 or copies > 1


@pytest.mark.parametrize(
    "samples",
    [(5, 1, 3, 2, 7, 4, 1, 1, 2), (1,), (2, 3), (2, 0, 0, 3, 0, 1, 0), (0, 0, 0, 2)],
    ids=str,
)
@pytest.mark.parametrize("most", [1, 2, 10])
def test_data_blocks_of_any_number_of_samples_and_subsets(
    world: World, samples: tuple[int, ...], most: int
) -> None:
    """Also none at all, and fewer data blocks than workers."""
    for name in ("perceptron", "convolution with batch norm", "recomputed, re-entrant"):
        if name.startswith("conv") and (most == 1 or 1 in samples):
            continue  # batch norm needs two values
        Run(world, make(name), Data(samples, most), copies=world.size).to(3)


def test_gradients_go_out_as_they_come_with_several_subsets(world: World) -> None:
    """What the first backward showed is of one subset, and not of all of a data block."""
    run = Run(world, make("recomputed, re-entrant"), Data((6,) * 4, most=2))
    run.step()
    named = dict(
        zip(
            (n for n, _ in run.module.named_parameters()), run.coded._backward.arrivals, strict=True
        )
    )
    assert {name for name, count in named.items() if count > 1} == {"shared.weight", "shared.bias"}
    assert max(named.values()) == 2
    run.to(2)


def test_dropout_depends_on_the_seed_alone(world: World) -> None:
    sums = []
    for seed in (0, 0, 7):
        torch.manual_seed(world.rank)  # what the program draws does not matter
        run = Run(world, make("dropout"), seed=seed, copies=2)
        before = torch.get_rng_state()
        run.to(3)
        assert torch.equal(before, torch.get_rng_state())
        sums.append(run._checksum())
    assert sums[0] == sums[1] != sums[2]


def test_twenty_steps_of_adamw(world: World) -> None:
    run = Run(world, make("convolution with batch norm"), make_optimizer=adamw)
    run.to(20)
    assert run.checked == 20


def test_a_later_run_needs_not_find_the_order_anew(world: World) -> None:
    first = Run(world, make("perceptron"))
    first.to(1)
    second = Run(world, make("perceptron"))
    second.coded.load_state_dict(first.coded.state_dict())
    columns = second.coded._backward.columns
    assert [c.members for c in columns] == [c.members for c in first.coded._backward.columns]
    second.to(STEPS)
    assert second.coded._backward.columns is columns
    other = Run(world, make("tied"))
    other.coded.load_state_dict(first.coded.state_dict())  # of another model: not used
    other.to(2)


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


# ---------------------------------------------------------------------- errors


def test_an_error_of_the_program_comes_through(world: World) -> None:
    def broken(subset: Subset) -> torch.Tensor:
        raise ValueError("on purpose")

    run = Run(world, make("perceptron"))
    with pytest.raises(ValueError, match="on purpose"):
        run.coded.step(lambda block: run.data.read(0, block), broken)
    run.coded.end()


def test_a_gradient_that_grows_after_it_was_sent(world: World) -> None:
    module = make("recomputed, re-entrant")
    run = Run(world, module, data := Data((2,) * 4))
    run.step()
    module.repeats = 3
    with pytest.raises(ExchangeError, match=r"shared.* grew after it was sent") as caught:
        run.coded.step(lambda block: data.read(1, block), run.loss)
    assert "use_reentrant=False" in str(caught.value)
    run.coded.end()


def test_data_that_nobody_is_left_to_compute(world: World, shared_folder: Path) -> None:
    """With one copy, of ranks that say nothing. Module and optimizer stay as they were."""
    if world.size == 1:
        pytest.skip("there are no others")
    told = shared_folder / "told"

    def loss(subset: Subset) -> torch.Tensor:
        if world.rank and run.coded.step_number == 2:
            with run.coded.engine.exclusive():  # so that its engine does not answer
                while not told.exists():
                    time.sleep(POLL_S)
        return loss_of(run.module, subset)

    run = Run(
        *(world, make("convolution with batch norm")), loss=loss, copies=1, silent_s=0.3, lost_s=0.6
    )
    run.step()
    run.step()
    if world.rank == 0:
        with pytest.raises(LostError, match=r"step 3 cannot .* data blocks \d.* rank \d"):
            run.step()
        run.assert_state()
        told.touch()
        coordinator = run.coded.coordinator
        assert coordinator is not None
        now = now_s()
        run.coded.engine.drive(lambda: min(coordinator._heard_s.values()) > now, POLL_S)
        with pytest.raises(LostError):
            run.coded.end()
    else:
        run.step()
        run.coded.end()


def test_a_slow_root_is_not_silent(world: World) -> None:
    """It is the one that listens; what it computes itself may take as long as it likes."""

    def loss(subset: Subset) -> torch.Tensor:
        if world.rank == 0 and run.coded.step_number == 1:
            begun_s = time.monotonic()
            while time.monotonic() - begun_s < 1.0:
                time.sleep(POLL_S)
        return loss_of(run.module, subset)

    data = Data((2,) * world.size)
    run = Run(world, make("perceptron"), data, loss=loss, copies=1, silent_s=0.3, lost_s=0.6)
    run.to(3)
    assert run.checked == 3


def test_too_few_ranks(world: World) -> None:
    for config in (
        CodedConfig(aggregators=world.size + 1),
        CodedConfig(aggregators=world.size, root="dedicated"),
    ):
        module = make("perceptron")
        with pytest.raises(
            ExchangeError, match=r"too few ranks [^\n]*\n  fix: start more"
        ) as caught:
            Coded(module, sgd(module.parameters()), config, world=world)
        assert caught.value.everywhere


@pytest.mark.parametrize("samples", [(1, 2), (1,) * 5, (0, 0, 0, 0), (2, -1, 1, 1)])
def test_samples_that_do_not_fit(world: World, samples: tuple[int, ...]) -> None:
    module = make("perceptron")
    with pytest.raises(ExchangeError, match="allowed: 4 numbers"):
        Coded(
            *(module, sgd(module.parameters()), CodedConfig(blocks=4)),
            world=world,
            samples=samples,
        )


def test_no_copies() -> None:
    with pytest.raises(JobError, match="copies: got 0; allowed: at least 1"):
        CodedConfig(copies=0)


def test_enough_that_cannot_be_had(world: World) -> None:
    if world.size == 1:
        pytest.skip("one worker is enough")
    module = make("perceptron")
    with pytest.raises(ExchangeError, match="data block"):
        Coded(
            module,
            sgd(module.parameters()),
            CodedConfig(copies=1, enough=world.size - 1),
            world=world,
        )


# ---------------------------------------------------------------------- after the end


def test_a_run_that_is_over_leaves_nothing(world: World) -> None:
    engine = engine_of(world)
    engine.channel("before").abandon()
    assert not engine._listeners  # also of the tests before
    run = Run(world, make("perceptron"), copies=2)
    run.to(2)
    this = weakref.ref(run.coded)
    module = run.module
    engine.channel("after").abandon()
    assert not engine._listeners
    del run
    gc.collect()
    assert this() is None
    again = Run(world, module)  # whose parameters have hooks of the run before
    again.to(2)
    barrier_on(engine.control)


def test_two_runs_at_once(world: World) -> None:
    left, right = Run(world, make("perceptron")), Run(world, make("tied"))
    for number in range(3):
        for run in (left, right) if number % 2 else (right, left):
            assert run.step()
    left.end()
    right.step()
    right.end()
