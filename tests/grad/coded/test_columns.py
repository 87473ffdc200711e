"""Gradients and buffers of a model into cells and back: same values, bits, layouts and Nones."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from late_device import LateDevice, LateEvent
from torch import nn

from hpctrain.errors import ExchangeError
from hpctrain.grad.coded.cells import Buffer, Pool
from hpctrain.grad.coded.columns import (
    LEAST_COLUMN_BYTES,
    BufferColumn,
    GradientColumn,
    buffer_columns,
    column_bytes,
)

DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.complex64, torch.complex128),
)


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """Of odd sizes and layouts: contiguous, channels_last, transposed, with gaps, a scalar."""
    images = torch.zeros(3, 4, 5, 2, dtype=dtype).to(memory_format=torch.channels_last)
    gaps = torch.zeros(6, 8, dtype=dtype)[:, ::2]
    tensors = [
        torch.zeros(7, 3, dtype=dtype),
        images,
        torch.zeros(5, 3, dtype=dtype).t(),
        gaps,
        torch.zeros((), dtype=dtype),
    ]
    return [nn.Parameter(tensor) for tensor in tensors]


def column_of(params: Sequence[nn.Parameter], device: LateDevice | None = None) -> GradientColumn:
    names = [f"p{number}" for number in range(len(params))]
    return GradientColumn(2, range(len(params)), names, params, 0, device)


def dirty(pool: Pool, column: GradientColumn | BufferColumn) -> Buffer:
    """A buffer as it comes from the pool: with what was there before."""
    buffer = pool.take(column.nbytes)
    buffer.payload.fill_(255)  # NaN in every floating-point dtype
    buffer.loss = 0.0
    return buffer


def gradients(params: Sequence[nn.Parameter], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for parameter in params:
        values = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
        made.append(torch.empty_like(parameter).copy_(values).detach())
    return made


def give(params: Sequence[nn.Parameter], made: Sequence[torch.Tensor | None]) -> None:
    for parameter, gradient in zip(params, made, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_come_back_as_they_were(dtype: torch.dtype) -> None:
    params, pool = parameters(dtype), Pool()
    column = column_of(params)
    for seed in range(3):
        made = gradients(params, seed)
        give(params, made)
        cell = dirty(pool, column)
        assert column.pack(cell) is None
        give(params, [None] * len(params))
        assert column.show(cell) is None
        for parameter, gradient in zip(params, made, strict=True):
            assert parameter.grad is not None
            assert parameter.grad.dtype == dtype
            assert torch.equal(parameter.grad, gradient)
            if gradient.is_contiguous() or gradient.ndim == 4:
                assert parameter.grad.stride() == gradient.stride()
        pool.drop(cell)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_two_data_blocks(dtype: torch.dtype) -> None:
    """16-bit gradients are summed as float32, and rounded once."""
    params, pool = parameters(dtype), Pool()
    column = column_of(params)
    assert column.dtype == (torch.float32 if dtype.itemsize == 2 else dtype.to_real())
    made = [gradients(params, seed) for seed in range(3)]
    cells = []
    for number, some in enumerate(made):
        give(params, some)
        cells.append(dirty(pool, column))
        column.pack(cells[-1])
        cells[-1].loss = float(number)
    column.add(cells[0], cells[1])
    column.add(cells[0], cells[2])
    assert cells[0].loss == 3
    column.show(cells[0])
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    for index, parameter in enumerate(params):
        first, second, third = (some[index].to(wide) for some in made)
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, (first + second + third).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_that_no_data_block_used_keep_none(dtype: torch.dtype) -> None:
    params, pool = parameters(dtype), Pool()
    column = column_of(params)
    made = gradients(params, 0)
    some = [made[0], None, made[2], None, None]
    others = [None, None, made[2], made[3], None]
    cells = []
    for used in (some, others):
        give(params, used)
        cells.append(dirty(pool, column))
        column.pack(cells[-1])
    column.add(*cells)
    give(params, made)
    column.show(cells[0])
    assert [parameter.grad is None for parameter in params] == [False, True, False, False, True]
    for index, expected in ((0, made[0]), (3, made[3])):
        found = params[index].grad
        assert found is not None
        assert torch.equal(found, expected)
    for used in ([None] * 5, made):  # the same buffer, the same views
        give(params, used)
        column.pack(cells[1])
        column.show(cells[1])
        assert [parameter.grad is None for parameter in params] == [used[0] is None] * 5


def test_what_is_shown_is_the_result_itself() -> None:
    """No copy where dtypes allow, and each buffer has views of its own."""
    params, pool = parameters(torch.float32), Pool()
    column = column_of(params)
    give(params, gradients(params, 0))
    first, second = dirty(pool, column), dirty(pool, column)
    column.pack(first)
    column.pack(second)
    for buffer in (first, second, first):
        column.show(buffer)
        start = buffer.payload.data_ptr()
        for parameter in params:
            assert parameter.grad is not None
            assert start <= parameter.grad.data_ptr() < start + buffer.payload.numel()


def test_cells_may_travel() -> None:
    """Columns are laid out in the same way on all ranks."""
    here, there, pool = parameters(torch.float64), parameters(torch.float64), Pool()
    give(here, gradients(here, 0))
    cell = dirty(pool, column_of(here))
    column_of(here).pack(cell)
    column_of(there).show(Buffer(cell.whole.clone()))
    for mine, other in zip(here, there, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.equal(mine.grad, other.grad)


def test_two_columns_share_buffers_of_one_size() -> None:
    first, second = parameters(torch.float32), parameters(torch.float32)
    pool, buffer = Pool(), None
    for index, params in enumerate((first, second, first)):
        column = GradientColumn(index % 2, range(5), "abcde", params, 0)
        give(params, gradients(params, index))
        buffer = buffer or dirty(pool, column)
        column.pack(buffer)
        column.show(buffer)
        for parameter, expected in zip(params, gradients(params, index), strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, expected)


def test_gradients_that_cannot_travel() -> None:
    pool = Pool()
    sparse = nn.Embedding(4, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    column = GradientColumn(0, [0], ["e.weight"], [sparse.weight], 0)
    with pytest.raises(ExchangeError, match=r"e\.weight is sparse"):
        column.pack(dirty(pool, column))
    twice = nn.Parameter(torch.ones(3))
    (twice.grad,) = torch.autograd.grad(twice.pow(3).sum(), [twice], create_graph=True)
    column = GradientColumn(0, [0], ["w"], [twice], 0)
    with pytest.raises(ExchangeError, match="of parameter w is to be differentiated again"):
        column.pack(dirty(pool, column))
    twice.grad = None


# ---------------------------------------------------------------------- on a device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("asked", [1, 4])
def test_cell_is_read_only_when_its_copy_has_ended(dtype: torch.dtype, asked: int) -> None:
    device, pool = LateDevice(asked, program_waits=True), Pool()
    params = parameters(dtype)
    column = column_of(params, device)
    host = column_of(parameters(dtype))
    for seed in range(3):
        made = gradients(params, seed)
        give(params, made)
        cell = dirty(pool, column)
        event = column.pack(cell)
        give(params, [None] * len(params))  # from now on, others may use their memory
        assert isinstance(event, LateEvent)
        assert cell.numbers(column.dtype).isnan().all()
        while not event.query():
            assert cell.numbers(column.dtype).isnan().all()
        give(host.parameters, made)
        expected = dirty(pool, host)
        host.pack(expected)
        host.show(expected)
        values = [p.grad for p in host.parameters]
        host.show(cell)
        for value, parameter in zip(values, host.parameters, strict=True):
            assert value is not None
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, value)


def test_next_cell_waits_for_the_copy_of_the_last_one() -> None:
    """The memory on the device from which both are copied is one."""
    device, pool = LateDevice(asked=50, program_waits=True), Pool()
    params = parameters(torch.float32)
    column = column_of(params, device)
    cells, events = [], []
    for seed in range(4):
        give(params, gradients(params, seed))
        cells.append(dirty(pool, column))
        events.append(column.pack(cells[-1]))
    for event in events:
        assert isinstance(event, LateEvent)
        while not event.query():
            pass
    host = column_of(parameters(torch.float32))
    for seed, cell in enumerate(cells):
        host.show(cell)
        for parameter, expected in zip(host.parameters, gradients(params, seed), strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_is_needed_until_its_copy_has_ended(dtype: torch.dtype) -> None:
    device, pool = LateDevice(asked=5), Pool()
    params = parameters(dtype)
    column, host = column_of(params, device), column_of(parameters(dtype))
    made = gradients(params, 0)
    give(host.parameters, [*made[:4], None])
    result = dirty(pool, column)
    host.pack(result)
    give(params, gradients(params, 1))
    packed = column.pack(dirty(pool, column))  # is still under way then
    event = column.show(result)
    assert packed is not None
    assert event is not None
    assert not event.query()
    if dtype is torch.float32:  # of others, the program's queue makes a copy: not at once on CUDA
        while not event.query():
            pass
        result.payload.fill_(255)
        device.synchronize()
        for parameter, expected in zip(params[:4], made, strict=False):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, expected)
    assert params[4].grad is None


# ---------------------------------------------------------------------- buffers of the model


class Odd(nn.Module):
    """Buffers of many kinds: those of batch norm, a mask, a counter, flags, none at all."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int32))
        self.register_buffer("flag", torch.tensor([False, True]))
        self.register_buffer("short", torch.tensor([0.5, 3.0], dtype=torch.float16))
        self.register_buffer("nothing", torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.shape[0]
        self.short += x.mean().half()
        y: torch.Tensor = self.norm(x)
        return y


def blocks_of_data(samples: Sequence[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, generator=generator) * (k + 1) for k, n in enumerate(samples)]


def columns_of(module: nn.Module) -> list[BufferColumn]:
    columns = buffer_columns(module, 0)
    for index, column in enumerate(columns):
        column.index = index
    return columns


SAMPLES = (4, 2, 6, 3)


def test_buffers_become_the_mean_over_samples() -> None:
    torch.manual_seed(0)
    model = Odd()
    model(torch.randn(5, 3))
    start = copy.deepcopy(model.state_dict())
    data = blocks_of_data(SAMPLES)
    after = []
    for x in data:
        alone = Odd()
        alone.load_state_dict(start)
        alone(x)
        after.append(alone.state_dict())

    columns, pool = columns_of(model), Pool()
    names = [name for column in columns for name in column._names]
    assert sorted(names) == sorted({*start} - {"nothing", "norm.weight", "norm.bias"})
    sums: list[Buffer] = []
    for column in columns:
        column.keep()
    for block in (2, 0, 3, 1):
        for column in columns:
            column.restore()
        model(data[block])
        for index, column in enumerate(columns):
            cell = dirty(pool, column)
            column.pack(cell, block, SAMPLES[block] / sum(SAMPLES))
            if index < len(sums):
                column.add(sums[index], cell)
            else:
                sums.append(cell)
    for column, total in zip(columns, sums, strict=True):
        column.show(total)

    found = model.state_dict()
    for name in names:
        if start[name].is_floating_point():
            wide = [state[name].double() * n for state, n in zip(after, SAMPLES, strict=True)]
            expected = (sum(wide) / sum(SAMPLES)).to(start[name].dtype)
            torch.testing.assert_close(found[name], expected)
        else:
            assert torch.equal(found[name], after[0][name]), name
    assert found["norm.num_batches_tracked"] == 2
    assert torch.equal(found["mask"], start["mask"])
    assert found["seen"].tolist() == [5 + SAMPLES[0]] * 2
    assert found["flag"].tolist() == [False, True]


def test_buffers_that_a_forward_leaves_keep_their_bits() -> None:
    model = nn.BatchNorm1d(50).eval()
    model.running_mean.normal_()
    model.running_var.uniform_(1e-3, 1e3)
    start = copy.deepcopy(model.state_dict())
    samples = (5, 7, 11, 3, 1, 9)
    for column in columns_of(model):
        column.keep()
        total = None
        for block, count in enumerate(samples):
            cell = dirty(Pool(), column)
            column.pack(cell, block, count / sum(samples))
            if total is None:
                total = cell
            else:
                column.add(total, cell)
        assert total is not None
        column.show(total)
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name])


