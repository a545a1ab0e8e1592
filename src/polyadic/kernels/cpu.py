"""What only a CPU needs. Portable code asks this module once it knows that a tensor is on a CPU.

Each constant names its unit, and the machine and the day of the measurement that it rests on.
"""

from __future__ import annotations

import math
import platform
from pathlib import Path

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from polyadic._torch import (
    count_dispatch_modes,
    forward_mode_level,
    has_onednn_product,
    not_traced,
    onednn_has_bfloat16,
    onednn_has_float16,
    onednn_is_enabled,
    tracing_state,
    transforms_active,
)

# ``addmm`` first spreads the bias over the whole output, which is one more pass over it. Adding the
# bias afterwards costs one more call instead: with more elements than these that is faster, 1.13 to
# 1.25 times (Xeon with AVX-512, one thread, November 2026).
BIAS_FUSED_UP_TO_ELEMENTS = 2**14
# With fewer columns than these a BLAS may add all terms of Xᵀ Z in one chain, whose rounding error
# grows with the square root of their number. Sums of blocks of BLOCK_ROWS rows keep it small.
BLOCKED_BELOW_COLUMNS, BLOCK_ROWS = 4, 256
# MKL, which is torch's BLAS on most processors, multiplies float32 matrices more slowly than oneDNN
# on AMD's: 1.04 to 1.36 times as long with at least so many multiplications (EPYC with AVX-512, one
# thread, November 2026). Longer sums than these stay with MKL: oneDNN adds all terms in one chain,
# and of 4096 terms its rounding error is 2.2 times MKL's.
ONEDNN_FROM_MULTIPLICATIONS, ONEDNN_UP_TO_TERMS = 2**22, 1024


def vendor() -> str:
    """Return the vendor of the processor, as it names itself, or an empty text."""
    listed = Path("/proc/cpuinfo")
    if not listed.exists():
        return platform.processor().rpartition(" ")[2]
    with listed.open() as lines:
        named = (line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
        return next(named, "")


def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies large float32 matrices faster here than torch's BLAS does."""
    mkl: bool = torch.backends.mkl.is_available()
    return mkl and has_onednn_product and vendor() == "AuthenticAMD"


ONEDNN_IS_FASTER = onednn_is_faster()


# Layers of one input that are called together read it once, and pay for it with more operations. A
# training step of three layers takes 1.03 to 1.5 times as long together as one after the other if x
# has fewer elements than these, and 0.67 to 0.97 times if it has more. A forward takes 0.87 to 1.4
# times as long (EPYC with AVX-512, one thread, November 2026).
TOGETHER_FROM_ELEMENTS = 2**17


def better_apart(elements: int) -> bool:
    """Whether layers with factors of their own are faster one after the other, for such an x."""
    return not torch.is_grad_enabled() or elements < TOGETHER_FROM_ELEMENTS


def sums_in_blocks(x: Tensor) -> bool:
    """Whether Xᵀ Z is a long sum with few columns, for x (n, w)."""
    if is_dynamo_compiling():
        return False
    rows, width = x.shape
    return width < BLOCKED_BELOW_COLUMNS and rows >= 2 * BLOCK_ROWS


def matmul_tn_in_blocks(x: Tensor, z: Tensor) -> Tensor:
    """Return Xᵀ Z (w, r) of x (n, w) and z (n, r), a sum of products of blocks of rows."""
    (rows, width), rank = x.shape, z.shape[1]
    cut = rows - rows % BLOCK_ROWS
    blocks = x[:cut].reshape(-1, BLOCK_ROWS, width), z[:cut].reshape(-1, BLOCK_ROWS, rank)
    total = torch.bmm(blocks[0].mT, blocks[1]).sum(0)
    return total if cut == rows else total + x[cut:].t() @ z[cut:]


def product_in_onednn(x: Tensor, matrix: Tensor, columns: int) -> bool:
    """Whether oneDNN makes the product of x (n, k) and a matrix with so many columns.

    To be asked on a CPU where ``ONEDNN_IS_FASTER``. oneDNN's operation has no rule for graphs,
    transforms, modes and subclasses, and with an operand whose rows are not dense it takes a
    thousand times as long.
    """
    # All questions but the first are answered in C, since a call of a Python function would show.
    return (
        not is_dynamo_compiling()
        and x.numel() * columns >= ONEDNN_FROM_MULTIPLICATIONS
        and x.shape[1] <= ONEDNN_UP_TO_TERMS
        and x.dtype == matrix.dtype == torch.float32
        and x.is_contiguous()
        and (matrix.is_contiguous() or matrix.t().is_contiguous())
        and type(x) is Tensor
        and type(matrix) in (Tensor, torch.nn.Parameter)
        and not torch.is_grad_enabled()
        and not transforms_active()
        and forward_mode_level() < 0
        and not count_dispatch_modes()
        and tracing_state() is None
        and onednn_is_enabled()
    )


@not_traced
def in_onednn(dtype: torch.dtype) -> bool:
    """Whether convolutions of this dtype run in oneDNN; torch's own depthwise ones are slow."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return onednn_has_bfloat16()
    if dtype == torch.float16:
        return onednn_has_float16()
    return dtype == torch.float32


# torch computes the weight gradient of a depthwise convolution fast for kernels of up to three
# columns, whatever their number of rows. Wider kernels are split into such pieces, which is 1.6 to
# 2.4 times as fast (Xeon with AVX-512, one thread, November 2026). For images with fewer entries
# than these the additional calls cost more than they save.
WIDE_COLUMNS, WIDE_FROM_ENTRIES = 3, 8192


def has_wide_weight_gradient(kernel_size: tuple[int, ...], entries: int) -> bool:
    """Whether a depthwise weight gradient is split by columns, for images of so many entries."""
    return len(kernel_size) == 2 and kernel_size[1] > WIDE_COLUMNS and entries >= WIDE_FROM_ENTRIES


# A complex depthwise convolution is one real convolution by 2×2 matrices, or two real depthwise
# ones. With so many taps the two take 0.3 to 0.7 times as long forward. With three or five taps, or
# for images of fewer entries, they take up to 1.7 times as long (Xeon with AVX-512, one thread,
# November 2026).
PARTS_FROM_TAPS, PARTS_FROM_ENTRIES = 9, 8192


def has_fast_parts(kernel_size: tuple[int, ...], entries: int) -> bool:
    """Whether a complex depthwise convolution is two real ones, for images of so many entries."""
    return math.prod(kernel_size) >= PARTS_FROM_TAPS and entries >= PARTS_FROM_ENTRIES
