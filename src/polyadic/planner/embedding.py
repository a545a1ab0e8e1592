"""Choice of a plan for an embedding: which in factors are joined, and how the out factors act."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyadic._torch import known
from polyadic.formats import LinearFormat
from polyadic.planner.linear import plan_rows
from polyadic.plans import LinearPlan, LinearRoute, Memory


def plan_embedding(
    fmt: LinearFormat, rows: int, dtype: torch.dtype, device_type: str, memory: Memory
) -> LinearPlan:
    """The plan for ``rows`` indices, whose out side is a linear map's of as many rows."""
    linear = plan_rows(fmt, (rows,), dtype, device_type, memory, rebuild=False)
    forward, backward = linear.forward.out_groups, linear.backward.out_groups
    if dtype.itemsize == 2:
        # A lookup rounds less than a GEMM: splitting would round once more than torch, twice over.
        forward = backward = (len(fmt.out_shape),)
    joined = _joined(fmt.in_shape, rows, device_type)
    routes = LinearRoute(joined, forward), LinearRoute(joined, backward)
    return LinearPlan(*routes, keep=int(memory == "fast"))


def _joined(modes: Sequence[int], rows: int, device_type: str) -> tuple[int, ...]:
    """Lengths of groups of adjacent in modes whose Khatri-Rao product is worth forming.

    That is where it has at most half as many rows as there are indices to look up. Elsewhere than
    on a CPU rows are summed by a matrix product, for which the modes had better stay small.
    """
    if device_type != "cpu" or (torch.compiler.is_compiling() and not known(rows, *modes)):
        return (1,) * len(modes)
    groups, sizes = [1], [modes[-1]]
    for mode in reversed(modes[:-1]):
        if 2 * mode * sizes[0] <= rows:
            groups[0], sizes[0] = groups[0] + 1, mode * sizes[0]
        else:
            groups.insert(0, 1)
            sizes.insert(0, mode)
    return tuple(groups)
