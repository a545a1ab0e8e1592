"""Gradients of all factors of all Khatri-Rao matrices of a layer in one launch.

    dA_d[a, r] = Σ_{i: i_d = a} dK[i, r] Π_{e≠d} A_e[i_e, r]

One program owns a row a of one factor and some columns r, and reads the Π_{e≠d} m_e rows of dK that
enter it: dK is read once for each factor, no two programs write to one place, and no partial sum
leaves a program. The order of the sum depends on sizes alone.

dK may come in pieces that add up to it, as partial sums that programs have written. Then a sum runs
over the pieces too, so that nothing adds them beforehand.

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


@triton.jit(do_not_specialize=["pieces"])
def mttkrp_kernel(
    d_matrices,
    factors,
    gradients,
    pieces,
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
        pieces: how many pieces there are of each dK that comes in pieces.
        MODES: for each group, (m_1, …, m_D).
        RIGHT: for each group, by how many rows of dK a step in each mode moves.
        FIRST: for each group, the first program of each factor and the end of the last.
        BLOCK: for each group and factor, rows of dK that a program reads at once.
        COLUMNS: for each group and factor, columns that a program makes.
        STRIDE: for each group, elements from one row of dK to the next.
        APART: for each group, elements from one piece of dK to the next; 0 where dK is whole.
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
                    pieces,
                    MODES,
                    RIGHT,
                    g,
                    d,
                    BLOCK[g][d],
                    COLUMNS[g][d],
                    STRIDE[g],
                    APART[g],
                    RANK,
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
    rows: tuple[int, ...]
    rank: int


@functools.lru_cache(maxsize=4096)
def form_of(
    modes: Modes,
    rank: int,
    strides: tuple[int, ...],
    apart: tuple[int, ...],
) -> _Form:
    """Return the grid and the constants of the kernel for such sizes; 0 apart: dK is whole."""
    program = 0
    first, blocks, widths = [], [], []
    for group, in_pieces in zip(modes, apart, strict=True):
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
        rank,
    )
    rows = tuple(itertools.chain.from_iterable(modes))
    return _Form((program, 1, 1), constants, rows, rank)


@functools.lru_cache(maxsize=4096)
def _form_of_shapes(
    d_shapes: tuple[Sequence[int], ...],
    d_strides: tuple[tuple[int, ...], ...],
    shapes: tuple[Sequence[int], ...],
    lengths: tuple[int, ...],
) -> tuple[_Form, int]:
    """Return the form for such tensors, and in how many pieces those dK are that come so."""
    strides = tuple([stride[-2] for stride in d_strides])
    apart = tuple([stride[0] if len(stride) == 3 else 0 for stride in d_strides])
    pieces = max([shape[0] if len(shape) == 3 else 1 for shape in d_shapes])
    return form_of(modes_of(shapes, lengths), shapes[0][1], strides, apart), pieces


def _new(factors: Sequence[Tensor], form: _Form, own_memory: bool) -> Sequence[Tensor]:
    """Memory for the gradient of every factor: in one piece, as each piece costs its allocation.

    With ``own_memory``, and where some would not begin at a multiple of 16 bytes, each has its own.
    """
    leader = factors[0]
    if own_memory or form.rank * leader.itemsize % ALIGNMENT_BYTES:
        return list(map(torch.empty_like, factors))
    # The method that torch.split calls, after as much time as it takes itself.
    return leader.new_empty((sum(form.rows), form.rank)).split_with_sizes(form.rows)


def mttkrps(
    d_matrices: Sequence[Tensor], groups: Sequence[Sequence[Tensor]], own_memory: bool = False
) -> list[list[Tensor]]:
    """Return the gradient of every factor of every group, in the factors' dtype.

    Args:
        d_matrices: for each group dK (Π m_d, at least R), or pieces (p, Π m_d, at least R) that
            are to be added, the same number for all that come so; in the factors' dtype or float32.
            Columns are adjacent in memory, and those beyond R are not read.
        groups: factors (m_d, R) of each matrix, contiguous, of one dtype and device.
        own_memory: whether no two gradients may lie in one piece of memory.
    """
    factors = [*itertools.chain.from_iterable(groups)]
    # A layer asks at each pass, so that sizes are looked up as they are.
    lengths = tuple(map(len, groups))
    form, pieces = _form_of_shapes(
        tuple(map(shape_of, d_matrices)),
        tuple(map(Tensor.stride, d_matrices)),
        tuple(map(shape_of, factors)),
        lengths,
    )
    flat = iter(_new(factors, form, own_memory))
    gradients = [list(itertools.islice(flat, length)) for length in lengths]
    LAUNCHER(
        (form, factors[0].dtype, *map(dtype_of, d_matrices)),
        form.grid,
        [*d_matrices, *factors, *itertools.chain.from_iterable(gradients)],
        (pieces,),
        lambda: (
            tuple(d_matrices),
            tuple(map(tuple, groups)),
            tuple(map(tuple, gradients)),
            pieces,
            *form.constants,
        ),
        warps=WARPS,
    )
    return gradients
