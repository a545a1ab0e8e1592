"""Forward and closed-form backward of a CP embedding, as a plan says.

Row i of the table KA KCᵀ, where i has the mixed-radix digits (i_1, …, i_D) over the in modes:

    z = A_1[i_1] ∘ … ∘ A_D[i_D] (R)        y = z KCᵀ (E)

So a lookup gathers D small rows for each index, multiplies them, and ends with one GEMM with KC. If
there are more indices than the Khatri-Rao product of adjacent factors has rows, that product is
formed and its rows are gathered instead; the in groups of the plan say which factors are joined. A
weight vector λ (R,) enters as one more in factor with a mode of size 1, in front.

On a GPU one kernel looks up and multiplies (see ``fused``), and the backward is six launches: z and
KC, G = dY KC, two for the gradients of the in factors, dKC = dYᵀ Z, and the gradients of the out
factors. Z, G and KC then have their columns padded with zeros to R' ≥ R.

Axes: b indices, m rows of one in factor, r rank, e embedding dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyadic._torch import is_plain, no_autocast
from polyadic.kernels.fused import MOST_ROWS, contiguous, may_fuse
from polyadic.kernels.multilinear import (
    accumulate_dtype,
    expand,
    khatri_rao,
    khatri_rao_backward,
    partials,
)
from polyadic.kernels.pairs import khatri_rao_pair, mttkrp_pair, padded_rank, unpadded
from polyadic.kernels.products import matmul_nn, matmul_tn_unrounded
from polyadic.plans import Groups, LinearPlan, LinearRoute

# A GPU sums gradients into the rows of a factor by comparing each index with each row. It does so
# for factors of up to this many rows.
MOST_SCATTERED_ROWS = 4096


def _digits(indices: Tensor, modes: Sequence[int]) -> list[Tensor]:
    """Return the mixed-radix digits of indices (b,), (b,) for each mode; the last varies fastest.

    The first digit is not reduced: an index outside the table stays one outside the first mode.
    """
    digits: list[Tensor] = []
    for mode in reversed(modes[1:]):
        digits.insert(0, torch.remainder(indices, mode))
        indices = torch.div(indices, mode, rounding_mode="floor")
    return [indices, *digits]


def _pick(
    indices: Tensor, factors: Sequence[Tensor], groups: Groups
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the digits of the indices over the joined modes, and the rows (b, r) they point at.

    All rows are in at least float32, in which Khatri-Rao products are formed.
    """
    wide = accumulate_dtype(factors[0].dtype)
    joined, start = [], 0
    for length in groups:
        part = factors[start : start + length]
        joined.append(part[0] if length == 1 else khatri_rao(part, wide))
        start += length
    digits = _digits(indices, [matrix.shape[0] for matrix in joined])
    rows = [m.index_select(0, digit) for m, digit in zip(joined, digits, strict=True)]
    return digits, rows if factors[0].dtype == wide else [row.to(wide) for row in rows]


def _sum_into(rows: Tensor, digit: Tensor, mode: int) -> Tensor:
    """Sum rows (b, r) by their digit: (mode, r)."""
    if rows.device.type == "cpu":
        return rows.new_zeros(mode, rows.shape[1]).index_add(0, digit, rows)
    # Elsewhere index_add is atomic: slow where modes are this small, and different at each run.
    chosen = torch.arange(mode, device=rows.device).unsqueeze(1) == digit
    return chosen.to(rows.dtype) @ rows


