"""Forward and closed-form backward of a CP linear map, as a plan says.

    Y = X KA KCᵀ,   KA = A_1 ⊙ … ⊙ A_D (M, R),   KC = C_1 ⊙ … ⊙ C_E (N, R)

A weight vector λ (R,) enters as one more in factor with a mode of size 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from polyadic.kernels.multilinear import (
    contract,
    expand,
    khatri_rao,
    partials,
    product_gradients,
)
from polyadic.kernels.products import matmul_nn, matmul_nt, matmul_tn
from polyadic.plans import LinearPlan


@dataclass(frozen=True)
class LinearMap:
    """The map (x, bias, *factors) → y with factors = (*in_factors, *out_factors).

    Args:
        plan: what is computed in which order; its groups count the factors as they are passed.
        n_in: number of in factors.
    """

    plan: LinearPlan
    n_in: int

    innermost = False

    @property
    def left_to_autograd(self) -> bool:
        """Whether the plan leaves the backward to torch's autograd."""
        return self.plan.keep == 2

    def forward(
        self, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return y (B, N) and what the plan keeps for the backward beside x and the factors."""
        in_factors, out_factors = factors[: self.n_in], factors[self.n_in :]
        route = self.plan.forward
        if route.kind == "dense":
            weight = matmul_nt(khatri_rao(out_factors, x.dtype), khatri_rao(in_factors, x.dtype))
            return matmul_nt(x, weight, bias), ()
        z = contract(x, in_factors, route.in_groups)
        y = expand(z, out_factors, route.out_groups, bias)
        return y, (z,) if self.plan.keep else ()

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        factors: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of x and of the factors.

            Z = X KA, G = dY KC (B, R)    dX = G KAᵀ    dKA = Xᵀ G    dKC = dYᵀ Z

        Args:
            grad_y: (B, N).
            x: (B, M).
            kept: what ``forward`` kept; empty to recompute it (as second derivatives need).
            factors: (*in_factors, *out_factors).
            needs: whether x and each factor needs its gradient.
        """
        in_factors, out_factors = factors[: self.n_in], factors[self.n_in :]
        wrt_x = wrt_in = wrt_out = True
        if not all(needs):
            wrt_x, wrt_in = needs[0], any(needs[1 : 1 + self.n_in])
            wrt_out = any(needs[1 + self.n_in :])
        route = self.plan.backward
        d_x, d_in, d_out = None, None, None
        if route.kind == "dense":
            ka, kc = khatri_rao(in_factors, x.dtype), khatri_rao(out_factors, x.dtype)
            if wrt_x:
                d_x = matmul_nn(grad_y, matmul_nt(kc, ka))
            if wrt_in or wrt_out:
                d_weight = matmul_tn(grad_y, x)
                d_in = product_gradients(d_weight, kc, in_factors)
                d_out = product_gradients(d_weight.t(), ka, out_factors)
        else:
            if kept:
                z = kept[0]
            elif wrt_out:
                z = contract(x, in_factors, route.in_groups)
            else:
                z = grad_y.new_empty(grad_y.shape[0], in_factors[0].shape[1])
            _, g, d_out = partials(
                grad_y, z, out_factors, route.out_groups, wrt_z=wrt_x or wrt_in, wrt_factors=wrt_out
            )
            if g is not None:
                d_x, _, d_in = partials(
                    x, g, in_factors, route.in_groups, wrt_x=wrt_x, wrt_factors=wrt_in
                )
        none_in, none_out = [None] * self.n_in, [None] * len(out_factors)
        return d_x, [*(d_in or none_in), *(d_out or none_out)]

    @staticmethod
    def bias_gradient(grad_y: Tensor) -> Tensor:
        """Sum over the batch, (B, N) → (N,)."""
        return grad_y.sum(0)
