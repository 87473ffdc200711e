"""Coded sends, votes and estimates: the pure parts, and on real ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from grad.coded.alone import along_tree
from torch import nn

from hpctrain.comm.collect import barrier_on
from hpctrain.comm.engine import engine_of
from hpctrain.errors import ExchangeError, JobError
from hpctrain.grad.coded import exchange
from hpctrain.grad.coded.cells import Buffer, Kind, Pool
from hpctrain.grad.coded.collecting import WholeSum, variance_of_mean
from hpctrain.grad.coded.columns import GradientColumn, buffer_columns
from hpctrain.grad.coded.config import CodedConfig, LostError
from hpctrain.grad.coded.dealing import Paces
from hpctrain.grad.coded.exchange import Coded
from hpctrain.grad.coded.schemes import Combined, Scheme, Voted, scheme_of
from hpctrain.grad.coded.sums import Node, tree_of
from hpctrain.world import World

SIZE = 5
POLL_S = 1e-4


@pytest.fixture(autouse=True)
def lends_also_what_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "LEAST_BYTES", 1)


class Bench:
    """A column of one parameter, and its cells."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.pool = Pool()
        self.taken: list[Buffer] = []
        parameter = nn.Parameter(torch.zeros(SIZE, dtype=dtype))
        self.column = GradientColumn(0, [0], ["p"], [parameter], 0)
        self.parameter = parameter

    def cell(self, gradient: torch.Tensor, loss: float = 0.0) -> Buffer:
        self.parameter.grad = gradient
        cell = self.pool.take(self.column.nbytes).write(Kind.CELL, 0)
        self.column.pack(cell)
        cell.loss = loss
        self.taken.append(cell)
        return cell

    def gradient(self, cell: Buffer | None) -> torch.Tensor:
        assert cell is not None
        return self.column.views(cell)[0].clone()

    def assert_nothing_is_held(self, *but: Buffer | None) -> None:
        held = [cell for cell in {id(c): c for c in self.taken}.values() if cell.holders]
        assert all(any(cell is one for one in but) for cell in held)


def gradients(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(count, SIZE, generator=generator, dtype=torch.float64))


# ---------------------------------------------------------------------- coded sends


@pytest.mark.parametrize(("workers", "copies"), [(1, 1), (4, 1), (4, 2), (5, 3), (8, 2), (8, 3)])
def test_any_survivors_give_the_sum(workers: int, copies: int) -> None:
    scheme, bench = Combined(workers, copies), Bench()
    parts = gradients(workers)
    losses = [float(part.sum()) for part in parts]
    tree = tree_of(workers)
    for survivors in combinations(range(workers), workers - copies + 1):
        root = scheme.whole(0, bench.column, tree, bench.pool.drop)
        total = None
        for worker in reversed(survivors):
            assert total is None
            combination = scheme.parts(bench.column, tree, worker, bench.pool.drop)
            for block in scheme.own(worker):
                assert combination.take_settled(()) == []
                cell = bench.cell(parts[block], losses[block])
                assert combination.put(Node(block, block + 1), cell)
            ((node, vector),) = combination.take_settled(())
            assert root.put(worker, node, vector)
            assert not root.put(worker, node, bench.cell(parts[0])), "what is there already"
            total = root.take_total()
        assert total is not None
        assert torch.allclose(bench.gradient(total), sum(parts), rtol=0, atol=1e-12)  # type: ignore[arg-type]
        assert total.loss == pytest.approx(sum(losses), abs=1e-12)
        bench.assert_nothing_is_held(total)
        bench.pool.drop(total)


def test_a_combination_that_is_not_complete_is_never_sent() -> None:
    scheme, bench = Combined(4, 2), Bench()
    combination = scheme.parts(bench.column, tree_of(4), 3, bench.pool.drop)
    combination.put(Node(3, 4), bench.cell(gradients(1)[0]))
    assert combination.take_settled(()) == []
    combination.clear()
    bench.assert_nothing_is_held()


def test_decoding_that_is_given_up() -> None:
    scheme, bench = Combined(4, 2), Bench()
    root = scheme.whole(0, bench.column, tree_of(4), bench.pool.drop)
    root.put(2, Node(2, 3), bench.cell(gradients(1)[0]))
    root.clear()
    assert root.take_total() is None
    bench.assert_nothing_is_held()


def test_who_is_needed_to_decode() -> None:
    scheme = Combined(5, 3)
    assert scheme.own(4) == (0, 1, 4)
    assert scheme.lost(scheme.assignment, (1, 2)) == ()
    assert scheme.lost(scheme.assignment, (0, 1, 2)) == (0, 1, 2, 3, 4)
    assert "any 3 workers" in scheme.certificate(3)
    with pytest.raises(ExchangeError, match="allowed: at least 3 of 5"):
        scheme.certificate(2)
    with pytest.raises(ExchangeError, match="one for each worker: 4"):
        scheme_of("mds", "spread", 8, 4, 2, None)


