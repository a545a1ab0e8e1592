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

from polyadic._torch import (
    OWN_CLASSES,
    count_dispatch_modes,
    forward_mode_level,
    tracing_state,
    transforms_active,
)
from polyadic.kernels.backend import DTYPES, triton_serves

# Sizes and numbers of rows are 32-bit integers in the kernels, which count to the end of a tile.
MOST_ROWS = 2**31 - 2**16
# Up to so many rows of a linear layer are computed from the factors in one launch, as when a
# language model decodes, if there are not too many terms: launching then costs more than computing.
MOST_DECODED_ROWS = 4


def may_fuse(x: Tensor, factors: Sequence[Tensor], recording: bool = False) -> bool:
    """Whether a fused Triton kernel may compute a map of x by these factors.

    Args:
        x: the input, or indices.
        factors: all of one dtype.
        recording: whether gradients may be recorded where this is asked, as they are around the
            forward of an eager call but not in it.
    """
    # A layer asks this at each pass, so that as little as possible of it is in Python.
    return (
        (recording or not torch.is_grad_enabled())
        and x.is_cuda
        and not torch.compiler.is_compiling()
        and factors[0].dtype in DTYPES
        and x.numel() > 0
        and OWN_CLASSES.issuperset(map(type, (x, *factors)))
        and not transforms_active()
        and forward_mode_level() < 0
        and count_dispatch_modes() == 0
        and tracing_state() is None
        and triton_serves(x.get_device())
    )


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors, those that are not contiguous as copies that are."""
    if all(map(Tensor.is_contiguous, tensors)):
        return list(tensors)
    return [t.contiguous() for t in tensors]