@dataclass(frozen=True)
class EmbeddingMap:
    """The map (indices, None, *factors) → y with factors = (λ if any, *in, *out).

    Args:
        plan: its in groups say which in factors are joined before the lookup, its out groups how
            the out factors are applied, ``keep`` whether Z is kept.
        n_in: number of in factors, λ counted.
        padding_idx: the index whose row is zero and sends no gradient, or None.
        size: V, the rows of the table; None for all Π m_d.
    """

    plan: LinearPlan
    n_in: int
    padding_idx: int | None = None
    size: int | None = None

    output_channels_last = False
    autograd_backward = False

    def forward(
        self, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return y (b, e) for indices x (b,), and Z (b, r) where the plan keeps it."""
        # Off as for torch's embedding: a residual stream that starts in fp32 stays so.
        with no_autocast(x):
            if self._is_fused(x, factors, self.plan.forward):
                return self._forward_fused(x, factors)
            _, rows = _pick(x, factors[: self.n_in], self.plan.forward.in_groups)
            z = self._product(rows, x, factors[0].dtype)
            y = expand(z, factors[self.n_in :], self.plan.forward.out_groups, bias)
        return y, () if self.plan.keep == "x" else (z,)

    def _is_fused(self, x: Tensor, factors: Sequence[Tensor], route: LinearRoute) -> bool:
        """Whether Triton kernels compute one direction."""
        return route.by == "triton" and may_fuse(x, factors) and self._fits(factors)

    def _fits(self, factors: Sequence[Tensor]) -> bool:
        """Whether the kernels can count the rows of the table and of each factor."""
        modes = [factor.shape[0] for factor in factors[: self.n_in]]
        return math.prod(modes) <= MOST_ROWS and max(modes) <= MOST_SCATTERED_ROWS

    def asserts_range(self, x: Tensor, factors: Sequence[Tensor]) -> bool:
        """Whether an eager forward finds out by itself that an index is outside the table."""
        return (
            self.plan.forward.by == "triton" and may_fuse(x, factors, True) and self._fits(factors)
        )

    def _forward_fused(
        self, x: Tensor, factors: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        from polyadic.kernels.triton.embedding import lookup

        x, *factors = contiguous((x, *factors))
        ins, outs = factors[: self.n_in], factors[self.n_in :]
        padded, keep = padded_rank(ins[0].shape[1]), self.plan.keep != "x"
        size = self.size or math.prod([factor.shape[0] for factor in ins])
        y, z = lookup(x, ins, outs, self.padding_idx, size, padded, keep=keep)
        return y, () if z is None else (z,)

    def _product(self, rows: Sequence[Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return Z (b, r), the product of the rows, rounded once and zero at the padding index."""
        return self._silent(math.prod(rows[1:], start=rows[0]), x).to(dtype)

    def _silent(self, rows: Tensor, x: Tensor) -> Tensor:
        """Zero the rows (b, r) of the padding index."""
        if self.padding_idx is None:
            return rows
        return rows.masked_fill((x == self.padding_idx).unsqueeze(1), 0)

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        factors: Sequence[Tensor],
        needs: Sequence[bool],
        wrt_bias: bool = False,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradients of the factors; an index has none.

            G = dY KC (b, r)    dKC = dYᵀ Z    dA_d[m] = Σ_{b: i_d = m} G ∘ Π_{e≠d} A_e[i_e]

        Args:
            grad_y: (b, e).
            x: indices (b,).
            kept: what ``forward`` kept; empty to recompute it (as second derivatives need).
            factors: (λ if any, *in, *out).
            needs: whether x (never) and each factor needs its gradient.
            wrt_bias: whether that of the bias (e,) is to follow.
        """
        with no_autocast(x):
            fused = is_plain(grad_y) and self._is_fused(x, factors, self.plan.backward)
            backward = self._backward_fused if fused else self._backward
            grads = backward(grad_y, x, kept, factors, needs[1:])
        return None, [*grads, grad_y.sum(0)] if wrt_bias else grads

    def _backward_fused(
        self,
        grad_y: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        factors: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        from polyadic.kernels.triton.embedding import rows, scatter

        x, *factors = contiguous((x, *factors))
        ins, outs = factors[: self.n_in], factors[self.n_in :]
        wrt_in, wrt_out = any(needs[: self.n_in]), any(needs[self.n_in :])
        padded = padded_rank(ins[0].shape[1])
        if wrt_out and not kept:
            z, kc = rows(x, ins, outs, self.padding_idx, padded)
        else:
            kc = khatri_rao_pair([outs], outs[0].dtype)[0]
            z = kept[0] if kept else grad_y
        d_in: list[Tensor | None] = [None] * len(ins)
        d_out: list[Tensor | None] = [None] * len(outs)
        if wrt_in:
            d_in = [*scatter(matmul_nn(grad_y, kc), x, ins, self.padding_idx)]
        if wrt_out:
            d_out = [*mttkrp_pair([matmul_tn_unrounded(grad_y, z)], [outs])[0]]
        return [*d_in, *d_out]

    def _backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        factors: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        in_factors, out_factors = factors[: self.n_in], factors[self.n_in :]
        wrt_in, wrt_out = any(needs[: self.n_in]), any(needs[self.n_in :])
        route = self.plan.backward
        digits: list[Tensor] = []
        rows: list[Tensor] = []
        if wrt_in or not kept:
            digits, rows = _pick(x, in_factors, route.in_groups)
        if kept:
            z = unpadded(kept[0], in_factors[0].shape[1])
        elif wrt_out:
            z = self._product(rows, x, in_factors[0].dtype)
        else:
            z = grad_y.new_empty(grad_y.shape[0], in_factors[0].shape[1])
        _, g, d_out = partials(
            grad_y, z, out_factors, route.out_groups, wrt_z=wrt_in, wrt_factors=wrt_out
        )
        d_in: list[Tensor | None] = [None] * self.n_in
        if g is not None:
            d_in = self._scatter(self._silent(g.to(rows[0].dtype), x), digits, rows, in_factors)
        none_out = [None] * len(out_factors)
        return [*d_in, *(d_out or none_out)]

    def _scatter(
        self, g: Tensor, digits: list[Tensor], rows: list[Tensor], in_factors: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return the gradients of all in factors from G (b, r); they share their products."""
        # ``before`` holds the products G ∘ A_1[i_1] ∘ … from the left, and ``after`` the product
        # … ∘ A_D[i_D] from the right, so that no product is formed twice.
        before = [g]
        for row in rows[:-1]:
            before.append(before[-1] * row)
        after: Tensor | None = None
        grads: list[Tensor | None] = []
        stop = self.n_in
        groups = self.plan.backward.in_groups
        for d in reversed(range(len(rows))):
            piece = before[d] if after is None else before[d] * after
            own = in_factors[stop - groups[d] : stop]
            total = _sum_into(piece, digits[d], math.prod([factor.shape[0] for factor in own]))
            grads[:0] = khatri_rao_backward(total, own)
            if d > 0:
                after = rows[d] if after is None else rows[d] * after
            stop -= groups[d]
        return grads
