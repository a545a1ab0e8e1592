"""The one multilinear form behind every layer, its contractions and its partial derivatives.

    T(X, Z, A_1, …, A_D) = Σ_{b,i,r} X[b, i] · Z[b, r] · Π_d A_d[i_d, r],     i = (i_1, …, i_D)

Its partial derivatives are all that forward and backward consist of:

    ∂T/∂Z = contract(X, A)  = X K      (B, M) → (B, R)        K = A_1 ⊙ … ⊙ A_D   (M, R)
    ∂T/∂X = expand(Z, A)    = Z Kᵀ     (B, R) → (B, M)
    ∂T/∂A_d = MTTKRP of Xᵀ Z (M, R) with all other factors

A layer contracts its input with the in factors and expands the result with the out factors; the
backward of either is the other two partials of the same form.

``groups`` says in which pieces the modes are contracted: consecutive modes of one group are
joined by a Khatri-Rao product, groups are contracted one after the other. (D,) is the explicit
Khatri-Rao matrix, (l, D-l) the two-step (partial Khatri-Rao) form, (1, …, 1) the per-factor order.

Axes: b batch rows, i = all modes flattened (M), l modes of the groups to the left, g modes of one
group, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from polyadic.kernels.products import matmul_nn, matmul_nt, matmul_tn_unrounded, plus_bias

Groups = tuple[int, ...]

_HALVES = (torch.bfloat16, torch.float16)
# The first d dimensions, for each d that a tensor of at most 64 dimensions can have.
_LEADING = tuple(tuple(range(d)) for d in range(64))


def best_cut(sizes: Sequence[int]) -> int:
    """Where to halve modes for a dimension tree: both Khatri-Rao products together smallest."""
    if len(sizes) == 2:
        return 1
    return min(range(1, len(sizes)), key=lambda c: math.prod(sizes[:c]) + math.prod(sizes[c:]))


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which products of factors are formed: fp32 for half precisions, else ``dtype``."""
    return torch.float32 if dtype in _HALVES else dtype


