"""A linear map of few rows from its factors alone: Y = X KA KCᵀ + bias in one or two launches.

With few rows there is next to nothing to compute; launching and reading take the time.

**One launch.** Each program makes all of Z for itself, and then its columns of Y. That is little
work in two groups of modes: with KA = KL ⊙ KR, of l and s rows,

    Z[t, r] = Σ_l KL[l, r] Σ_s X[t, l, s] KR[s, r]

is a product of (t·l, s) with (s, r) and a short weighted sum. It serves up to ``MOST_AT_ONCE`` rows
t·l.

**Two launches** for more rows or terms. In the first kernel each program makes some rows of KA from
the factors, multiplies its part of X with them and writes a partial Z. The second kernel adds these
up in a fixed order, rounds Z once, makes rows of KC and multiplies Z with them.

Neither matrix ever stands in memory. Rows are padded to 16, the least that tensor cores take.

Axes: t rows, i in features (M), n out features, r rank.

Arguments that mean the same in the kernels: MODES are the modes of the in factors and of the out
factors, and RIGHT says by how many rows of the matrix a step in each moves; RANK is the number of
columns of a factor; ROWS is the number of rows t, ``rows``, rounded up to a power of two.
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

from polyadic.kernels.triton.launch import ALIGNMENT_BYTES, Launcher
from polyadic.kernels.triton.numerics import (
    khatri_rao_rows,
    product,
    right_of,
    rounded,
    up_to_power_of_two,
)

# The largest number of rows of X.
MOST_ROWS = 16
# Parts that the in features are divided into, for up to 8 rows and for more: the second kernel
# holds all partial sums of a tile at once.
PARTS_OF_FEW, PARTS_OF_MORE = 32, 16
# In features and columns of a tile of the first kernel; out features and terms of the second.
BLOCK, COLUMNS, OUT_FEATURES, TERMS = 128, 32, 32, 64
# One launch serves up to so many rows t, rows t·l of its product, and entries of KR, which each
# program makes for itself.
MOST_ROWS_AT_ONCE, MOST_AT_ONCE, MOST_ENTRIES_AT_ONCE = 4, 64, 2**15


@triton.jit(do_not_specialize=["rows"])
def contract_kernel(
    x,
    factors,
    partial,
    rows,
    MODES: tl.constexpr,
    RIGHT: tl.constexpr,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write partial[part, t, r], the sum of X[t, i] KA[i, r] over the in features of a part.

    It is made from x (t, SIZE) and pointers to the in factors (m_d, RANK). ``partial`` is (parts,
    ROWS, RANK) in float32, of which rows beyond t are not written. A part has SHARE in features, a
    multiple of BLOCK, and BLOCK of them are summed at a time; a program makes COLUMNS columns.
    """
    t = tl.arange(0, 16)
    r = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ranked = (r < RANK)[None, :]
    first = tl.program_id(1) * SHARE
    dtype: tl.constexpr = x.dtype.element_ty
    total = tl.zeros((16, COLUMNS), tl.float32)
    for start in range(0, SHARE, BLOCK):
        i = first + start + tl.arange(0, BLOCK)
        real = i < SIZE
        mask = real[:, None] & ranked
        ka = khatri_rao_rows(factors, i, r, mask, MODES, RIGHT, 0, RANK, -1)
        ka = rounded(tl.where(mask, ka, 0.0), dtype)
        at = x + t[:, None] * SIZE + i[None, :]
        part = tl.load(at, mask=(t < rows)[:, None] & real[None, :], other=0.0)
        total = product(part, ka, total)
    at = partial + (tl.program_id(1) * ROWS + t)[:, None] * RANK + r[None, :]
    tl.store(at, total, mask=(t < rows)[:, None] & ranked)


