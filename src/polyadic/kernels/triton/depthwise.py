"""The depthwise stage of a CP convolution, and its gradients.

    Z2[p, r] = Σ_t Z1[p·stride + t·dilation - padding, r] taps[t, r]

    dZ1[q] = Σ_t dZ2[p with q = p·stride + t·dilation - padding] ∘ taps[t]
    dtaps[t] = Σ_q Z1[q] ∘ dZ2[p with q = p·stride + t·dilation - padding]

dZ1 and dtaps share what they read of dZ2; the launch that makes them also makes Z2 again, which the
gradient of the projection behind the stage needs. Maps have their channels innermost, so that a tap
is a read at another row. Rows outside the map are masked and count as zero: no halo, no padding in
memory. Spatial dimensions are three; fewer have sizes and taps of one in front.

The gradient of the taps is summed without atomic operations: each program keeps one sum for each
tap and entry of its tile in registers, over all the tiles that it goes through, and adds its rows
up once, in the end. The programs' sums are added by the kernel that makes the gradients of the
kernel's factors from them (see ``mttkrp``).

Loads are not pipelined (stages = 1): pipelined ones bypass the L1 cache, in which eight of nine
taps of a 3×3 kernel are found.

A program makes runs of RUN positions (see ``stage``).

Axes: b images, s positions of an input, p and q positions of all images, r maps of a group, g
groups, t taps.

Arguments that mean the same in every kernel: size_0 to size_2 and out_0 to out_2 are the spatial
sizes before the stage and after it; KERNEL, STRIDE, PADDING (zeros in front) and DILATION have an
entry for each dimension; TAPS is the number of taps, GROUPS the number of groups of channels and
PADDED the number of maps in a group; BLOCK positions, or runs of RUN positions, and COLUMNS maps
make a tile.
"""

# Tuples of tensors grow in Triton, whose language mypy does not know.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyadic.kernels.triton.launch import Launcher
from polyadic.kernels.triton.numerics import rounded, up_to_power_of_two
from polyadic.kernels.triton.stage import write_stage

# Programs that fill a large GPU a few times over (an H100 has 132 multiprocessors).
MANY_PROGRAMS = 1024
# Positions of a run, where there are few taps: the loads of many would not fit into registers.
RUN, MOST_RUN_TAPS = 4, 9
# TILE is the number of entries of a tile, of runs or, without them, of positions; those of the
# backward keep in registers a sum for each entry and tap, of which there are at most MOST_TAPS. A
# program of the backward goes through at least LEAST_TILES tiles. A program that makes Z2 again
# keeps no sums: it takes OUT_TILES where that gives no more than MOST_OUT_PROGRAMS, which fill the
# GPU up where the others leave room.
TILE, BACKWARD_TILE, MOST_TAPS, LEAST_TILES = 512, 256, 27, 2
OUT_TILES, MOST_OUT_PROGRAMS = 2, 16384


