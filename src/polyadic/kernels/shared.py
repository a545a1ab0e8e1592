"""The two halves of a CP linear map by themselves, for layers that share an input.

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
    """The first columns of Z or G, zeros behind them where there are fewer.

    On a GPU matrices have their columns padded with zeros, those of all layers together in the in
    half and those of each layer in its out half.
    """
    if z.shape[1] >= count:
        return z if z.shape[1] == count else z[:, :count]
    return F.pad(z, (0, count - z.shape[1]))


def _in_one_group(x: Tensor, groups: Groups) -> bool:
    """Whether a GPU contracts all modes with their whole Khatri-Rao matrix."""
    return x.is_cuda and len(groups) == 1


@dataclass(frozen=True)
class InHalf:
    """The map (x, *factors) → Z = X K of x (B, M) and factors (m_d, R).

    Args:
        forward_groups: lengths of the groups in which the modes are contracted.
        backward_groups: the same for the gradients.
    """

    forward_groups: Groups
    backward_groups: Groups

    output_channels_last = False
    autograd_backward = False

    @property
    def plan(self) -> object:
        """The groups."""
        return self.forward_groups, self.backward_groups

    def forward(
        self, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Z (B, R); on a GPU columns of zeros may be added."""
        if _in_one_group(x, self.forward_groups):
            return matmul_nn(x, khatri_rao_pair([factors], x.dtype)[0]), ()
        return contract(x, factors, self.forward_groups), ()

    def backward(
        self,
        grad_z: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        factors: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of x, G Kᵀ, and of the factors, the MTTKRPs of dK = Xᵀ G."""
        wrt_x, wrt_factors = needs[0], any(needs[1:])
        grads: list[Tensor | None] = [None] * len(factors)
        d_x: Tensor | None = None
        if _in_one_group(x, self.backward_groups):
            if wrt_x:
                matrix = khatri_rao_pair([factors], x.dtype)[0]
                d_x = matmul_nt(_columns(grad_z, matrix.shape[1]), matrix)
            if wrt_factors:
                grads = [*mttkrp_pair([matmul_tn_unrounded(x, grad_z)], [factors])[0]]
            return d_x, grads
        grad_z = _columns(grad_z, factors[0].shape[1])
        d_x, _, found = partials(
            x, grad_z, factors, self.backward_groups, wrt_x=wrt_x, wrt_factors=wrt_factors
        )
        return d_x, [*(found or grads)]

    @staticmethod
    def bias_gradient(grad_z: Tensor) -> Tensor:
        """There is no bias."""
        raise NotImplementedError


@dataclass(frozen=True)
class OutHalf:
    """The map (z, bias, *factors) → Y = Z Kᵀ + bias of z (B, R) and factors (n_d, R).

    Args:
        forward_groups: lengths of the groups in which the modes are expanded.
        backward_groups: the same for the gradients.
    """

    forward_groups: Groups
    backward_groups: Groups

    output_channels_last = False
    autograd_backward = False

    @property
    def plan(self) -> object:
        """The groups."""
        return self.forward_groups, self.backward_groups

    def forward(
        self, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Y (B, N)."""
        if _in_one_group(x, self.forward_groups):
            matrix = khatri_rao_pair([factors], x.dtype)[0]
            return matmul_nt(_columns(x, matrix.shape[1]), matrix, bias), ()
        z = _columns(x, factors[0].shape[1])
        return expand(z, factors, self.forward_groups, bias), ()

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        factors: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of z, G = dY K, and of the factors, the MTTKRPs of dK = dYᵀ Z."""
        wrt_z, wrt_factors = needs[0], any(needs[1:])
        grads: list[Tensor | None] = [None] * len(factors)
        d_z: Tensor | None = None
        if _in_one_group(x, self.backward_groups):
            if wrt_z:
                d_z = matmul_nn(grad_y, khatri_rao_pair([factors], x.dtype)[0])
                d_z = _columns(d_z, x.shape[1])
            if wrt_factors:
                grads = [*mttkrp_pair([matmul_tn_unrounded(grad_y, x)], [factors])[0]]
            return d_z, grads
        z = _columns(x, factors[0].shape[1])
        _, d_z, found = partials(
            grad_y, z, factors, self.backward_groups, wrt_z=wrt_z, wrt_factors=wrt_factors
        )
        d_z = None if d_z is None else _columns(d_z, x.shape[1])
        return d_z, [*(found or grads)]

    @staticmethod
    def bias_gradient(grad_y: Tensor) -> Tensor:
        """Sum over the batch, (B, N) → (N,)."""
        return grad_y.sum(0)