@pytest.mark.parametrize("scheme", [Combined(4, 2), Voted(8, 4, 4)], ids=["mds", "vote"])
def test_nobody_is_asked_for_more(scheme: Scheme) -> None:
    workers = scheme.assignment.workers
    round_ = scheme.round(scheme.assignment, Paces(workers), 0.0, ())
    for worker in range(workers):
        assert round_.joined(worker, scheme.own(worker), 0.0) == []
    for worker in range(1, workers):
        for number, block in enumerate(scheme.own(worker), 1):
            assert round_.done(worker, block, float(number)) == []
    assert round_.decide(1000.0) == []
    assert len(round_.done_by) == round_.assignment.blocks
    assert {block for block, _ in round_.redundant} <= {*range(scheme.assignment.blocks)}
    round_.end(1001.0)


# ---------------------------------------------------------------------- votes


class Votes:
    """Three workers in one group, whose root tells who is wrong."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.scheme = Voted(2, 3, 3)
        self.wrong: list[tuple[int, int, Node]] = []
        self.scheme.wrong = lambda *what: self.wrong.append(what)
        self.root = self.scheme.whole(7, self.bench.column, tree_of(2), self.bench.pool.drop)

    def put(self, worker: int, *values: float) -> bool:
        return self.root.put(
            worker, Node(0, 2), self.bench.cell(torch.tensor(values * SIZE, dtype=torch.float64))
        )


def test_what_most_sent_counts() -> None:
    votes = Votes()
    assert not votes.put(2, 4.0)
    assert votes.root.take_total() is None
    assert not votes.put(0, 1.0)
    assert votes.put(1, 1.0)
    total = votes.root.take_total()
    assert votes.bench.gradient(total).tolist() == [1.0] * SIZE
    assert votes.wrong == [(2, 7, Node(0, 2))]
    votes.bench.assert_nothing_is_held(total)


def test_a_late_one_is_compared_too() -> None:
    votes = Votes()
    votes.put(0, 1.0)
    votes.put(1, 1.0)
    assert votes.root.take_total() is not None
    assert not votes.put(2, -1.0)
    assert not votes.put(2, -1.0), "no second vote"
    assert votes.wrong == [(2, 7, Node(0, 2))]


def test_nan_is_a_vote_like_any_other() -> None:
    votes = Votes()
    votes.put(0, math.nan)
    votes.put(1, 1.0)
    assert votes.put(2, 1.0)
    assert votes.wrong == [(0, 7, Node(0, 2))]


def test_a_second_vote_of_one_worker_does_not_count() -> None:
    votes = Votes()
    votes.put(0, 4.0)
    assert not votes.put(0, 4.0)
    assert votes.root.take_total() is None
    votes.root.clear()
    votes.bench.assert_nothing_is_held()


def test_no_majority_can_come() -> None:
    votes = Votes()
    undecided = votes.root.undecided  # type: ignore[attr-defined]
    votes.put(0, 1.0)
    votes.put(1, 2.0)
    assert undecided(()) == []
    assert undecided({2}) == [Node(0, 2)]
    votes.put(2, 3.0)
    assert undecided(()) == [Node(0, 2)]


def test_how_many_votes_are_needed() -> None:
    scheme = Voted(8, 6, 3)
    assert scheme.fewest == 5
    first = scheme.assignment.holders[0]
    assert scheme.lost(scheme.assignment, first[:1]) == ()
    assert 0 in scheme.lost(scheme.assignment, first[:2])
    assert "any 5 of 6 workers" in scheme.certificate(5)
    with pytest.raises(ExchangeError, match="at least 5"):
        scheme.certificate(4)
    with pytest.raises(ExchangeError, match="too few copies to vote"):
        Voted(8, 6, 2)


def test_what_lies_between_gradients_is_no_vote() -> None:
    """Cells are used again, and gradients begin at aligned places."""
    pool = Pool()
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(5))]
    column = GradientColumn(0, [0, 1], ["a", "b"], parameters, 0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    digests = set()
    for rubbish in (0, 255):
        cell = pool.take(column.nbytes)
        cell.payload.fill_(rubbish)
        column.pack(cell)
        cell.loss = 1.5
        digests.add(column.digest(cell))
    assert len(digests) == 1
    cell.loss = 2.5
    assert column.digest(cell) not in digests


# ---------------------------------------------------------------------- estimates


def test_estimate_of_equal_blocks_is_their_mean() -> None:
    bench = Bench()
    parts = gradients(4)
    whole = WholeSum(bench.column, tree_of(4), bench.pool.drop)
    for block in (0, 1, 3):
        whole.put(block, Node(block, block + 1), bench.cell(parts[block], loss=1.0 + block))
    estimate = whole.take_estimate((5, 5, 5, 5))
    assert estimate is not None
    expected = (parts[0] + parts[1] + parts[3]) * (4 / 3)
    assert torch.allclose(bench.gradient(estimate.total), expected, rtol=0, atol=1e-14)
    assert estimate.total.loss == pytest.approx(7.0 * 4 / 3)
    assert estimate.covered == 0.75
    assert estimate.variance > 0
    bench.assert_nothing_is_held(estimate.total)


def test_estimate_from_one_part_has_no_error() -> None:
    bench = Bench()
    whole = WholeSum(bench.column, tree_of(2), bench.pool.drop)
    assert whole.take_estimate((1, 1)) is None
    whole.put(0, Node(0, 1), bench.cell(gradients(1)[0]))
    estimate = whole.take_estimate((1, 3))
    assert estimate is not None
    assert estimate.covered == 0.25
    assert math.isnan(estimate.variance)
    assert torch.equal(bench.gradient(estimate.total), gradients(1)[0] * 4)


def test_blocks_without_samples_are_no_basis() -> None:
    bench = Bench()
    whole = WholeSum(bench.column, tree_of(2), bench.pool.drop)
    whole.put(0, Node(0, 1), bench.cell(gradients(1)[0]))
    assert whole.take_estimate((0, 3)) is None


def test_estimates_are_unbiased_and_so_is_their_variance() -> None:
    """Over all ways in which 3 of 8 parts may be there."""
    parts = gradients(8)
    mean = sum(parts) / 8
    found, told = [], []
    for there in combinations(parts, 3):
        found.append(sum(there) / 3)
        told.append(variance_of_mean([[part] for part in there], [1] * 3, 8))
    errors = torch.stack([(one - mean).square().sum() for one in found])  # type: ignore[operator]
    assert torch.allclose(sum(found) / len(found), mean)  # type: ignore[arg-type]
    assert sum(told) / len(told) == pytest.approx(float(errors.mean()))
    assert variance_of_mean([[part] for part in parts], [1] * 8, 8) == 0


def test_estimated_buffers() -> None:
    """Means are scaled like gradients; whole numbers are those of data block 0, or stay."""
    module = nn.BatchNorm1d(2)
    assert module.running_var is not None
    floats, whole_numbers = buffer_columns(module, 0)
    for block, covered in ((0, 0.5), (1, 0.0)):
        for column in (floats, whole_numbers):
            pool = Pool()
            whole = WholeSum(column, tree_of(2), pool.drop)
            cell = pool.take(column.nbytes)
            column.keep()
            if column is floats:
                module.running_var.fill_(3)
            column.pack(cell, block, 0.5)
            column.restore()
            whole.put(0, Node(block, block + 1), cell)
            estimate = whole.take_estimate((1, 1))
            assert estimate is not None
            assert estimate.covered == (0.5 if column is floats else covered)
            if column is floats:
                column.show(estimate.total)
                assert module.running_var.tolist() == [3.0, 3.0]


def test_what_does_not_go_together() -> None:
    with pytest.raises(JobError, match=r"coded.deadline_s.*\n.*allowed: 0|deadline_s"):
        CodedConfig(deadline_s=1.0, sends="mds")
    with pytest.raises(JobError, match=r"placement, coded\.relearn: does nothing"):
        CodedConfig(placement="cyclic", relearn=False, sends="vote")
    with pytest.raises(JobError, match="silent before it is lost"):
        CodedConfig(silent_s=2.0, lost_s=1.0)


# ---------------------------------------------------------------------- real ranks


class Job:
    """Linear layers on samples of data blocks; each data block's gradient is known."""

    def __init__(self, world: World, **config: float | str) -> None:
        torch.manual_seed(5)
        self.world = world
        self.module = nn.Sequential(
            nn.Linear(SIZE, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)
        ).double()
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1)
        made = CodedConfig(**config)  # type: ignore[arg-type]
        self.coded = Coded(self.module, self.optimizer, made, world=world, block_bytes=100)
        self.data = torch.randn(self.coded.blocks, 4, SIZE, dtype=torch.float64)
        self.factor: Callable[[int], float] = lambda block: 1.0
        self.wait: Callable[[int], object] = lambda block: None

    def share(self, block: int) -> torch.Tensor:
        out: torch.Tensor = self.module(self.data[block])
        return out.square().mean() / self.coded.blocks

    def loss(self, block: int) -> torch.Tensor:
        self.wait(block)
        return self.share(block) * self.factor(block)

    def expected(self) -> tuple[list[list[torch.Tensor]], float]:
        """The gradients and the loss of the next step, by data block, in one process."""
        kept = {name: value.clone() for name, value in self.module.state_dict().items()}
        found, loss = [], 0.0
        for block in range(self.coded.blocks):
            self.module.load_state_dict(kept)
            value = self.share(block)
            loss += float(value)
            found.append(list(torch.autograd.grad(value, list(self.module.parameters()))))
        self.module.load_state_dict(kept)
        return found, loss

    def step(self) -> bool:
        return self.coded.step(lambda block: [block], self.loss)

    def gradients(self) -> list[torch.Tensor]:
        return [p.grad.clone() for p in self.module.parameters() if p.grad is not None]


