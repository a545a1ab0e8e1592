"""What authors of layers, our tests and our benchmarks check and count with."""

from polyadic.testing.counting import (
    Allocation,
    KeptBytes,
    LiveBytes,
    allocations,
    flops,
    kept_bytes,
    launches,
    operations,
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
    "KeptBytes",
    "LiveBytes",
    "Problem",
    "Result",
    "allocations",
    "conv_problem",
    "environment",
    "flops",
    "kept_bytes",
    "launches",
    "linear_problem",
    "operations",
    "verify",
]
