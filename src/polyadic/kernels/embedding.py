"""Forward and closed-form backward of a CP embedding, as a plan says.

Row i of the table KA KCᵀ, where i has the mixed-radix digits (i_1, …, i_D) over the in modes:

    z = A_1[i_1] ∘ … ∘ A_D[i_D] (R)        y = z KCᵀ (E)

so a lookup gathers D small rows per index, multiplies them and is one GEMM with KC; of KA no more
is formed. A weight vector λ (R,) enters as one more in factor with a mode of size 1, in front.

Axes: b indices, m rows of one in factor, r rank, e embedding dimension.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyadic._plan import LinearPlan
from polyadic.kernels.modes import accumulate_dtype, expand, partials


def _digits(indices: Tensor, modes: Sequence[int]) -> list[Tensor]:
    """Mixed-radix digits of indices (b,), one (b,) per mode, the last mode varying fastest.

    The first digit is not reduced: an index outside the table stays one outside the first mode.
    """
    digits: list[Tensor] = []
    for mode in reversed(modes[1:]):
        digits.insert(0, torch.remainder(indices, mode))
        indices = torch.div(indices, mode, rounding_mode="floor")
    return [indices, *digits]


def _pick(indices: Tensor, factors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Digits of the indices and the rows (b, r) of the factors they point at, in at least fp32."""
    digits = _digits(indices, [factor.shape[0] for factor in factors])
    wide = accumulate_dtype(factors[0].dtype)
    rows = [f.index_select(0, digit) for f, digit in zip(factors, digits, strict=True)]
    return digits, rows if factors[0].dtype == wide else [row.to(wide) for row in rows]


def _sum_into(rows: Tensor, digit: Tensor, mode: int) -> Tensor:
    """Sum rows (b, r) by their digit: (mode, r)."""
    if rows.device.type == "cpu":
        return rows.new_zeros(mode, rows.shape[1]).index_add(0, digit, rows)
    # Elsewhere index_add is atomic: slow where modes are this small, and different at each run.
    chosen = torch.arange(mode, device=rows.device).unsqueeze(1) == digit
    return chosen.to(rows.dtype) @ rows


def _no_autocast(like: Tensor) -> contextlib.AbstractContextManager[None]:
    """Autocast off, as for torch's embedding: a residual stream that starts in fp32 stays so."""
    kind = like.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


@dataclass(frozen=True)
class EmbeddingMap:
    """The map (indices, None, *factors) → y with factors = (λ if any, *in, *out).

    Args:
        plan: its out groups say how the out factors are applied, ``keep`` whether Z is kept.
        n_in: number of in factors, λ counted.
        padding_idx: the index whose row is zero and sends no gradient, or None.
    """

    plan: LinearPlan
    n_in: int
    padding_idx: int | None = None

    left_to_autograd = False

    def forward(
        self, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return y (b, e) for indices x (b,), and Z (b, r) where the plan keeps it."""
        with _no_autocast(x):
            z = self._gather(x, factors)
            y = expand(z, factors[self.n_in :], self.plan.forward.out_groups, bias)
        return y, (z,) if self.plan.keep else ()

    def _gather(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """Z (b, r): the product of the rows, rounded once; zero at the padding index."""
        _, rows = _pick(x, factors[: self.n_in])
        return self._silent(math.prod(rows[1:], start=rows[0]), x).to(factors[0].dtype)

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
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of the factors; an index has none.

            G = dY KC (b, r)    dKC = dYᵀ Z    dA_d[m] = Σ_{b: i_d = m} G ∘ Π_{e≠d} A_e[i_e]

        Args:
            grad_y: (b, e).
            x: indices (b,).
            kept: what ``forward`` kept; empty to recompute it (as second derivatives need).
            factors: (λ if any, *in, *out).
            needs: whether x (never) and each factor needs its gradient.
        """
        with _no_autocast(x):
            return None, self._backward(grad_y, x, kept, factors, needs[1:])

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
        if kept:
            z = kept[0]
        elif wrt_out:
            z = self._gather(x, factors)
        else:
            z = grad_y.new_empty(grad_y.shape[0], in_factors[0].shape[1])
        groups = self.plan.backward.out_groups
        _, g, d_out = partials(grad_y, z, out_factors, groups, wrt_z=wrt_in, wrt_factors=wrt_out)
        d_in: list[Tensor | None] = [None] * self.n_in
        if g is not None:
            digits, rows = _pick(x, in_factors)
            # From the left G ∘ A_1[i_1] ∘ …, from the right … ∘ A_D[i_D]: no product formed twice.
            before = [self._silent(g.to(rows[0].dtype), x)]
            for row in rows[:-1]:
                before.append(before[-1] * row)
            after: Tensor | None = None
            for d in reversed(range(self.n_in)):
                if needs[d]:
                    piece = before[d] if after is None else before[d] * after
                    total = _sum_into(piece, digits[d], in_factors[d].shape[0])
                    d_in[d] = total.to(in_factors[d].dtype)
                after = rows[d] if after is None else rows[d] * after
        none_out = [None] * len(out_factors)
        return [*d_in, *(d_out or none_out)]

    @staticmethod
    def bias_gradient(grad_y: Tensor) -> Tensor:
        """Sum over the indices, (b, e) → (e,)."""
        return grad_y.sum(0)
