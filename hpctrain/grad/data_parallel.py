"""A drop-in for torch's DistributedDataParallel over MPI."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from hpctrain.comm.engine import engine_of
from hpctrain.errors import ExchangeError
from hpctrain.grad import replicas
from hpctrain.grad.config import ExchangeConfig
from hpctrain.grad.next_forward import BlockCheck, NextForward
from hpctrain.grad.overlap import Exchange
from hpctrain.grad.untraced import untraced
from hpctrain.world import World, join


class DataParallel(nn.Module):
    """Wraps a module so that `loss.backward()` leaves gradients averaged over all ranks.

    Parameters and buffers start as those of rank 0. Every rank must run the same number of
    backwards; within one, ranks may differ in the parameters that they use.

        world = hpctrain.join()
        model = hpctrain.DataParallel(Net())

    Construction and every backward outside `no_sync` are collective.

    Args:
        module: on the host or on one CUDA device, with dense gradients. Wrap it before or after
            `torch.compile`.
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
        channel = self.exchange.channel
        if self.exchange.config.next_forward:  # so that buffers need not wait behind blocks
            channel = engine.channel(f"buffers {DataParallel._made}")
            weakref.finalize(self, channel.abandon)
        self.exchange.buffers = replicas.BufferSync(module, channel, self.exchange.config.buffers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        self._prepare()
        later = self.exchange.later
        if later and later.is_observing and torch.is_grad_enabled():
            return self._mark(self._observe(later, args, kwargs))
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

    def overlap_step(
        self, optimizer: torch.optim.Optimizer, check: BlockCheck | None = None
    ) -> NextForward:
        """Have the optimizer's steps taken block by block, each before the next forward needs it.

        For `ExchangeConfig(next_forward=True)`; before the first backward. Not collective. From
        then on backward returns while gradients are on the wire, and gradients may be looked at
        only after `wait_for_gradients`; parameters between a step and the next forward may be
        those before the step. `state_dict` of the module and of the optimizer, and forwards
        without gradients, wait by themselves. A step consumes gradients: `grad` is None after it.

        Args:
            optimizer: any of torch.optim but LBFGS and SparseAdam.
            check: called with each block when its average is there, before it is used; may raise.

        Returns:
            What takes the steps.

        Raises:
            ExchangeError: the optimizer does not treat every parameter by itself or lacks some,
                it is the second one, or `next_forward` is false.
        """
        exchange = self.exchange
        if not exchange.config.next_forward:
            raise ExchangeError(
                "overlap_step without next_forward",
                fix="wrap with hpctrain.ExchangeConfig(next_forward=True)",
                everywhere=True,
            )
        if exchange.later:
            raise ExchangeError(
                "overlap_step was called before",
                fix="use one optimizer with several groups of parameters",
                everywhere=True,
            )
        exchange.later = NextForward(
            exchange.engine, self.module, exchange.parameters, optimizer, check
        )
        return exchange.later

    def wait_for_gradients(self) -> None:
        """Wait for gradients that are still on the wire, so that `grad` can be read and changed.

        Does nothing without `next_forward`, where backward has waited already. Not collective.
        """
        if self.exchange.later:
            self.exchange.later.settle()

    def check_in_sync(self) -> None:
        """Make sure that parameters have the same bits on all ranks. Collective.

        Raises:
            MismatchError: naming the ranks and the first parameter that differ.
            ExchangeError: a parameter is not among those that are averaged.
        """
        self._refuse_other_parameters()
        self.wait_for_gradients()
        replicas.check_same_values(self.exchange.engine.control, self.world, self.module)

    @untraced
    def _prepare(self) -> None:
        if self.exchange.later:
            self.exchange.later.before_forward(torch.is_grad_enabled())
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

    @untraced
    def _observe(self, later: NextForward, args: Any, kwargs: Any) -> Any:
        return later.observe(lambda: self.module(*args, **kwargs))

    def _refuse_other_parameters(self) -> None:
        """Refuse parameters that were added or replaced, whose gradients would not be averaged.

        Raises:
            ExchangeError: naming the first one.
        """
        known = {*map(id, self.exchange.parameters), *(id(p) for _, p in self._frozen)}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and id(parameter) not in known:
                raise _not_averaged(name, "was added or replaced after DataParallel was made")

    @untraced
    def _mark(self, outputs: Any) -> Any:
        """Have the exchange notice when backward enters the graph of this forward.

        The hook of an output belongs to the outermost backward. Hooks of parameters may run in
        a backward nested inside, under re-entrant checkpointing, which ends too early.
        """
        if torch.is_grad_enabled():
            if self.exchange.later:
                self.exchange.later.after_forward()
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
        elif parameter.device.type not in ("cpu", "cuda"):
            what, fix = f"is on {parameter.device}", "put the model on the CPU or on a CUDA device"
        elif parameter.device != next(module.parameters()).device:
            what = f"is on {parameter.device}, others are on {next(module.parameters()).device}"
            fix = "put all of the model on one device"
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