@pytest.mark.parametrize("start", [torch.inf, torch.finfo(torch.float32).max, torch.nan])
def test_buffers_that_begin_with_no_value(start: float) -> None:
    """As those of observers do, which keep the least that they have seen."""
    model = nn.Module()
    model.register_buffer("least", torch.tensor([start, 7.0]))
    model.register_buffer("other", torch.tensor([start]))
    (column,) = columns_of(model)
    column.keep()
    cells = []
    for block, value in enumerate((2.0, 4.0)):
        column.restore()
        model.least[0] = value
        cells.append(dirty(Pool(), column))
        column.pack(cells[-1], block, 0.5)
    column.restore()
    column.add(*cells)
    column.show(cells[0])
    assert model.least.tolist() == [3.0, 7.0]
    assert torch.equal(model.other.view(torch.int32), torch.tensor([start]).view(torch.int32))


def test_infinite_buffers_and_a_data_block_without_samples() -> None:
    model = Odd()
    for column in columns_of(model):
        column.keep()
        cells = [dirty(Pool(), column) for _ in range(2)]
        column.pack(cells[0], 0, 0.0)
        column.pack(cells[1], 1, 1.0)
        column.add(*cells)
        column.show(cells[0])
    assert torch.equal(model.mask, torch.full((2, 2), -torch.inf).triu(1))


