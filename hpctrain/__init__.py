"""Train PyTorch models over plain MPI."""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpctrain.errors import HpctrainError
    from hpctrain.grad.accumulate import accumulate
    from hpctrain.grad.coded.config import CodedConfig
    from hpctrain.grad.coded.exchange import Coded
    from hpctrain.grad.config import ExchangeConfig
    from hpctrain.grad.data_parallel import DataParallel
    from hpctrain.grad.periods.method import PeriodsConfig
    from hpctrain.grad.periods.periods import Periods
    from hpctrain.grad.shared.config import SharedConfig
    from hpctrain.grad.shared.shared import Shared
    from hpctrain.world import Role, World, join

__version__ = "0.1.0"
logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless the program logs
__all__ = [
    "Coded",
    "CodedConfig",
    "DataParallel",
    "ExchangeConfig",
    "HpctrainError",
    "Periods",
    "PeriodsConfig",
    "Role",
    "Shared",
    "SharedConfig",
    "World",
    "accumulate",
    "join",
]

_HOMES = {
    "Coded": "hpctrain.grad.coded.exchange",
    "CodedConfig": "hpctrain.grad.coded.config",
    "DataParallel": "hpctrain.grad.data_parallel",
    "ExchangeConfig": "hpctrain.grad.config",
    "HpctrainError": "hpctrain.errors",
    "Periods": "hpctrain.grad.periods.periods",
    "PeriodsConfig": "hpctrain.grad.periods.method",
    "Role": "hpctrain.world",
    "Shared": "hpctrain.grad.shared.shared",
    "SharedConfig": "hpctrain.grad.shared.config",
    "World": "hpctrain.world",
    "accumulate": "hpctrain.grad.accumulate",
    "join": "hpctrain.world",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: the command line answers before torch is loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hpctrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
