"""Contractions of the channels of (b, c, *s) with a matrix, in either memory layout.

Axes: b batch, c channels, r rank (or the channels contracted to), s all positions, g groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyadic.kernels.multilinear import accumulate_dtype
from polyadic.kernels.products import matmul_nn, matmul_tn_unrounded, plus_bias

# From this many positions on, one product for each image is as fast as one product of all rows.
PRODUCT_PER_IMAGE_FROM_POSITIONS = 64


def is_rows(x: Tensor) -> bool:
    """Whether the channels are innermost, so that positions are rows of a matrix."""
    return x.stride(1) == 1


def as_rows(x: Tensor) -> Tensor:
    """(b, c, *s) → (b·s, c); a view where the channels are innermost."""
    return x.movedim(1, -1).reshape(x.shape[0] * math.prod(x.shape[2:]), x.shape[1])


def _columns(x: Tensor) -> Tensor:
    """(b, c, *s) → (b, c, s); reshape, unlike flatten, has a rule for batched gradients."""
    return x.reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:]))


def _volume(rows: Tensor, like: Tensor) -> Tensor:
    """(b·s, r) or (b, s, r) → (b, r, *s) with channels innermost, b and s those of ``like``."""
    return rows.view(like.shape[0], *like.shape[2:], rows.shape[-1]).movedim(-1, 1)


def project(
    x: Tensor, matrix: Tensor, layout: str, groups: int = 1, bias: Tensor | None = None
) -> Tensor:
    """Contract the channels: (b, c, *s) with (c, r) → (b, r, *s), in the layout asked for.

    If channels_last is asked for and the input has another layout, the GEMM reads the input
    transposed, so that no pass over it is spent on conversion. With groups, the channels of each
    group are contracted separately, with one matrix (c/g, r) for all groups or with each group's
    own of (g, c/g, r), and each group gives r channels.
    """
    if groups > 1:
        return _project_groups(x, matrix, layout, groups, bias)
    if layout == "channels_first":
        y = torch.matmul(matrix.t(), _columns(x)).view(x.shape[0], matrix.shape[1], *x.shape[2:])
        return y if bias is None else plus_bias(y, bias.view(-1, *[1] * (x.dim() - 2)))
    if is_rows(x):
        return _volume(matmul_nn(as_rows(x), matrix, bias), x)
    columns, matrices = _columns(x).transpose(1, 2), matrix.expand(x.shape[0], *matrix.shape)
    return _volume(plus_bias(torch.bmm(columns, matrices), bias), x)


def project_back(z: Tensor, matrix: Tensor, like: Tensor, layout: str, groups: int = 1) -> Tensor:
    """Contract a map (b, r, *s) with (c, r) → (b, c, *s), in the layout of ``like`` (b, c, *s).

    If the input came in channels_first, the GEMM writes its gradient in that layout, so that nobody
    has to convert it.
    """
    turned = layout == "channels_last" and groups == 1 and not is_rows(like)
    if not turned or math.prod(z.shape[2:]) < PRODUCT_PER_IMAGE_FROM_POSITIONS:
        return project(z, matrix.mT, layout, groups)
    matrices = matrix.expand(z.shape[0], *matrix.shape)
    return torch.bmm(matrices, _columns(z)).view(z.shape[0], matrix.shape[0], *z.shape[2:])


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(b, g·c, *s) → (b, g, c, s)."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, math.prod(x.shape[2:]))


def _project_groups(
    x: Tensor, matrix: Tensor, layout: str, groups: int, bias: Tensor | None
) -> Tensor:
    """``project`` with groups: (b, g·c, *s) → (b, g·r, *s)."""
    if layout == "channels_last":
        if is_rows(x):
            rows = as_rows(x).view(-1, groups, x.shape[1] // groups)
            own = matrix.dim() == 3
            y = (rows.transpose(0, 1) @ matrix).transpose(0, 1) if own else rows @ matrix
        else:
            # Read transposed, as without groups; what is copied is the result.
            y = (_by_group(x, groups).mT @ matrix).transpose(1, 2)
        y = y.reshape(x.shape[0] * math.prod(x.shape[2:]), groups * matrix.shape[-1])
        return _volume(plus_bias(y, bias), x)
    y = (matrix.mT @ _by_group(x, groups)).reshape(
        x.shape[0], groups * matrix.shape[-1], *x.shape[2:]
    )
    return y if bias is None else y + bias.view(-1, *[1] * (x.dim() - 2))


def outer(x: Tensor, z: Tensor, layout: str, groups: int = 1, each: bool = False) -> Tensor:
    """Return the gradient of a projection's matrix: Σ_{b,s} x[b, c, s] z[b, r, s] → (c, r).

    If the sum over the batch is taken here, its half-precision terms have been rounded already, and
    it stays in float32. With groups it is the gradient of the shared matrix (c/g, r), or with
    ``each`` that of each group's own (g, c/g, r).
    """
    last = layout == "channels_last"
    if last and not is_rows(x) and better_as_rows(z.shape[1], groups * math.prod(x.shape[2:])):
        x = in_layout(x, layout)
    if last and is_rows(x):
        if groups == 1:
            return matmul_tn_unrounded(as_rows(x), as_rows(z))
        rows, maps = (as_rows(t).view(-1, groups, t.shape[1] // groups) for t in (x, z))
        if each:
            return rows.permute(1, 2, 0) @ maps.transpose(0, 1)
        # reshape, not flatten, which gradients batched by autograd have no rule for.
        return rows.reshape(-1, rows.shape[2]).t() @ maps.reshape(-1, maps.shape[2])
    wide = accumulate_dtype(x.dtype)
    if groups > 1:
        products = _by_group(x, groups) @ _by_group(z, groups).mT
        return products.sum(0 if each else (0, 1), dtype=wide)
    return outer_of_images(x, z).sum(0, dtype=wide)


def outer_of_images(x: Tensor, z: Tensor) -> Tensor:
    """Return Σ_s x[b, c, s] z[b, r, s] → (b, c, r), a product for each image."""
    return torch.bmm(_columns(x), _columns(z).transpose(1, 2))


def better_as_rows(maps: int, positions: int) -> bool:
    """Whether ``outer`` should convert an input of so many positions an image to rows first.

    Otherwise ``outer`` makes a product (c, r) for each group and image, with ``maps`` = g·r columns
    in all. If there are few positions, these products are more to write than the input is to read.
    """
    return maps > positions


def in_layout(x: Tensor, layout: str) -> Tensor:
    """Return the tensor in a layout, converted if it is in another one."""
    if layout == "channels_first":
        return x.contiguous()
    # contiguous(memory_format=torch.channels_last) would do too, but vmap refuses it.
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
