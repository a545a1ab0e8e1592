"""What code asks while a compiler traces it, in words that every supported torch understands."""

from __future__ import annotations

import torch

# A symbolic batch under torch.compile gets one plan for all sizes: that of a large batch.
UNKNOWN_BATCH = 256


def exporting() -> bool:
    """Whether the graph being traced is to be exported."""
    return torch.compiler.is_exporting()


# Called while tracing, not traced: the compiler of torch 2.11 takes it for true in each graph.
exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def known(*sizes: int) -> bool:
    """Whether torch.compile, which is tracing, knows all sizes as constants."""
    # Imported while tracing, as it takes half a second.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    known = True
    for size in sizes:
        known = known and has_static_value(size)
    return known
