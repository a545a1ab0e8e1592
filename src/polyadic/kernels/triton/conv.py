"""The depthwise stage of a CP convolution and the projection behind it, in one launch.

    Y[p] = Z2[p] KCᵀ + bias        Z2 of the depthwise stage

Z2 is never written to memory: a program makes a tile of it (see ``stage``), rounds it once and
hands it to the tensor cores. It is the right-hand operand of that product. As the left-hand operand
it would make the compiler change the layout of each tap's load, at the cost of one barrier each, as
the machine code shows.

Axes: p positions of all images, r maps of a group, n out channels, g groups, t taps.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyadic.kernels.triton.depthwise import MOST_RUN_TAPS, Three, Where
from polyadic.kernels.triton.launch import Launcher
from polyadic.kernels.triton.numerics import product, rounded, up_to_power_of_two
from polyadic.kernels.triton.stage import depthwise_rows

# Programs that fill a large GPU once (an H100 has 132 multiprocessors).
ENOUGH_PROGRAMS = 132
# Positions of a program, and maps that it takes at a time.
POSITIONS, TERMS = 32, 32


@triton.jit(
    do_not_specialize=["positions", "size_0", "size_1", "size_2", "out_0", "out_1", "out_2"]
)
def depthwise_project_kernel(
    z1,
    taps,
    kc,
    bias,
    y,
    kept,
    positions,
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
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    BIASED: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Write BLOCK positions and COLUMNS channels of one group of y (p, GROUPS · CHANNELS).

    It is made from z1 (b, *s, GROUPS · PADDED), taps (t, PADDED), kc (GROUPS · CHANNELS, PADDED),
    group by group, and with BIASED bias (GROUPS · CHANNELS,), TERMS maps at a time, for all p <
    ``positions``. With KEEP also Z2 is written, to ``kept`` (p, GROUPS · PADDED). The arguments
    that ``depthwise`` has too mean the same here.
    """
    # All programs are on one axis, because the other axes have room for 65,535 programs only.
    # Programs of the same positions are neighbours, so that they find in the cache what they read
    # of z1.
    across: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    strip, g = tl.program_id(0) % across, tl.program_id(1)
    n = strip * COLUMNS + tl.arange(0, COLUMNS)
    p = tl.program_id(0) // across * BLOCK + tl.arange(0, BLOCK)
    inside, real = p < positions, n < CHANNELS
    dtype: tl.constexpr = kc.dtype.element_ty
    total = tl.zeros((COLUMNS, BLOCK), tl.float32)
    for start in range(0, PADDED, TERMS):
        r = start + tl.arange(0, TERMS)
        ranked = r < PADDED
        z2 = depthwise_rows(
            z1 + g * PADDED,
            taps,
            p,
            inside,
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
            GROUPS * PADDED,
            PADDED,
        )
        z2 = rounded(z2, dtype)
        if KEEP:
            at = kept + p[:, None].to(tl.int64) * (GROUPS * PADDED) + (g * PADDED + r)[None, :]
            if strip == 0:
                tl.store(at, z2, mask=inside[:, None] & ranked[None, :])
        at = kc + (g * CHANNELS + n)[:, None] * PADDED + r[None, :]
        rows = tl.load(at, mask=real[:, None] & ranked[None, :], other=0.0)
        total = product(rows, tl.trans(z2), total)
    if BIASED:
        own = tl.load(bias + g * CHANNELS + n, mask=real, other=0.0)
        total += own.to(tl.float32)[:, None]
    at = y + p[:, None].to(tl.int64) * (GROUPS * CHANNELS) + (g * CHANNELS + n)[None, :]
    result = rounded(tl.trans(total), y.dtype.element_ty)
    tl.store(at, result, mask=inside[:, None] & real[None, :])


LAUNCHER = Launcher(depthwise_project_kernel)


def columns_of(channels: int, positions: int, dtype: torch.dtype) -> int:
    """Return the channels of a program: many, as each makes Z2 again, if that leaves programs."""
    most = 64 if dtype == torch.float32 else 128
    columns = max(16, min(most, up_to_power_of_two(channels)))
    while columns > 64 and -(-channels // columns) * -(-positions // POSITIONS) < ENOUGH_PROGRAMS:
        columns //= 2
    return columns


def project_constants(
    where: Where,
    groups: int,
    channels: int,
    padded: int,
    biased: bool,
    keep: bool,
    columns: int,
    dtype: torch.dtype,
) -> tuple[Any, ...]:
    """Return the constants of the kernel, with ``columns`` channels to a program."""
    # The addresses of many taps take registers beside those of wide entries.
    many = dtype == torch.float32 and where.taps > MOST_RUN_TAPS
    block, terms = (POSITIONS // 2, TERMS // 2) if many else (POSITIONS, TERMS)
    return (*where, where.taps, groups, channels, padded, biased, keep, block, columns, terms)


def depthwise_project(
    z1: Tensor,
    taps: Tensor,
    kc: Tensor,
    bias: Tensor | None,
    where: Where,
    size: Three,
    out: Three,
    groups: int,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return Y = Z2 KCᵀ + bias of the depthwise stage's Z2, and Z2 if it is to be kept.

    Args:
        z1: (b·s, g·r), contiguous.
        taps: (t, r), contiguous, in the dtype of z1; r columns are a multiple of 8.
        kc: (n, r), contiguous, group by group.
        bias: (n,) or None.
        where: taps, stride, padding and dilation.
        size: spatial size s of z1.
        out: spatial size of the result.
        groups: groups of channels.
        keep: whether Z2 is wanted.

    Returns:
        (b·s', n) and (b·s', g·r) or None.
    """
    images = z1.shape[0] // (size[0] * size[1] * size[2])
    positions = images * out[0] * out[1] * out[2]
    channels, padded = kc.shape[0] // groups, kc.shape[1]
    y = z1.new_empty((positions, kc.shape[0]))
    z2 = z1.new_empty((positions, z1.shape[1])) if keep else None
    columns = columns_of(channels, positions * groups, z1.dtype)
    biased = bias is not None
    constants = project_constants(where, groups, channels, padded, biased, keep, columns, z1.dtype)
    block = constants[-3]
    added, kept = kc if bias is None else bias, y if z2 is None else z2
    tensors, numbers = (z1, taps, kc, added, y, kept), (positions, *size, *out)
    LAUNCHER(
        (constants, z1.dtype, added.dtype),
        (-(-channels // columns) * -(-positions // block), groups, 1),
        tensors,
        numbers,
        lambda: (*tensors, *numbers, *constants),
    )
    return y, z2
