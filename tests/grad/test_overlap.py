"""What an exchange may be asked for."""

from __future__ import annotations

from typing import Any

import pytest

from hpctrain import ExchangeConfig
from hpctrain.errors import ExchangeError


@pytest.mark.parametrize(
    "values",
    [
        {"way": "native", "deterministic": True},
        {"way": "native", "wire": "bfloat16"},
        {"way": "ring", "deterministic": True},
    ],
    ids=str,
)
def test_ways_that_cannot_keep_what_is_asked_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ExchangeError, match=f"way = '{values['way']}' .*allowed: way = "):
        ExchangeConfig(**values)


@pytest.mark.parametrize("way", ["auto", "direct", "shared", "two_level"])
def test_other_ways_sum_in_order(way: str) -> None:
    assert ExchangeConfig(way=way, deterministic=True).way == way
