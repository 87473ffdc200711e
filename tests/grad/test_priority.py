"""The order in which blocks are sent when the next forward overlaps."""

import random

import pytest

from hpctrain.grad.priority import StepTimes, agreed_order, wire_order


def forward_begins_s(order, ready_s, wire_s, needed, forward_s):
    """When a forward that needs blocks one after another ends, if they are sent in this order."""
    clock_s, arrived_s = 0.0, {}
    for block in order:
        clock_s = max(clock_s, ready_s[block]) + wire_s[block]
        arrived_s[block] = clock_s
    clock_s = max(ready_s)
    for block in sorted(arrived_s, key=needed.__getitem__):
        clock_s = max(clock_s, arrived_s[block]) + forward_s
    return clock_s


def test_a_fast_wire_keeps_the_order_of_backward() -> None:
    assert wire_order([1, 2, 3, 4], [0.5] * 4, [3, 2, 1, 0]) == [0, 1, 2, 3]


def test_a_slow_wire_sends_first_what_is_needed_first() -> None:
    # Block 0 goes at once, since nothing else is there; then all others have come.
    assert wire_order([1, 2, 3, 4], [10.0] * 4, [3, 2, 1, 0]) == [0, 3, 2, 1]


def test_all_ready_at_once_are_sent_as_they_are_needed() -> None:
    assert wire_order([0.0] * 5, [1.0] * 5, [2, 0, 4, 1, 3]) == [1, 3, 0, 4, 2]


def test_no_blocks_and_one() -> None:
    assert wire_order([], [], []) == []
    assert wire_order([3.0], [0.0], [7]) == [0]


@pytest.mark.parametrize("seed", range(20))
def test_every_block_is_sent_once_and_the_forward_ends_no_later(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 12)
    ready_s = sorted(draw.random() for _ in range(count))
    wire_s = [draw.uniform(0.5, 2)] * count
    needed = list(reversed(range(count)))
    order = wire_order(ready_s, wire_s, needed)
    assert sorted(order) == list(range(count))
    plain = forward_begins_s(range(count), ready_s, wire_s, needed, 0.1)
    assert forward_begins_s(order, ready_s, wire_s, needed, 0.1) <= plain + 1e-9


def test_the_slowest_rank_decides_and_one_odd_step_does_not() -> None:
    quick = StepTimes([0.0, 0.1, 0.2], [0.01, 0.01, 0.01])
    slow = StepTimes([0.0, 0.1, 0.2], [5.0, 5.0, 5.0])
    needed = [2, 1, 0]
    assert agreed_order([[quick] * 4, [quick] * 4], needed) == [0, 1, 2]
    assert agreed_order([[quick] * 4, [slow] * 4], needed) == [0, 2, 1]
    assert agreed_order([[quick] * 4, [quick, slow, quick, quick]], needed) == [0, 1, 2]
