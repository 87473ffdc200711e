"""Copies of a run's state, to write while training changes the state itself.

What a forward may change, such as a model's parameters and buffers, is copied at once: a loss
function may clip weights or follow an average. The optimizer's state, the larger part, belongs to
its step alone: the writer's thread copies it while the next forward and backward run, and the step
waits for the end of that. Tensors on a GPU are queued for copying, behind what the program has
queued so far and before what it queues next.
"""

from __future__ import annotations

import copy
import ctypes
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

_FIXED = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class Copies:
    """Memory for copies, used again from one checkpoint to the next.

    A copy is valid after `finish`, and until the next one of the same key is made.
    """

    def __init__(self) -> None:
        self._memory: dict[str, list[torch.Tensor]] = {}
        self._queued: list[torch.cuda.Event] = []

    def of(self, key: str, value: Any, is_dense: bool = False, alone: bool = False) -> Any:
        """A copy of nested dicts and lists, with all tensors on the host.

        Args:
            key: names the memory.
            value: what to copy.
            is_dense: have all tensors contiguous, whatever they are.
            alone: copy without the help of torch's threads, each of which has a team of them.

        Raises:
            Exception: something in it cannot be copied.
        """
        memory = self._memory.setdefault(key, [])
        made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        used = 0

        def copied(leaf: Any) -> Any:
            nonlocal used
            if not isinstance(leaf, torch.Tensor):
                return leaf if isinstance(leaf, _FIXED) else copy.deepcopy(leaf)
            leaf = leaf.detach()
            if type(leaf) is not torch.Tensor or leaf.layout != torch.strided or leaf.is_quantized:
                return leaf.clone().to("cpu")
            place = leaf.data_ptr()
            source, host = made.get(place, (None, leaf))
            if source is not None and _is_same(leaf, source):
                return host  # tied tensors stay one
            host = _reused(memory, used, leaf, is_dense)
            used += 1
            _fill(host, leaf, alone)
            made[place] = leaf, host
            return host

        with torch.no_grad():
            result = _mapped(value, copied)
        del memory[used:]
        for device in {source.device for source, _ in made.values() if source.is_cuda}:
            self._queued.append(torch.cuda.current_stream(device).record_event())
        if hasattr(value, "_metadata"):  # a module's state names its format there
            result._metadata = copy.deepcopy(value._metadata)
        return result

    def finish(self) -> None:
        """Wait for what was queued. For one thread at a time."""
        queued, self._queued = self._queued, []
        for event in queued:
            event.synchronize()


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Nested dicts and lists with each of their innermost values changed."""
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _mapped(inner, change)) for key, inner in value.items())
    if type(value) in (list, tuple):
        return type(value)(_mapped(inner, change) for inner in value)
    return change(value)


def _is_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether tensors that begin at the same address are one."""
    return (
        first.device == second.device
        and first.dtype == second.dtype
        and first.shape == second.shape
        and first.stride() == second.stride()
        and first.is_conj() == second.is_conj()
        and first.is_neg() == second.is_neg()
    )


def _reused(
    memory: list[torch.Tensor], index: int, source: torch.Tensor, is_dense: bool
) -> torch.Tensor:
    """The tensor of this index, or a new one if that does not fit any more."""
    if index < len(memory):
        host = memory[index]
        if host.dtype == source.dtype and host.shape == source.shape:
            if host.is_contiguous() if is_dense else host.stride() == source.stride():
                return host
    else:
        memory.append(source)
    memory[index] = torch.empty_like(
        source,
        device="cpu",
        memory_format=torch.contiguous_format if is_dense else torch.preserve_format,
        pin_memory=source.is_cuda,
    )
    return memory[index]


def _fill(host: torch.Tensor, source: torch.Tensor, alone: bool) -> None:
    is_block = source.device == host.device and host.stride() == source.stride()
    if alone and is_block and not source.is_conj() and not source.is_neg():
        nbytes = source.numel() * source.element_size()
        ctypes.memmove(host.data_ptr(), source.data_ptr(), nbytes)
    else:
        host.copy_(source, non_blocking=source.is_cuda)
