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

from polyadic.kernels.products import (
    HALVES,
    matmul_nn,
    matmul_nt,
    matmul_tn_unrounded,
    plus_bias,
)
from polyadic.plans import Groups

# The first d dimensions, for each d that a tensor of at most 64 dimensions can have.
_LEADING = tuple(tuple(range(d)) for d in range(64))


def best_cut(sizes: Sequence[int]) -> int:
    """Return where to halve modes so that the Khatri-Rao products of both halves are smallest."""
    if len(sizes) == 2:
        return 1
    return min(range(1, len(sizes)), key=lambda c: math.prod(sizes[:c]) + math.prod(sizes[c:]))


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products of factors are formed: float32 instead of a half one."""
    return torch.float32 if dtype in HALVES else dtype


def khatri_rao(factors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Return the column-wise Kronecker product (Π m_d, R), formed in fp32 at least, rounded once.

    Args:
        factors: D tensors (m_d, R); the last mode varies fastest.
        dtype: dtype of the result, the factors' own by default.
    """
    own = factors[0].dtype
    # Each layer comes here at each pass, so that ``widened`` and ``cast`` are called only to work.
    product, *rest = widened(factors) if own in HALVES else factors
    for factor in rest:
        product = product.unsqueeze(-2) * factor
    if rest:
        product = product.flatten(0, -2)
    dtype = dtype or own
    return product if product.dtype == dtype else product.to(dtype)


def _prefixes(factors: Sequence[Tensor]) -> list[Tensor]:
    """Return the products of the first d factors for each d < D, as (m_1, …, m_d, 1, R)."""
    if len(factors) == 1:
        return []
    prefixes = [factors[0].unsqueeze(-2)]
    for factor in factors[1:-1]:
        prefixes.append((prefixes[-1] * factor).unsqueeze(-2))
    return prefixes


def _product(factors: Sequence[Tensor], prefixes: Sequence[Tensor]) -> Tensor:
    """Return K (Π m_d, R), the last prefix times the last factor."""
    return (prefixes[-1] * factors[-1]).flatten(0, -2) if prefixes else factors[-1]


