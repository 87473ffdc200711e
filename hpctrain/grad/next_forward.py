"""The next forward starts before all gradients are there: an optimizer's step, block by block.

With `next_forward`, backward returns while blocks are still on the wire. `optimizer.step()` updates
the parameters of the blocks that have arrived and leaves the others *owed*; a module whose
parameters are owed waits for them, and has them updated, when its forward begins. All blocks
see the settings (learning rate and so on) that the optimizer had when `step()` was called. Each
parameter takes the same updates, in the same bits, as without: a step of torch's optimizers treats
every parameter by itself.

What is needed where is observed in the first forward: a parameter may be used outside the module
that owns it, as in `nn.MultiheadAttention` and with tied weights. Later forwards must use
parameters in the same modules; another use that comes before the update is refused when its
gradient arrives, but not if it has no gradient, or if a module that does wait for the parameter
runs after it. Whoever looks at a gradient that is on the wire is told so (blocks.OnTheWire).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpctrain.comm.engine import Engine
from hpctrain.errors import ExchangeError, RankDiedError
from hpctrain.grad.blocks import Block
from hpctrain.grad.priority import StepTimes
from hpctrain.grad.replicas import BufferSync
from hpctrain.grad.untraced import untraced
from hpctrain.trace import COMPUTE, now_s

BlockCheck = Callable[[Block], None]

_UNFIT = (torch.optim.LBFGS, torch.optim.SparseAdam)


class NextForward:
    """Owes updates of blocks that are on the wire, and applies each before it is needed.

    Made by `DataParallel.overlap_step`. Not collective, but for the errors of the exchange.

    Args:
        engine: the process's engine.
        module: the module whose forward needs the parameters.
        parameters: those that are averaged.
        optimizer: updates them.
        check: called with each block before it is used; may raise.
    """

    def __init__(
        self,
        engine: Engine,
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        check: BlockCheck | None = None,
    ) -> None:
        kind = type(optimizer)
        if not kind.__module__.startswith("torch.optim") or isinstance(optimizer, _UNFIT):
            raise ExchangeError(
                f"the step of {kind.__name__} cannot be taken block by block: it is not known to "
                "treat every parameter by itself",
                allowed="optimizers of torch.optim but LBFGS and SparseAdam",
                fix="use one of those, or next_forward = false",
                everywhere=True,
            )
        updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(parameter) not in updated for parameter in parameters):
            raise ExchangeError(
                "the optimizer does not update all parameters that are averaged",
                fix="use one optimizer with several groups of parameters, freeze those that are "
                "not trained before wrapping, or use next_forward = false",
                everywhere=True,
            )
        self._engine = engine
        self._optimizer = optimizer
        self._check = check
        self._index = {id(parameter): i for i, parameter in enumerate(parameters)}
        self._block_of: dict[int, Block] = {}
        self.in_flight: dict[Block, None] = {}
        self.owed: dict[Block, list[int]] = {}
        """Blocks to update, and the places of the parameters that `step()` left out."""
        self._is_taken = False
        """Whether the optimizer's step has been taken, as far as it goes, of what came last."""
        self.keeps = False
        """Whether a step of which a part never comes is to be undone; costs memory and copies."""
        self._kept: list[tuple[nn.Parameter, torch.Tensor, dict[str, Any] | None]] = []
        """Parameters that the last step has updated, with what they and the optimizer's state were
        before, as long as others are owed."""
        self._buffers: BufferSync | None = None
        self._stepped: list[Block] = []
        self._settings: list[dict[str, Any]] = []
        self._places: dict[int, int] = {}
        self._updating = False
        self._unneeded: set[int] = set()
        self._spans_s: dict[int, tuple[float, float]] = {}
        self.first_use: list[int] | None = None
        """Of each parameter, its place in the order in which a forward uses them; once observed."""
        self.waited_s = 0.0
        """How long computing has waited for the wire since this was last set to zero."""
        self._hook_optimizer(optimizer)
        self._module = weakref.ref(module)
        for part in module.modules():
            part.register_state_dict_pre_hook(_Hook(self, NextForward.settle))
            part.register_load_state_dict_pre_hook(_Hook(self, NextForward.settle))
        module.register_forward_pre_hook(_Hook(self, NextForward.finish_buffers), prepend=True)

    # ------------------------------------------------------------------ what is needed where

    @property
    def is_observing(self) -> bool:
        """Whether the next forward shows which module needs which parameter."""
        return self.first_use is None

    def observe(self, run: Callable[[], Any]) -> Any:
        """Run the module's forward and see where it uses parameters."""
        module = self._module()
        assert module is not None
        if any(type(part).__name__ == "OptimizedModule" for part in module.modules()):
            result = run()  # what compiled code uses cannot be seen
            self.first_use = [0] * len(self._index)
            users = {index: {module: None} for index in self._index.values()}
        else:
            with _Uses(module, self._index) as seen:
                result = run()
            users = seen.users
            self._complete(module, seen)
        needs: dict[nn.Module, list[int]] = {}
        for index, of_index in users.items():
            for user in of_index:
                needs.setdefault(user, []).append(index)
        for user, indices in needs.items():
            wait = _Hook(self, NextForward._update_for, tuple(indices))
            user.register_forward_pre_hook(wait, prepend=True)
        return result

    def _complete(self, module: nn.Module, seen: _Uses) -> None:
        """Parameters that were not seen in use are needed by the modules that own them.

        A branch may not have been taken, or an autograd function has a use for them in backward.
        """
        never = len(seen.begun_at) + len(seen.used_at) + 1
        for owner in module.modules():
            for parameter in owner._parameters.values():
                index = self._index.get(id(parameter), -1)
                if index >= 0 and index not in seen.used_at:
                    seen.users.setdefault(index, {})[owner] = None
                    seen.used_at[index] = seen.begun_at.get(owner, never)
        self.first_use = [seen.used_at.get(index, never) for index in range(len(self._index))]

    def _update_for(self, indices: Iterable[int]) -> None:
        """A module that uses the parameters `indices` begins."""
        if not self.owed and not self._unneeded:
            return
        self._unneeded.difference_update(indices)  # by a forward before this one
        for index in indices:
            block = self._block_of[index]
            if block in self.owed:
                self._update(block)
        self._engine.poll()

    # ------------------------------------------------------------------ the exchange's side

    def owe(self, blocks: Sequence[Block], buffers: BufferSync | None) -> None:
        """Backward has ended: these blocks, in this order, and the buffers are on the wire."""
        self._buffers = buffers
        self._is_taken = False
        if not self._block_of:
            self._block_of = {index: block for block in blocks for index in block.members}
        self._unneeded.clear()
        self._spans_s = {}
        for block in blocks:
            block.hide()
            self.in_flight[block] = None
        if blocks:
            _on_the_wire.add(self)

    def before_forward(self, has_grad: bool) -> None:
        """Have what the forward needs from its beginning; everything if it is an evaluation."""
        if self.in_flight and not (has_grad and self.owed):
            self.settle()
        self.finish_buffers()

    def before_backward(self) -> None:
        """Have gradients where backward adds to them.

        Raises:
            ExchangeError: updates are still owed, so that the forward used old parameters.
        """
        for block in self.owed:
            raise _stale(block.names[0])
        self.settle()

    def check_used(self, index: int, name: str) -> None:
        """A gradient has arrived: refuse it if the forward used the parameter before its update.

        Raises:
            ExchangeError: it did.
        """
        if index in self._unneeded:
            raise _stale(name)

    def after_forward(self) -> None:
        """Apply what this forward did not need, so that nothing is owed when backward begins."""
        for block in list(self.owed):
            self._unneeded.update(block.members)
            self._update(block)

    def settle(self) -> None:
        """Wait for everything on the wire: update what is owed, leave other gradients in `grad`."""
        for block in list(self.in_flight):
            if block in self.owed:
                self._update(block)
            else:
                self._arrive(block)
        self.finish_buffers()

    def salvage(self) -> bool:
        """Some rank is dead, and nothing more will come: have all of the last step, or none.

        Not collective; needs `keeps`.

        Returns:
            Whether the last step counts. If not, parameters are those before it.
        """
        counts = not self._is_taken or self._has_all()
        if self._is_taken and counts:
            try:
                for block in list(self.owed):
                    self._update(block)
                self.finish_buffers()
            except RankDiedError:  # the check wanted to ask others
                counts = False
        if not counts:
            self._undo()
        self.owed.clear()
        self.in_flight.clear()
        self._kept.clear()
        self._buffers = None
        _on_the_wire.discard(self)
        return counts

    def _has_all(self) -> bool:
        """Whether all that is still needed for the last step is there."""
        has_buffers = self._buffers is None or self._buffers.has_come
        return has_buffers and all(
            ticket.done and ticket.error is None
            for block in self.in_flight
            for ticket in block.tickets
        )

    def _keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep what an update changes, unless all that is owed after it is there."""
        if not self.keeps or self._has_all():
            self._kept.clear()
            return
        for parameter in parameters:
            gathered = self._optimizer.state.get(parameter)
            state = None if gathered is None else {k: _copied(v) for k, v in gathered.items()}
            self._kept.append((parameter, parameter.detach().clone(), state))

    @torch.no_grad()
    def _undo(self) -> None:
        for parameter, value, gathered in self._kept:
            parameter.copy_(value)
            if gathered is None:
                self._optimizer.state.pop(parameter, None)
            else:
                self._optimizer.state[parameter] = gathered

    def finish_buffers(self) -> None:
        """Wait for buffers that are on the wire."""
        if self._buffers:
            self._buffers.finish()
            self._buffers = None

    def times(self, blocks: Sequence[Block]) -> StepTimes | None:
        """What this rank saw of the last step that is done; blocks in the order of the wire."""
        if len(self._spans_s) < len(blocks):
            return None
        begun_s, ended_s = zip(*self._spans_s.values(), strict=True)
        # A block's own time tells little: ends are noticed late, and several at once.
        s_per_byte = (max(ended_s) - min(begun_s)) / sum(block.slab.nbytes for block in blocks)
        ready_s, wire_s = [0.0] * len(blocks), [0.0] * len(blocks)
        for block in blocks:
            ready_s[block.index] = block.ready_s
            wire_s[block.index] = block.slab.nbytes * s_per_byte
        return StepTimes(ready_s, wire_s)

    def needed(self, blocks: Sequence[Block]) -> list[int] | None:
        """Of each block, by index, its place in the order in which a forward needs them."""
        uses = self.first_use
        if uses is None:
            return None
        return [min(uses[i] for i in b.members) for b in sorted(blocks, key=lambda b: b.index)]

    # ------------------------------------------------------------------ the optimizer's side

    def _hook_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        this = weakref.ref(self)

        def before(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            later = this()
            if later is not None and not later._updating:
                later._before_step(bool(args[1:]) or bool(kwargs.get("closure")))

        def after(*_: Any) -> None:
            later = this()
            if later is not None and not later._updating:
                later._after_step()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        optimizer.register_state_dict_pre_hook(_Hook(self, NextForward.settle))
        optimizer.register_load_state_dict_pre_hook(_Hook(self, NextForward.settle))

    @property
    def _must_settle(self) -> bool:
        """Whether this step cannot be taken in parts.

        The forward did not come through the wrapper, other hooks of the optimizer look at all
        gradients or parameters, or it lacks a parameter.
        """
        optimizer = self._optimizer
        hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
        return (
            self.is_observing
            or any(len(registered) > 1 for registered in hooks)
            or any(id(p) not in self._places for b in self.in_flight for p in b.parameters)
        )

    def _before_step(self, has_closure: bool) -> None:
        """Show the optimizer what has arrived; it leaves parameters without gradient alone."""
        for block in list(self.owed):  # of a step that no forward followed
            self._update(block)
        self._stepped = []
        self._kept.clear()
        if not self.in_flight:
            return
        if has_closure:
            raise ExchangeError(
                "optimizer.step(closure) runs a forward before all parameters are updated",
                fix="call step() without a closure, or use next_forward = false",
                everywhere=True,
            )
        self._places = {
            id(parameter): number
            for number, group in enumerate(self._optimizer.param_groups)
            for parameter in group["params"]
        }
        if self._must_settle:
            self.settle()
            return
        self._settings = [_settings(group) for group in self._optimizer.param_groups]
        self._stepped = list(self.in_flight)
        for block in self._stepped:
            if all(ticket.done for ticket in block.tickets):
                self._arrive(block)
                self._keep(block.parameters)
            else:
                self.owed[block] = block.withhold()

    def _after_step(self) -> None:
        """Take away what the step has used, so that it does not matter what had arrived by then."""
        self._is_taken = True
        for block in self._stepped:
            for parameter in block.parameters:
                parameter.grad = None
        if not self.owed:
            return
        for group, before in zip(self._optimizer.param_groups, self._settings, strict=False):
            for key, value in before.items():
                if not isinstance(value, torch.Tensor) and group[key] != value:
                    raise ExchangeError(
                        f"{type(self._optimizer).__name__} changes its {key!r} with each step, "
                        "so that a step cannot be taken block by block",
                        fix="use another optimizer, or next_forward = false",
                        everywhere=True,
                    )

    def _update(self, block: Block) -> None:
        """Wait for a block and take the step that its parameters are owed."""
        places = self.owed.pop(block)
        self._arrive(block, places)
        parts: list[list[nn.Parameter]] = [[] for _ in self._settings]
        for place in places:
            parameter = block.parameters[place]
            if parameter.grad is not None:
                parts[self._places[id(parameter)]].append(parameter)
        self._keep(parameter for part in parts for parameter in part)
        groups = [
            {**settings, "params": part}
            for settings, part in zip(self._settings, parts, strict=True)
            if part
        ]
        if groups:
            self._step(groups, block.parameters[0].device.type)
        for place in places:
            block.parameters[place].grad = None

    def _step(self, groups: list[dict[str, Any]], device: str) -> None:
        """The optimizer's step for a part of its parameters, as outside of any forward.

        Without the hooks and counters of the program, which have seen the step already.
        """
        optimizer = self._optimizer
        step = type(optimizer).step
        whole, optimizer.param_groups = optimizer.param_groups, groups
        self._updating = True
        try:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(device, enabled=False),
            ):
                getattr(step, "__wrapped__", step)(optimizer)
        finally:
            optimizer.param_groups = whole
            self._updating = False

    def _arrive(self, block: Block, places: Sequence[int] | None = None) -> None:
        """Wait for a block, and show its gradients, or those of the parameters at `places`."""
        begun_s = now_s()
        for ticket in block.tickets:
            self._engine.wait(ticket)
        block.slab.take_back()
        if block.tickets:
            span = (block.tickets[0].begun_s, max(t.finished_s for t in block.tickets))
            self._spans_s[block.index] = span
        del self.in_flight[block]
        if not self.in_flight:
            _on_the_wire.discard(self)
        ended_s = now_s()
        self.waited_s += ended_s - begun_s
        self._engine.world.trace.add(COMPUTE, "wait for the wire", begun_s, ended_s)
        block.reveal(places)
        if self._check:
            self._check(block)


class _Uses(TorchDispatchMode):
    """Notes which modules were running when a parameter was used.

    Args:
        module: whose forward runs.
        index: of each parameter, by its id.

    Attributes:
        users: modules that were the innermost running, by parameter, in the order of first uses.
        begun: modules in the order in which they first began.
    """

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module, index: dict[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._root = module
        self._index = index
        self._running: list[nn.Module] = []
        self._clock = 0
        self.users: dict[int, dict[nn.Module, None]] = {}
        self.used_at: dict[int, int] = {}
        self.begun_at: dict[nn.Module, int] = {}

    def __enter__(self) -> _Uses:
        self._hooks = []
        for module in self._root.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                self._hooks.append(module.register_forward_pre_hook(self._enter, prepend=True))
                self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._clock += 1
        self._running.append(module)
        self.begun_at.setdefault(module, self._clock)

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            index = self._index.get(id(value))
            if index is not None:
                self._clock += 1
                self.used_at.setdefault(index, self._clock)
                user = self._running[-1] if self._running else self._root
                self.users.setdefault(index, {})[user] = None
        return func(*args, **(kwargs or {}))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group's settings as they are now."""
    return {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in group.items()
        if key != "params"
    }


_on_the_wire: set[NextForward] = set()
"""Those that owe something: a program may have let go of the wrapper and keep the module."""


class _Hook:
    """Calls a method as long as the object lives. Saved with a module, it does nothing any more."""

    def __init__(self, later: NextForward, method: Callable[..., None], *args: Any) -> None:
        self._later = weakref.ref(later)
        self._method = method
        self._args = args

    @untraced
    def __call__(self, *_: Any) -> None:
        """Whatever a hook is called with."""
        later = self._later()
        if later is not None:
            self._method(later, *self._args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _NoHook, ()


class _NoHook:
    def __call__(self, *_: Any) -> None:
        """Nothing."""


def _stale(name: str) -> ExchangeError:
    return ExchangeError(
        f"parameter {name} was used before the last step had updated it: by a forward that went "
        "past DataParallel, or in another place than in the first forward",
        fix="call the wrapped model itself, in the same way in each step, or use "
        "next_forward = false",
    )
