"""All Khatri-Rao matrices of a layer in one launch.

One program makes BLOCK rows of one matrix, COLUMNS columns wide. Entries are multiplied in float32
and rounded once, as ``multilinear.khatri_rao`` does, so that both give the same bits.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyadic.kernels.triton.launch import Launcher
from polyadic.kernels.triton.numerics import (
    khatri_rao_rows,
    right_of,
    rounded,
    up_to_power_of_two,
)

BLOCK_ROWS, MOST_COLUMNS, WARPS = 32, 128, 4


@triton.jit
def khatri_rao_kernel(
    factors,
    matrices,
    MODES: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write K (rows, PADDED) of each group of factors, columns RANK to PADDED zero.

    Args:
        factors: for each group, a tuple of pointers to its factors (m_d, RANK).
        matrices: pointer to K of each group.
        MODES: for each group, (m_1, …, m_D).
        RIGHT: for each group, by how many rows a step in each mode moves.
        ROWS: rows of each K.
        FIRST: the first program of each group, and the number of programs.
        RANK: columns of a factor.
        PADDED: columns of K.
        BLOCK: rows that a program makes.
        COLUMNS: columns that a program makes.
    """
    program = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    for g in tl.static_range(len(MODES)):
        if (program >= FIRST[g]) & (program < FIRST[g + 1]):
            rows = (program - FIRST[g]) * BLOCK + tl.arange(0, BLOCK)
            inside = (rows < ROWS[g])[:, None]
            real = inside & (columns < RANK)[None, :]
            k = khatri_rao_rows(factors[g], rows, columns, real, MODES, RIGHT, g, RANK, -1)
            k = tl.where((columns < RANK)[None, :], k, 0.0)
            at = matrices[g] + rows[:, None].to(tl.int64) * PADDED + columns[None, :]
            dtype: tl.constexpr = matrices[g].dtype.element_ty
            tl.store(at, rounded(k, dtype), mask=inside & (columns < PADDED)[None, :])


LAUNCHER = Launcher(khatri_rao_kernel)
Modes = tuple[tuple[int, ...], ...]
shape_of = operator.attrgetter("shape")


@dataclass(frozen=True, eq=False)
class _Form:
    """What is made once for such sizes; compared and looked up as itself."""

    grid: tuple[int, int, int]
    rows: tuple[int, ...]
    constants: tuple[Any, ...]


@functools.lru_cache(maxsize=4096)
def form_of(modes: Modes, rank: int, padded: int) -> _Form:
    """Return the grid, the rows of each matrix and the constants of the kernel for such sizes."""
    rows = tuple(map(math.prod, modes))
    first = [0]
    for count in rows:
        first.append(first[-1] - -count // BLOCK_ROWS)
    columns = min(MOST_COLUMNS, up_to_power_of_two(padded))
    constants = (
        modes,
        tuple(map(right_of, modes)),
        rows,
        tuple(first),
        rank,
        padded,
        BLOCK_ROWS,
        columns,
    )
    return _Form((first[-1], -(-padded // columns), 1), rows, constants)


def modes_of(shapes: Sequence[Sequence[int]], lengths: Sequence[int]) -> Modes:
    """Return the modes of each group of factors from the shapes of all and lengths of groups."""
    rows = iter([shape[0] for shape in shapes])
    return tuple([tuple(itertools.islice(rows, length)) for length in lengths])


@functools.lru_cache(maxsize=4096)
def _form_of_shapes(
    shapes: tuple[Sequence[int], ...], lengths: tuple[int, ...], padded: int
) -> _Form:
    return form_of(modes_of(shapes, lengths), shapes[0][1], padded)


def khatri_rao_matrices(
    groups: Sequence[Sequence[Tensor]], dtype: torch.dtype, padded: int
) -> list[Tensor]:
    """Return K (Π m_d, padded) of each group of factors, zero in the columns beyond the rank.

    Args:
        groups: factors (m_d, R) of each matrix, contiguous, of one dtype and device; the last mode
            varies fastest.
        dtype: dtype of the matrices.
        padded: number of columns, at least R.
    """
    factors = [*itertools.chain.from_iterable(groups)]
    # A layer asks at each pass, so that sizes are looked up as they are.
    form = _form_of_shapes(tuple(map(shape_of, factors)), tuple(map(len, groups)), padded)
    leader = factors[0]
    matrices = [leader.new_empty((rows, padded), dtype=dtype) for rows in form.rows]
    LAUNCHER(
        (form, leader.dtype, dtype),
        form.grid,
        factors + matrices,
        (),
        lambda: (tuple(map(tuple, groups)), tuple(matrices), *form.constants),
        warps=WARPS,
    )
    return matrices
