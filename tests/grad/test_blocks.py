import random

import pytest
import torch
from torch import nn

from hpctrain.comm.memory import ALIGN_BYTES, Slab
from hpctrain.errors import ExchangeError
from hpctrain.grad.blocks import Block, is_dense, layout, move, partition, slab_size

CHANNELS_LAST = torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)


def parameters_of(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def block_of(parameters: list[nn.Parameter]) -> Block:
    names = [f"p{i}" for i in range(len(parameters))]
    slab = Slab.allocate(*slab_size(parameters))
    return Block(0, range(len(parameters)), names, parameters, slab)


def set_gradients(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """Give each parameter a random gradient; returns copies."""
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return [p.grad.clone() for p in parameters if p.grad is not None]


# ---------------------------------------------------------------------- partition


@pytest.mark.parametrize("seed", range(25))
def test_partition_of_any_model(seed: int) -> None:
    chance = random.Random(seed)
    count = chance.randrange(40)
    order = chance.sample(range(count), count)
    nbytes = [chance.choice([0, 1, 7, 43, 100, 300]) for _ in range(count)]
    kinds = [chance.choice(["float32", "bfloat16"]) for _ in range(count)]
    block_bytes, first_bytes = chance.choice([(200, 50), (400, 100), (50, 200), (1, 1)])

    blocks = partition(order, nbytes, kinds, block_bytes, first_bytes)

    place = {index: position for position, index in enumerate(order)}
    assert sorted(index for block in blocks for index in block) == sorted(order)
    assert all(len({kinds[index] for index in block}) == 1 for block in blocks)
    completed = [place[block[-1]] for block in blocks]
    assert completed == sorted(completed)
    for kind in set(kinds):
        mine = [block for block in blocks if kinds[block[0]] == kind]
        assert [i for block in mine for i in block] == [i for i in order if kinds[i] == kind]
        limits = [min(first_bytes, block_bytes)] + [block_bytes] * (len(mine) - 1)
        sizes = [sum(nbytes[index] for index in block) for block in mine]
        for block, size, limit in zip(mine, sizes, limits, strict=True):
            assert size <= limit or nbytes[block[0]] == size
        for size, limit, following in zip(sizes, limits, mine[1:], strict=False):
            assert size + nbytes[following[0]] > limit


@pytest.mark.parametrize(
    ("order", "nbytes", "kinds", "blocks"),
    [
        ([], [], "", []),
        ([0], [999], "a", [[0]]),
        ([2, 1, 0], [8, 8, 4], "aaa", [[2], [1, 0]]),
        ([3, 2, 1, 0], [1, 99, 1, 1], "aaaa", [[3, 2], [1], [0]]),
        ([0, 1, 2, 3], [2, 2, 15, 1], "aaaa", [[0, 1], [2, 3]]),
        ([0, 1, 2, 3], [2, 3, 15, 2], "aaaa", [[0], [1], [2], [3]]),
        ([0, 1, 2, 3], [1, 1, 1, 1], "abab", [[0, 2], [1, 3]]),
        ([0, 1, 2, 3], [4, 4, 4, 4], "abba", [[0], [1], [2], [3]]),
    ],
)
def test_partition_with_blocks_of_16_and_a_first_of_4(
    order: list[int], nbytes: list[int], kinds: str, blocks: list[list[int]]
) -> None:
    assert partition(order, nbytes, kinds, block_bytes=16, first_bytes=4) == blocks


# ---------------------------------------------------------------------- layout


@pytest.mark.parametrize(
    ("counts", "itemsize", "offsets", "length"),
    [
        ([], 4, [], 0),
        ([1, 16, 17, 0, 3], 4, [0, 16, 32, 64, 64], 80),
        ([1, 33], 2, [0, 32], 96),
        ([5], 16, [0], 8),
        ([1, 1], 128, [0, 1], 2),
    ],
)
def test_parts_of_a_slab_begin_on_cache_lines(
    counts: list[int], itemsize: int, offsets: list[int], length: int
) -> None:
    assert layout(counts, itemsize) == (offsets, length)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(()),
        torch.zeros(7),
        torch.zeros(3, 4),
        torch.zeros(3, 4).t(),
        torch.zeros(2, 3, 4).permute(2, 0, 1),
        CHANNELS_LAST,
        torch.zeros(1, 3, 1, 5),
        torch.zeros(1, 3).as_strided((1, 3), (99, 1)),
        torch.zeros(8)[::2],
        torch.zeros(3, 4)[:, :2],
        torch.zeros(3, 1).expand(3, 4),
        torch.zeros(1).expand(5),
        torch.zeros(9).as_strided((3, 3), (1, 1)),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)}-{tensor.stride()}",
)
def test_dense_is_what_touches_every_element_once(tensor: torch.Tensor) -> None:
    indices = torch.cartesian_prod(*[torch.arange(n) for n in (*tensor.shape, 1)])
    strides = torch.tensor([*tensor.stride(), 0])
    touched = (indices.view(-1, len(strides)) * strides).sum(1).tolist()
    assert is_dense(tensor.shape, tensor.stride()) == (sorted(touched) == list(range(len(touched))))


