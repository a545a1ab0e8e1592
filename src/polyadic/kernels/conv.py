"""Forward and closed-form backward of a CP convolution, as a plan says.

    Z1 = X ×_c KA (in-projection)   Z2 = depthwise(Z1, kernels)   Y = Z2 ×_c KC (out-projection)

Stride, padding and dilation act in the depthwise stage alone; padding commutes with the
in-projection because that has no bias. A weight vector λ (R,) enters as one more kernel factor
with a mode of size 1, and a 1×1 kernel's factors join the in factors: then it is a linear map.

Axes: b batch, c in channels, n out channels, r rank, s all positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyadic._plan import ConvPlan
from polyadic.kernels.modes import accumulate_dtype, khatri_rao, khatri_rao_backward
from polyadic.kernels.stages import Geometry, Ints, Stage, Stages, stages


def _is_rows(x: Tensor) -> bool:
    """Whether the channels are innermost, so that positions are rows of a matrix."""
    return x.stride(1) == 1


def _rows(x: Tensor) -> Tensor:
    """(b, c, *s) → (b·s, c); a view where the channels are innermost."""
    return x.movedim(1, -1).reshape(x.shape[0] * math.prod(x.shape[2:]), x.shape[1])


def _columns(x: Tensor) -> Tensor:
    """(b, c, *s) → (b, c, s); reshape, unlike flatten, has a rule for batched gradients."""
    return x.reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:]))


def _volume(rows: Tensor, like: Tensor) -> Tensor:
    """(b·s, r) or (b, s, r) → (b, r, *s) with channels innermost, b and s those of ``like``."""
    return rows.view(like.shape[0], *like.shape[2:], rows.shape[-1]).movedim(-1, 1)


def _project(x: Tensor, matrix: Tensor, layout: str, bias: Tensor | None = None) -> Tensor:
    """Contract the channels: (b, c, *s) with (c, r) → (b, r, *s), in the layout asked for.

    To channels_last from an input that is not: the GEMM reads the input transposed, so that no
    pass over it is spent on conversion.
    """
    if layout == "channels_first":
        y = torch.matmul(matrix.t(), _columns(x)).view(x.shape[0], matrix.shape[1], *x.shape[2:])
        return y if bias is None else y + bias.view(-1, *[1] * (x.dim() - 2))
    if _is_rows(x):
        rows = _rows(x)
        return _volume(rows @ matrix if bias is None else torch.addmm(bias, rows, matrix), x)
    columns, matrices = _columns(x).transpose(1, 2), matrix.expand(x.shape[0], *matrix.shape)
    if bias is None:
        return _volume(torch.bmm(columns, matrices), x)
    return _volume(torch.baddbmm(bias.expand(1, 1, -1), columns, matrices), x)


def _outer(x: Tensor, z: Tensor, layout: str) -> Tensor:
    """Gradient of a projection's matrix: Σ_{b,s} x[b, c, s] z[b, r, s] → (c, r).

    A sum over the batch taken here is of half-precision terms already rounded; it stays in fp32.
    """
    if layout == "channels_last" and _is_rows(x):
        return _rows(x).t() @ _rows(z)
    return torch.bmm(_columns(x), _columns(z).transpose(1, 2)).sum(
        0, dtype=accumulate_dtype(x.dtype)
    )


def _in_layout(x: Tensor, layout: str) -> Tensor:
    """Return the same tensor, converted to ``layout`` where it is in another."""
    if layout == "channels_first":
        return x.contiguous()
    # contiguous(memory_format=torch.channels_last) does the same but is refused under vmap.
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _strided(x: Tensor, skip: Ints) -> Tensor:
    """Every skip-th position of x (b, c, *s)."""
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


def _taps(stage: Stage, kernel_factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Depthwise kernels (r, 1, *k) of one stage."""
    columns = khatri_rao([kernel_factors[i] for i in stage.held], dtype)
    return columns.t().reshape(-1, 1, *stage.kernel_size)


