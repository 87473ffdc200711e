"""Messages: headers read as they were written, and buffers are used by one at a time."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from hpctrain.grad.coded.cells import (
    HEADER_BYTES,
    Buffer,
    Kind,
    Pool,
    add_cells,
    balanced,
    content,
)
from hpctrain.grad.coded.worker import as_blocks, as_bytes


def on_the_wire(buffer: Buffer) -> Buffer:
    """What arrives elsewhere."""
    return Buffer(buffer.whole.clone())


@pytest.mark.parametrize("kind", Kind)
def test_header(kind: Kind) -> None:
    buffer = Pool().take(24).write(kind, 1 << 40, 3, 5, 8, loss=-0.1)
    for there in (buffer, on_the_wire(buffer)):
        assert there.kind is kind
        assert (there.round, there.column, there.lo, there.hi) == (1 << 40, 3, 5, 8)
        assert there.loss == -0.1
        unique = (Kind.STATE, Kind.OVER, Kind.ORDER, Kind.LAYOUT, Kind.DONE)
        assert there.is_unique is (kind in unique)
    buffer.loss = 2.5
    assert on_the_wire(buffer).loss == 2.5
    assert on_the_wire(buffer.write(kind, -1)).round == -1
    assert buffer.loss == 0


def test_header_and_payload_do_not_touch() -> None:
    buffer = Pool().take(16)
    buffer.payload.fill_(255)
    buffer.write(Kind.CELL, 1, 2, 3, 4, loss=5.0)
    assert (buffer.payload == 255).all()
    buffer.payload.zero_()
    assert (buffer.kind, buffer.round, buffer.loss) == (Kind.CELL, 1, 5.0)
    assert buffer.whole.numel() == HEADER_BYTES + buffer.payload.numel()
    assert buffer.mpi.nbytes == HEADER_BYTES + 16


def test_messages_of_another_size_each_time_are_not_kept() -> None:
    pool = Pool()
    for size in range(100):
        pool.drop(pool.message(Kind.OVER, 0, data=bytes(size)))
        pool.drop(pool.message(Kind.DONE, 0, data=bytes(1 + size)))
    assert pool.made_bytes == 0
    pool.drop(pool.message(Kind.DONE, 0))
    assert pool.made_bytes == HEADER_BYTES


def test_message_and_content() -> None:
    pool = Pool()
    buffer = pool.message(Kind.OWN, 7, 1, 2, column=3, data=b"some bytes")
    there = on_the_wire(buffer)
    assert content(there) == b"some bytes"
    assert (there.kind, there.round, there.lo, there.hi, there.column) == (Kind.OWN, 7, 1, 2, 3)
    assert content(pool.message(Kind.DROP, 0)) == b""


@pytest.mark.parametrize("blocks", [(), (0,), (5, 3, 70_000)])
def test_blocks_travel(blocks: tuple[int, ...]) -> None:
    pool = Pool()
    assert (
        as_blocks(content(on_the_wire(pool.message(Kind.OWN, 0, data=as_bytes(blocks))))) == blocks
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_add(dtype: torch.dtype) -> None:
    pool = Pool()
    left, right = (pool.take(10 * dtype.itemsize).write(Kind.CELL, 0) for _ in range(2))
    left.numbers(dtype)[:] = torch.arange(10)
    right.numbers(dtype)[:] = 2
    left.loss, right.loss = 0.5, 0.25
    add_cells(dtype)(left, right)
    assert (left.numbers(dtype) == torch.arange(10).to(dtype) + 2).all()
    assert left.loss == 0.75
    assert (right.numbers(dtype) == 2).all()
    assert left.numbers(dtype).data_ptr() == left.payload.data_ptr()


def test_buffers_are_used_again_by_size() -> None:
    pool = Pool()
    small, large = pool.take(8), pool.take(16)
    assert pool.made_bytes == 2 * HEADER_BYTES + 24
    pool.drop(small)
    assert pool.take(16) is not small
    assert pool.take(8) is small
    assert pool.take(8) is not small
    pool.drop(large)
    assert pool.take(16) is large


def test_holders() -> None:
    pool = Pool()
    buffer = pool.take(8)
    pool.hold(buffer, 2)
    for _ in range(2):
        pool.drop(buffer)
        assert pool.take(8) is not buffer
    pool.drop(buffer)
    assert pool.take(8) is buffer
    assert buffer.holders == 1


def test_double_drop_is_a_bug() -> None:
    pool = Pool()
    buffer = pool.take(8)
    pool.drop(buffer)
    with pytest.raises(AssertionError):
        pool.drop(buffer)


def test_memory_of_states_is_not_kept() -> None:
    """Each has another size, so that nobody would use it again."""
    pool = Pool()
    for size in range(100, 200):
        state = pool.message(Kind.STATE, 1, data=bytes(size))
        pool.hold(state)
        pool.drop(state)
        assert pool.made_bytes == HEADER_BYTES + size
        pool.drop(state)
    assert pool.made_bytes == 0
    received = pool.take(64)
    received.whole.copy_(Pool().message(Kind.STATE, 1, data=bytes(64)).whole)
    pool.drop(received)
    assert pool.made_bytes == 0


def test_pool_takes_memory_from_where_it_is_told() -> None:
    made = []

    def allocate(nbytes: int) -> torch.Tensor:
        made.append(torch.zeros(nbytes, dtype=torch.uint8))
        return made[-1]

    buffer = Pool(allocate).take(8)
    assert buffer.whole is made[0]


def test_pool_for_any_thread() -> None:
    """Nobody is given what another one has."""
    pool = Pool()

    def use(number: int) -> None:
        for _ in range(500):
            buffer = pool.take(8)
            words = buffer.payload.numpy()
            words[:] = number
            held = pool.take(8)
            bad.extend([number] * int((words != number).any()))
            pool.drop(buffer)
            pool.drop(held)

    bad: list[int] = []
    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not bad
    assert pool.made_bytes <= 8 * (HEADER_BYTES + 8)


@pytest.mark.parametrize(
    ("sizes", "parts", "expected"),
    [
        ([], 2, []),
        ([5], 3, [0]),
        ([1, 5], 2, [1, 0]),
        ([3, 3, 3, 3], 2, [0, 1, 0, 1]),
        ([8, 4, 3, 3, 2], 2, [0, 1, 1, 1, 0]),
    ],
)
def test_balanced(sizes: list[int], parts: int, expected: list[int]) -> None:
    assert balanced(sizes, parts) == expected


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_balanced_is_even(parts: int) -> None:
    sizes = np.random.default_rng(parts).integers(1, 100, 60).tolist()
    filled = [0] * parts
    for part, size in zip(balanced(sizes, parts), sizes, strict=True):
        filled[part] += size
    assert max(filled) - min(filled) <= max(sizes)
    assert balanced(sizes, parts)[sizes.index(max(sizes))] == 0  # the first one has some
