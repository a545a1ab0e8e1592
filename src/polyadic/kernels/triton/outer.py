"""The gradients dKA = Xᵀ G and dKC = dYᵀ Z of both Khatri-Rao matrices of a layer in one launch.

Both are sums over the rows of the batch. Each program owns some rows of one of the two matrices and
goes through its share of the batch. Shares leave partial sums in float32, which the kernel that
makes the gradients of the factors adds up (see ``mttkrp``), so that nothing adds them before.

The gradient of a bias is the sum of dY over its rows. The programs of dKC have dY at hand, and
multiply it with a matrix of ones besides.

For two matrices of 4096 rows and rank 64 this takes 10.5 µs for 2048 rows of the batch and 35.8 for
8192, where two products of cuBLAS take 15.6 and 45.2; for more columns than MOST_RANK cuBLAS is as
fast (bfloat16 on an H200, November 2026).

Axes: t rows of the batch, i in features (M), n out features (N), r columns of a matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyadic.kernels.products import HALVES
from polyadic.kernels.triton.launch import ALIGNMENT_BYTES, Launcher
from polyadic.kernels.triton.numerics import product, up_to_power_of_two

# The most columns r.
MOST_RANK = 64
# Rows of a matrix that a program owns, rows of the batch that it takes at a time, how often it does
# so at least, and programs that fill a large GPU twice over (an H100 has 132 multiprocessors).
OWNED, TERMS, LEAST_TURNS, MANY_PROGRAMS = 64, 64, 4, 256
WARPS, STAGES = 4, 4
# Columns of the matrix of ones: the fewest that tensor cores take.
ONES = 16


@triton.jit(do_not_specialize=["rows", "share", "in_width", "out_width"])
def outer_kernel(
    x,
    g,
    d_y,
    z,
    d_ka,
    d_kc,
    sums,
    rows,
    share,
    in_width,
    out_width,
    RANK: tl.constexpr,
    BIASED: tl.constexpr,
    OWNED: tl.constexpr,
    TERMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONES: tl.constexpr,
):
    """Write d_ka (pieces, i, RANK), d_kc (pieces, n, RANK) and, with BIASED, sums (pieces, n).

    They are made from x (t, i) and g (t, RANK), and from d_y (t, n) and z (t, RANK), for all t <
    ``rows``; a piece is the sum over ``share`` rows. ``in_width`` and ``out_width`` are the numbers
    of features, multiples of 8.
    """
    program, piece = tl.program_id(0), tl.program_id(1)
    in_programs = tl.cdiv(in_width, OWNED)
    if program < in_programs:
        left, right, to, width, owned = x, g, d_ka, in_width, program
    else:
        left, right, to, width, owned = d_y, z, d_kc, out_width, program - in_programs
    width = tl.multiple_of(width, 8)
    i, r = owned * OWNED + tl.arange(0, OWNED), tl.arange(0, COLUMNS)
    real, ranked = (i < width)[None, :], (r < RANK)[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    ones = tl.full((TERMS, ONES), 1.0, tl.float32).to(dtype)
    total = tl.zeros((OWNED, COLUMNS), tl.float32)
    summed = tl.zeros((OWNED, ONES), tl.float32)
    first = piece * share
    last = tl.minimum(first + share, rows)
    for start in range(first, last, TERMS):
        t = start + tl.arange(0, TERMS)
        inside = (t < last)[:, None]
        at = left + t[:, None].to(tl.int64) * width + i[None, :]
        features = tl.trans(tl.load(at, mask=inside & real, other=0.0))
        at = right + t[:, None].to(tl.int64) * RANK + r[None, :]
        total = product(features, tl.load(at, mask=inside & ranked, other=0.0), total)
        if BIASED:
            summed = product(features, ones, summed)
    row = piece.to(tl.int64) * width + i
    tl.store(to + row[:, None] * RANK + r[None, :], total, mask=(i < width)[:, None] & ranked)
    if BIASED:
        # All columns are equal.
        gradient = tl.max(summed, 1)
        if program >= in_programs:
            tl.store(sums + row, gradient, mask=i < width)


LAUNCHER = Launcher(outer_kernel)


def serves(in_features: int, out_features: int, padded: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes such sizes: few columns of half precision, and rows of 16 bytes."""
    entries = ALIGNMENT_BYTES // dtype.itemsize
    aligned = in_features % entries == out_features % entries == 0
    return dtype in HALVES and padded <= MOST_RANK and aligned


def constants_of(padded: int, biased: bool) -> tuple[Any, ...]:
    """Return the constants of the kernel."""
    return padded, biased, OWNED, TERMS, max(16, up_to_power_of_two(padded)), ONES


def outer(
    x: Tensor, g: Tensor, d_y: Tensor, z: Tensor, *, biased: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return dKA, dKC and, with ``biased``, the gradient of the bias, in pieces to be added up.

    Args:
        x: (B, M), of half precision, contiguous, not empty; M is a multiple of 8.
        g: (B, r), contiguous, r at most ``MOST_RANK`` and a multiple of 8.
        d_y: (B, N), contiguous; N is a multiple of 8.
        z: (B, r), contiguous.
        biased: whether the gradient of a bias is wanted.

    Returns:
        (p, M, r); (p, N, r); (p, N) or None: all in float32. How many pieces p there are depends on
        sizes alone.
    """
    (rows, in_width), out_width, padded = x.shape, d_y.shape[1], g.shape[1]
    programs = -(-in_width // OWNED) - -out_width // OWNED
    pieces = max(1, min(MANY_PROGRAMS // programs, rows // (LEAST_TURNS * TERMS)))
    share = -(-rows // (pieces * TERMS)) * TERMS
    pieces = -(-rows // share)
    d_ka, d_kc = (
        x.new_empty((pieces, width, padded), dtype=torch.float32) for width in (in_width, out_width)
    )
    sums = x.new_empty((pieces, out_width), dtype=torch.float32) if biased else None
    constants = constants_of(padded, biased)
    tensors = x, g, d_y, z, d_ka, d_kc, d_kc if sums is None else sums
    numbers = rows, share, in_width, out_width
    LAUNCHER(
        (constants, x.dtype),
        (programs, pieces, 1),
        tensors,
        numbers,
        lambda: (*tensors, *numbers, *constants),
        warps=WARPS,
        stages=STAGES,
    )
    return d_ka, d_kc, sums
