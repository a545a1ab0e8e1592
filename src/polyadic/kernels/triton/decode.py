"""A linear map of few rows from its factors alone: Y = X KA KCᵀ + bias in one launch.

With few rows there is next to nothing to compute; launching and reading take the time. So each
program makes all of Z for itself, and then its columns of Y. That is little work in two groups of
modes: with KA = KL ⊙ KR, of l and s rows,

    Z[t, r] = Σ_l KL[l, r] Σ_s X[t, l, s] KR[s, r]

is a product of (t·l, s) with (s, r) and a short weighted sum. It serves up to ``MOST_AT_ONCE`` rows
t·l, and neither matrix ever stands in memory. One row of 4096 features takes 3.9 µs at rank 64,
where both matrices and two products take 9.3. Two launches, for more rows or terms, were measured
too: for 16 rows of rank 64 they took 12.1 µs where those take 9.4, and of rank 256 38 where those
take 11.3 (bfloat16 on an H200, November 2026).

Axes: t rows, i in features (M), n out features, r rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyadic.kernels.fused import MOST_DECODED_ROWS
from polyadic.kernels.triton.launch import Launcher
from polyadic.kernels.triton.numerics import (
    khatri_rao_rows,
    product,
    right_of,
    rounded,
    up_to_power_of_two,
)

# Rows of KR and out features of a tile, and terms that are summed at a time.
BLOCK, OUT_FEATURES, TERMS = 64, 32, 64
# One launch serves up to so many rows t·l of its product, and entries of KR, which each program
# makes for itself.
MOST_AT_ONCE, MOST_ENTRIES_AT_ONCE = 64, 2**15


@triton.jit(do_not_specialize=["rows"])
def decode_kernel(
    x,
    left,
    right,
    out_factors,
    bias,
    y,
    rows,
    MODES: tl.constexpr,
    RIGHT: tl.constexpr,
    LEFT: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Write COLUMNS out features of y (t, WIDTH) from x (t, LEFT · SPLIT).

    It is made from pointers to the in factors of the left and of the right group and to the out
    factors (m_d, RANK) and, with BIASED, from bias (WIDTH,). MODES are the modes of each of the
    three groups, and RIGHT says by how many rows of a matrix a step in each mode moves. ``rows`` is
    the number of rows t, and ROWS the power of two above it. LEFT is padded to PADDED, BLOCK rows
    of KR and TERMS columns are taken at a time.
    """
    q = tl.arange(0, ROWS * PADDED)
    t, left_row = q // PADDED, q % PADDED
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real, there = n < WIDTH, (q // PADDED < rows) & (left_row < LEFT)
    dtype: tl.constexpr = y.dtype.element_ty
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, RANK, TERMS):
        r = first + tl.arange(0, TERMS)
        ranked = (r < RANK)[None, :]
        summed = tl.zeros((ROWS * PADDED, TERMS), tl.float32)
        for start in range(0, SPLIT, BLOCK):
            s = start + tl.arange(0, BLOCK)
            mask = (s < SPLIT)[:, None] & ranked
            kr = khatri_rao_rows(right, s, r, mask, MODES, RIGHT, 1, RANK, -1)
            kr = rounded(tl.where(mask, kr, 0.0), dtype)
            at = x + ((t * LEFT + left_row) * SPLIT)[:, None] + s[None, :]
            part = tl.load(at, mask=there[:, None] & (s < SPLIT)[None, :], other=0.0)
            summed = product(part, kr, summed)
        mask = there[:, None] & ranked
        kl = khatri_rao_rows(left, left_row, r, mask, MODES, RIGHT, 0, RANK, -1)
        weighted = summed * tl.where(mask, kl, 0.0)
        z = tl.sum(tl.reshape(weighted, (ROWS, PADDED, TERMS)), 1)
        z = rounded(z, dtype).to(tl.float32)
        mask = real[:, None] & ranked
        kc = khatri_rao_rows(out_factors, n, r, mask, MODES, RIGHT, 2, RANK, -1)
        kc = rounded(tl.where(mask, kc, 0.0), dtype).to(tl.float32)
        total += tl.sum(z[:, None, :] * kc[None, :, :], 2)
    if BIASED:
        total += tl.load(bias + n, mask=real, other=0.0).to(tl.float32)[None, :]
    row = tl.arange(0, ROWS)
    at = y + row[:, None] * WIDTH + n[None, :]
    tl.store(at, rounded(total, dtype), mask=(row < rows)[:, None] & real[None, :])


DECODE = Launcher(decode_kernel)

Modes = tuple[int, ...]


class OneLaunch(NamedTuple):
    """Grid and constants of the one kernel, and how many in factors make the left group."""

    grid: tuple[int, int, int]
    constants: tuple[Any, ...]
    cut: int


@functools.lru_cache(maxsize=4096)
def one_launch(
    modes: tuple[Modes, Modes], rank: int, rows: int, biased: bool, dtype: torch.dtype
) -> OneLaunch | None:
    """Return how the kernel computes such a map, None where there are too many rows or terms.

    The left group is the longest for which rows t·l fit, as that leaves the right group short.
    """
    ins, outs = modes
    padded_rows = up_to_power_of_two(rows)
    # More rows of float32 would not fit into the registers.
    most = 16 if dtype == torch.float32 else MOST_AT_ONCE
    for cut in range(len(ins) - 1, 0, -1):
        left, split = math.prod(ins[:cut]), math.prod(ins[cut:])
        padded = max(up_to_power_of_two(left), 16 // padded_rows)
        if rows <= MOST_DECODED_ROWS and padded_rows * padded <= most:
            if split * rank > MOST_ENTRIES_AT_ONCE:
                return None
            groups = ins[:cut], ins[cut:], outs
            block = max(16, min(BLOCK, up_to_power_of_two(split)))
            terms = max(16, min(TERMS, up_to_power_of_two(rank)))
            width = math.prod(outs)
            sizes = left, split, width, rank, padded_rows, padded, biased
            constants = (groups, tuple(map(right_of, groups)), *sizes, block, OUT_FEATURES, terms)
            return OneLaunch((-(-width // OUT_FEATURES), 1, 1), constants, cut)
    return None


def decode(
    x: Tensor,
    in_factors: Sequence[Tensor],
    out_factors: Sequence[Tensor],
    bias: Tensor | None,
) -> Tensor | None:
    """Compute Y = X KA KCᵀ + bias (t, N); None where there are too many rows or terms for it.

    Args:
        x: (t, M), at least one row, contiguous.
        in_factors: (m_d, R) with Π m_d = M, contiguous, all factors of one dtype, which autocast
            leaves as it is where it casts x.
        out_factors: (n_d, R), contiguous.
        bias: (Π n_d,), contiguous, or None.
    """
    rows, rank, dtype = x.shape[0], in_factors[0].shape[1], in_factors[0].dtype
    modes = tuple([tuple([f.shape[0] for f in side]) for side in (in_factors, out_factors)])
    one = one_launch(modes, rank, rows, bias is not None, x.dtype)
    if one is None:
        return None
    y = x.new_empty((rows, math.prod(modes[1])))
    left, right = tuple(in_factors[: one.cut]), tuple(in_factors[one.cut :])
    added = x if bias is None else bias
    DECODE(
        (one, x.dtype, dtype, added.dtype),
        one.grid,
        (x, *in_factors, *out_factors, added, y),
        (rows,),
        lambda: (x, left, right, tuple(out_factors), added, y, rows, *one.constants),
    )
    return y
