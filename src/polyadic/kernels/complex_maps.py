"""Complex convolutions by real ones, as torch.convolution takes no complex numbers.

A complex convolution is a real one with twice as many channels: the parts of a channel, re and im,
side by side, and for each tap w the matrix of the multiplication by w, [[re w, -im w], [im w,
re w]], whose rows are the parts of the result. In channels_last complex maps lie in memory so, and
no map is copied. A depthwise convolution is also two real depthwise ones of these channels, y = re
w * x + i (im w * x).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyadic.kernels import cpu


def as_real(x: Tensor) -> Tensor:
    """(b, c, *s), complex → (b, 2c, *s), real."""
    parts = torch.view_as_real(x.resolve_conj()).movedim(-1, 2)
    return parts.reshape(x.shape[0], 2 * x.shape[1], *x.shape[2:])


def as_complex(x: Tensor) -> Tensor:
    """(b, 2c, *s), real → (b, c, *s), complex, in the layout of x."""
    parts = x.reshape(x.shape[0], x.shape[1] // 2, 2, *x.shape[2:]).movedim(2, -1)
    *strides, last = parts.stride()
    if last == 1 and not any(stride % 2 for stride in strides):
        return torch.view_as_complex(parts)
    return torch.complex(parts[..., 0], parts[..., 1])


def kernel_of_matrices(weight: Tensor, transposed: bool) -> Tensor:
    """(n, c, *k), complex → (2n, 2c, *k), real; the in channels are the rows where transposed."""
    # Not weight.imag, which for a conjugate is a view that vmap has no rule for.
    re, im = torch.view_as_real(weight.resolve_conj()).unbind(-1)
    im = -im if transposed else im
    rows = torch.stack((torch.stack((re, -im), 2), torch.stack((im, re), 2)), 1)
    return rows.reshape(2 * weight.shape[0], 2 * weight.shape[1], *weight.shape[2:])


def taps_of_matrices(block: Tensor, transposed: bool) -> Tensor:
    """The adjoint of ``kernel_of_matrices``: (2n, 2c, *k), real → (n, c, *k), complex."""
    n, c = block.shape[0] // 2, block.shape[1] // 2
    rows = block.reshape(n, 2, c, 2, *block.shape[2:])
    im = rows[:, 1, :, 0] - rows[:, 0, :, 1]
    return torch.complex(rows[:, 0, :, 0] + rows[:, 1, :, 1], -im if transposed else im)


def is_by_parts(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether a complex convolution is two real depthwise ones and not one of groups of two."""
    if not x.is_cpu or weight.shape[:2] != (groups, 1):
        return False
    return cpu.has_fast_parts(tuple(weight.shape[2:]), math.prod(x.shape[1:]))


def taps_by_parts(weight: Tensor) -> tuple[Tensor, ...]:
    """(n, 1, *k), complex → its parts (2n, 1, *k), real, each for both parts of a channel."""
    parts = torch.view_as_real(weight.resolve_conj()).movedim(-1, 0).unsqueeze(2)
    twice = parts.expand(-1, -1, 2, *[-1] * (weight.dim() - 1))
    return twice.reshape(2, 2 * weight.shape[0], *weight.shape[1:]).unbind(0)
