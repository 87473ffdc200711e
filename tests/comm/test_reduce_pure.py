from collections.abc import Sequence

import numpy as np
import pytest
import torch

from hpctrain.comm.memory import Slab
from hpctrain.comm.reduce import DIRECT_RANKS, possible, scratch_bytes
from hpctrain.comm.reduce.sums import PIECE_BYTES, SumInOrder, piece_bytes, slices

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PIECE = {dtype: PIECE_BYTES // max(4, dtype.itemsize) for dtype in DTYPES}


def parts_of(count: int, parts: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Numbers of very different size that cancel, so that each order of summation has its bits."""
    generator = torch.Generator().manual_seed(count + parts)
    numbers = torch.randn(parts, count, generator=generator, dtype=torch.float64)
    numbers *= 10.0 ** torch.randint(-4, 4, (parts, count), generator=generator)
    numbers[2:] -= numbers[:-2].clone()
    return list(numbers.to(dtype))


def plain_sum(parts: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
    """The sum by numpy, element after element; 16-bit ones in float32."""
    wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    arrays = [part.to(wide).numpy() for part in parts]
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return torch.from_numpy(np.asarray(total * total.dtype.type(scale))).to(parts[0].dtype)


def sum_in_order(out: torch.Tensor, parts: Sequence[torch.Tensor], scale: float) -> None:
    SumInOrder([out], parts, scale)()


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.itemsize]
    return left.dtype == right.dtype and torch.equal(left.view(bits), right.view(bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("pieces", "more"), [(0, 0), (0, 1), (0, 7), (1, -1), (1, 0), (1, 1), (2, 0), (2, 7)]
)
@pytest.mark.parametrize("parts", range(2, 7))
def test_sum_has_the_bits_of_a_plain_loop_in_the_same_order(
    dtype: torch.dtype, pieces: int, more: int, parts: int
) -> None:
    count = pieces * PIECE[dtype] + more
    numbers = parts_of(count, parts, dtype)
    expected = plain_sum(numbers, 1 / parts)
    out = torch.full((count,), torch.nan, dtype=dtype)
    sum_in_order(out, numbers, 1 / parts)
    assert same_bits(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_numbers_of_these_tests_tell_orders_apart(dtype: torch.dtype) -> None:
    numbers = parts_of(10_000, 5, dtype)
    assert not same_bits(plain_sum(numbers, 0.2), plain_sum(numbers[::-1], 0.2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", range(4))
def test_out_may_be_any_of_the_parts(dtype: torch.dtype, position: int) -> None:
    numbers = parts_of(PIECE[dtype] + 3, 4, dtype)
    expected = plain_sum(numbers, 0.25)
    others = [part.clone() for part in numbers[1:]]
    sum_in_order(numbers[position], numbers, 0.25)
    assert same_bits(numbers[position], expected)
    for index, before in enumerate(others, start=1):
        assert index == position or same_bits(numbers[index], before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_1_leaves_the_plain_sum(dtype: torch.dtype) -> None:
    numbers = parts_of(1001, 3, dtype)
    expected = plain_sum(numbers, 1)
    sum_in_order(numbers[1], numbers, 1.0)
    assert same_bits(numbers[1], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_part_is_only_scaled(dtype: torch.dtype) -> None:
    [part] = parts_of(5, 1, dtype)
    out = torch.empty_like(part)
    expected = plain_sum([part], 0.5)
    sum_in_order(out, [part], 0.5)
    assert same_bits(out, expected)


@pytest.mark.parametrize(
    ("dtype", "numbers", "scale", "total"),
    [
        (torch.float16, [60_000.0, 60_000.0, 60_000.0], 1 / 3, 60_000.0),
        (torch.float16, [60_000.0, 60_000.0, -60_000.0], 1.0, 60_000.0),
        (torch.bfloat16, [256.0, 1.0, 1.0], 1.0, 258.0),
        (torch.float16, [2048.0, 1.0, 1.0], 1.0, 2050.0),
    ],
)
def test_16_bit_sums_neither_overflow_nor_round_on_the_way(
    dtype: torch.dtype, numbers: list[float], scale: float, total: float
) -> None:
    parts = [torch.tensor([number], dtype=dtype) for number in numbers]
    sum_in_order(parts[0], parts, scale)
    assert parts[0].tolist() == [total]


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64, 1001])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
def test_slices_cover_every_element_once_and_evenly(count: int, size: int) -> None:
    cuts = slices(count, size)
    lengths = [cut.stop - cut.start for cut in cuts]
    assert [index for cut in cuts for index in range(count)[cut]] == list(range(count))
    assert len(cuts) == size
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1000])
@pytest.mark.parametrize("size", [1, 3, 6])
def test_slices_are_cut_at_whole_lines(count: int, size: int, multiple: int) -> None:
    cuts = slices(count, size, multiple)
    assert [index for cut in cuts for index in range(count)[cut]] == list(range(count))
    assert all(cut.start % multiple == 0 or cut.start == count for cut in cuts)
    lengths = [cut.stop - cut.start for cut in cuts]
    assert max(lengths) - min(lengths) <= 2 * multiple


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 7, 100_000])
def test_sum_is_written_to_all_parts(count: int, dtype: torch.dtype) -> None:
    numbers = parts_of(count, 3, dtype)
    expected = plain_sum(numbers, 0.5)
    SumInOrder([numbers[1], numbers[0], numbers[2]], numbers, 0.5)()
    assert all(same_bits(number, expected) for number in numbers)


def test_pieces_of_many_parts_are_smaller_but_not_tiny() -> None:
    sizes = [piece_bytes(parts) for parts in (1, 2, 4, 8, 64, 1000)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == PIECE_BYTES
    assert sizes[-1] >= 1 << 12


ONE_NODE, TWO_NODES, LONE_RANKS = [[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1]]
MANY = [list(range(DIRECT_RANKS + 1))]


@pytest.mark.parametrize(
    ("nodes", "shared", "dtype", "ordered", "narrow", "ways"),
    [
        (ONE_NODE, True, torch.float32, False, False, ["shared", "direct"]),
        (ONE_NODE, True, torch.bfloat16, True, False, ["shared", "direct"]),
        (ONE_NODE, False, torch.float32, False, False, ["direct"]),
        (TWO_NODES, True, torch.float32, False, False, ["two_level", "direct", "ring", "native"]),
        (TWO_NODES, True, torch.float32, True, False, ["two_level"]),
        (TWO_NODES, True, torch.float32, False, True, ["two_level", "direct", "ring"]),
        (TWO_NODES, True, torch.float16, False, False, ["two_level", "direct", "ring"]),
        (LONE_RANKS, False, torch.float64, True, False, ["direct"]),
        (LONE_RANKS, False, torch.float64, False, False, ["direct", "ring", "native"]),
        (MANY, False, torch.float32, False, False, ["ring", "native"]),
        (MANY, False, torch.bfloat16, False, False, ["ring"]),
        (MANY, False, torch.float32, True, False, ["direct"]),
    ],
)
def test_only_ways_that_give_what_is_asked_compete(
    nodes: list[list[int]],
    shared: bool,
    dtype: torch.dtype,
    ordered: bool,
    narrow: bool,
    ways: list[str],
) -> None:
    found = possible(nodes, dtype, in_shared_memory=shared, ordered=ordered, narrow=narrow)
    assert found == ways


@pytest.mark.parametrize(
    ("count", "wire", "size", "nbytes"),
    [
        (100, None, 1, 0),
        (100, None, 4, 3 * 25 * 4),
        (101, None, 4, 3 * 26 * 4),
        (2, None, 4, 3 * 1 * 4),
        (100, torch.bfloat16, 4, 256 + 3 * 25 * 2),
        (0, torch.bfloat16, 4, 0),
    ],
)
def test_scratch_holds_what_the_other_ranks_send(
    count: int, wire: torch.dtype | None, size: int, nbytes: int
) -> None:
    assert scratch_bytes("direct", Slab.allocate(count, torch.float32), wire, size) == nbytes