def widened(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Cast tensors of half precision to float32; return others as they are."""
    if tensors[0].dtype not in HALVES:
        return tensors
    return [tensor.to(torch.float32) for tensor in tensors]


def _matrices(factors: Sequence[Tensor], groups: Groups, dtype: torch.dtype) -> list[Tensor]:
    """Return the Khatri-Rao matrix (g, R) of each group.

    The last matrix enters a GEMM and is in ``dtype``. The others stay in at least float32: the
    products that they enter are rounded once, at the end, so that more groups do not mean more
    roundings.
    """
    matrices, start, wide = [], 0, accumulate_dtype(dtype)
    for length in groups:
        stop = start + length
        matrices.append(khatri_rao(factors[start:stop], wide if stop < len(factors) else dtype))
        start = stop
    return matrices


def _grouped(
    factors: Sequence[Tensor], groups: Groups, dtype: torch.dtype
) -> tuple[list[Tensor], list[Sequence[Tensor]], list[list[Tensor]]]:
    """Return what ``_matrices`` returns, the factors of each group, and their prefixes."""
    matrices, pieces, grown, start = [], [], [], 0
    every, wide = widened(factors), accumulate_dtype(dtype)
    for length in groups:
        stop = start + length
        piece = every[start:stop]
        prefixes = _prefixes(piece)
        matrices.append(cast(_product(piece, prefixes), wide if stop < len(factors) else dtype))
        pieces.append(piece)
        grown.append(prefixes)
        start = stop
    return matrices, pieces, grown


def contract(x: Tensor, factors: Sequence[Tensor], groups: Groups) -> Tensor:
    """Z = X K: (B, M) → (B, R), the rightmost group by a GEMM, the others by weighted sums."""
    if len(groups) == 1:
        return matmul_nn(x, khatri_rao(factors, x.dtype))
    *left, last = _matrices(factors, groups, x.dtype)
    return _sum_left(_split_last(x, last), last, x.shape[0], left)[0]


def _split_last(x: Tensor, last: Tensor) -> Tensor:
    """Reshape (B, M) to (B·L, g), so that the modes of the last group are the columns."""
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
    partials[0] = cast(partials[0], x.dtype)
    return partials


def product_for_sum(a: Tensor, b: Tensor) -> Tensor:
    """Multiply elementwise in the dtype in which the sum that follows is taken."""
    wide = accumulate_dtype(a.dtype)
    return cast(a, wide) * cast(b, wide)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor if needed; Tensor.to takes a microsecond even if there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _spread(z: Tensor, left: Sequence[Tensor]) -> list[Tensor]:
    """Multiply the groups in left to right: [(B, R), (B, g_1, R), …, (B, g_1, …, g_k, R)].

    The first and the last in the dtype of ``z``, those between in that of ``left``.
    """
    spread = [z]
    for matrix in left:
        spread.append(spread[-1].unsqueeze(-2) * matrix)
    spread[-1] = cast(spread[-1], z.dtype)
    return spread


def expand(
    z: Tensor, factors: Sequence[Tensor], groups: Groups, bias: Tensor | None = None
) -> Tensor:
    """X = Z Kᵀ (+ bias): (B, R) → (B, M), all groups but the last multiplied in before the GEMM."""
    if len(groups) == 1:
        return matmul_nt(z, khatri_rao(factors, z.dtype), bias)
    *left, last = _matrices(factors, groups, z.dtype)
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
    """Return the partial derivatives of T(X, Z, A) that are asked for; they share intermediates.

    The modes come in groups g_1 … g_k with Khatri-Rao matrices K_1 … K_k, so that T is a product of
    X, Z and one matrix for each group, summed over all indices. Leaving one of them out of the sum
    gives the derivative with respect to it. What is left is a part to the left of it and a part to
    the right of it, and these parts grow step by step:

        Q_j = Z ∘ K_1 ∘ … ∘ K_j     spreads Z over the groups, from the left:   (B, g_1, …, g_j, R)
        P_j = X K_k … K_{j+1}       sums X over the groups, from the right:     (B, g_1, …, g_j, R)

        ∂T/∂X = Q_{k-1} K_kᵀ        ∂T/∂Z = P_0        ∂T/∂K_j = Σ_{b, groups < j} P_j ∘ Q_{j-1}

    For the last group P_k = X, and the sum is the GEMM Xᵀ Q_{k-1}. Each ∂T/∂K_j becomes the
    gradients of that group's factors by an MTTKRP (``_mttkrp``). With one group Q_0 = Z, and all of
    it is three GEMMs with K.

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
        wide = widened(factors)
        prefixes = _prefixes(wide)
        # ∂T/∂K and its factors come first, because dK is as large as K: so both are never in
        # memory.
        grads = _mttkrp(matmul_tn_unrounded(x, z), wide, prefixes, own) if wrt_factors else None
        if not (wrt_x or wrt_z):
            return None, None, grads
        matrix = cast(_product(wide, prefixes), x.dtype)
        d_x = matmul_nt(z, matrix) if wrt_x else None  # ∂T/∂X = Z Kᵀ
        return d_x, matmul_nn(x, matrix) if wrt_z else None, grads  # ∂T/∂Z = X K
    (*left, last), pieces, grown = _grouped(factors, groups, x.dtype)
    spread = _spread(z, left)  # Q_0 … Q_{k-1}
    every = spread[-1].reshape(-1, last.shape[1])
    d_x = matmul_nt(every, last).view(x.shape) if wrt_x else None  # ∂T/∂X = Q_{k-1} K_kᵀ
    if not (wrt_z or wrt_factors):
        return d_x, None, None
    split = _split_last(x, last)
    summed = _sum_left(split, last, x.shape[0], left)  # P_0 … P_{k-1}
    d_z = summed[0] if wrt_z else None  # ∂T/∂Z = P_0
    if not wrt_factors:
        return d_x, d_z, None
    grads = []
    for j in range(len(left)):
        # ∂T/∂K of group j + 1 = Σ P_{j+1} ∘ Q_j
        d_matrix = product_for_sum(summed[j + 1], spread[j].unsqueeze(-2)).sum(_LEADING[j + 1])
        grads += _mttkrp(d_matrix, pieces[j], grown[j], own)
    # ∂T/∂K_k = Xᵀ Q_{k-1}
    return d_x, d_z, grads + _mttkrp(matmul_tn_unrounded(split, every), pieces[-1], grown[-1], own)


def product_gradients(x: Tensor, z: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of K's factors from dK = Xᵀ Z, of x (B, M), z (B, R)."""
    return khatri_rao_backward(matmul_tn_unrounded(x, z), factors)


def khatri_rao_backward(d_matrix: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of the factors of K from that of K: each is an MTTKRP.

    Args:
        d_matrix: (Π m_d, R).
        factors: D tensors (m_d, R).

    Returns:
        D tensors (m_d, R), in the factors' dtype.
    """
    wide = widened(factors)
    return _mttkrp(d_matrix, wide, _prefixes(wide), factors[0].dtype)


def _mttkrp(
    d_matrix: Tensor, factors: Sequence[Tensor], prefixes: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Return the gradients of the factors from dK, with the prefixes that K was built from.

    K[i] = Π_d A_d[i_d], so dA_d sums dK over all modes but d, times the factors of those modes. We
    take the modes from the last to the first. D_d is dK with the modes behind d summed away and
    their factors multiplied in; what is left for dA_d are the modes in front of d, whose product is
    a prefix that is there already:

        D_D = dK
        dA_d = Σ_{i_1 … i_{d-1}} D_d ∘ (A_1 ⊙ … ⊙ A_{d-1})
        D_{d-1} = Σ_{i_d} D_d ∘ A_d

    The largest tensor is read twice, and each further one is smaller by a mode.
    """
    d = d_matrix if d_matrix.dtype == factors[0].dtype else d_matrix.to(factors[0].dtype)
    mode, grads = len(prefixes), []
    if mode:
        d = d.view(*prefixes[-1].shape[:-2], -1, d.shape[1])
    while mode:
        grads.append((d * prefixes[mode - 1]).sum(_LEADING[mode]))  # dA_d
        d = (d * factors[mode]).sum(-2)  # D_{d-1}
        mode -= 1
    grads.append(d)  # dA_1 = D_1
    grads.reverse()
    return grads if dtype == d.dtype else [grad.to(dtype) for grad in grads]
