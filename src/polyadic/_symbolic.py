"""What a compiler that is tracing knows of sizes, and what is assumed where it does not."""

from __future__ import annotations

# A symbolic batch under torch.compile gets one plan for all sizes: that of a large batch.
UNKNOWN_BATCH = 256


def known(*sizes: int) -> bool:
    """Whether torch.compile, which is tracing, knows all sizes as constants."""
    # Imported while tracing, as it takes half a second.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    known = True
    for size in sizes:
        known = known and has_static_value(size)
    return known