def test_restore_forgets_what_a_forward_did() -> None:
    model = Odd()
    start = copy.deepcopy(model.state_dict())
    columns = columns_of(model)
    for column in columns:
        column.keep()
    for _ in range(2):
        model(torch.randn(4, 3))
        assert not torch.equal(model.norm.running_mean, start["norm.running_mean"])
        for column in columns:
            column.restore()
        for name, value in model.state_dict().items():
            assert torch.equal(value, start[name]), name


def test_buffers_are_found_anew() -> None:
    """A module may put another tensor in a buffer's place."""
    model = nn.BatchNorm1d(2)
    (column,) = [c for c in columns_of(model) if c._averages]
    column.keep()
    model.running_mean = torch.ones(2)
    cell = dirty(Pool(), column)
    column.pack(cell, 0, 1.0)
    column.restore()
    assert model.running_mean.tolist() == [0, 0]
    column.show(cell)
    assert model.running_mean.tolist() == [1, 1]


def test_no_buffers_no_columns() -> None:
    assert buffer_columns(nn.Linear(2, 2), 0) == []
    assert len(buffer_columns(nn.BatchNorm1d(2), 0)) == 2


@pytest.mark.parametrize(
    ("roots", "travel", "expected"),
    [(1, False, 4 << 20), (4, False, 2 << 20), (1, True, 2 << 20), (4, True, 1 << 19)],
)
def test_all_roots_have_columns_and_more_of_them_travel(
    roots: int, travel: bool, expected: int
) -> None:
    assert column_bytes(8 << 20, 4 << 20, roots, travel) == expected
    assert column_bytes(8, 4 << 20, roots, travel) == LEAST_COLUMN_BYTES
    assert column_bytes(8 << 20, 1 << 10, roots, travel) == 1 << 10
