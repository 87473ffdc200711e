"""A drop-in for torch's DistributedDataParallel over MPI."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from hpctrain.comm.engine import engine_of
from hpctrain.errors import ExchangeError
from hpctrain.grad import replicas
from hpctrain.grad.overlap import Exchange, ExchangeConfig
from hpctrain.world import World, join


def _untraced(method: Callable[..., Any]) -> Callable[..., Any]:
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


class DataParallel(nn.Module):
    """Wraps a module so that `loss.backward()` leaves gradients averaged over all ranks.

    Parameters and buffers start as those of rank 0. Every rank must run the same number of
    backwards; within one, ranks may differ in the parameters that they use.

        world = hpctrain.join()
        model = hpctrain.DataParallel(Net())

    Construction and every backward outside `no_sync` are collective.

    Args:
        module: on the host, with dense gradients. Wrap it before or after `torch.compile`.
        config: how gradients are exchanged.
        world: the ranks; by default those of `hpctrain.join()`.

    Raises:
        MismatchError: the module has other parameters or shapes on some rank.
        ExchangeError: a parameter or layer cannot be exchanged; the message says what to do.
    """

    _made = 0

    def __init__(
        self, module: nn.Module, config: ExchangeConfig | None = None, *, world: World | None = None
    ) -> None:
        super().__init__()
        self.module = module
        self.world = world or join()
        _refuse_unsupported(module)
        engine = engine_of(self.world)
        control = engine.control
        replicas.check_same_model(control, self.world, module)
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._forwards = 0
        self._frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
        DataParallel._made += 1
        self.exchange = Exchange(
            named, engine, config or ExchangeConfig(), name=f"gradients {DataParallel._made}"
        )
        replicas.broadcast_state(control, module)
        replicas.check_same_values(control, self.world, module)
        self.exchange.buffers = replicas.BufferSync(
            module, self.exchange.channel, self.exchange.config.buffers
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        self._prepare()
        return self._mark(self.module(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        """Attributes of the module are reached through the wrapper, so that code need not care."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward calls inside add up gradients on this rank; the next one outside averages."""
        with self.exchange.local():
            yield

    def check_in_sync(self) -> None:
        """Make sure that parameters have the same bits on all ranks. Collective.

        Raises:
            MismatchError: naming the ranks and the first parameter that differ.
            ExchangeError: a parameter is not among those that are averaged.
        """
        self._refuse_other_parameters()
        replicas.check_same_values(self.exchange.engine.control, self.world, self.module)

    @_untraced
    def _prepare(self) -> None:
        if torch.is_grad_enabled():
            self.exchange.check_idle()
            for name, parameter in self._frozen:
                if parameter.requires_grad:
                    raise _not_averaged(
                        name, "was frozen when DataParallel was made and is not now"
                    )
            # Walking a large module takes as long as its smallest layers: not at every step.
            if self._forwards < 4 or self._forwards % 64 == 0:
                self._refuse_other_parameters()
            self._forwards += 1

    def _refuse_other_parameters(self) -> None:
        """Refuse parameters that were added or replaced, whose gradients would not be averaged.

        Raises:
            ExchangeError: naming the first one.
        """
        known = {*map(id, self.exchange.parameters), *(id(p) for _, p in self._frozen)}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and id(parameter) not in known:
                raise _not_averaged(name, "was added or replaced after DataParallel was made")

    @_untraced
    def _mark(self, outputs: Any) -> Any:
        """Have the exchange notice when backward enters the graph of this forward.

        The hook of an output belongs to the outermost backward. Hooks of parameters may run in
        a backward nested inside, under re-entrant checkpointing, which ends too early.
        """
        if torch.is_grad_enabled():
            for tensor in tree_leaves(outputs):
                # A parameter that is returned as it is would collect a hook at each forward.
                if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                    tensor.register_hook(self._entered)
        return outputs

    def _entered(self, gradient: torch.Tensor) -> None:
        self.exchange.begin()


def _not_averaged(name: str, what: str) -> ExchangeError:
    return ExchangeError(
        f"parameter {name} {what}, so that its gradient would not be averaged",
        fix="wrap the module again after such a change",
        everywhere=True,
    )


def _refuse_unsupported(module: nn.Module) -> None:
    """Refuse, before the first step, what would fail or go wrong silently later.

    Raises:
        ExchangeError: naming layer or parameter, and what to do.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse:
            raise ExchangeError(
                f"layer {name or 'module'} produces sparse gradients",
                fix=f"make it {type(layer).__name__}(..., sparse=False)",
                everywhere=True,
            )
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            what, fix = "has no shape yet", "run one forward pass before DataParallel"
        elif parameter.device.type != "cpu":
            what = f"is on {parameter.device}"
            fix = "keep the model on the CPU; gradients in device memory are not exchanged yet"
        elif type(parameter.data) is not torch.Tensor:
            what = f"is a {type(parameter.data).__name__}"
            fix = "use plain tensors; sharded and quantized ones have no gradient of their own here"
        elif parameter.requires_grad and (
            parameter.dtype.itemsize < 2 or parameter.dtype == torch.complex32
        ):
            what, fix = f"has dtype {parameter.dtype}", "train a 16-bit or wider copy"
        else:
            continue
        raise ExchangeError(f"parameter {name} {what}", fix=fix, everywhere=True)
