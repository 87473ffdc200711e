"""Python that torch.compile leaves alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def untraced(method: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.disable, whose import takes a second, put off until torch.compile is used."""
    disabled: Callable[..., Any] | None = None

    @wraps(method)
    def call(*args: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return method(*args)
        disabled = disabled or torch.compiler.disable(method)
        return disabled(*args)

    return call
