"""Gradients that come late: what the optimizer does meanwhile, and what when they are there."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpctrain.comm.quantize import GROUP
from hpctrain.grad.flat import Flat, elements_of
from hpctrain.grad.periods.merging import compensate
from hpctrain.grad.periods.method import Method

Check = Callable[[list[torch.Tensor], bool], bool]
"""Whether to take a step on gradients, which it may change; told whether they are of all ranks."""


def take_all(gradients: list[torch.Tensor], is_shared: bool) -> bool:
    """A check that lets all steps be taken."""
    del gradients, is_shared
    return True


class Before:
    """Parameters and the optimizer's state as they were, to go back to."""

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer):
        self._parameters = parameters
        self._optimizer = optimizer
        self.values = [torch.empty_like(p) for p in parameters]
        self.state: list[dict[str, Any]] = [{} for _ in parameters]
        self.is_taken = False

    def take(self) -> None:
        """Keep them as they are now."""
        self.is_taken = True
        for place, p in enumerate(self._parameters):
            self.values[place].copy_(p.detach())
            gathered = self._optimizer.state.get(p, {})
            kept = self.state[place]
            self.state[place] = {
                name: _copied(value, kept.get(name)) for name, value in gathered.items()
            }

    def put_back(self) -> None:
        """Have them as they were."""
        assert self.is_taken
        for place, p in enumerate(self._parameters):
            p.detach().copy_(self.values[place])
            kept = self.state[place]
            if not kept:  # an entry without content would be one that lacks something
                self._optimizer.state.pop(p, None)
                continue
            gathered = self._optimizer.state[p]
            for name in [name for name in gathered if name not in kept]:
                del gathered[name]
            for name, value in kept.items():
                if isinstance(value, torch.Tensor):
                    gathered[name].copy_(value)
                else:
                    gathered[name] = copy.deepcopy(value)

    @property
    def state_bytes(self) -> int:
        """Memory of the copies of the optimizer's state."""
        tensors = (value for kept in self.state for value in kept.values())
        return sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))