# ---------------------------------------------------------------------- Block


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
def test_gradients_go_through_the_slab_unchanged(dtype: torch.dtype) -> None:
    parameters = parameters_of((3, 4), (), (0,), (17,), dtype=dtype)
    gradients = set_gradients(parameters)
    block = block_of(parameters)
    block.fill()
    block.slab.tensor.mul_(2)
    block.settle()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, 2 * gradient)


def test_gradients_are_parts_of_the_slab_on_cache_lines_of_their_own() -> None:
    parameters = parameters_of((3, 4), (1,), (17,))
    block = block_of(parameters)
    set_gradients(parameters)
    block.fill()
    start = block.slab.tensor.data_ptr()
    offsets = [p.grad.data_ptr() - start for p in parameters if p.grad is not None]
    assert offsets == [0, ALIGN_BYTES, 2 * ALIGN_BYTES]
    assert block.slab.tensor.numel() == block.gradients.numel() + len(parameters)


def test_padding_stays_zero_so_that_norms_can_be_taken_of_the_whole() -> None:
    parameters = parameters_of((3, 4), (1,), (17,))
    block = block_of(parameters)
    gradients = set_gradients(parameters)
    block.fill()
    assert block.gradients.count_nonzero() == sum(gradient.numel() for gradient in gradients)


def test_a_slab_of_complex_gradients_is_real() -> None:
    [parameter] = parameters = parameters_of((2,), dtype=torch.complex64)
    parameter.grad = torch.tensor([1 + 2j, 3 - 4j])
    block = block_of(parameters)
    block.fill()
    assert block.slab.tensor[:4].tolist() == [1, 2, 3, -4]


@pytest.mark.parametrize(
    "like",
    [CHANNELS_LAST, torch.zeros(3, 4).t(), torch.zeros(5, 2), torch.zeros(1, 3, 1)],
    ids=lambda tensor: f"{tuple(tensor.shape)}-{tensor.stride()}",
)
def test_a_gradient_keeps_the_memory_layout_of_its_parameter(like: torch.Tensor) -> None:
    parameters = [*parameters_of((5,)), nn.Parameter(like.clone())]
    block = block_of(parameters)
    gradients = set_gradients(parameters)
    block.fill()
    assert parameters[1].grad is not None
    assert parameters[1].grad.stride() == parameters[1].stride()
    assert torch.equal(parameters[1].grad, gradients[1])


def test_a_parameter_that_no_rank_used_has_no_gradient() -> None:
    parameters = parameters_of((3,), (3,))
    block = block_of(parameters)
    set_gradients(parameters)
    parameters[0].grad = None
    block.fill()
    assert block._flags.astype(bool).tolist() == [0, 1]
    block.settle()
    assert parameters[0].grad is None
    assert parameters[1].grad is not None


def test_a_parameter_that_another_rank_used_gets_the_average() -> None:
    parameters = parameters_of((3,), (3,))
    block = block_of(parameters)
    block.fill()
    assert block._flags.astype(bool).tolist() == [0, 0]
    block.views[0].fill_(0.25)
    block.slab.tensor[-2] = 1 / 4  # the flag that another rank has set
    block.settle()
    assert parameters[0].grad is not None
    assert parameters[0].grad.tolist() == [0.25] * 3
    assert parameters[1].grad is None


def test_the_gradient_of_an_earlier_step_does_not_come_back() -> None:
    [parameter] = parameters = parameters_of((3,))
    block = block_of(parameters)
    set_gradients(parameters)
    block.fill()
    block.settle()
    parameter.grad = None
    block.fill()
    assert block.slab.tensor.count_nonzero() == 0


@pytest.mark.parametrize(
    "gradient",
    [
        torch.tensor([[1.0, 2], [3, 4]]).t(),
        torch.tensor([1.0, 2]).expand(2, 2),
    ],
    ids=["transposed", "expanded"],
)
def test_move_makes_the_view_the_gradient_whatever_it_was(gradient: torch.Tensor) -> None:
    [parameter] = parameters_of((2, 2))
    view = torch.full((2, 2), torch.nan)
    parameter.grad = gradient
    move(parameter, view, "p")
    assert parameter.grad is view
    assert torch.equal(view, gradient)


@pytest.mark.parametrize(
    ("gradient", "reason"),
    [
        (torch.ones(2, 2, requires_grad=True) * 3, "to be differentiated again"),
        (torch.ones(2, 2).to_sparse(), "sparse"),
    ],
    ids=["with a graph", "sparse"],
)
@pytest.mark.parametrize("how", ["move", "deliver", "fill"])
def test_a_gradient_that_cannot_be_averaged_is_refused(
    gradient: torch.Tensor, reason: str, how: str
) -> None:
    parameters = parameters_of((2, 2))
    block = block_of(parameters)
    parameters[0].grad = gradient
    calls = {
        "move": lambda: move(parameters[0], block.views[0], "p0"),
        "deliver": block.deliver,
        "fill": block.fill,
    }
    with pytest.raises(ExchangeError, match=f"parameter p0.* {reason}"):
        calls[how]()


def test_a_delivered_block_lacks_no_gradient() -> None:
    block = block_of(parameters_of((2, 2), (3,)))
    with pytest.raises(ExchangeError, match="parameter p0"):
        block.deliver()
