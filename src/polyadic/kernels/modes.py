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

Groups = tuple[int, ...]


def best_cut(sizes: Sequence[int]) -> int:
    """Where to halve modes for a dimension tree: both Khatri-Rao products together smallest."""
    if len(sizes) == 2:
        return 1
    return min(range(1, len(sizes)), key=lambda c: math.prod(sizes[:c]) + math.prod(sizes[c:]))


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which products of factors are formed: fp32 for half precisions, else ``dtype``."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def khatri_rao(factors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Column-wise Kronecker product (Π m_d, R), formed in at least fp32 and rounded once.

    Args:
        factors: D tensors (m_d, R); the last mode varies fastest.
        dtype: dtype of the result, the factors' own by default.
    """
    own = factors[0].dtype
    product, *rest = _at_least_fp32(factors)
    for factor in rest:
        product = product.unsqueeze(-2) * factor
    if rest:
        product = product.flatten(0, -2)
    return _rounded(product, dtype or own)


def _at_least_fp32(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same tensors, half precisions cast to fp32."""
    wide = accumulate_dtype(tensors[0].dtype)
    return tensors if tensors[0].dtype == wide else [tensor.to(wide) for tensor in tensors]


def _grouped(factors: Sequence[Tensor], groups: Groups, dtype: torch.dtype) -> list[Tensor]:
    """One Khatri-Rao matrix (g, R) per group, left to right.

    The last one enters a GEMM in ``dtype``. The others enter products that are rounded once, in
    the end, so that more groups do not mean more roundings: they stay in fp32 at least.
    """
    matrices, start, wide = [], 0, accumulate_dtype(dtype)
    for length in groups:
        stop = start + length
        inner = stop < len(factors)
        matrices.append(khatri_rao(factors[start:stop], wide if inner else dtype))
        start = stop
    return matrices


def contract(x: Tensor, factors: Sequence[Tensor], groups: Groups) -> Tensor:
    """Z = X K: (B, M) → (B, R), the rightmost group by a GEMM, the others by weighted sums."""
    if len(groups) == 1:
        return x @ khatri_rao(factors, x.dtype)
    *left, last = _grouped(factors, groups, x.dtype)
    return _sum_left(_contract_last(x, last), left)[0]


