"""Half of a CP linear map by itself, for layers that share an input.

    Y_l = X W_l,   W_l = KA_l KC_lᵀ          Z_l = X KA_l,   Y_l = Z_l KC_lᵀ

A Khatri-Rao product works on each column by itself, so that the Khatri-Rao product of factors that
stand side by side, [A_1,d | … | A_L,d] for every mode d, is [KA_1 | … | KA_L]. One in half of all
columns therefore makes all Z_l in one product, which reads X once, and its backward makes

    dX = Σ_l G_l KA_lᵀ = [G_1 | … | G_L] [KA_1 | … | KA_L]ᵀ,   G_l = dY_l KC_l

in one product too, where separate layers make L products of the size of X and add them up. Each
half is linear in its input and in each factor, and autograd joins them at the Z_l, which are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from polyadic.kernels.multilinear import contract, expand, partials
from polyadic.kernels.pairs import khatri_rao_pair, mttkrp_pair
from polyadic.kernels.products import matmul_nn, matmul_nt, matmul_tn_unrounded
from polyadic.plans import Groups


def _columns(z: Tensor, count: int) -> Tensor:
    """Return the first ``count`` columns of Z or G, with zeros behind them where there are fewer.

    On a GPU matrices have their columns padded with zeros: those of all layers together in the in
    half, and those of each layer in its out half.
    """
    if z.shape[1] >= count:
        return z if z.shape[1] == count else z[:, :count]
    return F.pad(z, (0, count - z.shape[1]))


def _in_one_group(x: Tensor, groups: Groups) -> bool:
    """Whether a GPU contracts all modes with their whole Khatri-Rao matrix."""
    return x.is_cuda and len(groups) == 1


@dataclass(frozen=True)
class Half:
    """One half of a linear map, by factors (n_d, R) with Π n_d = N and Khatri-Rao matrix K (N, R).

    Both halves belong to one multilinear form (see ``multilinear``), in which X (B, N) and Z (B, R)
    stand on either side of K. So the backward of one half takes from that form what the forward of
    the other half computes, and both have the same gradient of K:

        half   map                          gradient of its input   gradient of K
        in     (x, None, *factors) → X K    dZ Kᵀ                   Xᵀ dZ
        out    (z, bias, *factors) → Z Kᵀ   dX K                    dXᵀ Z

    Args:
        expands: whether this is the out half.
        forward_groups: lengths of the groups in which the modes are contracted, or expanded.
        backward_groups: lengths of the groups for the gradients.
    """

    expands: bool
    forward_groups: Groups
    backward_groups: Groups

    output_channels_last = False
    autograd_backward = False

    @property
    def plan(self) -> object:
        """The groups, and whether it is the out half."""
        return self.expands, self.forward_groups, self.backward_groups

    def forward(
        self, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return Z (B, R), to which a GPU may add columns of zeros, or Y (B, N)."""
        groups = self.forward_groups
        if _in_one_group(x, groups):
            matrix = khatri_rao_pair([factors], x.dtype)[0]
            if self.expands:
                return matmul_nt(_columns(x, matrix.shape[1]), matrix, bias), ()
            return matmul_nn(x, matrix), ()
        if self.expands:
            return expand(_columns(x, factors[0].shape[1]), factors, groups, bias), ()
        return contract(x, factors, groups), ()

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        factors: Sequence[Tensor],
        needs: Sequence[bool],
        wrt_bias: bool = False,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradients of the input, and of the factors, which are the MTTKRPs of dK.

        Args:
            grad_y: gradient of the output.
            x: input of the forward.
            kept: nothing, as the forward keeps nothing.
            factors: (n_d, R).
            needs: whether the input and each factor needs its gradient.
            wrt_bias: whether that of the bias (N,) is to follow; the in half has no bias.
        """
        d_x, grads = self._backward(grad_y, x, factors, needs)
        return d_x, [*grads, grad_y.sum(0)] if wrt_bias else grads

    def _backward(
        self, grad_y: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        wrt_x, wrt_factors = needs[0], any(needs[1:])
        wide, narrow = (grad_y, x) if self.expands else (x, grad_y)  # (B, N) and (B, R)
        grads: list[Tensor | None] = [None] * len(factors)
        d_x: Tensor | None = None
        if _in_one_group(x, self.backward_groups):
            if wrt_x:
                matrix = khatri_rao_pair([factors], x.dtype)[0]
                if self.expands:
                    d_x = _columns(matmul_nn(grad_y, matrix), x.shape[1])
                else:
                    d_x = matmul_nt(_columns(grad_y, matrix.shape[1]), matrix)
            if wrt_factors:
                grads = [*mttkrp_pair([matmul_tn_unrounded(wide, narrow)], [factors])[0]]
            return d_x, grads
        d_wide, d_narrow, found = partials(
            wide,
            _columns(narrow, factors[0].shape[1]),
            factors,
            self.backward_groups,
            wrt_x=wrt_x and not self.expands,
            wrt_z=wrt_x and self.expands,
            wrt_factors=wrt_factors,
        )
        if self.expands:
            d_x = None if d_narrow is None else _columns(d_narrow, x.shape[1])
        else:
            d_x = d_wide
        return d_x, [*(found or grads)]
