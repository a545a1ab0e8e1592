"""The one place that decides whether consecutive steps of a map are fused into one Triton kernel.

Between these steps torch's operations write intermediates to memory and read them again; a fused
kernel keeps them to itself, and needs one launch instead of several. It computes numbers and
nothing else. If a backward is differentiated, in transforms of torch.func, in graphs to be compiled
or exported, and under modes that watch operations, torch's operations are used instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyadic._torch import is_fake, is_plain, observed, transformed
from polyadic.kernels.backend import DTYPES, triton_serves

# Sizes and numbers of rows are 32-bit integers in the kernels.
MOST_ROWS = 2**31 - 1


def may_fuse(x: Tensor, factors: Sequence[Tensor]) -> bool:
    """Whether a fused Triton kernel may compute a map of x by these factors.

    Args:
        x: the input, or indices.
        factors: all of one dtype.
    """
    return (
        x.is_cuda
        and factors[0].dtype in DTYPES
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not transformed()
        and not observed()
        and is_plain(x)
        and all(map(is_plain, factors))
        and not is_fake(x)
        and triton_serves(x.device.index)
    )


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors, those that are not contiguous as copies that are."""
    return [t if t.is_contiguous() else t.contiguous() for t in tensors]