def _copied(value: Any, into: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    fits = isinstance(into, torch.Tensor) and into.shape == value.shape
    return into.copy_(value) if fits else value.detach().clone()


@dataclass
class _Told:
    """What is on the wire of one iteration.

    Attributes:
        own: this rank's own gradient, where a local step was taken on it.
        used: which parameters it has.
        then: the parameters that it was computed at, where a correction needs them.
        settings: of the optimizer's groups in that iteration.
    """

    own: Flat | None
    used: list[bool]
    then: Flat | None
    settings: list[dict[str, Any]]


class LateGradients:
    """Takes the optimizer's steps when gradients come, in the order of their iterations.

    Args:
        method: with sends = "gradients".
        parameters: what is trained.
        optimizer: updates it.
        check: asked before each step.

    Attributes:
        before: the parameters and the state that all ranks share, while local steps are ahead.
    """

    def __init__(
        self,
        method: Method,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        check: Check = take_all,
    ) -> None:
        self._check = check
        self._method = method
        self._parameters = parameters
        self._optimizer = optimizer
        is_ahead = method.merge == "correct" and method.pull_lag > 0
        self.before = Before(parameters, optimizer) if is_ahead else None
        self._told: deque[_Told] = deque()
        self._free: list[Flat] = []

    @staticmethod
    def count(parameters: Sequence[torch.Tensor]) -> int:
        """Elements of what is told: the gradient, and behind it one flag a parameter, exactly."""
        return _gradient_end(parameters) + len(parameters)

    @staticmethod
    def slots(method: Method) -> int:
        """Iterations whose gradients are held at a time, to be told or on the wire."""
        return max(1, method.pull_lag) + (method.merge == "compensate")

    @staticmethod
    def copies(method: Method) -> int:
        """Copies of all parameters, or of a rank's own gradients, that are held besides."""
        if method.pull_lag == 0 or method.merge == "late":
            return 0
        return method.pull_lag + 2

    def capture(self, out: torch.Tensor) -> None:
        """Write what is to be told, and go ahead with a local step if the method has one.

        Args:
            out: flat; receives it.
        """
        flat, flags = self._split(out)
        used = [p.grad is not None for p in self._parameters]
        flags.copy_(torch.tensor(used))
        for view, p in zip(flat.views, self._parameters, strict=True):
            if p.grad is None:
                view.zero_()
            else:
                view.copy_(torch.view_as_real(p.grad) if p.is_complex() else p.grad)
        if self._method.pull_lag == 0:
            return
        own = then = None
        if self.before:
            own = self._copy_of(flat.tensor)
        if self._method.merge == "compensate":
            then = self._copy_of(None)
            then.gather(self._parameters)
        settings = [_settings(group) for group in self._optimizer.param_groups]
        self._told.append(_Told(own, used, then, settings))
        if self.before:
            if not self.before.is_taken:
                self.before.take()
            self._step_ahead(self._told[-1])

    def pull(self, mean: torch.Tensor) -> None:
        """Take the step of the oldest iteration whose gradient had not come.

        Args:
            mean: flat; over ranks, as captured; overwritten.
        """
        flat, flags = self._split(mean)
        used = (flags > 0).tolist()
        if self._method.pull_lag == 0:
            self._step(flat, used, None, is_shared=True)
            return
        told = self._told.popleft()
        if told.then is not None:
            now = self._copy_of(None)
            now.gather(self._parameters)
            compensate(flat.tensor, now.tensor, told.then.tensor, self._method.compensation)
            self._free += [now, told.then]
        if self.before:
            self.before.put_back()
            self.before.is_taken = False
        self._step(flat, used, told.settings, is_shared=True)
        if told.own is not None:
            self._free.append(told.own)
        if self.before and self._told:
            self.before.take()
            for ahead in self._told:
                self._step_ahead(ahead)

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on, with copies of what will change."""
        told = [
            {
                "own": each.own and each.own.tensor.clone(),
                "used": each.used,
                "then": each.then and each.then.tensor.clone(),
                "settings": each.settings,
            }
            for each in self._told
        ]
        before = self.before
        if before is None or not before.is_taken:
            return {"told": told}
        values = [value.clone() for value in before.values]
        gathered = [
            {name: _copied(value, None) for name, value in kept.items()} for kept in before.state
        ]
        return {"told": told, "values": values, "state": gathered}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._told = deque(
            _Told(
                self._loaded(each["own"]),
                each["used"],
                self._loaded(each["then"]),
                each["settings"],
            )
            for each in state["told"]
        )
        if self.before is None:
            return
        self.before.is_taken = "values" in state
        if self.before.is_taken:
            for into, value in zip(self.before.values, state["values"], strict=True):
                into.copy_(value)
            self.before.state = [
                {name: _copied(value, None) for name, value in kept.items()}
                for kept in state["state"]
            ]

    def _loaded(self, values: torch.Tensor | None) -> Flat | None:
        return None if values is None else self._copy_of(values)

    def _step_ahead(self, told: _Told) -> None:
        """A local step, which may be taken once more: a check may change the gradient."""
        assert told.own is not None
        gradient = self._copy_of(told.own.tensor)
        self._step(gradient, told.used, told.settings, is_shared=False)
        self._free.append(gradient)

    def _step(
        self,
        gradient: Flat,
        used: Sequence[bool],
        settings: Sequence[dict[str, Any]] | None,
        is_shared: bool,
    ) -> None:
        """One step of the optimizer on a gradient; gradients of parameters are as before then."""
        kept = [p.grad for p in self._parameters]
        groups = self._optimizer.param_groups if settings else []
        own, now = [dict(group) for group in groups], [_settings(group) for group in groups]
        for place, p in enumerate(self._parameters):
            p.grad = _as_gradient(gradient.views[place], p) if used[place] else None
        for group, values in zip(groups, settings or (), strict=True):
            _set(group, values)
        taken = [p.grad for p in self._parameters if p.grad is not None]
        if self._check(taken, is_shared):
            self._optimizer.step()
        for group, held, values in zip(groups, own, now, strict=True):
            group.update(held)
            _set(group, values)
        for p, before in zip(self._parameters, kept, strict=True):
            p.grad = before

    def _split(self, flat: torch.Tensor) -> tuple[Flat, torch.Tensor]:
        """The gradients in what is told, and the flags."""
        end, count = _gradient_end(self._parameters), elements_of(self._parameters)
        return Flat(self._parameters, flat[:count]), flat[end:]

    def _copy_of(self, values: torch.Tensor | None) -> Flat:
        flat = self._free.pop() if self._free else Flat(self._parameters)
        if values is not None:
            flat.tensor.copy_(values)
        return flat


def _gradient_end(parameters: Sequence[torch.Tensor]) -> int:
    """Where flags begin: behind whole groups of elements that share a scale."""
    return -(-elements_of(parameters) // GROUP) * GROUP


def _as_gradient(view: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """A gradient as the parameter lies in memory: fused optimizers take both as they lie."""
    if parameter.is_complex():
        view = torch.view_as_complex(view.clone() if view.storage_offset() % 2 else view)
    if view.stride() != parameter.stride():
        return torch.empty_like(parameter).copy_(view)
    return view.to(parameter.dtype)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer's group is set to, such as its learning rate, which may be a tensor."""
    return {name: _copied(value, None) for name, value in group.items() if name != "params"}


def _set(group: dict[str, Any], values: dict[str, Any]) -> None:
    """Set it to that; tensors stay the same ones, which schedulers write to."""
    for name, value in values.items():
        held = group.get(name)
        if isinstance(value, torch.Tensor) and isinstance(held, torch.Tensor):
            held.copy_(value)
        else:
            group[name] = value