def khatri_rao(factors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Column-wise Kronecker product (Π m_d, R), formed in at least fp32 and rounded once.

    Args:
        factors: D tensors (m_d, R); the last mode varies fastest.
        dtype: dtype of the result, the factors' own by default.
    """
    product, *rest = _at_least_fp32(factors)
    for factor in rest:
        product = product.unsqueeze(-2) * factor
    if rest:
        product = product.flatten(0, -2)
    return _rounded(product, dtype or factors[0].dtype)


def _prefixes(factors: Sequence[Tensor]) -> list[Tensor]:
    """What K grows from: the products of the first d factors, d < D, each (m_1, …, m_d, 1, R)."""
    if len(factors) == 1:
        return []
    prefixes = [factors[0].unsqueeze(-2)]
    for factor in factors[1:-1]:
        prefixes.append((prefixes[-1] * factor).unsqueeze(-2))
    return prefixes


def _product(factors: Sequence[Tensor], prefixes: Sequence[Tensor]) -> Tensor:
    """K (Π m_d, R) from the factors and their prefixes."""
    return (prefixes[-1] * factors[-1]).flatten(0, -2) if prefixes else factors[-1]


def _at_least_fp32(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same tensors, half precisions cast to fp32."""
    if tensors[0].dtype not in _HALVES:
        return tensors
    return [tensor.to(torch.float32) for tensor in tensors]


def _grouped(
    factors: Sequence[Tensor], groups: Groups, dtype: torch.dtype
) -> tuple[list[Tensor], list[Sequence[Tensor]], list[list[Tensor]]]:
    """One Khatri-Rao matrix (g, R) per group, left to right; its factors and their prefixes.

    The last one enters a GEMM in ``dtype``. The others enter products that are rounded once, in
    the end, so that more groups do not mean more roundings: they stay in fp32 at least.
    """
    matrices, pieces, grown, start = [], [], [], 0
    every, wide = _at_least_fp32(factors), accumulate_dtype(dtype)
    for length in groups:
        stop = start + length
        piece = every[start:stop]
        prefixes = _prefixes(piece)
        matrices.append(_rounded(_product(piece, prefixes), wide if stop < len(factors) else dtype))
        pieces.append(piece)
        grown.append(prefixes)
        start = stop
    return matrices, pieces, grown


def contract(x: Tensor, factors: Sequence[Tensor], groups: Groups) -> Tensor:
    """Z = X K: (B, M) → (B, R), the rightmost group by a GEMM, the others by weighted sums."""
    if len(groups) == 1:
        return matmul_nn(x, khatri_rao(factors, x.dtype))
    *left, last = _grouped(factors, groups, x.dtype)[0]
    return _sum_left(_split_last(x, last), last, x.shape[0], left)[0]


def _split_last(x: Tensor, last: Tensor) -> Tensor:
    """(B, M) → (B·L, g), the modes of the last group apart from those before it."""
    rows, size = x.shape
    width = last.shape[0]
    return x.reshape(rows * (size // width), width)


def _sum_left(x: Tensor, last: Tensor, rows: int, left: Sequence[Tensor]) -> list[Tensor]:
    """Contract x (B·L, g) with all groups right to left; result j has the first j groups left.

    [(B, R), (B, g_1, R), …, (B, g_1, …, g_k, R)], each the weighted sum of its right neighbour;
    the first and the last in the dtype of x, those between in that of ``left``.
    """
    sizes = [matrix.shape[0] for matrix in left]
    partials = [matmul_nn(x, last).view(rows, *sizes, last.shape[1])]
    for matrix in reversed(left):
        partials.insert(0, (partials[0] * matrix).sum(-2))
    partials[0] = _rounded(partials[0], x.dtype)
    return partials


def _weighted(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise product in the accumulation dtype, for a sum that follows."""
    wide = accumulate_dtype(a.dtype)
    return _rounded(a, wide) * _rounded(b, wide)


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype; Tensor.to costs a microsecond even where nothing is to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _spread(z: Tensor, left: Sequence[Tensor]) -> list[Tensor]:
    """Multiply the groups in left to right: [(B, R), (B, g_1, R), …, (B, g_1, …, g_k, R)].

    The first and the last in the dtype of ``z``, those between in that of ``left``.
    """
    spread = [z]
    for matrix in left:
        spread.append(spread[-1].unsqueeze(-2) * matrix)
    spread[-1] = _rounded(spread[-1], z.dtype)
    return spread


def expand(
    z: Tensor, factors: Sequence[Tensor], groups: Groups, bias: Tensor | None = None
) -> Tensor:
    """X = Z Kᵀ (+ bias): (B, R) → (B, M), all groups but the last multiplied in before the GEMM."""
    if len(groups) == 1:
        return matmul_nt(z, khatri_rao(factors, z.dtype), bias)
    *left, last = _grouped(factors, groups, z.dtype)[0]
    x = matmul_nt(_spread(z, left)[-1].reshape(-1, last.shape[1]), last)
    return plus_bias(x.view(z.shape[0], math.prod([factor.shape[0] for factor in factors])), bias)


def partials(
    x: Tensor,
    z: Tensor,
    factors: Sequence[Tensor],
    groups: Groups,
    *,
    wrt_x: bool = False,
    wrt_z: bool = False,
    wrt_factors: bool = True,
) -> tuple[Tensor | None, Tensor | None, list[Tensor] | None]:
    """Partial derivatives of T(X, Z, A) that are asked for, sharing their intermediates.

    With groups g_1 … g_k, Q_j = Z ∘ K_1 ∘ … ∘ K_j (spread from the left) and P_j = X contracted
    with K_k … K_{j+1} (summed from the right):

        ∂T/∂X = Q_{k-1} K_kᵀ        ∂T/∂Z = P_0        ∂T/∂K_j = Σ_{b,l<j} P_j ∘ Q_{j-1}

    Args:
        x: (B, M).
        z: (B, R).
        factors: D tensors (m_d, R).
        groups: lengths of the groups of modes, summing to D.
        wrt_x: compute ∂T/∂X (B, M).
        wrt_z: compute ∂T/∂Z (B, R).
        wrt_factors: compute every ∂T/∂A_d (m_d, R), in the factors' dtype.
    """
    own = factors[0].dtype
    if len(groups) == 1:
        wide = _at_least_fp32(factors)
        prefixes = _prefixes(wide)
        # Gradients first: dK is as large as K, and need not live beside it.
        grads = _mttkrp(matmul_tn_unrounded(x, z), wide, prefixes, own) if wrt_factors else None
        if not (wrt_x or wrt_z):
            return None, None, grads
        matrix = _rounded(_product(wide, prefixes), x.dtype)
        d_x = matmul_nt(z, matrix) if wrt_x else None
        return d_x, matmul_nn(x, matrix) if wrt_z else None, grads
    (*left, last), pieces, grown = _grouped(factors, groups, x.dtype)
    spread = _spread(z, left)
    every = spread[-1].reshape(-1, last.shape[1])
    d_x = matmul_nt(every, last).view(x.shape) if wrt_x else None
    if not (wrt_z or wrt_factors):
        return d_x, None, None
    split = _split_last(x, last)
    summed = _sum_left(split, last, x.shape[0], left)
    d_z = summed[0] if wrt_z else None
    if not wrt_factors:
        return d_x, d_z, None
    grads = []
    for j in range(len(left)):
        d_matrix = _weighted(summed[j + 1], spread[j].unsqueeze(-2)).sum(_LEADING[j + 1])
        grads += _mttkrp(d_matrix, pieces[j], grown[j], own)
    return d_x, d_z, grads + _mttkrp(matmul_tn_unrounded(split, every), pieces[-1], grown[-1], own)


def product_gradients(x: Tensor, z: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the factors of K from dK = Xᵀ Z, x (B, M), z (B, R), in the factors' dtype."""
    return khatri_rao_backward(matmul_tn_unrounded(x, z), factors)


def khatri_rao_backward(d_matrix: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the factors of K from that of K (MTTKRP of ``d_matrix`` with all others).

    Args:
        d_matrix: (Π m_d, R).
        factors: D tensors (m_d, R).

    Returns:
        D tensors (m_d, R), in the factors' dtype.
    """
    wide = _at_least_fp32(factors)
    return _mttkrp(d_matrix, wide, _prefixes(wide), factors[0].dtype)


def _mttkrp(
    d_matrix: Tensor, factors: Sequence[Tensor], prefixes: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Gradients of the factors, the last mode first, with the prefixes that K was built from.

    dA_d = Σ_{i<d} D_d ∘ (A_1 ⊙ … ⊙ A_{d-1}),    D_{d-1} = Σ_{i_d} D_d ∘ A_d,    D_D = dK
    """
    d = d_matrix if d_matrix.dtype == factors[0].dtype else d_matrix.to(factors[0].dtype)
    mode, grads = len(prefixes), []
    if mode:
        d = d.view(*prefixes[-1].shape[:-2], -1, d.shape[1])
    while mode:
        grads.append((d * prefixes[mode - 1]).sum(_LEADING[mode]))
        d = (d * factors[mode]).sum(-2)
        mode -= 1
    grads.append(d)
    grads.reverse()
    return grads if dtype == d.dtype else [grad.to(dtype) for grad in grads]
