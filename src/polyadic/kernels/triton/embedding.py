"""Lookup in a table in CP format, and the gradients of the factors it was looked up in.

    y[b] = z[b] KCᵀ        z[b] = A_1[i_1] ∘ … ∘ A_D[i_D]        (i_1, …, i_D) the digits of index b

Three kernels: the lookup as a whole; the rows z together with KC, which products of the backward
need; and the gradients of the in factors from G = dY KC (b, r), in partial sums.

    dA_d[a] = Σ_{b: i_d(b) = a} G[b] ∘ Π_{e≠d} A_e[i_e(b)]

Many indices share a row of a factor, so that adding into it as they come would need atomic
operations, whose order differs from run to run. Here each program owns some rows of one factor and
goes through its share of the indices: which index belongs to which row is a matrix of ones and
zeros, and the sum a matrix product on the tensor cores. Those take bfloat16, so a term enters as
the sum of two or three numbers of bfloat16, exact to 16 bits where the factors have 11 and to 24
where they have 24; the ones are exact, and sums are in float32.

Axes: b indices, a rows of one in factor, r rank, e embedding dimension.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyadic.kernels.backend import has_warpgroups
from polyadic.kernels.triton.launch import ALIGNMENT_BYTES, Launcher
from polyadic.kernels.triton.numerics import (
    khatri_rao_rows,
    product,
    right_of,
    rounded,
    up_to_power_of_two,
)
from polyadic.kernels.triton.sums import add_up

# Programs that fill a large GPU twice over (an H100 has 132 multiprocessors), and those of a lookup
# that find room on it at once: each makes its rows of KC and then goes through tiles of indices. On
# an H200 a lookup of 65,536 indices in 768 columns of rank 64 took 47 µs with these and 57 with a
# program for each tile (bfloat16, November 2026).
ENOUGH_PROGRAMS, AT_ONCE = 256, 396
# Rows of a factor that a program of the scatter owns: the height of a tensor-core product.
OWNED_ROWS = 64
# Most shares that the indices are divided into; each is a partial sum of every factor's rows.
MOST_SHARES = 128


@triton.jit
def looked_up(indices, b, count, table_rows, padding):
    """Indices at positions ``b``, and which of them have a row: within the table, no padding."""
    inside = b < count
    index = tl.load(indices + b, mask=inside, other=-1)
    real = inside & (index >= 0) & (index < table_rows) & (index != padding)
    return tl.where(real, index, 0).to(tl.int32), real


@triton.jit
def expanding_rows(
    factors,
    e,
    r,
    MODES: tl.constexpr,
    RIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
):
    """Rows ``e`` and columns ``r`` of KC, rounded, zero outside it."""
    mask = (e < WIDTH)[:, None] & (r < RANK)[None, :]
    kc = khatri_rao_rows(factors, e, r, mask, MODES, RIGHT, 1, RANK, -1)
    return rounded(tl.where(mask, kc, 0.0), factors[0].dtype.element_ty)


@triton.jit(do_not_specialize=["count", "padding", "size", "programs"])
def lookup_kernel(
    indices,
    in_factors,
    out_factors,
    y,
    kept,
    count,
    padding,
    size,
    programs,
    MODES: tl.constexpr,
    RIGHT: tl.constexpr,
    TABLE: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Write tiles of BLOCK rows and COLUMNS columns of y (b, WIDTH), TERMS columns of z at a time.

    The rows of a strip of columns are shared by ``programs`` programs, each of which makes the
    strip's rows of KC once if they have no more than TERMS columns. With KEEP the programs of the
    first columns write z (b, PADDED) as well. An index outside [0, size) ends the kernel with an
    error, which CUDA reports as torch's own lookups have it reported: at a later call.
    """
    # All programs are on one axis, because the other axes have room for 65,535 programs only.
    # Neighbouring programs have the same indices.
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    once: tl.constexpr = RANK <= TERMS
    strip = tl.program_id(0) % across
    e = strip * COLUMNS + tl.arange(0, COLUMNS)
    if once:
        r = tl.arange(0, TERMS)
        kc = tl.trans(expanding_rows(out_factors, e, r, MODES, RIGHT, WIDTH, RANK))
    for first in range(0, tl.cdiv(count, BLOCK), programs):
        b = (first + tl.program_id(0) // across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        given = tl.load(indices + b, mask=b < count, other=0)
        inside_table = (given >= 0) & (given < size)
        tl.device_assert(inside_table, "an index is outside the table of an embedding")
        index, real = looked_up(indices, b, count, TABLE, padding)
        dtype: tl.constexpr = in_factors[0].dtype.element_ty
        total = tl.zeros((BLOCK, COLUMNS), tl.float32)
        for start in range(0, RANK, TERMS):
            r = start + tl.arange(0, TERMS)
            mask = real[:, None] & (r < RANK)[None, :]
            z = khatri_rao_rows(in_factors, index, r, mask, MODES, RIGHT, 0, RANK, -1)
            z = rounded(tl.where(mask, z, 0.0), dtype)
            if KEEP:
                inside = (b < count)[:, None] & (r < PADDED)[None, :]
                # All programs of these indices make this z; one of them writes it.
                if strip == 0:
                    tl.store(kept + b[:, None] * PADDED + r[None, :], z, mask=inside)
            if once:
                total = product(z, kc, total)
            else:
                rows = expanding_rows(out_factors, e, r, MODES, RIGHT, WIDTH, RANK)
                total = product(z, tl.trans(rows), total)
        inside = (b < count)[:, None] & (e < WIDTH)[None, :]
        at = y + b[:, None] * WIDTH + e[None, :]
        tl.store(at, rounded(total, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "padding", "row_programs"])
def rows_kernel(
    indices,
    in_factors,
    out_factors,
    z,
    kc,
    count,
    padding,
    row_programs,
    MODES: tl.constexpr,
    RIGHT: tl.constexpr,
    TABLE: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write z (b, PADDED) by the first ``row_programs`` programs and KC (WIDTH, PADDED) by others.

    Columns from RANK on are zero.
    """
    across: tl.constexpr = (PADDED + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0) // across
    r = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    ranked, written = (r < RANK)[None, :], (r < PADDED)[None, :]
    if program < row_programs:
        b = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        index, real = looked_up(indices, b, count, TABLE, padding)
        mask = real[:, None] & ranked
        rows = khatri_rao_rows(in_factors, index, r, mask, MODES, RIGHT, 0, RANK, -1)
        rows = rounded(tl.where(mask, rows, 0.0), z.dtype.element_ty)
        tl.store(z + b[:, None] * PADDED + r[None, :], rows, mask=(b < count)[:, None] & written)
    else:
        e = (program - row_programs) * BLOCK + tl.arange(0, BLOCK)
        inside = (e < WIDTH)[:, None]
        mask = inside & ranked
        rows = khatri_rao_rows(out_factors, e, r, mask, MODES, RIGHT, 1, RANK, -1)
        rows = rounded(tl.where(mask, rows, 0.0), kc.dtype.element_ty)
        tl.store(kc + e[:, None] * PADDED + r[None, :], rows, mask=inside & written)


@triton.jit(do_not_specialize=["count", "share", "padding"])
def scatter_kernel(
    g,
    indices,
    factors,
    partial,
    count,
    share,
    padding,
    MODES: tl.constexpr,
    RIGHT: tl.constexpr,
    FIRST: tl.constexpr,
    BASE: tl.constexpr,
    TABLE: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write partial[split, a, r], the sums over one share of the indices, for all in factors.

    Args:
        g: (b, PADDED).
        indices: (b,).
        factors: pointers to the in factors (m_d, RANK).
        partial: (splits, BASE[D], RANK) in float32.
        count: number of indices b.
        share: indices to a split, a multiple of BLOCK.
        padding: the index that sends no gradient.
        MODES: of the in factors, in a tuple of this one group.
        RIGHT: by how many rows of the table a step in each moves, in a tuple of this one group.
        FIRST: the first program of each factor, and the number of programs.
        BASE: the first row of each factor in ``partial``, and the number of rows.
        TABLE: rows of the table.
        RANK: columns of a factor.
        PADDED: columns of ``g``.
        ROWS: rows of a factor that a program owns.
        BLOCK: indices it takes at a time.
        COLUMNS: columns it sums.
        PARTS: numbers of bfloat16 that a term is split into.
    """
    program, split = tl.program_id(1), tl.program_id(2)
    r = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ranked = (r < RANK)[None, :]
    first = split.to(tl.int64) * share
    last = tl.minimum(first + share, count)
    for d in tl.static_range(len(MODES[0])):
        if (program >= FIRST[d]) & (program < FIRST[d + 1]):
            a = (program - FIRST[d]) * ROWS + tl.arange(0, ROWS)
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in range(first, last, BLOCK):
                b = start + tl.arange(0, BLOCK)
                index, real = looked_up(indices, b, last, TABLE, padding)
                mask = real[:, None] & ranked
                term = khatri_rao_rows(factors, index, r, mask, MODES, RIGHT, 0, RANK, d)
                at = g + b[:, None] * PADDED + r[None, :]
                term *= tl.load(at, mask=mask, other=0.0).to(tl.float32)
                digit = (index // RIGHT[0][d]) % MODES[0][d]
                chosen = (a[:, None] == digit[None, :]) & real[None, :]
                # The interpreter cannot cast a truth value to bfloat16, so that we cast it twice.
                chosen = chosen.to(tl.float32).to(tl.bfloat16)
                for _ in tl.static_range(PARTS):
                    part = rounded(term, tl.bfloat16)
                    total = product(chosen, part, total)
                    term -= part.to(tl.float32)
            rows = split.to(tl.int64) * BASE[len(MODES[0])] + BASE[d] + a
            at = partial + rows[:, None] * RANK + r[None, :]
            tl.store(at, total, mask=(a < MODES[0][d])[:, None] & ranked)


LOOKUP = Launcher(lookup_kernel, asserts=True)
ROWS = Launcher(rows_kernel)
SCATTER = Launcher(scatter_kernel)
# An index that no row has, for tables without a padding index.
NO_PADDING = -1
# Rows, and most columns, that a program makes of z or KC; and what the shares of indices are
# multiples of.
ROWS_TILE, MOST_COLUMNS, SHARE_UNIT = 32, 128, 64

Modes = tuple[int, ...]


class _Tile(NamedTuple):
    """Block shapes of a program: rows, columns, terms of a sum at a time; warps that share it."""

    rows: int
    columns: int
    terms: int
    warps: int


def _rows_are_aligned(rank: int, dtype: torch.dtype) -> bool:
    """Whether each row of a factor can be read 16 bytes at a time."""
    return rank * dtype.itemsize % ALIGNMENT_BYTES == 0


@functools.lru_cache(maxsize=4096)
def lookup_tile(count: int, width: int, rank: int, dtype: torch.dtype) -> _Tile:
    """Return the tile of a lookup, which is wide where that leaves enough programs.

    Every tile makes z again, so that few wide tiles do less work. In float32, or if rows are read
    entry by entry, wider tiles would not fit into the registers.
    """
    if dtype == torch.float32:
        return _Tile(32, 64, max(16, min(32, up_to_power_of_two(rank))), 4)
    terms = max(16, min(64, up_to_power_of_two(rank)))
    if not _rows_are_aligned(rank, dtype):
        return _Tile(32, 64, min(terms, 32), 4)
    wide = width > 64 and -(-count // 64) * -(-width // 128) >= ENOUGH_PROGRAMS
    return _Tile(64, 128 if wide else 64, terms, 4)


def _sizes(in_factors: Sequence[Tensor], out_factors: Sequence[Tensor]) -> tuple[Any, ...]:
    modes = tuple([tuple([f.shape[0] for f in side]) for side in (in_factors, out_factors)])
    return sides(modes, in_factors[0].shape[1])


@functools.lru_cache(maxsize=4096)
def sides(modes: tuple[Modes, Modes], rank: int) -> tuple[Any, ...]:
    """Return the modes of both sides, how far a step in each moves, the table's sizes, the rank."""
    ins, outs = modes
    return modes, (right_of(ins), right_of(outs)), math.prod(ins), math.prod(outs), rank


def lookup(
    indices: Tensor,
    in_factors: Sequence[Tensor],
    out_factors: Sequence[Tensor],
    padding_idx: int | None,
    size: int,
    padded: int,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return rows y (b, e) of the table, and z (b, padded) if it is to be kept.

    Rows of the padding index are zero. An index outside the table is an error on the device.

    Args:
        indices: at least one, contiguous, int64 or int32.
        in_factors: contiguous (m_d, R), of one dtype, which is that of y and z.
        out_factors: contiguous (n_d, R), whose modes multiply to e.
        padding_idx: the index whose row is zero, or None.
        size: V, the rows of the table that may be looked up.
        padded: columns of z, at least R; those from R on are zero.
        keep: whether z is wanted.
    """
    leader, count = in_factors[0], indices.shape[0]
    sizes = _sizes(in_factors, out_factors)
    width, rank = sizes[-2:]
    y = leader.new_empty((count, width))
    z = leader.new_empty((count, padded)) if keep else None
    tile = lookup_tile(count, width, rank, leader.dtype)
    constants = (*sizes, padded, keep, *tile[:3])
    kept = y if z is None else z
    across = -(-width // tile.columns)
    programs = min(-(-count // tile.rows), -(-AT_ONCE // across))
    numbers = count, _padding(padding_idx), size, programs
    LOOKUP(
        (constants, tile.warps, leader.dtype, indices.dtype),
        (across * programs, 1, 1),
        (indices, *in_factors, *out_factors, y, kept),
        numbers,
        lambda: (indices, tuple(in_factors), tuple(out_factors), y, kept, *numbers, *constants),
        warps=tile.warps,
    )
    return y, z


def _padding(index: int | None) -> int:
    return NO_PADDING if index is None else index


def rows_constants(sizes: tuple[Any, ...], padded: int) -> tuple[Any, ...]:
    """Constants of the kernel for the ``sides`` of a table."""
    return (*sizes, padded, ROWS_TILE, min(MOST_COLUMNS, up_to_power_of_two(padded)))


def rows(
    indices: Tensor,
    in_factors: Sequence[Tensor],
    out_factors: Sequence[Tensor],
    padding_idx: int | None,
    padded: int,
) -> tuple[Tensor, Tensor]:
    """Return Z (b, padded) and KC (e, padded), zero from column R on; see ``lookup``."""
    leader, count = in_factors[0], indices.shape[0]
    sizes = _sizes(in_factors, out_factors)
    width = sizes[-2]
    z, kc = leader.new_empty((count, padded)), leader.new_empty((width, padded))
    constants = rows_constants(sizes, padded)
    block, columns = constants[-2:]
    row_programs = -(-count // block)
    numbers = count, _padding(padding_idx), row_programs
    ROWS(
        (constants, leader.dtype, indices.dtype),
        (-(-padded // columns) * (row_programs - -width // block), 1, 1),
        (indices, *in_factors, *out_factors, z, kc),
        numbers,
        lambda: (indices, tuple(in_factors), tuple(out_factors), z, kc, *numbers, *constants),
    )
    return z, kc


class _Scatter(NamedTuple):
    """Programs across columns and down all factors' rows, and the kernel's constants."""

    across: int
    down: int
    constants: tuple[Any, ...]


@functools.lru_cache(maxsize=4096)
def scatter_form(
    modes: Modes, rank: int, padded: int, dtype: torch.dtype, warpgroups: bool
) -> _Scatter:
    """Return the grid and the constants with which the scatter into such factors is started.

    ``warpgroups`` is what ``has_warpgroups`` says. Elsewhere each warp computes all terms for
    itself, and large tiles would need more registers than there are.
    """
    columns = max(16, min(64 if warpgroups else 32, up_to_power_of_two(rank)))
    first = (0, *itertools.accumulate([-(-mode // OWNED_ROWS) for mode in modes]))
    base = (0, *itertools.accumulate(modes))
    # Terms of float32, and rows read entry by entry, take more registers.
    plain = warpgroups and dtype != torch.float32 and _rows_are_aligned(rank, dtype)
    block, parts = 64 if plain else 32, 3 if dtype == torch.float32 else 2
    sizes = ((modes,), (right_of(modes),), first, base, math.prod(modes), rank, padded)
    constants = (*sizes, OWNED_ROWS, block, columns, parts)
    return _Scatter(-(-rank // columns), first[-1], constants)


def scatter(
    g: Tensor, indices: Tensor, in_factors: Sequence[Tensor], padding_idx: int | None
) -> list[Tensor]:
    """Return the gradients of the in factors, in their dtype, from G = dY KC, by two launches.

    Args:
        g: (b, at least R), contiguous, in the factors' dtype.
        indices: (b,), at least one, contiguous.
        in_factors: contiguous (m_d, R).
        padding_idx: the index that sends no gradient, or None.
    """
    leader, (count, padded) = in_factors[0], g.shape
    rank = leader.shape[1]
    modes = tuple([factor.shape[0] for factor in in_factors])
    form = scatter_form(modes, rank, padded, leader.dtype, has_warpgroups(leader.get_device()))
    shares = min(MOST_SHARES, max(1, ENOUGH_PROGRAMS // (form.across * form.down)))
    share = -(-count // (shares * SHARE_UNIT)) * SHARE_UNIT
    shares = -(-count // share)
    partial = leader.new_empty((shares, sum(modes), rank), dtype=torch.float32)
    factors, numbers = tuple(in_factors), (count, share, _padding(padding_idx))
    SCATTER(
        (form.constants, leader.dtype, indices.dtype),
        (form.across, form.down, shares),
        (g, indices, *factors, partial),
        numbers,
        lambda: (g, indices, factors, partial, *numbers, *form.constants),
    )
    return add_up(partial, modes, leader.dtype)