@pytest.mark.mpi
@pytest.mark.parametrize("root", ["working", "dedicated"])
@pytest.mark.parametrize(("sends", "copies"), [("mds", 1), ("mds", 2), ("mds", 3), ("vote", 3)])
def test_steps_are_those_of_one_process(world: World, sends: str, copies: int, root: str) -> None:
    workers = world.size - (root == "dedicated")
    if workers < (3 if sends == "vote" else 1):
        pytest.skip("too few workers")
    job = Job(world, sends=sends, copies=copies, root=root)
    late = world.size - 1

    def wait(block: int) -> None:
        del block
        while world.rank == late > 0 and min(copies, workers) > 1 and job.coded.is_wanted:
            time.sleep(POLL_S)

    for number in range(4):
        job.wait = wait if number % 2 else lambda block: None
        expected, loss = job.expected()
        if not job.step():
            continue
        for place, gradient in enumerate(job.gradients()):
            reference = along_tree([block[place] for block in expected])
            assert torch.allclose(gradient, reference, rtol=0, atol=1e-12)
        assert job.coded.loss == pytest.approx(loss, abs=1e-12)
        job.optimizer.step()
    job.coded.end()
    barrier_on(engine_of(world).control)


@pytest.mark.mpi
def test_a_rank_that_sends_wrong_gradients_is_named(world: World) -> None:
    if world.size < 3:
        pytest.skip("too few workers")
    job = Job(world, sends="vote", copies=3)
    liar = world.size - 1
    job.factor = lambda block: 1.001 if world.rank == liar and job.coded.step_number else 1.0
    while not (job.coded.is_over or job.coded.wrong):  # the root stops when it has found out
        expected, _ = job.expected()
        if job.step():
            for place, gradient in enumerate(job.gradients()):
                reference = along_tree([block[place] for block in expected])
                assert torch.allclose(gradient, reference, rtol=0, atol=1e-12)
            job.optimizer.step()
    job.coded.end()
    if world.rank == 0:
        assert {*job.coded.wrong} == {liar}


