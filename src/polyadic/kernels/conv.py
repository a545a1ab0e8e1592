"""Forward and closed-form backward of a CP convolution, as a plan says.

    Z1 = X ×_c KA (in-projection)   Z2 = depthwise(Z1, kernels)   Y = Z2 ×_c KC (out-projection)

Stride, padding and dilation act in the depthwise stage alone; padding commutes with the
in-projection because that has no bias. A weight vector λ (R,) enters as one more kernel factor
with a mode of size 1, and a 1×1 kernel's factors join the in factors: then it is a linear map.

A transposed convolution is the adjoint of a convolution. It has these three steps too, of which the
middle one is a depthwise transposed convolution. With g groups, each group has its own rows of KC
(of KA if transposed), and all groups share the other matrix and the taps. Z1 and Z2 then hold g·R
channels, group by group, and the taps are repeated for each group.

Axes: b batch, c in channels, n out channels, r rank, s all positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyadic.kernels.depthwise import Geometry, Ints, Stage, Stages, stages
from polyadic.kernels.fused_conv import FusedConv, is_fused
from polyadic.kernels.multilinear import khatri_rao, khatri_rao_backward
from polyadic.kernels.projections import in_layout, outer, project, project_back
from polyadic.plans import ConvPlan


def _strided(x: Tensor, skip: Ints) -> Tensor:
    """Return every skip-th position of x (b, c, *s)."""
    for dim, step in enumerate(skip, start=2):
        if step > 1:
            x = x[(slice(None),) * dim + (slice(None, None, step),)]
    return x


def _unstrided(grad: Tensor, like: Tensor, skip: Ints) -> Tensor:
    """Apply the adjoint of ``_strided``: zeros between the positions that were taken."""
    for dim, step in reversed(list(enumerate(skip, start=2))):
        if step > 1:
            size = [*grad.shape]
            size[dim] = like.shape[dim]
            grad = torch.slice_scatter(grad.new_zeros(size), grad, dim, None, None, step)
    return grad


def _taps(
    stage: Stage, kernel_factors: Sequence[Tensor], dtype: torch.dtype, groups: int
) -> Tensor:
    """Return the depthwise kernels (g·r, 1, *k) of one stage; every group has the same ones."""
    columns = khatri_rao([kernel_factors[i] for i in stage.factor_positions], dtype)
    # They are made contiguous here, or each convolution would copy them.
    kernels = columns.t().contiguous().view(-1, 1, *stage.kernel_size)
    return kernels if groups == 1 else kernels.repeat(groups, *[1] * (kernels.dim() - 1))


@dataclass(frozen=True)
class ConvMap:
    """The map (x, bias, *factors) → y with factors = (*out, *in, λ if any, *kernel).

    Args:
        plan: layout, depthwise form and what is kept.
        geometry: kernel size, stride, padding, dilation; whether transposed.
        n_out: number of out factors.
        n_in: number of in factors.
        groups: number of groups of channels.
    """

    plan: ConvPlan
    geometry: Geometry
    n_out: int
    n_in: int
    groups: int = 1

    autograd_backward = False

    @property
    def output_channels_last(self) -> bool:
        """Whether the output comes in channels_last."""
        return self.plan.forward.layout == "channels_last"

    def _split(
        self, factors: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        cut = self.n_out + self.n_in
        return factors[: self.n_out], factors[self.n_out : cut], factors[cut:]

    @property
    def _lifted(self) -> bool:
        """Whether a 1-D convolution is computed as a 2-D one of images with one row."""
        return len(self.geometry.kernel_size) == 1

    def _matrices(
        self, in_factors: Sequence[Tensor], out_factors: Sequence[Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return KA (c, r) and KC (n, r).

        The side that groups do not share is (g, c/g, r) or (g, n/g, r).
        """
        ka, kc = khatri_rao(in_factors, dtype), khatri_rao(out_factors, dtype)
        if self.groups > 1 and self.geometry.transposed:
            ka = ka.view(self.groups, -1, ka.shape[1])
        elif self.groups > 1:
            kc = kc.view(self.groups, -1, kc.shape[1])
        return ka, kc

    def _stages(self, form: str, factors: Sequence[Tensor]) -> Stages:
        return stages(self.geometry, form, len(factors) - self.n_out - self.n_in)

    def forward(
        self, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return y (b, n, *s') and what the plan keeps for the backward beside x and factors."""
        out_factors, in_factors, kernel_factors = self._split(factors)
        route = self.plan.forward
        split, lifted = self._stages(route.depthwise, factors), self._lifted
        x = x.unsqueeze(2) if lifted else x
        maps: list[Tensor] = []
        if is_fused(route, split, x, factors if bias is None else (*factors, bias)):
            fused = self._fused(split, out_factors, in_factors, kernel_factors)
            y, kept = fused.forward(_strided(x, split.skip), bias, self.plan.keep)
            return (y.squeeze(2) if lifted else y), kept
        if route.kind == "dense":
            kernel = in_layout(self._dense(factors, x.dtype), route.layout)
            y = split.dense.forward(in_layout(x, route.layout), kernel, bias, self.groups)
        else:
            if not split.depthwise:
                in_factors = [*kernel_factors, *in_factors]
            ka, kc = self._matrices(in_factors, out_factors, x.dtype)
            z = project(_strided(x, split.skip), ka, route.layout, self.groups)
            # A map that is not kept is freed as soon as the next one has been made from it.
            maps = [z] if self.plan.keep else []
            for stage in split.depthwise:
                taps = _taps(stage, kernel_factors, x.dtype, self.groups)
                z = stage.forward(z, taps, None, taps.shape[0])
            if self.plan.keep == 2 and split.depthwise:
                maps.append(z)
            y = project(z, kc.mT, route.layout, self.groups, bias)
        return (y.squeeze(2) if lifted else y), tuple(maps)

    def _fused(
        self,
        split: Stages,
        out_factors: Sequence[Tensor],
        in_factors: Sequence[Tensor],
        kernel_factors: Sequence[Tensor],
    ) -> FusedConv:
        """Return the fused convolution by these factors; those of a 1×1 kernel join the in side."""
        if not split.depthwise:
            return FusedConv([*kernel_factors, *in_factors], out_factors, (), None, self.groups)
        (stage,) = split.depthwise
        return FusedConv(in_factors, out_factors, kernel_factors, stage, self.groups)

    def _dense(self, factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Build the kernel in torch's layout: (n, c, *k), transposed (c, n, *k)."""
        first, rest = self._first_and_rest(factors)
        inner = khatri_rao(rest, dtype)
        size = self._stages("merged", factors).dense.kernel_size
        kernel = khatri_rao(first, dtype) @ inner.t()
        return kernel.view(kernel.shape[0], inner.shape[0] // math.prod(size), *size)

    def _first_and_rest(
        self, factors: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Factors of the first dimension of torch's kernel, and of all others."""
        out_factors, in_factors, kernel_factors = self._split(factors)
        if self.geometry.transposed:
            return in_factors, [*out_factors, *kernel_factors]
        return out_factors, [*in_factors, *kernel_factors]

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

            dZ2 = dY ×_c KCᵀ   dKC = dY · Z2   (dZ1, dk) = depthwise backward
            dX = dZ1 ×_c KAᵀ   dKA = X · dZ1   (· sums over batch and positions)

        Args:
            grad_y: (b, n, *s').
            x: (b, c, *s).
            kept: what ``forward`` kept; empty to recompute it (as second derivatives need).
            factors: (*out, *in, λ if any, *kernel).
            needs: whether x and each factor needs its gradient.
            wrt_bias: whether that of the bias (n,) is to follow.
        """
        if self._lifted:
            x, grad_y = x.unsqueeze(2), grad_y.unsqueeze(2)
        route = self.plan.backward
        split = self._stages(route.depthwise, factors)
        # The gradients of the out factors alone take few steps, which need no kernel.
        whole = needs[0] or any(needs[1 + self.n_out :])
        if whole and is_fused(route, split, x, (grad_y, *factors)):
            d_x, grads = self._backward_fused(grad_y, x, kept, factors, split, (*needs, wrt_bias))
        else:
            if route.kind == "dense":
                d_x, grads = self._backward_dense(grad_y, x, factors, needs)
            else:
                d_x, grads = self._backward_factorized(grad_y, x, kept, factors, needs)
            if wrt_bias:
                grads = [*grads, self.bias_gradient(grad_y)]
        return (d_x.squeeze(2) if self._lifted and d_x is not None else d_x), grads

    def _backward_dense(
        self, grad_y: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        layout = self.plan.backward.layout
        kernel = self._dense(factors, x.dtype)
        grad_y, x, kernel = (in_layout(t, layout) for t in (grad_y, x, kernel))
        d_x, d_kernel = self._stages("merged", factors).dense.backward(
            grad_y, x, kernel, self.groups, (needs[0], any(needs[1:]))
        )
        if d_kernel is None:
            return d_x, [None] * len(factors)
        d_matrix = d_kernel.reshape(d_kernel.shape[0], -1)
        first, rest = self._first_and_rest(factors)
        d_first = khatri_rao_backward(d_matrix @ khatri_rao(rest, x.dtype), first)
        d_rest = khatri_rao_backward(d_matrix.t() @ khatri_rao(first, x.dtype), rest)
        if self.geometry.transposed:
            return d_x, [*d_rest[: self.n_out], *d_first, *d_rest[self.n_out :]]
        return d_x, [*d_first, *d_rest]

    def _backward_factorized(
        self,
        grad_y: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        factors: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradients of x and of the factors without building a dense kernel.

        The forward is a chain of maps, each linear in its input and in its own factors:

            X  --KA-->  Z1  --taps of stage 1-->  …  --taps of the last stage-->  Z2  --KC-->  Y

        The backward goes through the chain in reverse. At each link it needs the link's input,
        which was kept or is made again, and the gradient of the link's output:

            dKC = Σ dY · Z2         dZ2 = dY ×_c KCᵀ        the out-projection
            dtaps = Σ dZ' · Z       dZ = adjoint of taps    each stage, Z before and Z' behind it
            dKA = Σ X · dZ1         dX = dZ1 ×_c KAᵀ        the in-projection

        (Σ sums over the batch and all positions.) The gradient of each Khatri-Rao matrix, KC, taps
        and KA, then becomes the gradients of its factors by an MTTKRP. A 1×1 kernel has no stages,
        and its factors join those of KA. Each input of a stage is dropped as soon as it has been
        used, so that the next gradient takes its memory.
        """
        out_factors, in_factors, kernel_factors = self._split(factors)
        layout = self.plan.backward.layout
        split = self._stages(self.plan.backward.depthwise, factors)
        wrt_x, wrt_out = needs[0], any(needs[1 : 1 + self.n_out])
        wrt_rest = any(needs[1 + self.n_out :])
        if not split.depthwise:
            in_factors = [*kernel_factors, *in_factors]
        if kept and kept[0].shape[1] != self.groups * in_factors[0].shape[1]:
            # The forward was fused and has kept padded maps; this way of computing cannot use them.
            kept = ()
        ka, kc = self._matrices(in_factors, out_factors, x.dtype)
        taps = [_taps(stage, kernel_factors, x.dtype, self.groups) for stage in split.depthwise]
        taken = _strided(x, split.skip)

        maps = self._inputs_of_stages(taken, kept, ka, taps, split, wrt_out, wrt_rest)
        d_out: list[Tensor] | None = None
        if wrt_out:
            z = kept[1] if len(kept) == 2 else maps[-1]
            d_out = khatri_rao_backward(self._outer(grad_y, z, kc), out_factors)  # from dKC
            del z
        # Z2 has been used and is dropped.
        del maps[len(taps) :]
        none_rest: list[Tensor | None] = [None] * (len(factors) - self.n_out)
        d_first: list[Tensor | None] = [*d_out] if d_out else [None] * self.n_out
        if not (wrt_x or wrt_rest):
            return None, [*d_first, *none_rest]

        d_z = project(grad_y, kc, layout, self.groups)  # dZ2
        d_kernel: list[Tensor | None] = [None] * len(kernel_factors)
        for stage in reversed(split.depthwise):
            weight = taps.pop()
            # dZ and dtaps of this stage
            d_map, d_taps = stage.backward(
                d_z, maps.pop(), weight, weight.shape[0], (True, wrt_rest)
            )
            assert d_map is not None
            d_z = d_map
            del d_map
            if d_taps is not None:
                own = [kernel_factors[i] for i in stage.factor_positions]
                channels = d_taps.shape[0]
                if self.groups == 1:
                    d_columns = d_taps.reshape(channels, -1)
                else:
                    # All groups share the taps, so the gradients of all groups add up.
                    d_columns = d_taps.reshape(self.groups, channels // self.groups, -1).sum(0)
                pieces = khatri_rao_backward(d_columns.t(), own)
                for i, piece in zip(stage.factor_positions, pieces, strict=True):
                    d_kernel[i] = piece
        d_in: list[Tensor | None] = none_rest
        if wrt_rest:
            d_in = [*khatri_rao_backward(self._outer(taken, d_z, ka), in_factors)]  # from dKA
            if split.depthwise:
                d_in = [*d_in, *d_kernel]
            else:
                d_in = [*d_in[len(kernel_factors) :], *d_in[: len(kernel_factors)]]
        if not wrt_x:
            return None, [*d_first, *d_in]
        d_x = project_back(d_z, ka, taken, layout, self.groups)  # dX
        return _unstrided(d_x, x, split.skip), [*d_first, *d_in]

    def _backward_fused(
        self,
        grad_y: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        factors: Sequence[Tensor],
        split: Stages,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """``backward`` by kernels; ``needs`` are of x, of each factor and of the bias."""
        fused = self._fused(split, *self._split(factors))
        taken = _strided(x, split.skip)
        maps = kept if fused.keeps(kept) else ()
        wrt_x, *wrt_factors, wrt_bias = needs
        wrt = wrt_x, any(wrt_factors[: self.n_out]), any(wrt_factors[self.n_out :]), wrt_bias
        d_x, (d_in, d_out, d_kernel), d_bias = fused.backward(grad_y, taken, maps, wrt)
        if not split.depthwise:
            # The factors of a 1×1 kernel stood in front of the in factors.
            cut = len(factors) - self.n_out - self.n_in
            d_in, d_kernel = d_in[cut:], d_in[:cut]
        none_out, none_rest = [None] * self.n_out, [None] * (len(factors) - self.n_out)
        if d_x is not None and taken is not x:
            # ``_unstrided`` can be differentiated, for a clone and two launches more a dimension.
            part, d_x = d_x, torch.zeros_like(x)
            _strided(d_x, split.skip).copy_(part)
        grads = [*(d_out or none_out), *([*d_in, *d_kernel] or none_rest)]
        return d_x, grads if d_bias is None else [*grads, d_bias]

    def _outer(self, x: Tensor, z: Tensor, matrix: Tensor) -> Tensor:
        """Return the gradient of ``matrix``, a Khatri-Rao matrix that projects x to z or z to x."""
        each = matrix.dim() == 3
        total = outer(x, z, self.plan.backward.layout, self.groups, each)
        return total.reshape(-1, total.shape[-1]) if each else total

    def _inputs_of_stages(
        self,
        taken: Tensor,
        kept: Sequence[Tensor],
        ka: Tensor,
        taps: Sequence[Tensor],
        split: Stages,
        wrt_out: bool,
        wrt_rest: bool,
    ) -> list[Tensor]:
        """Return the input of every depthwise stage, and the last output if it is needed.

        If no factor's gradient is wanted, the backward uses only the sizes of these maps, so that
        they have no values then.
        """
        if not (wrt_out or (wrt_rest and taps)):
            size, empty = taken.shape[2:], []
            for stage in split.depthwise:
                shape = (taken.shape[0], self.groups * ka.shape[-1], *size)
                empty.append(taken.new_empty(()).expand(shape))
                size = torch.Size(stage.output_size(size))
            return empty
        maps = [kept[0] if kept else project(taken, ka, self.plan.backward.layout, self.groups)]
        needed = len(taps) if wrt_out and len(kept) < 2 else len(taps) - 1
        for stage, weight in zip(split.depthwise[:needed], taps, strict=False):
            maps.append(stage.forward(maps[-1], weight, None, weight.shape[0]))
        return maps

    @staticmethod
    def bias_gradient(grad_y: Tensor) -> Tensor:
        """Sum over the batch and all positions, (b, n, *s') → (n,)."""
        return grad_y.sum([0, *range(2, grad_y.dim())])
