"""Coded steps on real ranks: the bits of one process, whoever computes and whoever is late."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path

import pytest
import torch
from devices import gpu
from grad import plain
from grad.coded.side_by_side import (
    MODELS,
    OF_ITS_OWN,
    POLL_S,
    STEPS,
    Data,
    Run,
    Subset,
    adamw,
    assert_same,
    loss_of,
    make,
    sgd,
)
from grad.plain import assert_close
from late_device import LateDevice

from hpctrain.comm.collect import barrier_on
from hpctrain.comm.engine import engine_of
from hpctrain.errors import ExchangeError, JobError
from hpctrain.grad.coded import exchange
from hpctrain.grad.coded.assignment import PLACEMENTS, place
from hpctrain.grad.coded.config import CodedConfig, LostError
from hpctrain.grad.coded.exchange import Coded
from hpctrain.grad.coded.lending import ROUNDS
from hpctrain.trace import now_s
from hpctrain.world import World

pytestmark = pytest.mark.mpi


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


@pytest.fixture
def lends_also_what_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "LEAST_BYTES", 1)


@pytest.mark.usefixtures("lends_also_what_is_small")
@pytest.mark.parametrize("name", MODELS)
def test_gradients_that_are_lent_have_the_same_bits(world: World, name: str) -> None:
    """Those of workers to the root, and its sums to them; more steps than an arena has room for."""
    run = Run(world, make(name), root="working", copies=world.size)
    run.to(3 * ROUNDS)
    assert (run.coded._desk._lending is not None) == (world.size > 1)


@pytest.mark.usefixtures("lends_also_what_is_small")
def test_all_lend_who_must_compute(world: World) -> None:
    run = Run(world, make("perceptron"), root="working", copies=1)
    run.to(3 * ROUNDS)
    assert lenders_of(run) == ({*range(1, world.size)} if world.is_root else {0})


def lenders_of(run: Run) -> set[int]:
    """Ranks whose memory this one has read."""
    lending = run.coded._desk._lending
    return {source for source, _ in lending._seen} if lending else set()


@pytest.mark.usefixtures("lends_also_what_is_small")
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


@pytest.mark.usefixtures("lends_also_what_is_small")
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
        sums.append(world.comm.bcast(run._checksum()))  # the root's, which is never left behind
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


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("name", ["convolution with batch norm", "300 tiny"])
def test_gradients_on_a_device_whose_copies_end_late(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, copies: int
) -> None:
    monkeypatch.setattr(exchange, "device_of", lambda _: LateDevice(program_waits=True))
    Run(world, make(name), copies=min(copies, world.size), block_bytes=2000).to(STEPS)


@gpu
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_on_a_gpu(world: World, name: str, copies: int) -> None:
    where = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    with torch.backends.cudnn.flags(deterministic=True), torch.cuda.device(where):
        module = make(name).to(where)
        run = Run(world, module, Data(device=where), copies=min(copies, world.size))
        run.to(STEPS)


def test_gradients_outlive_an_evaluation(world: World) -> None:
    """Late cells of the step come meanwhile, and take memory that was given back."""
    run = Run(world, make("convolution with batch norm"), copies=2)
    for _ in range(10):
        if not run.step():
            break
        before = [p.grad.clone() for p in run.module.parameters() if p.grad is not None]
        if run.coded.evaluate(2 * world.size, lambda block: {"one": 1.0}) is None:
            break
        assert_same([p.grad for p in run.module.parameters() if p.grad is not None], before)
    run.end()


@pytest.mark.parametrize("continues", [False, True])
def test_an_evaluation_that_the_root_gives_up(world: World, continues: bool) -> None:
    """Because another rank was told to stop; whoever still computes figures leaves with it."""
    run = Run(world, make("perceptron"))
    assert run.step()
    coded = run.coded
    if not world.is_root:
        coded.ask_to_stop()

    def is_told() -> bool:
        return coded.is_told_to_stop or world.size == 1

    def figures(block: int) -> dict[str, float]:
        """So late that the evaluation is not complete before it is given up."""
        coded.engine.drive(is_told if world.is_root else lambda: coded.is_over, POLL_S)
        return {"one": 1.0}

    assert coded.evaluate(2 * world.size, figures, unless=is_told) is None
    coded.end(continues)
    assert coded.continues is continues
    assert coded.step_number == 1
    barrier_on(coded.engine.control)


# ---------------------------------------------------------------------- errors


def test_an_assignment_by_hand_that_does_not_fit(world: World) -> None:
    module = make("dropout")
    made = place("cyclic", 4, world.size + 1, 2)
    with pytest.raises(ExchangeError, match="made by hand does not fit"):
        Coded(module, sgd(module.parameters()), world=world, assignment=made)


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
            while time.monotonic() - begun_s < 3.0:
                time.sleep(POLL_S)
        return loss_of(run.module, subset)

    data = Data((2,) * world.size)
    run = Run(world, make("perceptron"), data, loss=loss, copies=1, silent_s=1.0, lost_s=2.0)
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


@pytest.mark.parametrize("sends", ["sums", "mds"])
def test_enough_of_more_than_there_are(world: World, sends: str) -> None:
    module = make("perceptron")
    many = world.size + 1
    config = CodedConfig(sends=sends, enough=many)
    with pytest.raises(ExchangeError, match=rf"enough.*: got {many}; allowed: 0 to {world.size}"):
        Coded(module, sgd(module.parameters()), config, world=world)


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


def test_a_rank_that_comes_late_to_the_end_does_not_miss_the_root(world: World) -> None:
    """Which has left by then, and says no more that it lives."""
    run = Run(world, make("perceptron"), copies=2)
    run.to(2)
    coded = run.coded
    if world.is_root:
        coded.end()
    else:
        coded.engine.drive(lambda: coded.is_over, POLL_S)
        coded._desk._heard_s[0] = -1e9
        coded.end()
    barrier_on(coded.engine.control)


def test_two_runs_at_once(world: World) -> None:
    left, right = Run(world, make("perceptron")), Run(world, make("tied"))
    for number in range(3):
        for run in (left, right) if number % 2 else (right, left):
            assert run.step()
    left.end()
    right.step()
    right.end()
