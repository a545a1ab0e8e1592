"""Adding up partial sums that programs have written, in an order that depends on sizes alone."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyadic.kernels.triton.launch import Launcher
from polyadic.kernels.triton.numerics import rounded, up_to_power_of_two

# Partial sums read at a time, columns of a program at most, and warps that share them.
BLOCK, MOST_COLUMNS, WARPS = 64, 64, 8


@triton.jit(do_not_specialize=["splits"])
def add_kernel(
    partial,
    sums,
    splits,
    MODES: tl.constexpr,
    BASE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add partial (splits, BASE[D], RANK) over the splits, a row a program, into (m_d, RANK) each.

    Args:
        partial: in float32.
        sums: pointers to one matrix (MODES[d], RANK) for each d.
        splits: number of splits.
        MODES: rows of each matrix.
        BASE: the first row of each matrix in ``partial``, and the number of rows.
        RANK: columns.
        BLOCK: splits read at a time.
        COLUMNS: columns a program sums.
    """
    row = tl.program_id(1)
    r = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ranked = r < RANK
    rows: tl.constexpr = BASE[len(MODES)]
    total = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for start in range(0, splits, BLOCK):
        s = start + tl.arange(0, BLOCK)
        at = partial + (s.to(tl.int64) * rows + row)[:, None] * RANK + r[None, :]
        total += tl.load(at, mask=(s < splits)[:, None] & ranked[None, :], other=0.0)
    result = tl.sum(total, 0)
    for d in tl.static_range(len(MODES)):
        if (row >= BASE[d]) & (row < BASE[d + 1]):
            at = sums[d] + (row - BASE[d]) * RANK + r
            tl.store(at, rounded(result, sums[d].dtype.element_ty), mask=ranked)


LAUNCHER = Launcher(add_kernel)


class _Form(NamedTuple):
    grid: tuple[int, int, int]
    constants: tuple[Any, ...]


@functools.lru_cache(maxsize=4096)
def form_of(heights: tuple[int, ...], width: int) -> _Form:
    """Return the grid and the constants for matrices of these heights and this width."""
    base = (0, *itertools.accumulate(heights))
    columns = min(MOST_COLUMNS, up_to_power_of_two(width))
    return _Form((-(-width // columns), base[-1], 1), (heights, base, width, BLOCK, columns))


def add_up(partial: Tensor, heights: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Sum over the first dimension, divided into matrices.

    Args:
        partial: (splits, Σ heights, width) in float32, contiguous.
        heights: rows of each matrix, in the order in which they stand in ``partial``.
        dtype: of the matrices (height, width).
    """
    width = partial.shape[-1]
    form = form_of(heights, width)
    sums = tuple([partial.new_empty((height, width), dtype=dtype) for height in heights])
    LAUNCHER(
        (form.constants, dtype),
        form.grid,
        (partial, *sums),
        (partial.shape[0],),
        lambda: (partial, sums, partial.shape[0], *form.constants),
        warps=WARPS,
    )
    return list(sums)