def _contract_last(x: Tensor, last: Tensor) -> Tensor:
    """P[b, l, r] = Σ_g X[b, l, g] K[g, r]: (B, M) → (B, L, R)."""
    rows, size = x.shape
    width, rank = last.shape
    return (x.reshape(rows * (size // width), width) @ last).view(rows, size // width, rank)


def _sum_left(partial: Tensor, left: Sequence[Tensor]) -> list[Tensor]:
    """Contract the remaining groups right to left; result j has the modes of the first j groups.

    (B, L, R) → [(B, R), (B, g_1, R), …, (B, L, R)], each the weighted sum of its right neighbour;
    the first and the last in the dtype of ``partial``, those between in that of ``left``.
    """
    partials = [partial]
    for matrix in reversed(left):
        group, rank = matrix.shape
        outer = partials[0].shape[1] // group
        split = partials[0].view(partial.shape[0], outer, group, rank)
        partials.insert(0, (split * matrix).sum(2))
    partials[0] = _rounded(partials[0].squeeze(1), partial.dtype)
    return partials


def _weighted(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise product in the accumulation dtype, for a sum that follows."""
    wide = accumulate_dtype(a.dtype)
    return _rounded(a, wide) * _rounded(b, wide)


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype; Tensor.to costs a microsecond even where nothing is to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _spread(z: Tensor, left: Sequence[Tensor]) -> list[Tensor]:
    """Multiply the groups in left to right: (B, R) → [(B, 1, R), (B, g_1, R), …, (B, L, R)].

    The first and the last in the dtype of ``z``, those between in that of ``left``.
    """
    spread = [z.unsqueeze(1)]
    for matrix in left:
        product = spread[-1].unsqueeze(2) * matrix
        rows, outer, group, rank = product.shape
        spread.append(product.reshape(rows, outer * group, rank))
    spread[-1] = _rounded(spread[-1], z.dtype)
    return spread


def plus_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """Y + bias in the memory of y, which nothing else holds.

    ``addmm`` would first spread the bias over the whole output, one more pass over it.
    """
    if bias is None:
        return y
    if torch.compiler.is_compiling():
        return y + bias
    try:
        return y.add_(bias)
    except RuntimeError:
        # Under vmap a batched bias does not fit into a y that is not batched.
        return y + bias


def expand(
    z: Tensor, factors: Sequence[Tensor], groups: Groups, bias: Tensor | None = None
) -> Tensor:
    """X = Z Kᵀ (+ bias): (B, R) → (B, M), all groups but the last multiplied in before the GEMM."""
    if len(groups) == 1:
        matrix = khatri_rao(factors, z.dtype).t()
        return plus_bias(z @ matrix, bias)
    *left, last = _grouped(factors, groups, z.dtype)
    x = _expand_last(_spread(z, left)[-1], last)
    return plus_bias(x, bias)


def _expand_last(spread: Tensor, last: Tensor) -> Tensor:
    """X[b, l, g] = Σ_r Q[b, l, r] K[g, r]: (B, L, R) → (B, M)."""
    rows, outer, rank = spread.shape
    return (spread.reshape(rows * outer, rank) @ last.t()).view(rows, outer * last.shape[0])


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
    if len(groups) == 1:
        matrix = khatri_rao(factors, x.dtype) if wrt_x or wrt_z else None
        return (
            z @ matrix.t() if wrt_x and matrix is not None else None,
            x @ matrix if wrt_z and matrix is not None else None,
            khatri_rao_backward(x.t() @ z, factors) if wrt_factors else None,
        )
    *left, last = _grouped(factors, groups, x.dtype)
    rows, rank = z.shape
    spread = _spread(z, left)
    d_x = _expand_last(spread[-1], last) if wrt_x else None
    summed = _sum_left(_contract_last(x, last), left) if wrt_z or wrt_factors else []
    d_z = summed[0] if wrt_z else None
    if not wrt_factors:
        return d_x, d_z, None
    grads, start = [], 0
    for j, length in enumerate(groups):
        if j == len(left):
            width = last.shape[0]
            tall = x.reshape(rows * (x.shape[1] // width), width)
            d_matrix = tall.t() @ spread[j].reshape(-1, rank)
        else:
            outer, group = spread[j].shape[1], left[j].shape[0]
            p = summed[j + 1].view(rows, outer, group, rank)
            d_matrix = _weighted(p, spread[j].unsqueeze(2)).sum((0, 1))
        grads += khatri_rao_backward(d_matrix, factors[start : start + length])
        start += length
    return d_x, d_z, grads


def khatri_rao_backward(d_matrix: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the factors of K from that of K (MTTKRP of ``d_matrix`` with all others).

    A dimension tree: two passes over (Πm, R) give the gradients of the Khatri-Rao products of the
    left and of the right half of the modes, which are treated likewise.

    Args:
        d_matrix: (Π m_d, R).
        factors: D tensors (m_d, R).

    Returns:
        D tensors (m_d, R), in the factors' dtype.
    """
    own = factors[0].dtype
    wide = accumulate_dtype(own)
    if d_matrix.dtype != wide:
        d_matrix = d_matrix.to(wide)
    grads = _factor_gradients(d_matrix, _at_least_fp32(factors))
    return grads if own == wide else [grad.to(own) for grad in grads]


def _factor_gradients(d_matrix: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """The dimension tree itself, in one dtype."""
    if len(factors) == 1:
        return [d_matrix]
    cut = best_cut([factor.shape[0] for factor in factors])
    left, right = khatri_rao(factors[:cut]), khatri_rao(factors[cut:])
    cube = d_matrix.view(left.shape[0], right.shape[0], left.shape[1])
    d_left, d_right = (cube * right).sum(1), (cube * left.unsqueeze(1)).sum(0)
    return _factor_gradients(d_left, factors[:cut]) + _factor_gradients(d_right, factors[cut:])
