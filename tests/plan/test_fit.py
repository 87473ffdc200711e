"""The fit finds the constants that made the times, and keeps to where it began without them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from hpctrain.plan.cost import Layout, Links
from hpctrain.plan.fit import fit
from hpctrain.plan.schedule import Step, Work, step_s

TRUE = Links(
    latency_s=1e-3,
    bytes_per_s=1.2e7,
    memory_bytes_per_s=1e10,
    overhead_s=5e-5,
    eager_bytes=1 << 16,
    handshake=0.15,
)
BEGIN = replace(TRUE, latency_s=2e-4, bytes_per_s=4e7, overhead_s=3e-4, handshake=0.4)
STEPS = [
    Step(work=Work.even(0.02, 0.04, 0, sizes), way=way, layout=Layout(nodes=nodes))
    for sizes in ([1 << 17] * 8, [1 << 20] * 2, [2048] * 40, [16_384] * 4, [4096])
    for way in ("native", "direct", "ring")
    for nodes in (2, 3, 4)
]


def test_finds_the_constants_that_made_the_times() -> None:
    found = fit(STEPS, [step_s(step, TRUE) for step in STEPS], [BEGIN] * len(STEPS))
    for name, value in found.items():
        assert value == pytest.approx(getattr(TRUE, name), rel=0.05), name


def test_noise_moves_them_little() -> None:
    noise = random.Random(0)
    measured = [step_s(step, TRUE) * noise.uniform(0.9, 1.1) for step in STEPS]
    found = fit(STEPS, measured, [BEGIN] * len(STEPS))
    assert found["bytes_per_s"] == pytest.approx(TRUE.bytes_per_s, rel=0.1)
    assert all(value > 0 for value in found.values())


def test_disturbed_steps_count_little() -> None:
    measured = [step_s(step, TRUE) for step in STEPS]
    measured[::7] = [seconds * 3 for seconds in measured[::7]]
    found = fit(STEPS, measured, [BEGIN] * len(STEPS), ["bytes_per_s"])
    assert found["bytes_per_s"] == pytest.approx(TRUE.bytes_per_s, rel=0.05)


def test_what_the_steps_do_not_show_stays() -> None:
    """Nothing waits for an acknowledgement here."""
    steps = [step for step in STEPS if max(nbytes for _, nbytes in step.work.blocks) < 1 << 16]
    found = fit(steps, [step_s(step, TRUE) for step in steps], [BEGIN] * len(steps))
    assert found["handshake"] == pytest.approx(BEGIN.handshake)


def test_each_step_has_its_own_machine() -> None:
    """Crowded and quiet steps together; the crowding is known."""
    machines = [replace(TRUE, crowding=1.0 + index % 3) for index in range(len(STEPS))]
    measured = [step_s(step, on) for step, on in zip(STEPS, machines, strict=True)]
    begins = [replace(BEGIN, crowding=on.crowding) for on in machines]
    found = fit(STEPS, measured, begins)
    assert found["overhead_s"] == pytest.approx(TRUE.overhead_s, rel=0.05)
