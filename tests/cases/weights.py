"""Dense weights by one ``torch.einsum`` over all factors, and what torch computes with them.

Nothing here calls the library's own products, so that it cannot share a fault with them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyadic import CPTensor

LETTERS = "abcdefghijklmnopqstuvwxyz"  # r is the rank


def by_einsum(factors: Sequence[Tensor], *scales: Tensor) -> Tensor:
    """The CP tensor of factors (m, R) by one einsum, a dimension to a mode; differentiable.

    Each of the scales (R,), if there are any, multiplies the components.
    """
    letters = LETTERS[: len(factors)]
    terms = [*(f"{letter}r" for letter in letters), *("r" for _ in scales)]
    # The search for the best order takes longer than any order of tensors this small.
    with torch.backends.opt_einsum.flags(enabled=False):
        return torch.einsum(f"{','.join(terms)}->{letters}", *factors, *scales)


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """The columns' outer products (i · j · …, R) of factors (i, R), (j, R), …."""
    return functools.reduce(lambda a, b: (a[:, None] * b).flatten(0, 1), factors)


def contracted(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Σ x[n, i, j, …] A[i, r] B[j, r] … (n, R) of x (n, i · j · …), a factor after the other."""
    z = x.unflatten(1, [len(factor) for factor in factors]) @ factors[-1]
    for factor in reversed(factors[:-1]):
        z = (z * factor).sum(-2)
    return z


def expanded(z: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Σ_r z[n, r] A[i, r] B[j, r] … (n, i · j · …) of z (n, R), a factor after the other."""
    for factor in factors[:-1]:
        z = z.unsqueeze(-2) * factor
    return (z @ factors[-1].t()).flatten(1)


def cp_by_einsum(cp: CPTensor) -> Tensor:
    """The tensor that a CPTensor stands for, its weights included."""
    return by_einsum(list(cp.factors), *([] if cp.weights is None else [cp.weights]))


def weight(layer: Any) -> Tensor:
    """The weight of any CP layer, a dimension to a group of modes; differentiable."""
    cp = layer.cp
    joint = getattr(cp, "joint", None)
    weights = cp.weights if joint is None else joint.weights
    scales = [] if joint is None else [joint.factors[0][cp.index[0]]]
    full = by_einsum([*cp.factors], *scales, *([] if weights is None else [weights]))
    return full.reshape([math.prod(group) for group in cp.tensorized_shape])


def dense_linear(layer: Any, x: Tensor) -> Tensor:
    """What torch's linear layer computes with the weight and bias of a CPLinear."""
    return F.linear(x, weight(layer).t(), layer.bias)


def dense_conv(layer: Any, x: Tensor) -> Tensor:
    """What torch's convolution computes with the kernel and bias of a CPConv."""
    dims = len(layer.kernel_size)
    kernel = weight(layer).unflatten(-1, layer.kernel_size)
    padding = layer.padding
    if layer.padding_mode != "zeros":
        sides = [side for p in reversed(padding) for side in (p, p)]
        x, padding = F.pad(x, sides, layer.padding_mode), 0
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return convolve(x, kernel, layer.bias, layer.stride, padding, layer.dilation, layer.groups)


def dense_conv_transpose(layer: Any, x: Tensor) -> Tensor:
    """What torch's transposed convolution computes with the kernel and bias of ours."""
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    return convolve[len(layer.kernel_size) - 1](
        x,
        weight(layer).unflatten(-1, layer.kernel_size),
        layer.bias,
        layer.stride,
        layer.padding,
        layer.output_padding,
        layer.groups,
        layer.dilation,
    )


def table(layer: Any) -> Tensor:
    """The table of a CPEmbedding as torch's layer would own it: the padding row is zero."""
    rows = weight(layer)[: layer.num_embeddings]
    return rows if layer.padding_idx is None else without_row(rows, layer.padding_idx)


def without_row(rows: Tensor, index: int) -> Tensor:
    """A table whose row is zero and sends no gradient back."""
    keep = torch.ones(len(rows), 1, dtype=rows.dtype, device=rows.device)
    keep[index] = 0
    return rows * keep


def dense_embedding(layer: Any, x: Tensor) -> Tensor:
    """What torch's lookup finds in the table of a CPEmbedding."""
    rows = table(layer)
    # torch does not differentiate a lookup of complex rows.
    return rows[x] if rows.is_complex() else F.embedding(x, rows)


def dense_tied(layer: Any, x: Tensor) -> Tensor:
    """What torch's linear layer computes with the table of a CPTiedLinear."""
    return F.linear(x, weight(layer)[: layer.out_features], layer.bias)
