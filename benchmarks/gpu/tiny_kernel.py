"""A Triton kernel that does almost nothing, to see what starting one costs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def double_kernel(x, y, SIZE: tl.constexpr):
    """Y = 2 x for SIZE elements."""
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at) * 2)


@triton.jit
def sum_kernel(inputs, y, SIZE: tl.constexpr):
    """The sum of a tuple of inputs: many arguments, as a layer's kernels have."""
    at = tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for i in tl.static_range(len(inputs)):
        total += tl.load(inputs[i] + at)
    tl.store(y + at, total)
