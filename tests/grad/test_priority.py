"""The order in which parts of blocks are sent when the next forward overlaps."""

import random

import pytest

from hpctrain.comm.reducer import Parts
from hpctrain.grad.priority import StepTimes, agreed_order, by_last_part, wire_order


def forward_ends_s(order, ready_s, wire_s, needed, parts, forward_s):
    """When a forward that needs blocks one after another ends, if they are sent in this order."""
    clock_s, arrived_s = 0.0, {}
    for block, start, stop in order:
        clock_s = max(clock_s, ready_s[block]) + wire_s[block] * (stop - start) / parts[block]
        arrived_s[block] = clock_s
    clock_s = max(ready_s)
    for block in sorted(arrived_s, key=needed.__getitem__):
        clock_s = max(clock_s, arrived_s[block]) + forward_s
    return clock_s


def whole(*blocks: int) -> list[Parts]:
    return [Parts(block, 0, 1) for block in blocks]


def test_a_fast_wire_keeps_the_order_of_backward() -> None:
    assert wire_order([1, 2, 3, 4], [0.5] * 4, [3, 2, 1, 0], [1] * 4) == whole(0, 1, 2, 3)


def test_a_slow_wire_sends_first_what_is_needed_first() -> None:
    # Block 0 goes at once, since nothing else is there; then all others have come.
    assert wire_order([1, 2, 3, 4], [10.0] * 4, [3, 2, 1, 0], [1] * 4) == whole(0, 3, 2, 1)


def test_all_ready_at_once_are_sent_as_they_are_needed() -> None:
    assert wire_order([0.0] * 5, [1.0] * 5, [2, 0, 4, 1, 3], [2] * 5) == [
        Parts(block, 0, 2) for block in (1, 3, 0, 4, 2)
    ]


def test_what_is_needed_first_overtakes_between_two_parts() -> None:
    order = wire_order([0, 2.5, 4], [4.0, 4.0, 1.0], [2, 1, 0], [4, 2, 1])
    assert order == [Parts(0, 0, 3), Parts(1, 0, 1), Parts(2, 0, 1), Parts(1, 1, 2), Parts(0, 3, 4)]
    assert by_last_part(order) == [2, 1, 0]


def test_blocks_that_are_needed_at_the_same_time_do_not_interrupt_each_other() -> None:
    order = wire_order([2.0, 1.0], [4.0, 4.0], [0, 0], [4, 4])
    assert order == [Parts(1, 0, 4), Parts(0, 0, 4)]


def test_no_blocks_and_one() -> None:
    assert wire_order([], [], [], []) == []
    assert wire_order([3.0], [0.0], [7], [1]) == whole(0)
    assert by_last_part([]) == []


@pytest.mark.parametrize("seed", range(40))
def test_every_part_is_sent_once_and_the_forward_ends_no_later(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 12)
    ready_s = sorted(draw.random() for _ in range(count))
    wire_s = [draw.uniform(0.5, 2)] * count
    parts = [draw.choice([1, 2, 5])] * count
    needed = list(reversed(range(count)))
    order = wire_order(ready_s, wire_s, needed, parts)
    sent = [(p.slab, part) for p in order for part in range(p.start, p.stop or 0)]
    assert sorted(sent) == [(block, part) for block in range(count) for part in range(parts[block])]
    plain = [Parts(block, 0, parts[block]) for block in range(count)]
    given = ready_s, wire_s, needed, parts, 0.1
    assert forward_ends_s(order, *given) <= forward_ends_s(plain, *given) + 1e-9


def test_the_slowest_rank_decides_and_one_odd_step_does_not() -> None:
    quick = StepTimes([0.0, 0.1, 0.2], [0.01, 0.01, 0.01])
    slow = StepTimes([0.0, 0.1, 0.2], [5.0, 5.0, 5.0])
    given = [2, 1, 0], [1, 1, 1]
    assert agreed_order([[quick] * 4, [quick] * 4], *given) == whole(0, 1, 2)
    assert agreed_order([[quick] * 4, [slow] * 4], *given) == whole(0, 2, 1)
    assert agreed_order([[quick] * 4, [quick, slow, quick, quick]], *given) == whole(0, 1, 2)
