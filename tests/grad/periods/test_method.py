"""What cannot be is refused before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest

from hpctrain.errors import JobError
from hpctrain.grad.periods.method import PeriodsConfig


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"preset": "co2", "outer_momentum": 0.0}, "outer_clip"),
        ({"preset": "co2", "outer": "adam"}, "outer_clip"),
        ({"merge": "compensate"}, "pull_lag must be at least 1"),
    ],
)
def test_what_does_nothing_is_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(JobError, match=text):
        PeriodsConfig(**values)


def test_adam_has_a_rate_of_its_own() -> None:
    method = PeriodsConfig(preset="diloco", outer="adam").method
    assert (method.outer_rate, method.outer_momentum) == (0.01, 0.9)
    assert PeriodsConfig(preset="diloco", outer="adam", outer_rate=0.1).method.outer_rate == 0.1


def test_lag_of_a_whole_period_follows_the_period() -> None:
    assert PeriodsConfig(preset="co2", period=16).method.pull_lag == 16
    assert PeriodsConfig(preset="eager_diloco", period=4).method.pull_lag == 4
    assert PeriodsConfig(preset="corrected", period=4).method.pull_lag == 2
    with pytest.raises(JobError, match="gives up the local steps"):
        PeriodsConfig(preset="co2", period=16, pull_lag=8)