@dataclass(frozen=True)
class ConvMap:
    """The map (x, bias, *factors) → y with factors = (*out, *in, λ if any, *kernel).

    Args:
        plan: layout, depthwise form and what is kept.
        geometry: kernel size, stride, padding, dilation.
        n_out: number of out factors.
        n_in: number of in factors.
    """

    plan: ConvPlan
    geometry: Geometry
    n_out: int
    n_in: int

    def _split(
        self, factors: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        cut = self.n_out + self.n_in
        return factors[: self.n_out], factors[self.n_out : cut], factors[cut:]

    @property
    def _lifted(self) -> bool:
        return len(self.geometry.kernel_size) == 1

    def _stages(self, form: str, factors: Sequence[Tensor]) -> Stages:
        return stages(self.geometry, form, len(factors) - self.n_out - self.n_in)

    def forward(
        self, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return y (b, n, *s') and what the plan keeps for the backward beside x and factors."""
        out_factors, in_factors, kernel_factors = self._split(factors)
        route = self.plan.forward
        plan = self._stages(route.depthwise, factors)
        x = x.unsqueeze(2) if self._lifted else x
        maps: list[Tensor] = []
        if route.kind == "dense":
            kernel = _in_layout(self._dense(factors, x.dtype), route.layout)
            y = plan.dense.forward(_in_layout(x, route.layout), kernel, bias, 1)
        else:
            if not plan.depthwise:
                in_factors = [*kernel_factors, *in_factors]
            ka = khatri_rao(in_factors, x.dtype)
            maps = [_project(_strided(x, plan.skip), ka, route.layout)]
            for stage in plan.depthwise:
                taps = _taps(stage, kernel_factors, x.dtype)
                maps = [maps[0], stage.forward(maps[-1], taps, None, taps.shape[0])]
            y = _project(maps[-1], khatri_rao(out_factors, x.dtype).t(), route.layout, bias)
        return (y.squeeze(2) if self._lifted else y), tuple(maps[: self.plan.keep])

    def _dense(self, factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Build the kernel (n, c, *k)."""
        out_factors, in_factors, kernel_factors = self._split(factors)
        inner = khatri_rao([*in_factors, *kernel_factors], dtype)
        size = self._stages("merged", factors).dense.kernel_size
        kernel = khatri_rao(out_factors, dtype) @ inner.t()
        return kernel.view(kernel.shape[0], inner.shape[0] // math.prod(size), *size)

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        factors: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of x and of the factors.

            dZ2 = dY ×_c KCᵀ   dKC = dY · Z2   (dZ1, dk) = depthwise backward
            dX = dZ1 ×_c KAᵀ   dKA = X · dZ1   (· sums over batch and positions)

        Args:
            grad_y: (b, n, *s').
            x: (b, c, *s).
            kept: what ``forward`` kept; empty to recompute it (as second derivatives need).
            factors: (*out, *in, λ if any, *kernel).
            needs: whether x and each factor needs its gradient.
        """
        if self._lifted:
            x, grad_y = x.unsqueeze(2), grad_y.unsqueeze(2)
        if self.plan.backward.kind == "dense":
            d_x, grads = self._backward_dense(grad_y, x, factors, needs)
        else:
            d_x, grads = self._backward_factorized(grad_y, x, kept, factors, needs)
        return (d_x.squeeze(2) if self._lifted and d_x is not None else d_x), grads

    def _backward_dense(
        self, grad_y: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        out_factors, in_factors, kernel_factors = self._split(factors)
        layout = self.plan.backward.layout
        kernel = self._dense(factors, x.dtype)
        grad_y, x, kernel = (_in_layout(t, layout) for t in (grad_y, x, kernel))
        d_x, d_kernel = self._stages("merged", factors).dense.backward(
            grad_y, x, kernel, 1, (needs[0], any(needs[1:]))
        )
        if d_kernel is None:
            return d_x, [None] * len(factors)
        d_matrix = d_kernel.reshape(d_kernel.shape[0], -1)
        inner = [*in_factors, *kernel_factors]
        d_out = khatri_rao_backward(d_matrix @ khatri_rao(inner, x.dtype), out_factors)
        d_inner = khatri_rao_backward(d_matrix.t() @ khatri_rao(out_factors, x.dtype), inner)
        return d_x, [*d_out, *d_inner]

    def _backward_factorized(
        self,
        grad_y: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        factors: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        out_factors, in_factors, kernel_factors = self._split(factors)
        layout = self.plan.backward.layout
        plan = self._stages(self.plan.backward.depthwise, factors)
        if not plan.depthwise:
            in_factors = [*kernel_factors, *in_factors]
        wrt_x, wrt_out = needs[0], any(needs[1 : 1 + self.n_out])
        wrt_rest = any(needs[1 + self.n_out :])
        ka, kc = khatri_rao(in_factors, x.dtype), khatri_rao(out_factors, x.dtype)
        taps = [_taps(stage, kernel_factors, x.dtype) for stage in plan.depthwise]
        taken = _strided(x, plan.skip)

        maps = self._inputs_of_stages(taken, kept, ka, taps, plan, wrt_out, wrt_rest)
        d_out: list[Tensor] | None = None
        if wrt_out:
            z2 = kept[1] if len(kept) == 2 else maps[-1]
            d_out = khatri_rao_backward(_outer(grad_y, z2, layout), out_factors)
        none_rest: list[Tensor | None] = [None] * (len(factors) - self.n_out)
        d_first: list[Tensor | None] = [*d_out] if d_out else [None] * self.n_out
        if not (wrt_x or wrt_rest):
            return None, [*d_first, *none_rest]

        d_z = _project(grad_y, kc, layout)
        d_kernel: list[Tensor | None] = [None] * len(kernel_factors)
        for stage, z, weight in reversed(
            list(zip(plan.depthwise, maps[: len(taps)], taps, strict=True))
        ):
            d_map, d_taps = stage.backward(d_z, z, weight, weight.shape[0], (True, wrt_rest))
            assert d_map is not None
            d_z = d_map
            if d_taps is not None:
                held = [kernel_factors[i] for i in stage.held]
                pieces = khatri_rao_backward(d_taps.reshape(d_taps.shape[0], -1).t(), held)
                for i, piece in zip(stage.held, pieces, strict=True):
                    d_kernel[i] = piece
        d_in: list[Tensor | None] = none_rest
        if wrt_rest:
            d_in = [*khatri_rao_backward(_outer(taken, d_z, layout), in_factors)]
            if plan.depthwise:
                d_in = [*d_in, *d_kernel]
            else:
                d_in = [*d_in[len(kernel_factors) :], *d_in[: len(kernel_factors)]]
        d_x = _unstrided(_project(d_z, ka.t(), layout), x, plan.skip) if wrt_x else None
        return d_x, [*d_first, *d_in]

    def _inputs_of_stages(
        self,
        taken: Tensor,
        kept: Sequence[Tensor],
        ka: Tensor,
        taps: Sequence[Tensor],
        plan: Stages,
        wrt_out: bool,
        wrt_rest: bool,
    ) -> list[Tensor]:
        """Input of every depthwise stage and, where needed and not kept, the last one's output.

        Where no factor's gradient is wanted the sizes are all the backward asks of them.
        """
        if not (wrt_out or (wrt_rest and taps)):
            size, empty = taken.shape[2:], []
            for stage in plan.depthwise:
                shape = (taken.shape[0], ka.shape[1], *size)
                empty.append(taken.new_empty(()).expand(shape))
                size = torch.Size(stage.output_size(size))
            return empty
        maps = [kept[0] if kept else _project(taken, ka, self.plan.backward.layout)]
        needed = len(taps) if wrt_out and len(kept) < 2 else len(taps) - 1
        for stage, weight in zip(plan.depthwise[:needed], taps, strict=False):
            maps.append(stage.forward(maps[-1], weight, None, weight.shape[0]))
        return maps

    @staticmethod
    def bias_gradient(grad_y: Tensor) -> Tensor:
        """Sum over batch and positions, (b, n, *s') → (n,)."""
        return grad_y.sum([0, *range(2, grad_y.dim())])