@triton.jit(do_not_specialize=["rows"])
def expand_kernel(
    partial,
    factors,
    bias,
    y,
    rows,
    MODES: tl.constexpr,
    RIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BIASED: tl.constexpr,
    COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Write COLUMNS out features of y (t, WIDTH) from the partial sums of Z.

    It is made from partial (PARTS, ROWS, RANK) in float32, pointers to the out factors (n_d, RANK)
    and, with BIASED, bias (WIDTH,). TERMS terms of a sum are taken at a time.
    """
    t = tl.arange(0, 16)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = n < WIDTH
    dtype: tl.constexpr = y.dtype.element_ty
    total = tl.zeros((COLUMNS, 16), tl.float32)
    for start in range(0, RANK, TERMS):
        r = start + tl.arange(0, TERMS)
        ranked = (r < RANK)[None, :]
        at = partial + t[:, None] * RANK + r[None, :]
        mask = (t < rows)[:, None] & ranked
        z = tl.load(at, mask=mask, other=0.0)
        for part in tl.static_range(1, PARTS):
            z += tl.load(at + part * (ROWS * RANK), mask=mask, other=0.0)
        mask = real[:, None] & ranked
        kc = khatri_rao_rows(factors, n, r, mask, MODES, RIGHT, 1, RANK, -1)
        kc = rounded(tl.where(mask, kc, 0.0), dtype)
        total = product(kc, tl.trans(rounded(z, dtype)), total)
    if BIASED:
        total += tl.load(bias + n, mask=real, other=0.0).to(tl.float32)[:, None]
    at = y + t[None, :] * WIDTH + n[:, None]
    tl.store(at, rounded(total, dtype), mask=(t < rows)[None, :] & real[:, None])


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
    factors (m_d, RANK) and, with BIASED, from bias (WIDTH,). MODES and RIGHT have an entry for each
    of the three. LEFT is padded to PADDED, BLOCK rows of KR and TERMS columns are taken at a time.
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


CONTRACT = Launcher(contract_kernel)
DECODE = Launcher(decode_kernel)
EXPAND = Launcher(expand_kernel)

Modes = tuple[int, ...]


class Form(NamedTuple):
    """Grids and constants of both kernels; parts of the in features; rows of a partial sum."""

    contract_grid: tuple[int, int, int]
    contract: tuple[Any, ...]
    expand_grid: tuple[int, int, int]
    expand: tuple[Any, ...]
    parts: int
    rows: int


@functools.lru_cache(maxsize=4096)
def form_of(
    modes: tuple[Modes, Modes], rank: int, rows: int, biased: bool, dtype: torch.dtype
) -> Form:
    """Return the grids and constants with which both kernels are started."""
    size, width = map(math.prod, modes)
    right = right_of(modes[0]), right_of(modes[1])
    # A tile takes more registers in float32, with more rows, or if it is read entry by entry.
    aligned = rank * dtype.itemsize % ALIGNMENT_BYTES == 0
    wide = rows <= 8 and aligned
    block = BLOCK if dtype != torch.float32 and aligned else BLOCK // 2
    columns = max(16, min(COLUMNS, up_to_power_of_two(rank)))
    terms = max(16, min(TERMS if wide else TERMS // 2, up_to_power_of_two(rank)))
    padded = up_to_power_of_two(rows)
    most = PARTS_OF_FEW if rows <= 8 else PARTS_OF_MORE
    share = -(-size // (most * block)) * block
    parts = -(-size // share)
    return Form(
        (-(-rank // columns), parts, 1),
        (modes, right, size, rank, padded, share, block, columns),
        (-(-width // OUT_FEATURES), 1, 1),
        (modes, right, width, rank, padded, parts, biased, OUT_FEATURES, terms),
        parts,
        padded,
    )


class OneLaunch(NamedTuple):
    """Grid and constants of the one kernel, and how many in factors make the left group."""

    grid: tuple[int, int, int]
    constants: tuple[Any, ...]
    cut: int


@functools.lru_cache(maxsize=4096)
def one_launch(
    modes: tuple[Modes, Modes], rank: int, rows: int, biased: bool, dtype: torch.dtype
) -> OneLaunch | None:
    """Return how one kernel computes such a map, None where two are to be launched.

    The left group is the longest for which rows t·l fit, as that leaves the right group short.
    """
    ins, outs = modes
    padded_rows = up_to_power_of_two(rows)
    # More rows of float32 would not fit into the registers.
    most = 16 if dtype == torch.float32 else MOST_AT_ONCE
    for cut in range(len(ins) - 1, 0, -1):
        left, split = math.prod(ins[:cut]), math.prod(ins[cut:])
        padded = max(up_to_power_of_two(left), 16 // padded_rows)
        if padded_rows <= MOST_ROWS_AT_ONCE and padded_rows * padded <= most:
            if split * rank > MOST_ENTRIES_AT_ONCE:
                return None
            groups = ins[:cut], ins[cut:], outs
            block = max(16, min(TERMS, up_to_power_of_two(split)))
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
) -> Tensor:
    """Compute Y = X KA KCᵀ + bias (t, N).

    Args:
        x: (t, M), 1 to 16 rows, contiguous.
        in_factors: (m_d, R) with Π m_d = M, contiguous, all factors of one dtype, which autocast
            leaves as it is where it casts x.
        out_factors: (n_d, R), contiguous.
        bias: (Π n_d,), contiguous, or None.
    """
    rows, rank, dtype = x.shape[0], in_factors[0].shape[1], in_factors[0].dtype
    modes = tuple([tuple([f.shape[0] for f in side]) for side in (in_factors, out_factors)])
    one = one_launch(modes, rank, rows, bias is not None, x.dtype)
    if one is not None:
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
    form = form_of(modes, rank, rows, bias is not None, x.dtype)
    partial = x.new_empty((form.parts, form.rows, rank), dtype=torch.float32)
    y = x.new_empty((rows, form.expand[2]))
    CONTRACT(
        (form.contract, x.dtype, dtype),
        form.contract_grid,
        (x, *in_factors, partial),
        (rows,),
        lambda: (x, tuple(in_factors), partial, rows, *form.contract),
    )
    added = partial if bias is None else bias
    EXPAND(
        (form.expand, x.dtype, dtype, added.dtype),
        form.expand_grid,
        (partial, *out_factors, added, y),
        (rows,),
        lambda: (partial, tuple(out_factors), added, y, rows, *form.expand),
    )
    return y
