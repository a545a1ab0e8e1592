"""Gradients of all factors of all Khatri-Rao matrices of a layer in one launch.

    dA_d[a, r] = Σ_{i: i_d = a} dK[i, r] Π_{e≠d} A_e[i_e, r]

One program owns a row a of one factor and some columns r, and reads the Π_{e≠d} m_e rows of dK that
enter it: dK is read once for each factor, no two programs write to one place, and no partial sum
leaves a program. The order of the sum depends on sizes alone.

dK may come in pieces that add up to it, as partial sums that programs have written. Then a sum runs
over the pieces too, so that nothing adds them beforehand.

The gradient of a bias is a sum of partial sums and nothing else. It is made here as the gradient of
one more factor (1, N), the only one of its group and of N columns.

A program takes a few terms of its sum at a time. For two matrices of 4096 rows on an H200, a kernel
that takes 64 needs 3.2 µs where one that takes 512 needs 6.1, and of rank 256 it needs 6.4 where
that needs 19 (November 2026).
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
from polyadic.kernels.triton.khatri_rao import Modes, grouped, modes_of, shape_of
from polyadic.kernels.triton.launch import Launcher
from polyadic.kernels.triton.numerics import (
    khatri_rao_rows,
    right_of,
    rounded,
    up_to_power_of_two,
)

# Terms of a sum that a program takes at once, of a dK that is whole and of one in pieces, and
# columns that it makes, at most; the entries and columns below which a tile is too small for the
# warps that share it.
MOST_TERMS, MOST_TERMS_OF_PIECES, MOST_COLUMNS, LEAST_ENTRIES, LEAST_COLUMNS = 64, 128, 32, 2048, 8
WARPS = 4
# Groups that a layer can have: its in factors, its out factors, those of its kernel, and its bias.
MOST_GROUPS = 4


@triton.jit(do_not_specialize=["pieces_0", "pieces_1", "pieces_2", "pieces_3"])
def mttkrp_kernel(
    d_matrices,
    factors,
    gradients,
    pieces_0,
    pieces_1,
    pieces_2,
    pieces_3,
    MODES: tl.constexpr,
    RIGHT: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    APART: tl.constexpr,
    RANK: tl.constexpr,
):
    """Write the gradient (m_d, RANK) of every factor.

    Args:
        d_matrices: for each group a pointer to dK (rows, RANK), or to pieces of it to be added.
        factors: for each group, a tuple of pointers to its factors (m_d, RANK).
        gradients: for each group, a tuple of pointers to their gradients.
        pieces_0: how many pieces there are of the first group's dK, if it comes in pieces.
        pieces_1: of the second group's.
        pieces_2: of the third group's.
        pieces_3: of the fourth group's.
        MODES: for each group, (m_1, …, m_D).
        RIGHT: for each group, by how many rows of dK a step in each mode moves.
        FIRST: for each group, the first program of each factor and the end of the last.
        BLOCK: for each group and factor, rows of dK that a program reads at once.
        COLUMNS: for each group and factor, columns that a program makes.
        STRIDE: for each group, elements from one row of dK to the next.
        APART: for each group, elements from one piece of dK to the next; 0 where dK is whole.
        RANK: for each group, columns of a factor.
    """
    program = tl.program_id(0)
    pieces = pieces_0, pieces_1, pieces_2, pieces_3
    for g in tl.static_range(len(MODES)):
        for d in tl.static_range(len(MODES[g])):
            if (program >= FIRST[g][d]) & (program < FIRST[g][d + 1]):
                factor_gradient(
                    program - FIRST[g][d],
                    d_matrices[g],
                    factors[g],
                    gradients[g][d],
                    pieces[g],
                    MODES,
                    RIGHT,
                    g,
                    d,
                    BLOCK[g][d],
                    COLUMNS[g][d],
                    STRIDE[g],
                    APART[g],
                    RANK[g],
                )


@triton.jit
def factor_gradient(
    program,
    d_matrix,
    factors,
    gradient,
    pieces,
    MODES: tl.constexpr,
    RIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    APART: tl.constexpr,
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
    count = terms
    if APART > 0:
        count = terms * pieces
    total = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for start in range(0, count, BLOCK):
        term = start + tl.arange(0, BLOCK)
        mask = (term < count)[:, None] & (columns < RANK)[None, :]
        j = term % terms
        rows = (j // right) * (size * right) + own * right + j % right
        at = d_matrix + rows[:, None].to(tl.int64) * STRIDE + columns[None, :]
        if APART > 0:
            at += (term // terms)[:, None].to(tl.int64) * APART
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        others = khatri_rao_rows(factors, rows, columns, mask, MODES, RIGHT, GROUP, RANK, MODE)
        total += value * others
    sums = rounded(tl.sum(total, 0), gradient.dtype.element_ty)
    tl.store(gradient + own * RANK + columns, sums, mask=columns < RANK)


LAUNCHER = Launcher(mttkrp_kernel)
dtype_of = operator.attrgetter("dtype")


@dataclass(frozen=True, eq=False)
class _Form:
    """What is made once for such sizes; compared and looked up as itself."""

    grid: tuple[int, int, int]
    constants: tuple[Any, ...]


@functools.lru_cache(maxsize=4096)
def form_of(
    modes: Modes,
    ranks: tuple[int, ...],
    strides: tuple[int, ...],
    apart: tuple[int, ...],
) -> _Form:
    """Return the grid and the constants of the kernel for such sizes; 0 apart: dK is whole."""
    program = 0
    first, blocks, widths = [], [], []
    for group, rank, in_pieces in zip(modes, ranks, apart, strict=True):
        starts, tall, wide = [program], [], []
        for mode in group:
            # How many pieces there are changes with the batch, and is no matter of the code.
            most = MOST_TERMS_OF_PIECES if in_pieces else MOST_TERMS
            terms = most if in_pieces else math.prod(group) // mode
            block = min(most, up_to_power_of_two(terms))
            columns = min(MOST_COLUMNS, max(LEAST_COLUMNS, LEAST_ENTRIES // block))
            columns = min(columns, up_to_power_of_two(rank))
            program += mode * -(-rank // columns)
            starts.append(program)
            tall.append(block)
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
        apart,
        ranks,
    )
    return _Form((program, 1, 1), constants)


class Gradients:
    """Makes the gradients of groups of factors of certain sizes and dtypes.

    Args:
        d_shapes: of dK of each group.
        d_strides: their strides.
        d_dtypes: their dtypes.
        shapes: of the factors of all groups.
        lengths: how many factors each group has.
        dtype: of the factors.
        width: N, the size of a bias whose gradient is made too; 0 for none. Its partial sums
            (p, N) are pieces of a dK (1, N) of one group more.
    """

    def __init__(
        self,
        d_shapes: tuple[Sequence[int], ...],
        d_strides: tuple[tuple[int, ...], ...],
        d_dtypes: tuple[torch.dtype, ...],
        shapes: tuple[Sequence[int], ...],
        lengths: tuple[int, ...],
        dtype: torch.dtype,
        width: int = 0,
    ) -> None:
        modes, ranks = modes_of(shapes, lengths), (shapes[0][1],) * len(lengths)
        strides = tuple([stride[-2] for stride in d_strides])
        whole = [len(shape) == 2 for shape in d_shapes]
        apart = tuple([0 if one else s[0] for one, s in zip(whole, d_strides, strict=True)])
        self.pieces = tuple([1 if one else s[0] for one, s in zip(whole, d_shapes, strict=True)])
        # Shape and strides of each gradient.
        self.sizes: list[tuple[Sequence[int], Sequence[int]]]
        self.sizes = [(tuple(shape), (shape[1], 1)) for shape in shapes]
        if width:
            modes, ranks, strides = (*modes, (1,)), (*ranks, width), (*strides, width)
            apart, d_dtypes, lengths = (*apart, width), (*d_dtypes, torch.float32), (*lengths, 1)
            self.sizes.append(((width,), (1,)))
        self.lengths, self.dtype = lengths, dtype
        self.more_pieces = (1,) * (MOST_GROUPS - len(lengths))
        self.form = form_of(modes, ranks, strides, apart)
        self.start = LAUNCHER.form((self.form, dtype, *d_dtypes), warps=WARPS)

    def __call__(
        self, d_matrices: Sequence[Tensor], factors: Sequence[Tensor], sums: Tensor | None = None
    ) -> list[Tensor]:
        """Return the gradients of all factors, and behind them that of the bias if there is one.

        Args:
            d_matrices: dK of each group.
            factors: those of all groups in a row, contiguous.
            sums: (p, N) in float32, contiguous, partial sums of the gradient of a bias; or None.
        """
        empty, dtype = empty_beside(factors[0]), self.dtype
        gradients = [empty(shape, strides, dtype) for shape, strides in self.sizes]
        pieces = self.pieces
        if sums is not None:
            d_matrices, pieces = (*d_matrices, sums), (*pieces, sums.shape[0])
            # The gradient of the only factor of a group does not depend on it, so that this one is
            # not read.
            factors = (*factors, gradients[-1])
        pieces += self.more_pieces
        self.start(
            self.form.grid,
            (*d_matrices, *factors, *gradients),
            pieces,
            lambda: (
                tuple(d_matrices),
                grouped(factors, self.lengths),
                grouped(gradients, self.lengths),
                *pieces,
                *self.form.constants,
            ),
        )
        return gradients


# A layer asks at each pass, so that shapes are looked up as they are.
gradients_of = functools.lru_cache(maxsize=4096)(Gradients)


def mttkrps(
    d_matrices: Sequence[Tensor], groups: Sequence[Sequence[Tensor]], sums: Tensor | None = None
) -> list[list[Tensor]]:
    """Return the gradient of every factor of every group, in the factors' dtype.

    With ``sums`` the total (N,) of all its pieces follows, in a list of its own.

    Args:
        d_matrices: for each group dK (Π m_d, at least R), or pieces (p, Π m_d, at least R) that
            are to be added; in the factors' dtype or float32. Columns are adjacent in memory, and
            those beyond R are not read.
        groups: factors (m_d, R) of each matrix, contiguous, of one dtype and device; at most three.
        sums: as in ``Gradients``.
    """
    factors = [*itertools.chain.from_iterable(groups)]
    make = gradients_of(
        tuple(map(shape_of, d_matrices)),
        tuple(map(Tensor.stride, d_matrices)),
        tuple(map(dtype_of, d_matrices)),
        tuple(map(shape_of, factors)),
        tuple(map(len, groups)),
        factors[0].dtype,
        0 if sums is None else sums.shape[1],
    )
    return list(map(list, grouped(make(d_matrices, factors, sums), make.lengths)))
