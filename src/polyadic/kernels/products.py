"""The three products of a layer's matrices, in BLAS's words: n as it is stored, t transposed.

    matmul_nn(x, K) = X K  (n, k), (k, m) → (n, m)
    matmul_nt(z, K) = Z Kᵀ (n, r), (m, r) → (n, m)
    matmul_tn(x, z) = Xᵀ Z (n, w), (n, r) → (w, r)

Each is one call of torch. What a CPU needs in addition stands in ``cpu``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from polyadic._torch import is_plain, onednn_product, transformed
from polyadic.kernels import cpu

HALVES = (torch.bfloat16, torch.float16)


def matmul_nn(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return X K + bias (n, m) of x (n, k), matrix (k, m) and bias (m,)."""
    if x.is_cpu:
        if cpu.ONEDNN_IS_FASTER and cpu.product_in_onednn(x, matrix, matrix.shape[1]):
            return onednn_product(x, matrix.t(), bias)
        return x @ matrix if bias is None else plus_bias(x @ matrix, bias)
    return x @ matrix if bias is None else torch.addmm(bias, x, matrix)


def matmul_nt(z: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return Z Kᵀ + bias (n, m) of z (n, r), matrix (m, r) and bias (m,)."""
    if z.is_cpu and cpu.ONEDNN_IS_FASTER and cpu.product_in_onednn(z, matrix, matrix.shape[0]):
        return onednn_product(z, matrix, bias)
    if (
        bias is not None
        and z.is_cpu
        and z.shape[0] * matrix.shape[0] > cpu.BIAS_FUSED_UP_TO_ELEMENTS
        and not is_compiling()
    ):
        return plus_bias(F.linear(z, matrix), bias)
    return F.linear(z, matrix, bias)


def matmul_tn(x: Tensor, z: Tensor) -> Tensor:
    """Return Xᵀ Z (w, r) of x (n, w) and z (n, r), a sum over n rows."""
    if x.is_cpu and cpu.sums_in_blocks(x):
        return cpu.matmul_tn_in_blocks(x, z)
    return x.t() @ z


def matmul_tn_in_float32(x: Tensor, z: Tensor) -> Tensor:
    """Return Xᵀ Z (w, r) where a fused kernel may work (see ``fused``): half precisions in float32.

    A GPU adds products of half precisions in float32 and can hand its sums out as they are.
    """
    return torch.mm(x.t(), z, out_dtype=torch.float32) if x.dtype in HALVES else x.t() @ z


def matmul_tn_unrounded(x: Tensor, z: Tensor) -> Tensor:
    """Return Xᵀ Z (w, r) for further sums: not rounded to half precision where that costs nothing.

    A GPU then hands its sums out in float32, if nothing but numbers is wanted.
    """
    if (
        x.is_cuda
        and torch.version.hip is None
        and x.shape[0] > 0
        and x.dtype in HALVES
        and is_plain(x)
        and is_plain(z)
        and not is_compiling()
        and not transformed()
    ):
        return torch.mm(x.t(), z, out_dtype=torch.float32)
    return matmul_tn(x, z)


def plus_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """Return y + bias, written into the memory of y, which nothing else may use."""
    if bias is None:
        return y
    if is_compiling():
        return y + bias
    try:
        return y.add_(bias)
    except RuntimeError:
        # Under vmap a batched bias does not fit into a y that is not batched.
        return y + bias
