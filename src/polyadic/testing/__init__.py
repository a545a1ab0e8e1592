"""What authors of layers, our tests and our benchmarks check and count with."""

from polyadic.live_bytes import LiveBytes
from polyadic.testing.counting import (
    Allocation,
    Flops,
    KeptBytes,
    Operations,
    allocations,
    flops,
    kept_bytes,
    launches,
)
from polyadic.testing.environment import environment
from polyadic.testing.verification import (
    Check,
    Problem,
    Result,
    conv_problem,
    linear_problem,
    verify,
)

__all__ = [
    "Allocation",
    "Check",
    "Flops",
    "KeptBytes",
    "LiveBytes",
    "Operations",
    "Problem",
    "Result",
    "allocations",
    "conv_problem",
    "environment",
    "flops",
    "kept_bytes",
    "launches",
    "linear_problem",
    "verify",
]
