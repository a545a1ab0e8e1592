"""A convolution on a GPU: cuBLAS makes the products, Triton kernels make all between them.

The forward has three launches. The first makes KA, KC and the taps, the second Z1 = X KA, and the
third the depthwise stage, the projection with KC and the bias, so that Z2 never stands in memory;
with many out channels the stage and the projection are two launches. The backward has seven: the
matrices, and partial sums of the bias's gradient; dZ2 = dY KC; one for dZ1, for partial sums of the
taps' gradient and for Z2 again; dKC, dKA and dX; and the gradients of all factors and of the bias,
those of the kernel and of the bias from the partial sums.

A 1×1 kernel has no stage between the products, so that only the first and the last of the Triton
kernels run. Channels of maps are innermost in memory, and padded with zeros in each group to
r' ≥ r, a multiple of 8.

Launches beyond these: one where Z1 is made again; one for each of X and dY that has to be converted
to channels_last; and with several groups one for a bias behind a 1×1 kernel.

Axes: b batch, c in channels, n out channels, r rank, s all positions, g groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyadic.kernels.depthwise import Ints, Stage, Stages
from polyadic.kernels.fused import MOST_ROWS, may_fuse
from polyadic.kernels.pairs import (
    launch_khatri_raos,
    launch_khatri_raos_and_sums,
    launch_mttkrps,
    padded_rank,
)
from polyadic.kernels.products import matmul_tn_in_float32
from polyadic.kernels.projections import (
    as_rows,
    better_as_rows,
    in_layout,
    is_rows,
    outer_of_images,
    project,
    project_back,
)
from polyadic.plans import MOST_FUSED_TAPS, ConvRoute

# Out channels up to which the projection is made in the kernel of the depthwise stage, which saves
# a launch. Its programs go through the maps one tile after the other, and load each tap of a
# position apart: with 128 channels (28² pixels, 184 maps) that kernel takes 24.5 µs and with 64
# (56², 88) it takes 35.7, where the stage alone takes 9.4 and 20.1, and a GEMM the rest in less (32
# images, bfloat16 on an H200, November 2026). With several groups it is always made there: apart,
# it would be a product for each group and a pass of its own for the bias.
MOST_PROJECTED_CHANNELS = 32


def is_fused(route: ConvRoute, plan: Stages, x: Tensor, factors: Sequence[Tensor]) -> bool:
    """Whether Triton kernels compute one direction of a convolution of x (b, c, *s)."""
    if route.by == "torch" or plan.dense.transposed or not may_fuse(x, factors):
        return False
    positions = x.shape[0] * math.prod(x.shape[2:])
    return math.prod(plan.dense.kernel_size) <= MOST_FUSED_TAPS and positions <= MOST_ROWS


def _three(values: Sequence[int], missing: int) -> tuple[int, int, int]:
    """Return the values for three dimensions, with ``missing`` in front for each that lacks."""
    first, second, third = (*[missing] * (3 - len(values)), *values)
    return first, second, third


def _volume(rows: Tensor, images: int, size: Sequence[int]) -> Tensor:
    """(b·s, r) → (b, r, *s)."""
    return rows.view(images, *size, rows.shape[1]).movedim(-1, 1)


@dataclass(frozen=True)
class FusedConv:
    """One convolution by these factors.

    Args:
        ins: in factors; without a stage those of the 1×1 kernel too.
        outs: out factors.
        kernels: kernel factors, those of the stage.
        stage: the depthwise stage, or None.
        groups: groups of channels.
    """

    ins: Sequence[Tensor]
    outs: Sequence[Tensor]
    kernels: Sequence[Tensor]
    stage: Stage | None
    groups: int

    def _sides(self) -> list[Sequence[Tensor]]:
        """Return the factors of KA (c, r'), of KC (n, r') and, if there is a stage, of the taps."""
        return [self.ins, self.outs, self.kernels] if self.stage else [self.ins, self.outs]

    def _as_wanted(self, x: Tensor) -> Tensor:
        """Return x, as rows if there are groups, whose products read no other layout."""
        return x if self.groups == 1 else in_layout(x, "channels_last")

    def _out(self, z: Tensor, kc: Tensor, bias: Tensor | None) -> Tensor:
        """Return Y = Z KCᵀ + bias: (b, g·r', *s) → (b, n, *s)."""
        if self.groups == 1:
            return project(z, kc.mT, "channels_last", 1, bias)
        return self._each(z, kc.view(self.groups, -1, kc.shape[1]).mT, bias)

    def _out_back(self, d_y: Tensor, kc: Tensor) -> Tensor:
        """Return dZ = dY KC: (b, n, *s) → (b, g·r', *s)."""
        if self.groups == 1:
            return project(d_y, kc, "channels_last")
        return self._each(d_y, kc.view(self.groups, -1, kc.shape[1]), None)

    def _each(self, maps: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply each group of (b, g·k, *s) with its own of (g, k, m): (b, g·m, *s)."""
        groups, k, m = matrices.shape
        rows = as_rows(maps)
        result = rows.new_empty((rows.shape[0], groups, m))
        # Written where it belongs; without ``out`` the groups would have to be put together.
        torch.bmm(rows.view(-1, groups, k).transpose(0, 1), matrices, out=result.transpose(0, 1))
        flat = result.view(rows.shape[0], groups * m)
        if bias is not None:
            flat.add_(bias)
        return _volume(flat, maps.shape[0], maps.shape[2:])

    def keeps(self, kept: Sequence[Tensor]) -> bool:
        """Whether these maps were kept by this class; maps of other routes are not padded."""
        return bool(kept) and kept[0].shape[1] == self.groups * padded_rank(self.ins[0].shape[1])

    def forward(
        self, taken: Tensor, bias: Tensor | None, keep: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return y (b, n, *s'), and of the maps Z1 and Z2 the first ``keep``.

        Args:
            taken: (b, c, *s), the positions of x that are left by the strides of 1×1 kernels.
            bias: (n,) or None.
            keep: how many maps are kept.
        """
        ka, kc, *taps = launch_khatri_raos(self._sides(), taken.dtype)
        z1 = project(self._as_wanted(taken), ka, "channels_last", self.groups)
        if self.stage is None:
            return self._out(z1, kc, bias), (z1,) if keep else ()
        from polyadic.kernels.triton.conv import depthwise_project
        from polyadic.kernels.triton.depthwise import depthwise

        where, size, out = self._where(self.stage, taken.shape[2:])
        if self.groups == 1 and kc.shape[0] > MOST_PROJECTED_CHANNELS:
            rows = depthwise(as_rows(z1), taps[0], where, _three(size, 1), _three(out, 1), 1)
            last = _volume(rows, taken.shape[0], out)
            return self._out(last, kc, bias), (z1, last)[:keep]
        rows, z2 = depthwise_project(
            as_rows(z1),
            taps[0],
            kc,
            bias,
            where,
            _three(size, 1),
            _three(out, 1),
            self.groups,
            keep=keep == 2,
        )
        y = _volume(rows, taken.shape[0], out)
        maps = [z1] if z2 is None else [z1, _volume(z2, taken.shape[0], out)]
        return y, tuple(maps) if keep else ()

    @staticmethod
    def _where(stage: Stage, size: Ints) -> tuple[Any, Ints, Ints]:
        """Return the stage in three dimensions, and the spatial sizes before and after it."""
        from polyadic.kernels.triton.depthwise import Where

        where = Where(
            _three(stage.kernel_size, 1),
            _three(stage.stride, 1),
            _three(stage.padding, 0),
            _three(stage.dilation, 1),
        )
        return where, tuple(size), tuple(stage.output_size(size))

    def backward(
        self,
        grad_y: Tensor,
        taken: Tensor,
        kept: Sequence[Tensor],
        needs: tuple[bool, bool, bool, bool],
    ) -> tuple[Tensor | None, list[list[Tensor]], Tensor | None]:
        """Return the gradients of ``taken``; of the in, out and kernel factors; and of the bias.

        Args:
            grad_y: (b, n, *s').
            taken: (b, c, *s).
            kept: those of Z1 and Z2 that ``forward`` kept.
            needs: whether the gradients of ``taken``, of the out factors, of the in and kernel
                factors, and of the bias are needed; the first or the third is.

        Returns:
            (b, c, *s) or None; for each side a list, empty where it is not needed; (n,) or None.
        """
        wrt_x, wrt_out, wrt_rest, wrt_bias = needs
        groups, images = self.groups, taken.shape[0]
        grad_y, sides = in_layout(grad_y, "channels_last"), self._sides()
        sums: Tensor | None = None
        # Where no factor needs a gradient, nothing adds the sums up.
        if wrt_bias and (wrt_rest or wrt_out):
            matrices, sums = launch_khatri_raos_and_sums(sides, taken.dtype, as_rows(grad_y))
        else:
            matrices = launch_khatri_raos(sides, taken.dtype)
        ka, kc, *taps = matrices
        d_z1 = self._out_back(grad_y, kc)
        maps = self._as_wanted(taken) if wrt_rest or not kept else taken
        z1 = kept[0] if kept else project(maps, ka, "channels_last", groups)
        last, d_taps = z1, None
        if self.stage is not None:
            from polyadic.kernels.triton.depthwise import depthwise_backward

            where, size, out = self._where(self.stage, taken.shape[2:])
            rows, d_taps, again = depthwise_backward(
                as_rows(z1),
                as_rows(d_z1),
                taps[0],
                where,
                _three(size, 1),
                _three(out, 1),
                groups,
                wrt_taps=wrt_rest,
                again=wrt_out and len(kept) < 2,
            )
            d_z1 = _volume(rows, images, size)
            last = kept[1] if len(kept) == 2 else z1
            last = last if again is None else _volume(again, images, out)
        d_matrices, wanted = [], []
        if wrt_rest:
            d_matrices.append(self._outer(maps, d_z1))
            wanted.append(self.ins)
        if wrt_out:
            d_matrices.append(self._outer_of_each(grad_y, last))
            wanted.append(self.outs)
        if d_taps is not None:
            d_matrices.append(d_taps)
            wanted.append(self.kernels)
        gradients = launch_mttkrps(d_matrices, wanted, sums=sums) if wanted else []
        d_in = gradients.pop(0) if wrt_rest else []
        d_out = gradients.pop(0) if wrt_out else []
        d_kernel = gradients.pop(0) if d_taps is not None else []
        d_x = project_back(d_z1, ka, taken, "channels_last", groups) if wrt_x else None
        d_bias = as_rows(grad_y).sum(0) if wrt_bias and sums is None else None
        return d_x, [d_in, d_out, d_kernel], d_bias if sums is None else gradients[0][0]

    def _outer(self, x: Tensor, z: Tensor) -> Tensor:
        """Return dKA (c, r') = Σ x[b, c, s] z[b, r, s], or a piece (b, c, r') of each image."""
        if not is_rows(x) and better_as_rows(z.shape[1], math.prod(x.shape[2:])):
            x = in_layout(x, "channels_last")
        if not is_rows(x):
            return outer_of_images(x, z)
        # All groups share the matrix, so that a group is one more row of each position.
        rows, maps = as_rows(x), as_rows(z)
        return matmul_tn_in_float32(
            rows.view(-1, rows.shape[1] // self.groups), maps.view(-1, maps.shape[1] // self.groups)
        )

    def _outer_of_each(self, grad_y: Tensor, z: Tensor) -> Tensor:
        """Return dKC (n, r') = Σ grad_y[b, n, s] z[b, r, s], group by group."""
        rows, maps = as_rows(grad_y), as_rows(z)
        if self.groups == 1:
            return matmul_tn_in_float32(rows, maps)
        rows, maps = (t.view(t.shape[0], self.groups, -1) for t in (rows, maps))
        return torch.bmm(rows.permute(1, 2, 0), maps.transpose(0, 1)).view(-1, maps.shape[2])
