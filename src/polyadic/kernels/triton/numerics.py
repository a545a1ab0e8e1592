"""Device functions that every kernel shares: rounding, tile products, rows of a Khatri-Rao product.

Triton's interpreter, with which the kernels are checked on a CPU, multiplies the bit patterns of
bfloat16 in dot products and cuts bits off where a GPU rounds to bfloat16. ``INTERPRETED`` is a
constant of the compiled code and selects arithmetic that is right there as well.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import triton
import triton.language as tl

# Triton reads this variable where a kernel is defined, which is when this module is imported.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def right_of(modes: Sequence[int]) -> tuple[int, ...]:
    """Return by how many rows of a Khatri-Rao product a step in each mode moves."""
    steps = [1]
    for mode in reversed(modes[1:]):
        steps.append(steps[-1] * mode)
    return tuple(reversed(steps))


def up_to_power_of_two(size: int) -> int:
    """Return the least power of two that is not below ``size``, as sizes of tiles must be."""
    return 1 << (size - 1).bit_length()


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """``x`` (float32) in another dtype, rounded to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        # Add one half of the last bit kept, or just less where that bit is even, and cut the rest.
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def product(a, b, accumulator):
    """``accumulator`` + ``a`` @ ``b``, summed in float32; float32 operands are not cut to TF32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def khatri_rao_rows(
    factors,
    rows,
    columns,
    mask,
    MODES: tl.constexpr,
    RIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    SKIP: tl.constexpr,
):
    """Rows of a Khatri-Rao product in float32, multiplied from left to right as torch does.

    Args:
        factors: tuple of D pointers to contiguous (m_d, RANK), the factors of one group.
        rows: row numbers (i,); the last mode varies fastest.
        columns: column numbers (r,).
        mask: which of (i, r) to read; 1 stands for the others.
        MODES: for each group of a layer, (m_1, …, m_D).
        RIGHT: for each group, by how many rows a step in each mode moves (see ``right_of``).
        GROUP: which of the groups is meant. Both come whole, as a tuple out of a tuple is no
            constant to a function that is called, in Triton up to 3.7.
        RANK: columns of a factor.
        SKIP: the mode left out, whose entry in RIGHT is not read; -1 for none.
    """
    result = tl.full((rows.shape[0], columns.shape[0]), 1.0, tl.float32)
    for d in tl.static_range(len(MODES[GROUP])):
        if d != SKIP:
            digit = (rows // RIGHT[GROUP][d]) % MODES[GROUP][d]
            at = factors[d] + digit[:, None] * RANK + columns[None, :]
            result *= tl.load(at, mask=mask, other=1.0).to(tl.float32)
    return result
