"""Forward and closed-form backward of a CP linear map, as a plan says.

    Y = X KA KCᵀ,   KA = A_1 ⊙ … ⊙ A_D (M, R),   KC = C_1 ⊙ … ⊙ C_E (N, R)

A weight vector λ (R,) enters as one more in factor with a mode of size 1.

On a GPU, where each operation costs its launch, both Khatri-Rao matrices of the explicit route come
from one launch and the gradients of all factors from another (see ``pairs``); their columns, and
those of Z and G, are padded with zeros to R' ≥ R. Where numbers alone are wanted, ``fused_linear``
computes that route.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from polyadic.kernels.backend import DTYPES
from polyadic.kernels.fused import MOST_DECODED_ROWS, contiguous, may_fuse
from polyadic.kernels.fused_linear import fused_of
from polyadic.kernels.multilinear import (
    contract,
    expand,
    partials,
    product_gradients,
)
from polyadic.kernels.pairs import (
    khatri_rao_pair,
    launch_khatri_raos_and_sums,
    launch_mttkrps,
    mttkrp_pair,
    unpadded,
)
from polyadic.kernels.products import (
    matmul_nn,
    matmul_nt,
    matmul_tn,
    matmul_tn_unrounded,
)
from polyadic.plans import LinearPlan, LinearRoute


def _in_pairs(x: Tensor, route: LinearRoute) -> bool:
    """Whether both sides are contracted on a GPU with their whole Khatri-Rao matrices.

    A compiler keeps a plan as a constant, and that of torch 2.11 sees a constant's attributes but
    not its properties; so this asks for attributes alone.
    """
    whole = len(route.in_groups) == 1 and len(route.out_groups) == 1
    return x.is_cuda and route.kind == "factorized" and whole


def _numbers_alone(x: Tensor, tensors: Sequence[Tensor], route: LinearRoute) -> bool:
    """Whether Triton kernels may do the work of a pass on x and these tensors, factors first."""
    return route.by == "triton" and x.dtype in DTYPES and may_fuse(x, tensors)


@dataclass(frozen=True)
class LinearMap:
    """The map (x, bias, *factors) → y with factors = (*in_factors, *out_factors).

    Args:
        plan: what is computed in which order; its groups count the factors as they are passed.
        n_in: number of in factors.
    """

    plan: LinearPlan
    n_in: int

    output_channels_last = False

    @property
    def autograd_backward(self) -> bool:
        """Whether the plan leaves the backward to torch's autograd."""
        return self.plan.keep == "autograd"

    def forward(
        self, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return y (B, N) and what the plan keeps for the backward beside x and the factors."""
        in_factors, out_factors = factors[: self.n_in], factors[self.n_in :]
        route = self.plan.forward
        if route.kind == "dense":
            ka, kc = khatri_rao_pair((in_factors, out_factors), x.dtype, route.by)
            return matmul_nt(x, matmul_nt(kc, ka), bias), ()
        if _in_pairs(x, route):
            if _numbers_alone(x, factors if bias is None else (*factors, bias), route):
                if self.plan.keep == "x" and x.shape[0] <= MOST_DECODED_ROWS:
                    decoded = self._decoded(x, bias, factors)
                    if decoded is not None:
                        return decoded, ()
                y, z = fused_of(x, factors, self.n_in).forward(x, bias, factors)
            else:
                ka, kc = khatri_rao_pair((in_factors, out_factors), x.dtype, route.by)
                z = matmul_nn(x, ka)
                y = matmul_nt(z, kc, bias)
        else:
            z = contract(x, in_factors, route.in_groups)
            y = expand(z, out_factors, route.out_groups, bias)
        return y, () if self.plan.keep == "x" else (z,)

    def _decoded(self, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]) -> Tensor | None:
        """Return y (B, N) for a few rows x by one kernel, None where there are too many terms."""
        from polyadic.kernels.triton.decode import decode

        bias = None if bias is None else bias.contiguous()
        x, *factors = contiguous((x, *factors))
        return decode(x, factors[: self.n_in], factors[self.n_in :], bias)

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        factors: Sequence[Tensor],
        needs: Sequence[bool],
        wrt_bias: bool = False,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradients of x and of the factors, and that of the bias if it is wanted.

            Z = X KA, G = dY KC (B, R)    dX = G KAᵀ    dKA = Xᵀ G    dKC = dYᵀ Z

        Args:
            grad_y: (B, N).
            x: (B, M).
            kept: what ``forward`` kept; empty to recompute it (as second derivatives need).
            factors: (*in_factors, *out_factors).
            needs: whether x and each factor needs its gradient.
            wrt_bias: whether that of the bias (N,) is to follow.
        """
        in_factors, out_factors = factors[: self.n_in], factors[self.n_in :]
        wrt_x = wrt_in = wrt_out = True
        if not all(needs):
            wrt_x, wrt_in = needs[0], any(needs[1 : 1 + self.n_in])
            wrt_out = any(needs[1 + self.n_in :])
        route = self.plan.backward
        d_x, d_in, d_out = None, None, None
        if route.kind == "dense":
            groups, wanted = (in_factors, out_factors), wrt_in or wrt_out
            sums: Tensor | None = None
            mttkrps = partial(mttkrp_pair, by=route.by)
            if wrt_bias and wanted and _numbers_alone(x, (*factors, grad_y), route):
                # The gradient of the bias as in ``fused_linear``.
                (ka, kc), sums = launch_khatri_raos_and_sums(groups, x.dtype, grad_y.contiguous())
                mttkrps = partial(launch_mttkrps, sums=sums)
            else:
                ka, kc = khatri_rao_pair(groups, x.dtype, route.by)
            if wrt_x:
                d_x = matmul_nn(grad_y, matmul_nt(kc, ka))
            if x.is_cuda and wanted:
                d_weight = matmul_tn(grad_y, x)
                d_ka, d_kc = (
                    matmul_tn_unrounded(d_weight, kc),
                    matmul_tn_unrounded(d_weight.t(), ka),
                )
                d_in, d_out, *d_bias = mttkrps((d_ka, d_kc), groups)
                if sums is not None:
                    return d_x, [*d_in, *d_out, *d_bias[0]]
            elif wanted:
                d_weight = matmul_tn(grad_y, x)
                d_in = product_gradients(d_weight, kc, in_factors)
                d_out = product_gradients(d_weight.t(), ka, out_factors)
        elif _in_pairs(x, route):
            if _numbers_alone(x, (*factors, grad_y, *kept), route):
                wrt = wrt_x, wrt_in, wrt_out, wrt_bias
                fused = fused_of(x, factors, self.n_in)
                return fused.backward(grad_y, x, kept, factors, wrt)
            d_x, d_in, d_out = self._backward_in_pairs(
                grad_y, x, kept, in_factors, out_factors, (wrt_x, wrt_in, wrt_out)
            )
        else:
            if kept:
                z = unpadded(kept[0], in_factors[0].shape[1])
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
        grads: list[Tensor | None] = [*(d_in or none_in), *(d_out or none_out)]
        if wrt_bias:
            grads.append(self.bias_gradient(grad_y))
        return d_x, grads

    def _backward_in_pairs(
        self,
        grad_y: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        in_factors: Sequence[Tensor],
        out_factors: Sequence[Tensor],
        wrt: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, list[Tensor] | None, list[Tensor] | None]:
        """Return dX and the gradients of both sides, with the matrices of both sides at once.

        KA is needed for dX, and for Z where it was not kept; KC for G, which dX and dKA need.
        """
        by, (wrt_x, wrt_in, wrt_out) = self.plan.backward.by, wrt
        wants_g, wants_ka = wrt_x or wrt_in, wrt_x or (wrt_out and len(kept) == 0)
        wanted: list[Sequence[Tensor]] = []
        if wants_ka:
            wanted.append(in_factors)
        if wants_g:
            wanted.append(out_factors)
        matrices = khatri_rao_pair(wanted, x.dtype, by) if wanted else []
        d_x: Tensor | None = None
        d_matrices: list[Tensor] = []
        groups: list[Sequence[Tensor]] = []
        if wants_g:
            g = matmul_nn(grad_y, matrices[-1])
            if wrt_x:
                d_x = matmul_nt(g, matrices[0])
            if wrt_in:
                d_matrices.append(matmul_tn_unrounded(x, g))
                groups.append(in_factors)
        if wrt_out:
            z = kept[0] if kept else matmul_nn(x, matrices[0])
            d_matrices.append(matmul_tn_unrounded(grad_y, z))
            groups.append(out_factors)
        gradients = mttkrp_pair(d_matrices, groups, by) if groups else []
        return d_x, gradients[0] if wrt_in else None, gradients[-1] if wrt_out else None

    @staticmethod
    def bias_gradient(grad_y: Tensor) -> Tensor:
        """Sum over the batch, (B, N) → (N,)."""
        return grad_y.sum(0)
