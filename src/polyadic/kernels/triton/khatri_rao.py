"""All Khatri-Rao matrices of a layer in one launch.

One program makes BLOCK rows of one matrix, COLUMNS columns wide. Entries are multiplied in float32
and rounded once, as ``multilinear.khatri_rao`` does, so that both give the same bits.

In a backward the same launch can begin the gradient of the bias, which is the sum of dY over its
rows: further programs leave partial sums, which the launch that makes the gradients of the factors
adds up (see ``mttkrp``). So a bias costs no launch in a backward.
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

from polyadic._torch import empty_beside
from polyadic.kernels.triton.launch import Launcher
from polyadic.kernels.triton.numerics import (
    khatri_rao_rows,
    right_of,
    rounded,
    up_to_power_of_two,
)

BLOCK_ROWS, MOST_COLUMNS, WARPS = 16, 128, 4
# Rows of dY that a program of a sum reads at once, how often it does so at least, and the number of
# such programs that fills a large GPU a few times over (an H100 has 132 multiprocessors).
SUMMED_ROWS, LEAST_TURNS, MANY_SUMS = 32, 4, 512


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
    write_rows(
        tl.program_id(0),
        factors,
        matrices,
        MODES,
        RIGHT,
        ROWS,
        FIRST,
        RANK,
        PADDED,
        BLOCK,
        COLUMNS,
    )


@triton.jit
def write_rows(
    program,
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
    """Write the rows of one program."""
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


@triton.jit(do_not_specialize=["rows", "share"])
def khatri_rao_and_sums_kernel(
    factors,
    matrices,
    d_y,
    sums,
    rows,
    share,
    MODES: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    SUMMED: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Do what ``khatri_rao_kernel`` does, and sum d_y (rows, WIDTH) over its rows in pieces.

    Args:
        factors: as there.
        matrices: as there.
        d_y: summed by the programs behind those of the matrices.
        sums: (pieces, WIDTH) in float32, the sum over ``share`` rows each.
        rows: of d_y.
        share: rows that a program sums.
        MODES: as there.
        RIGHT: as there.
        ROWS: as there.
        FIRST: as there.
        RANK: as there.
        PADDED: as there.
        BLOCK: as there.
        COLUMNS: as there.
        WIDTH: columns of d_y.
        SUMMED: rows that a program reads at once.
        STRIP: columns that a program sums.
    """
    program = tl.program_id(0)
    matrix_programs: tl.constexpr = FIRST[len(MODES)]
    if program < matrix_programs:
        write_rows(
            program, factors, matrices, MODES, RIGHT, ROWS, FIRST, RANK, PADDED, BLOCK, COLUMNS
        )
    elif tl.program_id(1) == 0:
        strips: tl.constexpr = (WIDTH + STRIP - 1) // STRIP
        piece = (program - matrix_programs) // strips
        columns = (program - matrix_programs) % strips * STRIP + tl.arange(0, STRIP)
        real = (columns < WIDTH)[None, :]
        count = tl.minimum(share, rows - piece * share)
        first = d_y + (piece * share).to(tl.int64) * WIDTH
        total = tl.zeros((SUMMED, STRIP), tl.float32)
        for start in range(0, count, SUMMED):
            row = start + tl.arange(0, SUMMED)
            at = first + row[:, None].to(tl.int64) * WIDTH + columns[None, :]
            mask = (row < count)[:, None] & real
            total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(sums + piece * WIDTH + columns, tl.sum(total, 0), mask=columns < WIDTH)


LAUNCHER = Launcher(khatri_rao_kernel)
WITH_SUMS = Launcher(khatri_rao_and_sums_kernel)
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


class Matrices:
    """Makes the matrices of groups of factors of certain sizes and dtypes.

    Args:
        shapes: of the factors of all groups.
        lengths: how many factors each group has.
        padded: columns of the matrices.
        dtype: of the factors.
        result: dtype of the matrices.
    """

    def __init__(
        self,
        shapes: tuple[Sequence[int], ...],
        lengths: tuple[int, ...],
        padded: int,
        dtype: torch.dtype,
        result: torch.dtype,
    ) -> None:
        self.form = form_of(modes_of(shapes, lengths), shapes[0][1], padded)
        self.lengths, self.result, self.key = lengths, result, (self.form, dtype, result)
        self.sizes, self.strides = [(rows, padded) for rows in self.form.rows], (padded, 1)
        self.start = LAUNCHER.form(self.key, warps=WARPS)

    def __call__(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """Return K (Π m_d, padded) of each group, zero in the columns beyond the rank.

        Args:
            factors: those of all groups in a row, contiguous, on one device.
        """
        empty, strides, result = empty_beside(factors[0]), self.strides, self.result
        matrices = [empty(size, strides, result) for size in self.sizes]
        self.start(
            self.form.grid,
            (*factors, *matrices),
            (),
            lambda: (grouped(factors, self.lengths), tuple(matrices), *self.form.constants),
        )
        return matrices

    def with_sums(self, factors: Sequence[Tensor], d_y: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the matrices, and d_y summed over its rows in pieces.

        Args:
            factors: as in a call.
            d_y: (B, N), contiguous, not empty.

        Returns:
            As a call returns; (p, N) in float32, to be added over the pieces p. How many there are
            depends on B and N alone.
        """
        empty, strides, result = empty_beside(factors[0]), self.strides, self.result
        matrices = [empty(size, strides, result) for size in self.sizes]
        rows, width = d_y.shape
        constants = sums_constants(width)
        strips = -(-width // constants[-1])
        turns = max(LEAST_TURNS, -(-rows * strips // (MANY_SUMS * SUMMED_ROWS)))
        share = turns * SUMMED_ROWS
        pieces = -(-rows // share)
        sums = empty((pieces, width), (width, 1), torch.float32)
        across, along, _ = self.form.grid
        WITH_SUMS(
            (self.key, constants, d_y.dtype),
            (across + pieces * strips, along, 1),
            (*factors, *matrices, d_y, sums),
            (rows, share),
            lambda: (
                grouped(factors, self.lengths),
                tuple(matrices),
                d_y,
                sums,
                rows,
                share,
                *self.form.constants,
                *constants,
            ),
            warps=WARPS,
        )
        return matrices, sums


def grouped(tensors: Sequence[Tensor], lengths: Sequence[int]) -> tuple[tuple[Tensor, ...], ...]:
    """Return tensors in groups of such lengths."""
    rest = iter(tensors)
    return tuple([tuple(itertools.islice(rest, length)) for length in lengths])


def sums_constants(width: int) -> tuple[int, int, int]:
    """Return the constants of the sums over rows of so many columns."""
    return width, SUMMED_ROWS, min(MOST_COLUMNS, up_to_power_of_two(width))


# A layer asks at each pass, so that shapes are looked up as they are.
matrices_of = functools.lru_cache(maxsize=4096)(Matrices)


def khatri_raos(
    groups: Sequence[Sequence[Tensor]], dtype: torch.dtype, padded: int, d_y: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Return what ``Matrices`` makes of such groups, with the sums of d_y if it is given.

    Args:
        groups: factors (m_d, R) of each matrix, contiguous, of one dtype and device; the last mode
            varies fastest.
        dtype: dtype of the matrices.
        padded: number of columns, at least R.
        d_y: as in ``Matrices.with_sums``, or None.
    """
    factors = [*itertools.chain.from_iterable(groups)]
    shapes = tuple(map(shape_of, factors))
    make = matrices_of(shapes, tuple(map(len, groups)), padded, factors[0].dtype, dtype)
    return (make(factors), None) if d_y is None else make.with_sums(factors, d_y)
