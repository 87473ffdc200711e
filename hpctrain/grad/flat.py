"""Several tensors side by side in one flat one, in an order and a precision of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Flat:
    """One flat tensor, with a view that has the shape of each of several others.

    Args:
        like: the others; complex ones lie as pairs of real numbers.
        tensor: flat and real, of `elements_of(like)` elements; zeros of its own by default.
    """

    def __init__(self, like: Sequence[torch.Tensor], tensor: torch.Tensor | None = None) -> None:
        self.like = [_real(each) for each in like]
        sizes = [each.numel() for each in self.like]
        if tensor is None:
            device = like[0].device if like else None
            tensor = torch.zeros(sum(sizes), dtype=dtype_of(like), device=device)
        self.tensor = tensor
        self.views = [
            part.view(each.shape) for part, each in zip(tensor.split(sizes), self.like, strict=True)
        ]

    def again(self) -> Flat:
        """Another one of the same kind, of zeros."""
        return Flat(self.like, torch.zeros_like(self.tensor))

    def gather(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take the values of tensors of the same shapes."""
        for view, each in zip(self.views, tensors, strict=True):
            view.copy_(_real(each))

    def scatter(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give the values to tensors of the same shapes."""
        for view, each in zip(self.views, tensors, strict=True):
            _real(each).copy_(view)


def elements_of(like: Sequence[torch.Tensor]) -> int:
    """Real elements of tensors."""
    return sum(_real(each).numel() for each in like)


def dtype_of(like: Sequence[torch.Tensor]) -> torch.dtype:
    """What loses nothing of them: float64 if one of them has so many bits, else float32."""
    wide = (torch.float64, torch.complex128)
    return torch.float64 if any(each.dtype in wide for each in like) else torch.float32


def _real(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
