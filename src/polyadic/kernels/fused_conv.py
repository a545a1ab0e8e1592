"""A convolution on a GPU: cuBLAS makes the products, Triton kernels make all between them.

The forward has three launches. The first makes KA, KC and the taps, the second Z1 = X KA, and the
third the depthwise stage, the projection with KC and the bias, so that Z2 never stands in memory;
with many out channels the stage and the projection are two launches. The backward has seven: the
matrices; dZ2 = dY KC; one for dZ1, for partial sums of the taps' gradient and for Z2 again; dKC,
dKA and dX; and the gradients of all factors, those of the kernel from the partial sums.

A 1×1 kernel has no stage between the products, so that only the first and the last of the Triton
kernels run. Channels of maps are innermost in memory, and padded with zeros in each group to
r' ≥ r, a multiple of 8.

Axes: b batch, c in channels, n out channels, r rank, s all positions, g groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polyadic.kernels.depthwise import Ints, Stage, Stages
from polyadic.kernels.fused import MOST_ROWS, may_fuse
from polyadic.kernels.pairs import khatri_rao_pair, mttkrp_pair, padded_rank
from polyadic.kernels.projections import as_rows, outer, project, project_back
from polyadic.plans import MOST_FUSED_TAPS, ConvRoute

# Out channels of a group up to which the projection is made in the kernel of the depthwise stage.
# Its programs go through the maps one tile after the other, and with more channels there are more
# maps: with 128 that kernel takes 30.6 µs (28² pixels, 32 images, 184 maps, bfloat16 on an H200,
# November 2026), where Z2 by a kernel without such a chain and a GEMM move bytes of 15 µs at most.
MOST_PROJECTED_CHANNELS = 64


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

    def _matrices(self) -> list[Tensor]:
        """Return KA (c, r'), KC (n, r') and, if there is a stage, the taps (t, r')."""
        sides = [self.ins, self.outs, self.kernels] if self.stage else [self.ins, self.outs]
        return khatri_rao_pair(sides, self.ins[0].dtype)

    def _each(self, kc: Tensor) -> Tensor:
        """Return KC, with groups as (g, n/g, r'): each group has rows that no other has."""
        return kc if self.groups == 1 else kc.view(self.groups, -1, kc.shape[1])

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
        ka, kc, *taps = self._matrices()
        z1 = project(taken, ka, "channels_last", self.groups)
        if self.stage is None:
            y = project(z1, self._each(kc).mT, "channels_last", self.groups, bias)
            return y, (z1,) if keep else ()
        from polyadic.kernels.triton.conv import depthwise_project
        from polyadic.kernels.triton.depthwise import depthwise

        where, size, out = self._where(self.stage, taken.shape[2:])
        if kc.shape[0] // self.groups > MOST_PROJECTED_CHANNELS:
            rows = depthwise(
                as_rows(z1), taps[0], where, _three(size, 1), _three(out, 1), self.groups
            )
            last = _volume(rows, taken.shape[0], out)
            y = project(last, self._each(kc).mT, "channels_last", self.groups, bias)
            return y, (z1, last)[:keep]
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
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, list[list[Tensor]]]:
        """Return the gradients of ``taken``, and of the in, out and kernel factors in this order.

        Args:
            grad_y: (b, n, *s').
            taken: (b, c, *s).
            kept: those of Z1 and Z2 that ``forward`` kept.
            needs: whether the gradients of ``taken``, of the out factors, and of the in and kernel
                factors are needed; those of the out factors are never asked for alone.

        Returns:
            (b, c, *s) or None; for each side a list, empty where it is not needed.
        """
        wrt_x, wrt_out, wrt_rest = needs
        layout, groups, images = "channels_last", self.groups, taken.shape[0]
        ka, kc, *taps = self._matrices()
        kc = self._each(kc)
        d_z1 = project(grad_y, kc, layout, groups)
        z1 = kept[0] if kept else project(taken, ka, layout, groups)
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
        matrices, sides = [], []
        if wrt_rest:
            matrices.append(outer(taken, d_z1, layout, groups))
            sides.append(self.ins)
        if wrt_out:
            each = groups > 1
            matrices.append(outer(grad_y, last, layout, groups, each).reshape(-1, ka.shape[1]))
            sides.append(self.outs)
        if d_taps is not None:
            matrices.append(d_taps)
            sides.append(self.kernels)
        gradients = mttkrp_pair(matrices, sides) if sides else []
        d_in = gradients.pop(0) if wrt_rest else []
        d_out = gradients.pop(0) if wrt_out else []
        d_kernel = gradients.pop(0) if d_taps is not None else []
        d_x = project_back(d_z1, ka, taken, layout, groups) if wrt_x else None
        return d_x, [d_in, d_out, d_kernel]
