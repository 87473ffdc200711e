"""Where a rank computes, and what has to be there."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from hpctrain.errors import UnfitError
from hpctrain.world import World

DEVICES = ("cpu", "cuda")


def device_of(world: World, name: str) -> torch.device:
    """This rank's device: with ``cuda`` the GPUs of a node are dealt out to its ranks in turn.

    Raises:
        UnfitError: torch sees no GPU.
    """
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UnfitError(
            f"train.device = {name!r}, but torch sees no GPU",
            where=world.name_of(world.rank),
            fix="use train.device = 'cpu', or start the job where GPUs are (CUDA_VISIBLE_DEVICES, "
            "a torch that is built for them)",
        )
    device = torch.device(name, world.local_rank % count)
    torch.cuda.set_device(device)
    return device


def moved(value: Any, device: torch.device) -> Any:
    """The same with all of its tensors on the device; itself where they are already."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    if all(tensor.device == device for tensor in tensors):
        return value

    def move(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf

    copy = tree_map(move, value)
    if hasattr(value, "_metadata"):  # a module's state names its format there
        copy._metadata = value._metadata
    return copy
