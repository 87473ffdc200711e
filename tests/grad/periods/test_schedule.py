"""Who is exchanged when: everything once a period, spread evenly, and never twice at a time."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from hpctrain.grad.periods.method import PRESETS, Method, mistakes_of
from hpctrain.grad.periods.schedule import Act, Schedule, fragments_of


def drawn(seed: int) -> Method:
    """A random method with changes."""
    draw = random.Random(seed)
    period = draw.choice((1, 2, 3, 5, 8, 13))
    pull_lag = draw.randint(0, period)
    method = Method(
        sends="changes",
        period=period,
        push_lag=draw.randint(0, max(0, pull_lag - 1)),
        pull_lag=pull_lag,
        merge=draw.choice(("correct", "replace" if pull_lag in (0, period) else "mix", "mix")),
        fragments=draw.choice((1, 2, 3, 7, 20)),
    )
    assert not list(mistakes_of(method))
    return method


@pytest.mark.parametrize("seed", range(50))
def test_every_fragment_is_exchanged_once_a_period(seed: int) -> None:
    method = drawn(seed)
    schedule, whole = Schedule(method), 4 * method.period
    done = [action for i in range(1, whole + 1) for action in schedule.after(i)]
    for act in Act:
        counts = Counter(
            (action.fragment, (action.of - 1) // method.period)
            for action in done
            if action.act is act
        )
        assert max(counts.values()) == 1
        complete = [key for key in counts if key[1] < 2]
        assert len(complete) == 2 * method.fragments


@pytest.mark.parametrize("seed", range(50))
def test_every_parameter_is_exchanged_once_a_period(seed: int) -> None:
    """Whatever shapes parameters have."""
    method, draw = drawn(seed), random.Random(seed)
    sizes = [draw.choice((0, 1, 7, 1000, 10**6)) for _ in range(draw.randint(0, 40))]
    cuts = fragments_of(sizes, method.fragments)
    parameters = range(len(sizes))
    for period in range(1, 4):
        counts = Counter(
            parameter
            for i in range(period * method.period + 1, (period + 1) * method.period + 1)
            for action in Schedule(method).after(i)
            if action.act is Act.PUSH
            for parameter in parameters[cuts[action.fragment]]
        )
        assert counts == Counter(parameters)


@pytest.mark.parametrize("seed", range(50))
def test_a_fragment_is_pulled_before_it_is_pushed_again(seed: int) -> None:
    schedule = Schedule(drawn(seed))
    on_the_wire: dict[int, int] = {}
    for i in range(1, 60):
        for action in schedule.after(i):
            if action.act is Act.PUSH:
                assert action.fragment not in on_the_wire
                on_the_wire[action.fragment] = action.of
            if action.act is Act.PULL:
                assert on_the_wire.pop(action.fragment) == action.of


@pytest.mark.parametrize("seed", range(50))
def test_what_is_in_flight(seed: int) -> None:
    schedule = Schedule(drawn(seed))
    left: dict[tuple[int, int], None] = {}
    for i in range(1, 60):
        for action in schedule.after(i):
            if action.act is Act.CAPTURE:
                left[action.fragment, action.of] = None
            if action.act is Act.PULL:
                del left[action.fragment, action.of]
        assert {(a.fragment, a.of) for a in schedule.in_flight(i)} == set(left)


def test_fragments_have_their_turns() -> None:
    schedule = Schedule(Method(sends="changes", period=8, merge="replace", fragments=4))
    pushed = [
        [action.fragment for action in schedule.after(i) if action.act is Act.PUSH]
        for i in range(1, 9)
    ]
    assert pushed == [[], [3], [], [2], [], [1], [], [0]]


def test_gradients_are_exchanged_in_every_iteration() -> None:
    schedule = Schedule(PRESETS["one_late"])
    assert list(map(str, schedule.after(1))) == ["capture 0 of 1", "push 0 of 1"]
    assert list(map(str, schedule.after(5))) == ["pull 0 of 4", "capture 0 of 5", "push 0 of 5"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_sense(name: str) -> None:
    assert not list(mistakes_of(PRESETS[name]))


@pytest.mark.parametrize(
    ("sizes", "fragments"), [([5] * 12, 4), ([1, 100, 1], 2), ([], 3), ([0, 0], 2), ([7], 5)]
)
def test_fragments_cover_all_parameters_once(sizes: list[int], fragments: int) -> None:
    cuts = fragments_of(sizes, fragments)
    assert len(cuts) == fragments
    assert [i for cut in cuts for i in range(*cut.indices(len(sizes)))] == list(range(len(sizes)))


def test_fragments_are_even() -> None:
    draw = random.Random(0)
    sizes = [draw.randint(1, 100) for _ in range(200)]
    shares = [sum(sizes[cut]) for cut in fragments_of(sizes, 5)]
    assert max(shares) < 1.1 * min(shares)
