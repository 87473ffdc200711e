from __future__ import annotations

import pytest

from hpctrain import World
from hpctrain.comm.collect import all_gather
from hpctrain.comm.engine import PROGRESS_MODES, engine_of
from hpctrain.comm.measure import (
    clock_offset,
    measure_all_reduce,
    measure_links,
    progress_trial,
)

pytestmark = pytest.mark.mpi


def test_ranks_of_one_machine_share_a_clock(world: World) -> None:
    """Linux gives all processes the same monotonic clock: the true offset is zero."""
    offsets = all_gather(engine_of(world).control, clock_offset(engine_of(world).control))
    assert offsets[0] == 0.0
    assert all(abs(offset) < 0.05 for offset in offsets)


def test_links_to_every_other_rank_are_measured_and_known_to_all(world: World) -> None:
    links = measure_links(engine_of(world).control, large_bytes=1 << 16, rounds=3)
    assert [link.rank for link in links] == list(range(1, world.size))
    assert all(link.latency_s > 0 and link.bytes_per_s > 0 for link in links)
    assert all(other == links for other in all_gather(engine_of(world).control, links))


def test_trial_measures_every_mode_and_leaves_the_engine_as_it_was(world: World) -> None:
    engine = engine_of(world)
    engine.progress = "thread"
    trial = progress_trial(engine)
    assert set(trial) == set(PROGRESS_MODES)
    assert engine.progress == "thread"
    assert all(other == trial for other in all_gather(engine.control, trial))


def test_all_reduce_is_measured_as_a_run_would(world: World) -> None:
    tried = measure_all_reduce(engine_of(world), [1 << 12, 1 << 20])
    assert [entry.nbytes for entry in tried] == ([1 << 12, 1 << 20] if world.size > 1 else [])
    for entry in tried:
        assert entry.way in entry.times_s
        assert all(seconds > 0 for seconds in entry.times_s.values())
