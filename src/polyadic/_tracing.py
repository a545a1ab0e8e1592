"""What code asks while a compiler traces it, in words that every supported torch understands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])

# A symbolic batch under torch.compile gets one plan for all sizes: that of a large batch.
UNKNOWN_BATCH = 256


def not_traced(function: F) -> F:
    """Have a compiler call a function while it traces, and keep the result as a constant.

    What torch.compiler.assume_constant_result does, without its import of the whole compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@not_traced
def exporting() -> bool:
    """Whether the graph being traced is to be exported."""
    # Traced, the compiler of torch 2.11 takes this for true in each graph.
    return torch.compiler.is_exporting()


def known(*sizes: int) -> bool:
    """Whether torch.compile, which is tracing, knows all sizes as constants."""
    # Imported while tracing, as it takes half a second.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    known = True
    for size in sizes:
        known = known and has_static_value(size)
    return known


def transformed() -> bool:
    """Whether a transform of torch.func is active, or a level of forward mode."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
