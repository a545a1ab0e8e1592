"""Gradients of all factors of all Khatri-Rao matrices of a layer in one launch.

    dA_d[a, r] = Σ_{i: i_d = a} dK[i, r] Π_{e≠d} A_e[i_e, r]

One program owns a row a of one factor and some columns r, and reads the Π_{e≠d} m_e rows of dK that
enter it: dK is read once for each factor, no two programs write to one place, and no partial sum
leaves a program. The order of the sum depends on sizes alone.

dK may come in pieces that add up to it, as partial sums that programs have written. Then a sum runs
over the pieces too, so that nothing adds them beforehand.

The gradient of a bias is a sum of partial sums and nothing else. It is made here as the gradient of
one more factor (1, N), the only one of its group and of N columns.

A program takes all terms of its sum at once if they are not too many, and the fewer columns for
that. A turn of the loop waits for memory, which takes a GPU longer than to work on what came, and
it has room for the many programs of few columns each.
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

from polyadic.kernels.triton.khatri_rao import Modes, modes_of, shape_of
from polyadic.kernels.triton.launch import ALIGNMENT_BYTES, Launcher
from polyadic.kernels.triton.numerics import (
    khatri_rao_rows,
    right_of,
    rounded,
    up_to_power_of_two,
)

# Terms of a sum that a program takes at once and columns that it makes, at most; the entries and
# columns below which a tile is too small for the warps that share it. Larger ones need more
# registers than there are.
MOST_TERMS, MOST_COLUMNS, LEAST_ENTRIES, LEAST_COLUMNS, WARPS = 512, 32, 2048, 8, 8
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
            terms = MOST_TERMS if in_pieces else math.prod(group) // mode
            block = min(MOST_TERMS, up_to_power_of_two(terms))
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


@functools.lru_cache(maxsize=4096)
def _form_of_shapes(
    d_shapes: tuple[Sequence[int], ...],
    d_strides: tuple[tuple[int, ...], ...],
    shapes: tuple[Sequence[int], ...],
    lengths: tuple[int, ...],
) -> tuple[_Form, tuple[int, ...], tuple[int, ...]]:
    """Return the form for such tensors, the rows of all factors, and of how many pieces each dK is.

    Sums (p, N), of which there is at most one and that is the last, are pieces of a dK (1, N).
    """
    modes = modes_of(shapes, lengths)
    ranks, strides, apart, pieces = [], [], [], []
    for n, (shape, stride) in enumerate(zip(d_shapes, d_strides, strict=True)):
        sums = n == len(lengths)
        ranks.append(shape[1] if sums else shapes[0][1])
        strides.append(stride[-2])
        in_pieces = sums or len(shape) == 3
        apart.append(stride[0] if in_pieces else 0)
        pieces.append(shape[0] if in_pieces else 1)
    if len(d_shapes) > len(lengths):
        modes = (*modes, (1,))
    form = form_of(modes, tuple(ranks), tuple(strides), tuple(apart))
    rows = tuple([shape[0] for shape in shapes])
    return form, rows, (*pieces, *(1,) * (MOST_GROUPS - len(pieces)))


def _new(factors: Sequence[Tensor], rows: tuple[int, ...], own_memory: bool) -> Sequence[Tensor]:
    """Memory for the gradient of every factor: in one piece, as each piece costs its allocation.

    With ``own_memory``, and where some would not begin at a multiple of 16 bytes, each has its own.
    """
    leader = factors[0]
    rank = leader.shape[1]
    if own_memory or rank * leader.itemsize % ALIGNMENT_BYTES:
        return list(map(torch.empty_like, factors))
    # The method that torch.split calls, after as much time as it takes itself.
    return leader.new_empty((sum(rows), rank)).split_with_sizes(rows)


def mttkrps(
    d_matrices: Sequence[Tensor],
    groups: Sequence[Sequence[Tensor]],
    own_memory: bool = False,
    sums: Tensor | None = None,
) -> list[list[Tensor]]:
    """Return the gradient of every factor of every group, in the factors' dtype.

    With ``sums`` the total (N,) of all its pieces follows, in a list of its own.

    Args:
        d_matrices: for each group dK (Π m_d, at least R), or pieces (p, Π m_d, at least R) that
            are to be added; in the factors' dtype or float32. Columns are adjacent in memory, and
            those beyond R are not read.
        groups: factors (m_d, R) of each matrix, contiguous, of one dtype and device; at most three.
        own_memory: whether no two gradients may lie in one piece of memory.
        sums: (p, N) in float32, contiguous, partial sums of the gradient of a bias; or None.
    """
    factors = [*itertools.chain.from_iterable(groups)]
    if sums is not None:
        d_matrices = [*d_matrices, sums]
    # A layer asks at each pass, so that sizes are looked up as they are.
    lengths = tuple(map(len, groups))
    form, rows, pieces = _form_of_shapes(
        tuple(map(shape_of, d_matrices)),
        tuple(map(Tensor.stride, d_matrices)),
        tuple(map(shape_of, factors)),
        lengths,
    )
    flat = iter(_new(factors, rows, own_memory))
    gradients = [list(itertools.islice(flat, length)) for length in lengths]
    if sums is not None:
        # The gradient of the only factor of a group does not depend on it: this one is not read.
        total = factors[0].new_empty(sums.shape[1])
        factors.append(total)
        groups = [*groups, [total]]
        gradients.append([total])
    LAUNCHER(
        (form, factors[0].dtype, *map(dtype_of, d_matrices)),
        form.grid,
        [*d_matrices, *factors, *itertools.chain.from_iterable(gradients)],
        pieces,
        lambda: (
            tuple(d_matrices),
            tuple(map(tuple, groups)),
            tuple(map(tuple, gradients)),
            *pieces,
            *form.constants,
        ),
        warps=WARPS,
    )
    return gradients
