"""Gradients of all factors of all Khatri-Rao matrices of a layer in one launch.

    dA_d[a, r] = Σ_{i: i_d = a} dK[i, r] Π_{e≠d} A_e[i_e, r]

One program owns a row a of one factor and some columns r, and reads the Π_{e≠d} m_e rows of dK that
enter it: dK is read once for each factor, no two programs write to one place, and no partial sum
leaves a program. The order of the sum depends on sizes alone.

A mode of few rows (λ has one) gives few programs with a long sum each; those take narrower columns,
of which there are more, and longer blocks of rows.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyadic.kernels.triton.khatri_rao import Modes
from polyadic.kernels.triton.launch import ALIGNMENT_BYTES, Launcher
from polyadic.kernels.triton.numerics import (
    khatri_rao_rows,
    right_of,
    rounded,
    up_to_power_of_two,
)

# Rows and columns of a tile for short and for long sums, and the warps that share it: larger ones
# need more registers than there are.
SHORT_TILE, LONG_TILE, WARPS = (64, 32), (512, 8), 8
LONG_FROM_TERMS = 1024


@triton.jit
def mttkrp_kernel(
    d_matrices,
    factors,
    gradients,
    MODES: tl.constexpr,
    RIGHT: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_STRIDE: tl.constexpr,
    RANK: tl.constexpr,
):
    """Write the gradient (m_d, RANK) of every factor.

    Args:
        d_matrices: for each group a pointer to dK, (rows, RANK) or SPLIT of them to be added.
        factors: for each group, a tuple of pointers to its factors (m_d, RANK).
        gradients: for each group, a tuple of pointers to their gradients.
        MODES: for each group, (m_1, …, m_D).
        RIGHT: for each group, by how many rows of dK a step in each mode moves.
        FIRST: for each group, the first program of each factor and the end of the last.
        BLOCK: for each group and factor, rows of dK that a program reads at once.
        COLUMNS: for each group and factor, columns that a program makes.
        STRIDE: for each group, elements from one row of dK to the next.
        SPLIT: for each group, the number of pieces of dK.
        SPLIT_STRIDE: for each group, elements from one piece to the next.
        RANK: columns of a factor.
    """
    program = tl.program_id(0)
    for g in tl.static_range(len(MODES)):
        for d in tl.static_range(len(MODES[g])):
            if (program >= FIRST[g][d]) & (program < FIRST[g][d + 1]):
                factor_gradient(
                    program - FIRST[g][d],
                    d_matrices[g],
                    factors[g],
                    gradients[g][d],
                    MODES,
                    RIGHT,
                    g,
                    d,
                    BLOCK[g][d],
                    COLUMNS[g][d],
                    STRIDE[g],
                    SPLIT[g],
                    SPLIT_STRIDE[g],
                    RANK,
                )


@triton.jit
def factor_gradient(
    program,
    d_matrix,
    factors,
    gradient,
    MODES: tl.constexpr,
    RIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_STRIDE: tl.constexpr,
    RANK: tl.constexpr,
):
    """Write some columns of one row of one factor's gradient."""
    strips: tl.constexpr = (RANK + COLUMNS - 1) // COLUMNS
    own = program // strips
    columns = (program % strips) * COLUMNS + tl.arange(0, COLUMNS)
    right: tl.constexpr = RIGHT[GROUP][MODE]
    size: tl.constexpr = MODES[GROUP][MODE]
    # Rows of dK with i_d = own: all combinations of the digits before and behind mode d.
    terms: tl.constexpr = RIGHT[GROUP][0] * MODES[GROUP][0] // size
    total = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for start in range(0, terms, BLOCK):
        j = start + tl.arange(0, BLOCK)
        rows = (j // right) * (size * right) + own * right + j % right
        mask = (j < terms)[:, None] & (columns < RANK)[None, :]
        at = d_matrix + rows[:, None].to(tl.int64) * STRIDE + columns[None, :]
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        for s in tl.static_range(1, SPLIT):
            value += tl.load(at + s * SPLIT_STRIDE, mask=mask, other=0.0).to(tl.float32)
        others = khatri_rao_rows(factors, rows, columns, mask, MODES, RIGHT, GROUP, RANK, MODE)
        total += value * others
    sums = rounded(tl.sum(total, 0), gradient.dtype.element_ty)
    tl.store(gradient + own * RANK + columns, sums, mask=columns < RANK)


LAUNCHER = Launcher(mttkrp_kernel)


@dataclass(frozen=True, eq=False)
class _Form:
    """What is made once for such sizes; compared and looked up as itself."""

    grid: tuple[int, int, int]
    constants: tuple[Any, ...]


@functools.lru_cache(maxsize=4096)
def form_of(
    modes: Modes,
    rank: int,
    strides: tuple[int, ...],
    splits: tuple[int, ...],
    split_strides: tuple[int, ...],
) -> _Form:
    """Return the grid and the constants of the kernel for such sizes."""
    program = 0
    first, blocks, widths = [], [], []
    for group in modes:
        starts, tall, wide = [program], [], []
        for mode in group:
            terms = math.prod(group) // mode
            most_rows, most_columns = LONG_TILE if terms >= LONG_FROM_TERMS else SHORT_TILE
            columns = min(most_columns, up_to_power_of_two(rank))
            program += mode * -(-rank // columns)
            starts.append(program)
            tall.append(min(most_rows, up_to_power_of_two(terms)))
            wide.append(columns)
        first.append(tuple(starts))
        blocks.append(tuple(tall))
        widths.append(tuple(wide))
    constants = (
        modes,
        tuple(map(right_of, modes)),
        tuple(first),
        tuple(blocks),
        tuple(widths),
        strides,
        splits,
        split_strides,
        rank,
    )
    return _Form((program, 1, 1), constants)


def _new(groups: Sequence[Sequence[Tensor]], modes: Modes, apart: bool) -> list[list[Tensor]]:
    """Memory for the gradient of every factor: in one piece, as each piece costs its allocation.

    With ``apart``, and where some would not begin at a multiple of 16 bytes, each has its own.
    """
    leader = groups[0][0]
    rank = leader.shape[1]
    if apart or rank * leader.dtype.itemsize % ALIGNMENT_BYTES:
        return [list(map(torch.empty_like, group)) for group in groups]
    rows = [mode for group in modes for mode in group]
    pieces = iter(torch.split(leader.new_empty((sum(rows), rank)), rows))
    return [list(itertools.islice(pieces, len(group))) for group in groups]


def mttkrps(
    d_matrices: Sequence[Tensor], groups: Sequence[Sequence[Tensor]], apart: bool = False
) -> list[list[Tensor]]:
    """Return the gradient of every factor of every group, in the factors' dtype.

    Args:
        d_matrices: for each group dK (Π m_d, at least R), or pieces (s, Π m_d, at least R) that
            are to be added, in the factors' dtype or float32; columns are adjacent in memory and
            those beyond R are not read.
        groups: factors (m_d, R) of each matrix, contiguous, of one dtype and device.
        apart: whether no two gradients may lie in one piece of memory.
    """
    leader = groups[0][0]
    modes = tuple([tuple([factor.shape[0] for factor in group]) for group in groups])
    strides, splits, split_strides = [], [], []
    for d_matrix in d_matrices:
        pieces = d_matrix.dim() == 3
        strides.append(d_matrix.stride(-2))
        splits.append(d_matrix.shape[0] if pieces else 1)
        split_strides.append(d_matrix.stride(0) if pieces else 0)
    form = form_of(modes, leader.shape[1], tuple(strides), tuple(splits), tuple(split_strides))
    gradients = _new(groups, modes, apart)
    flat = [tensor for group in (*groups, *gradients) for tensor in group]
    LAUNCHER(
        (form, leader.dtype, *[d_matrix.dtype for d_matrix in d_matrices]),
        form.grid,
        [*d_matrices, *flat],
        (
            tuple(d_matrices),
            tuple(map(tuple, groups)),
            tuple(map(tuple, gradients)),
            *form.constants,
        ),
        warps=WARPS,
    )
    return gradients
