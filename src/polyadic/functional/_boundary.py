"""What every public function does at its boundary: autocast, shapes of gradients, bytes held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polyadic import _check
from polyadic._plan import Memory


def nbytes(tensors: Sequence[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype autocast asks for on x's device, None where it is off or x is float64."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return None if x.dtype == torch.float64 else torch.get_autocast_dtype(kind)


def autocast(x: Any) -> tuple[Any, torch.dtype | None]:
    """Cast x as autocast asks, and return to which dtype; what is no floating tensor stays.

    A plan is chosen for the dtype computed in, so this comes first.
    """
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        return x, None
    dtype = autocast_dtype(x)
    return (x if dtype is None else x.to(dtype)), dtype


def memory_now(memory: Any) -> Memory:
    """Return the level asked for; ``"least"`` without gradients, for nothing is kept then."""
    level = _check.memory(memory)
    return level if torch.is_grad_enabled() else "least"


def gradient_like(grad_y: Any, x: Tensor, shape: tuple[int, ...]) -> None:
    _check.same_place(grad_y, x, "grad_y")
    if grad_y.shape != shape:
        raise ValueError(f"grad_y must have the output's shape {shape}, got {tuple(grad_y.shape)}")