@triton.jit(do_not_specialize=["count", "size_0", "size_1", "size_2", "out_0", "out_1", "out_2"])
def depthwise_kernel(
    z1,
    taps,
    z2,
    count,
    size_0,
    size_1,
    size_2,
    out_0,
    out_1,
    out_2,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    TAPS: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write z2 (p, GROUPS · PADDED), which has ``count`` runs; each program writes one tile.

    It is made from z1 (b, *s, GROUPS · PADDED) and taps (t, PADDED).
    """
    across: tl.constexpr = (PADDED + COLUMNS - 1) // COLUMNS
    g = tl.program_id(1)
    r = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    n = tl.program_id(0) // across * BLOCK + tl.arange(0, BLOCK)
    write_stage(
        z1 + g * PADDED,
        taps,
        z2 + g * PADDED,
        n,
        n < count,
        r,
        r < PADDED,
        size_0,
        size_1,
        size_2,
        out_0,
        out_1,
        out_2,
        KERNEL,
        STRIDE,
        PADDING,
        DILATION,
        TAPS,
        GROUPS * PADDED,
        PADDED,
        RUN,
    )


@triton.jit(
    do_not_specialize=[
        "in_count",
        "count",
        "share",
        "out_share",
        "in_programs",
        "size_0",
        "size_1",
        "size_2",
        "out_0",
        "out_1",
        "out_2",
    ]
)
def depthwise_backward_kernel(
    z1,
    d_z2,
    taps,
    d_z1,
    z2,
    partial,
    in_count,
    count,
    share,
    out_share,
    in_programs,
    size_0,
    size_1,
    size_2,
    out_0,
    out_1,
    out_2,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    TAPS: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    SUMMED: tl.constexpr,
    IN_RUN: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write d_z1 and partial sums of dtaps, by the first programs, and z2, by the others.

    They are made from z1 (b, *s, GROUPS · PADDED), d_z2 (p, GROUPS · PADDED) and taps (t, PADDED).
    The first ``in_programs`` programs write d_z1, shaped as z1, which has ``in_count`` runs of
    IN_RUN positions, and with SUMMED partial (in_programs, GROUPS, t, PADDED) in float32. The
    others, if there are any, write z2, shaped as d_z2, which has ``count`` runs of RUN. Each of the
    first goes through ``share`` runs one tile after the other, and each of the others through
    ``out_share``; both are multiples of BLOCK.
    """
    program, g = tl.program_id(1), tl.program_id(2)
    r = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ranked = r < PADDED
    maps: tl.constexpr = GROUPS * PADDED
    widths: tl.constexpr = KERNEL[2]
    dtype: tl.constexpr = taps.dtype.element_ty
    if program < in_programs:
        first = program * share
        last = tl.minimum(first + share, in_count)
        runs = (size_2 + IN_RUN - 1) // IN_RUN
        # There is at least one sum, because a loop cannot carry an empty tuple.
        sums = (tl.zeros((BLOCK, COLUMNS), tl.float32),) * (TAPS if SUMMED else 1)
        for start in range(first, last, BLOCK):
            n = start + tl.arange(0, BLOCK)
            line, begin = n // runs, n % runs * IN_RUN
            image = line // (size_0 * size_1)
            i = (line // size_1) % size_0 + PADDING[0]
            j = line % size_1 + PADDING[1]
            k = begin + PADDING[2]
            q = (line.to(tl.int64) * size_2 + begin)[:, None] * maps + (g * PADDED + r)[None, :]
            owns = ()
            for s in tl.static_range(IN_RUN):
                mask = ((n < last) & (begin + s < size_2))[:, None] & ranked[None, :]
                own = tl.load(z1 + q + s * maps, mask=mask, other=0.0).to(tl.float32)
                owns = owns + (own,)  # noqa: RUF005 - Triton has no *
            totals = (tl.zeros((BLOCK, COLUMNS), tl.float32),) * IN_RUN
            for row in tl.static_range(TAPS // widths):
                # The positions (x, y, z) to which the taps of a row take q. One exists if q is a
                # whole number of strides away.
                x = i - (row // KERNEL[1]) * DILATION[0]
                y = j - (row % KERNEL[1]) * DILATION[1]
                there = (n < last) & (x >= 0) & (y >= 0)
                there &= (x % STRIDE[0] == 0) & (y % STRIDE[1] == 0)
                x, y = x // STRIDE[0], y // STRIDE[1]
                there &= (x < out_0) & (y < out_1)
                line_at = ((image * out_0 + x).to(tl.int64) * out_1 + y) * out_2
                # Taps of a run are neighbours, so that what they read is one position apart.
                for c in tl.static_range(IN_RUN - 1 + widths):
                    z = k + (IN_RUN - 1 - c * DILATION[2])
                    real = there & (z >= 0) & (z % STRIDE[2] == 0)
                    z = z // STRIDE[2]
                    at = d_z2 + (line_at + z)[:, None] * maps + (g * PADDED + r)[None, :]
                    mask = (real & (z < out_2))[:, None] & ranked[None, :]
                    gradient = tl.load(at, mask=mask, other=0.0).to(tl.float32)
                    # Tap w takes position s of the run to k + s - w · dilation.
                    grown = ()
                    for s in tl.static_range(IN_RUN):
                        total = totals[s]
                        for w in tl.static_range(widths):
                            if s - w * DILATION[2] == IN_RUN - 1 - c * DILATION[2]:
                                t = row * KERNEL[2] + w
                                tap = tl.load(taps + t * PADDED + r, mask=ranked, other=0.0)
                                total += gradient * tap.to(tl.float32)[None, :]
                        grown = grown + (total,)  # noqa: RUF005
                    totals = grown
                    if SUMMED:
                        grown = ()
                        for t in tl.static_range(TAPS):
                            total = sums[t]
                            if t // KERNEL[2] == row:
                                w = t % KERNEL[2]
                                for s in tl.static_range(IN_RUN):
                                    if s - w * DILATION[2] == IN_RUN - 1 - c * DILATION[2]:
                                        total += gradient * owns[s]
                            grown = grown + (total,)  # noqa: RUF005
                        sums = grown
            for s in tl.static_range(IN_RUN):
                mask = ((n < last) & (begin + s < size_2))[:, None] & ranked[None, :]
                tl.store(d_z1 + q + s * maps, rounded(totals[s], dtype), mask=mask)
        if SUMMED:
            for t in tl.static_range(TAPS):
                row = (program * GROUPS + g).to(tl.int64) * TAPS + t
                tl.store(partial + row * PADDED + r, tl.sum(sums[t], 0), mask=ranked)
    else:
        first = (program - in_programs) * out_share
        last = tl.minimum(first + out_share, count)
        for start in range(first, last, BLOCK):
            n = start + tl.arange(0, BLOCK)
            write_stage(
                z1 + g * PADDED,
                taps,
                z2 + g * PADDED,
                n,
                n < last,
                r,
                ranked,
                size_0,
                size_1,
                size_2,
                out_0,
                out_1,
                out_2,
                KERNEL,
                STRIDE,
                PADDING,
                DILATION,
                TAPS,
                maps,
                PADDED,
                RUN,
            )


FORWARD = Launcher(depthwise_kernel)
BACKWARD = Launcher(depthwise_backward_kernel)

Three = tuple[int, int, int]


class Where(NamedTuple):
    """A depthwise stage along three dimensions; fewer are lifted by ones in front.

    Args:
        kernel: number of taps.
        stride: step of the kernel.
        padding: zeros in front; those behind follow from the sizes.
        dilation: distance between neighbouring taps.
    """

    kernel: Three
    stride: Three
    padding: Three
    dilation: Three

    @property
    def taps(self) -> int:
        """How many taps there are."""
        return self.kernel[0] * self.kernel[1] * self.kernel[2]


def _columns(padded: int) -> int:
    """Return the number of maps of a program: fewer if 64 would reach far beyond the last map."""
    columns = 64 if -padded % 64 <= 16 else 32
    return min(columns, max(16, up_to_power_of_two(padded)))


def _run(where: Where, most_stride: int) -> int:
    """Return the positions of a run.

    There are runs for few taps that are neighbours along the last dimension, behind a stride of at
    most ``most_stride``: the code of a run goes through all positions that it spans.
    """
    near = where.dilation[2] == 1 and where.stride[2] <= most_stride
    return RUN if where.taps <= MOST_RUN_TAPS and near else 1


def _runs(images: int, size: Three, run: int) -> int:
    """Return how many runs so many images have."""
    return images * size[0] * size[1] * -(-size[2] // run)


def forward_constants(where: Where, groups: int, padded: int) -> tuple[Any, ...]:
    """Return the constants of the forward's kernel."""
    columns = _columns(padded)
    return (*where, where.taps, groups, padded, _run(where, 2), TILE // columns, columns)


def forward_warps(where: Where) -> int:
    """Warps that share a tile of the forward; more where a tile has not the entries of runs."""
    return 4 if where.taps <= MOST_RUN_TAPS else 2


def depthwise(
    z1: Tensor, taps: Tensor, where: Where, size: Three, out: Three, groups: int
) -> Tensor:
    """Return Z2 (b·s', g·r) of Z1 (b·s, g·r); see ``depthwise_backward`` for the arguments."""
    images = z1.shape[0] // (size[0] * size[1] * size[2])
    z2 = z1.new_empty((images * out[0] * out[1] * out[2], z1.shape[1]))
    constants = forward_constants(where, groups, taps.shape[1])
    run, block, columns = constants[-3:]
    count = _runs(images, out, run)
    numbers = count, *size, *out
    FORWARD(
        (constants, z1.dtype),
        (-(-taps.shape[1] // columns) * -(-count // block), groups, 1),
        (z1, taps, z2),
        numbers,
        lambda: (z1, taps, z2, *numbers, *constants),
        warps=forward_warps(where),
    )
    return z2


def backward_constants(where: Where, groups: int, padded: int, wrt_taps: bool) -> tuple[Any, ...]:
    """Return the constants of the backward's kernel."""
    columns = max(16, min(32, up_to_power_of_two(padded)))
    runs = _run(where, 1), _run(where, 2)
    return (*where, where.taps, groups, padded, wrt_taps, *runs, BACKWARD_TILE // columns, columns)


BACKWARD_WARPS = 2


def depthwise_backward(
    z1: Tensor,
    d_z2: Tensor,
    taps: Tensor,
    where: Where,
    size: Three,
    out: Three,
    groups: int,
    *,
    wrt_taps: bool,
    again: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return dZ1, the gradient of the taps in pieces if it is wanted, and Z2 if wanted again.

    It takes one launch.

    Args:
        z1: (b·s, g·r), contiguous.
        d_z2: (b·s', g·r), contiguous.
        taps: (t, r), contiguous, in the dtype of z1; r columns are a multiple of 8.
        where: taps, stride, padding and dilation; at most ``MOST_TAPS`` taps.
        size: spatial size s of z1.
        out: spatial size s' of d_z2.
        groups: groups of channels.
        wrt_taps: whether the taps' gradient is wanted.
        again: whether Z2 is wanted.

    Returns:
        (b·s, g·r); (p, t, r) in float32, to be added over the pieces p, or None; (b·s', g·r) or
        None.
    """
    padded = taps.shape[1]
    constants = backward_constants(where, groups, padded, wrt_taps)
    in_run, run, block, columns = constants[-4:]
    across = -(-padded // columns)
    images = z1.shape[0] // (size[0] * size[1] * size[2])
    in_count, count = _runs(images, size, in_run), _runs(images, out, run)
    share = -(-in_count * across * groups // (MANY_PROGRAMS * block))
    share = max(LEAST_TILES, share) * block
    in_programs = -(-in_count // share)
    out_share = max(OUT_TILES, -(-count // (MOST_OUT_PROGRAMS * block))) * block
    out_programs = -(-count // out_share) if again else 0
    d_z1 = z1.new_empty(z1.shape)
    z2 = z1.new_empty(d_z2.shape) if again else None
    partial = taps.new_empty(
        (in_programs * groups, taps.shape[0], padded) if wrt_taps else (1,), dtype=torch.float32
    )
    tensors = z1, d_z2, taps, d_z1, d_z1 if z2 is None else z2, partial
    numbers = in_count, count, share, out_share, in_programs, *size, *out
    BACKWARD(
        (constants, z1.dtype),
        (across, in_programs + out_programs, groups),
        tensors,
        numbers,
        lambda: (*tensors, *numbers, *constants),
        warps=BACKWARD_WARPS,
    )
    return d_z1, partial if wrt_taps else None, z2
