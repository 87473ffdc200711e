"""Copies of a run's state, to write while training changes the state itself.

What a forward may change, such as a model's parameters and buffers, is copied at once: a loss
function may clip weights or follow an average. The optimizer's state, the larger part, belongs to
its step alone: it is copied by the writer's thread while the next forward and backward run, and the
step waits for the end of that. Tensors on a GPU are queued for copying behind what the program
has queued so far, and before what it queues next.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

_FIXED = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class Copies:
    """Memory for copies, used again from one checkpoint to the next.

    A copy is valid after `finish`, and until the next one of the same key is made.
    """

    def __init__(self) -> None:
        self._memory: dict[str, list[torch.Tensor]] = {}
        self._later: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._queued: list[torch.cuda.Event] = []

    def of(self, key: str, value: Any, may_wait: bool = False, is_dense: bool = False) -> Any:
        """A copy of nested dicts and lists, with all tensors on the host.

        Args:
            key: names the memory.
            value: what to copy.
            may_wait: whether tensors on the host are left to `finish`.
            is_dense: have all tensors contiguous, whatever they are.

        Raises:
            Exception: something in it cannot be copied.
        """
        memory = self._memory.setdefault(key, [])
        made: dict[Any, torch.Tensor] = {}

        def copied(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf if isinstance(leaf, _FIXED) else copy.deepcopy(leaf)
            leaf = leaf.detach()
            if type(leaf) is not torch.Tensor or leaf.layout != torch.strided or leaf.is_quantized:
                return leaf.clone().to("cpu")
            shape = leaf.size(), leaf.stride(), leaf.is_conj(), leaf.is_neg()
            place = leaf.device, leaf.data_ptr(), leaf.dtype, shape
            if place not in made:  # tied tensors stay one
                made[place] = self._copy(leaf, memory, len(made), may_wait, is_dense)
            return made[place]

        with torch.no_grad():
            result = tree_map(copied, value)
            for device in {place[0] for place in made if place[0].type == "cuda"}:
                self._queued.append(torch.cuda.current_stream(device).record_event())
        del memory[len(made) :]
        if hasattr(value, "_metadata"):  # a module's state names its format there
            result._metadata = copy.deepcopy(value._metadata)
        return result

    def finish(self) -> None:
        """Copy what was left to this, and wait for what was queued. For one thread at a time."""
        later, self._later = self._later, []
        for host, source in later:  # unlike torch's copy, this wakes no team of threads
            ctypes.memmove(host.data_ptr(), source.data_ptr(), host.numel() * host.element_size())
        queued, self._queued = self._queued, []
        for event in queued:
            event.synchronize()

    @property
    def is_unfinished(self) -> bool:
        """Whether the program must not change something before `finish` has ended."""
        return bool(self._later)

    def _copy(
        self,
        source: torch.Tensor,
        memory: list[torch.Tensor],
        index: int,
        may_wait: bool,
        is_dense: bool,
    ) -> torch.Tensor:
        form = torch.contiguous_format if is_dense else torch.preserve_format
        pinned = source.is_cuda

        def make() -> torch.Tensor:
            return torch.empty_like(source, device="cpu", memory_format=form, pin_memory=pinned)

        host = _reused(memory, index, source, is_dense, make)
        if may_wait and _is_block(source) and host.stride() == source.stride():
            self._later.append((host, source))
        else:
            host.copy_(source, non_blocking=pinned)
        return host


def _reused(
    memory: list[torch.Tensor],
    index: int,
    source: torch.Tensor,
    is_dense: bool,
    make: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """The tensor of this index, or a new one if that does not fit any more."""
    if index < len(memory):
        host = memory[index]
        fits = host.dtype == source.dtype and host.size() == source.size()
        if fits and (host.is_contiguous() if is_dense else host.stride() == source.stride()):
            return host
        memory[index] = make()
    else:
        memory.append(make())
    return memory[index]


def _is_block(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a block of the host's memory as it is."""
    return tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg()
