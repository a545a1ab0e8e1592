"""What every public function does at its boundary: autocast, shapes of gradients, bytes held."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from polyadic import checks
from polyadic._torch import Memo, autocasts
from polyadic.planner import choice
from polyadic.plans import Memory

# Validated calls by signature: the map to run, and how its input is laid out.
known_calls = Memo()
choice.when_forgotten(known_calls.clear)

_signature = attrgetter("shape", "dtype", "device")


def call_signature(
    x: Any, groups: tuple[Any, ...], bias: Any, weights: Any, *options: Any
) -> tuple[Any, ...] | None:
    """All that validation and choice of a plan look at, so that both are done once; or None.

    Args:
        x: the input.
        groups: sequences of factors; None is returned where one is no tuple or list.
        bias: the bias or None.
        weights: λ or None.
        options: whatever else decides, told apart by hash and equality.

    Raises:
        AttributeError: one of the tensors is none.
        TypeError: a group has no elements to go through, or an option no hash.
    """
    if torch._C._is_any_autocast_enabled():
        return None
    for group in groups:
        if type(group) is not tuple and type(group) is not list:
            return None
    return (
        tuple(map(len, groups)),
        tuple(map(_signature, itertools.chain((x,), *groups))),
        None if bias is None else _signature(bias),
        None if weights is None else _signature(weights),
        torch.get_num_threads(),
        options,
    )


def nbytes(tensors: Sequence[Tensor | None]) -> int:
    """Bytes of all tensors that are given."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype autocast asks for on x's device, None where it is off or x is float64."""
    kind = x.device.type
    if not autocasts(kind):
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
    level = checks.check_memory(memory)
    return level if torch.is_grad_enabled() else "least"


def gradient_like(grad_y: Any, x: Tensor, shape: tuple[int, ...]) -> None:
    """Check that a gradient has the output's shape, and x's dtype and device."""
    checks.check_like_factors(grad_y, x, "grad_y")
    if grad_y.shape != shape:
        raise ValueError(f"grad_y must have the output's shape {shape}, got {tuple(grad_y.shape)}")