@pytest.mark.mpi
def test_copies_that_all_differ(world: World) -> None:
    if world.size != 3:
        pytest.skip("for one group of three")
    job = Job(world, sends="vote", copies=3)
    assert job.step()
    job.factor = lambda block: 1.0 + 0.1 * world.rank
    if world.rank == 0:
        with pytest.raises(LostError, match="differ, and no majority agrees"):
            job.step()
        with pytest.raises(LostError):
            job.coded.end()  # the others learn of the end
    else:
        assert not job.step()
        assert job.coded.is_over
        job.coded.end()


@pytest.mark.mpi
@pytest.mark.parametrize("root", ["working", "dedicated"])
def test_a_deadline(world: World, shared_folder: Path, root: str) -> None:
    """The last data block of the late rank is missing in one step: the others stand for it."""
    if world.size == 1:
        pytest.skip("nobody else is late")
    job = Job(world, copies=1, deadline_s=1.0, root=root)
    is_late = world.rank == world.size - 1
    last = job.coded.assignment.owned(job.coded.assignment.workers - 1)[-1]
    done = shared_folder / "done"

    def wait(block: int) -> None:
        while is_late and block == last and job.coded.step_number == 1 and not done.exists():
            time.sleep(POLL_S)

    job.wait = wait
    for number in range(2):
        expected, _ = job.expected()
        if not job.step():
            assert job.coded.is_over
            break
        if number == 1 and not is_late:
            assert job.coded.covered == (job.coded.blocks - 1) / job.coded.blocks
            assert job.coded.error > 0
            assert {p.grad is None for p in job.module.parameters()} == {False}
            for place, gradient in enumerate(job.gradients()):
                there = sum(block[place] for at, block in enumerate(expected) if at != last)
                scaled = there / job.coded.covered
                assert torch.allclose(gradient, scaled, rtol=0, atol=1e-12)
            done.touch()
        job.optimizer.step()
    job.coded.end()
    barrier_on(engine_of(world).control)
