"""The steps of a convolution's plan, with their costs: a mirror of ``kernels.conv`` on sizes.

With g groups the side they do not share counts the channels of all; the other side is contracted
once for each, so that there are g times as many positions of it, and g·R channels in between.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from polyadic.formats import ConvFormat, Shape
from polyadic.kernels.depthwise import LEAST_FOR_WIDE, WIDEST, Geometry, Stage, Stages, stages
from polyadic.kernels.projections import better_as_rows
from polyadic.planner.machine import Step
from polyadic.planner.steps import (
    gemm,
    khatri_rao_backward_steps,
    khatri_rao_steps,
    tall_steps,
    transpose,
)
from polyadic.plans import ConvPlan, ConvRoute


def _sizes(plan: Stages, size: Shape) -> list[Shape]:
    """Spatial size in front of each stage and behind the last."""
    lifted = (1, *size) if len(size) == 1 else size
    sizes = [tuple(-(-n // step) for n, step in zip(lifted, plan.skip, strict=True))]
    for stage in plan.depthwise:
        sizes.append(stage.output_size(sizes[-1]))
    return sizes


def _layout(name: str, channels: int, positions: int, item: int) -> Step:
    return transpose(f"{name} to channels_last", channels * positions, item)


def _passed(read: int, written: int, route: ConvRoute, item: int) -> int:
    """Bytes of a depthwise convolution, the new memory it writes counted three times.

    Writing takes longer where pages are touched first. In channels_first torch's kernels convert
    what they read and write.
    """
    converted = 0 if route.layout == "channels_last" else 2 * (read + written)
    return item * (read + 3 * written + converted)


def _depthwise(
    name: str, stage: Stage, channels: int, batch: int, before: Shape, after: Shape,
    route: ConvRoute, item: int,
) -> Step:  # fmt: skip
    """Two FLOPs for each tap and position, which are the output's or, transposed, the input's."""
    read, written = (channels * batch * math.prod(size) for size in (before, after))
    taps = math.prod(stage.kernel_size)
    return Step(
        name, "depthwise", 2 * taps * (read if stage.transposed else written),
        _passed(read, written, route, item), 1, elements=written,
        channels_last=route.layout == "channels_last",
    )  # fmt: skip


def _depthwise_backward(
    stage: Stage, channels: int, batch: int, before: Shape, after: Shape,
    route: ConvRoute, item: int,
) -> list[Step]:  # fmt: skip
    """Two convolutions more, at half the rate; for wide taps over copies of what they read."""
    one = _depthwise("", stage, channels, batch, before, after, route, item)
    z, grad = (channels * batch * math.prod(size) for size in (before, after))
    calls, copied = 1, 0
    wide = len(stage.kernel_size) == 2 and stage.kernel_size[1] > WIDEST
    if wide and stage.kernel_size[0] > 1 and channels * math.prod(before) >= LEAST_FOR_WIDE:
        calls = -(-stage.kernel_size[1] // WIDEST)
        copied = 2 * (calls + 1) * z
    d_z = dataclasses.replace(
        one, name="depthwise backward: dZ", padded_flops=2 * one.flops,
        nbytes=_passed(grad, z, route, item), elements=z,
    )  # fmt: skip
    d_taps = dataclasses.replace(
        d_z, name="depthwise backward: dtaps", launches=calls,
        nbytes=_passed(z + grad, 0, route, item) + item * copied,
        elements=channels * math.prod(stage.kernel_size),
    )  # fmt: skip
    return [d_z, d_taps]


class _Sizes:
    """The numbers all steps of one convolution are made of."""

    def __init__(
        self, fmt: ConvFormat, geometry: Geometry, batch: int, size: Shape, route: ConvRoute,
        item: int,
    ) -> None:  # fmt: skip
        self.fmt, self.batch, self.route, self.item = fmt, batch, route, item
        self.plan = stages(geometry, route.depthwise, len(fmt.kernel_size))
        self.sizes = _sizes(self.plan, size)
        self.positions = batch * math.prod(size)
        self.taken = batch * math.prod(self.sizes[0])
        self.out_positions = batch * math.prod(geometry.output_size(size))
        self.rank, self.groups = fmt.rank, fmt.groups
        self.maps = fmt.groups * fmt.rank
        # Channels one group contracts, on either side.
        self.c, self.n = (channels // fmt.groups for channels in fmt.channels)

    @property
    def inner(self) -> Sequence[int]:
        """Modes of the in-projection: a 1×1 kernel's join the in modes."""
        ins, kernel = self.fmt.in_shape, self.fmt.kernel_size
        return ins if self.plan.depthwise else (*kernel, *ins)

    def project(self, name: str, positions: int, k: int, n: int) -> Step:
        if self.route.layout == "channels_first":
            # The positions are the columns of the product.
            return gemm(name, n * self.groups, k, positions, self.item)
        return gemm(name, positions * self.groups, k, n, self.item)

    def outer(self, name: str, channels: int, positions: int, rows: bool) -> list[Step]:
        """Gradient of KA or KC; ``rows``: the side that is no map comes in channels_last."""
        product = gemm(name, channels, positions * self.groups, self.rank, self.item)
        if self.route.layout == "channels_last":
            made = [product]
            if self.groups == 1:
                made = tall_steps(name, channels, positions, self.rank, self.item, views=0)
            if rows:
                return made
            if better_as_rows(self.maps, self.groups * positions // max(self.batch, 1)):
                side = name.split()[-2]
                return [_layout(side, channels * self.groups, positions, self.item), *made]
        partial = self.batch * self.groups * channels * self.rank
        total = Step(
            f"{name} over images", "stream", 0, 2 * self.item * partial, 1, elements=partial
        )
        return [product, total]

    def dense(self, name: str) -> Step:
        fmt, (c, n) = self.fmt, self.fmt.channels
        at = self.positions if fmt.transposed else self.out_positions
        moved = self.positions * c + self.out_positions * n + fmt.dense_parameters
        return Step(
            name, "conv", 2 * at * fmt.dense_parameters, self.item * moved, 1,
            elements=self.out_positions * n, channels_last=self.route.layout == "channels_last",
        )  # fmt: skip

    def kernel_sides(self) -> tuple[Shape, Shape]:
        """Modes of the first dimension of torch's kernel, and of all others."""
        fmt = self.fmt
        if fmt.transposed:
            return fmt.in_shape, (*fmt.out_shape, *fmt.kernel_size)
        return fmt.out_shape, (*fmt.in_shape, *fmt.kernel_size)

    def kernel(self) -> list[Step]:
        """The dense kernel from its factors."""
        first, rest = self.kernel_sides()
        return [
            *khatri_rao_steps("K of the kernel's first side", first, self.rank, self.item),
            *khatri_rao_steps("K of the other side and taps", rest, self.rank, self.item),
            gemm("W = K K'^T", math.prod(first), self.rank, math.prod(rest), self.item),
        ]  # fmt: skip


def conv_forward_steps(
    fmt: ConvFormat,
    geometry: Geometry,
    batch: int,
    size: Shape,
    channels_last: bool,
    route: ConvRoute,
    item: int,
) -> list[Step]:
    """Y by one route; ``channels_last`` says how the input comes."""
    s = _Sizes(fmt, geometry, batch, size, route, item)
    if route.kind == "dense":
        steps = s.kernel()
        if route.layout == "channels_last" and not channels_last:
            steps.append(_layout("X", fmt.channels[0], s.positions, item))
        return [*steps, s.dense("dense convolution")]
    steps = khatri_rao_steps("KA", s.inner, s.rank, item)
    steps.append(s.project("Z1 = X KA", s.taken, s.c, s.rank))
    for stage, before, after in zip(s.plan.depthwise, s.sizes, s.sizes[1:], strict=False):
        steps += khatri_rao_steps("taps", [fmt.kernel_size[i] for i in stage.held], s.rank, item)
        steps.append(_depthwise("depthwise", stage, s.maps, batch, before, after, route, item))
    steps += khatri_rao_steps("KC", fmt.out_shape, s.rank, item)
    return [*steps, s.project("Y = Z2 KC^T", s.out_positions, s.rank, s.n)]


def conv_backward_steps(
    fmt: ConvFormat,
    geometry: Geometry,
    batch: int,
    size: Shape,
    channels_last: bool,
    route: ConvRoute,
    item: int,
    *,
    kept: int,
) -> list[Step]:
    """All gradients by one route, with ``kept`` R-channel maps from the forward.

    The gradient of Y is taken to come in the route's layout.
    """
    s = _Sizes(fmt, geometry, batch, size, route, item)
    if route.kind == "dense":
        return _dense_backward(s, channels_last)
    steps = khatri_rao_steps("KA", s.inner, s.rank, item)
    steps += khatri_rao_steps("KC", fmt.out_shape, s.rank, item)
    if not kept:
        steps.append(s.project("Z1 = X KA again", s.taken, s.c, s.rank))
    through = list(zip(s.plan.depthwise, s.sizes, s.sizes[1:], strict=False))
    for stage, before, after in through if kept < 2 else through[:-1]:
        steps.append(
            _depthwise("depthwise again", stage, s.maps, batch, before, after, route, item)
        )
    steps += [
        *s.outer("dKC = dY Z2", s.n, s.out_positions, rows=True),
        *khatri_rao_backward_steps("MTTKRP out", fmt.out_shape, s.rank, item),
        s.project("dZ2 = dY KC", s.out_positions, s.n, s.rank),
    ]
    for stage, before, after in reversed(through):
        held = [fmt.kernel_size[i] for i in stage.held]
        steps += _depthwise_backward(stage, s.maps, batch, before, after, route, item)
        steps += khatri_rao_backward_steps("MTTKRP taps", held, s.rank, item)
    return [
        *steps,
        *s.outer("dKA = X dZ1", s.c, s.taken, rows=channels_last),
        *khatri_rao_backward_steps("MTTKRP in", s.inner, s.rank, item),
        s.project("dX = dZ1 KA^T", s.taken, s.rank, s.c),
    ]


def _dense_backward(s: _Sizes, channels_last: bool) -> list[Step]:
    steps, item = s.kernel(), s.item
    if s.route.layout == "channels_last" and not channels_last:
        steps.append(_layout("X", s.fmt.channels[0], s.positions, item))
    first, rest = s.kernel_sides()
    rows, columns = math.prod(first), math.prod(rest)
    return [
        *steps,
        s.dense("dX"),
        s.dense("dW"),
        gemm("dK = dW K'", rows, columns, s.rank, item),
        gemm("dK' = dW^T K", columns, rows, s.rank, item),
        *khatri_rao_backward_steps("MTTKRP of the first side", first, s.rank, item),
        *khatri_rao_backward_steps("MTTKRP of the other side and taps", rest, s.rank, item),
    ]


def conv_plan_steps(
    fmt: ConvFormat,
    geometry: Geometry,
    batch: int,
    size: Shape,
    channels_last: bool,
    plan: ConvPlan,
    item: int,
    *,
    training: bool,
) -> tuple[list[Step], list[Step]]:
    """Forward and (if training) backward steps of a plan."""
    where = (fmt, geometry, batch, size, channels_last)
    forward = conv_forward_steps(*where, plan.forward, item)
    kept = plan.keep if plan.forward.kind == "factorized" else 0
    if not training:
        return forward, []
    return forward, conv_backward_steps(*where, plan.backward, item, kept=kept)


def kept_elements(
    fmt: ConvFormat, geometry: Geometry, batch: int, size: Shape, plan: ConvPlan
) -> int:
    """Entries of the input and of the maps a plan keeps for the backward."""
    s = _Sizes(fmt, geometry, batch, size, plan.forward, 1)
    kept = s.positions * fmt.channels[0]
    if plan.forward.kind == "dense" or not plan.keep:
        return kept
    two = plan.keep == 2 and bool(s.plan.depthwise)
    return kept + s.maps * (s.taken + (s.out_positions if two else 0))


def dense_conv_steps(
    fmt: ConvFormat, geometry: Geometry, batch: int, size: Shape, item: int, *, training: bool
) -> list[Step]:
    """What a dense convolution layer does: one convolution forward, two backward."""
    s = _Sizes(fmt, geometry, batch, size, ConvRoute("channels_first", kind="dense"), item)
    return [s.dense(name) for name in (["Y", "dX", "dW"] if training else ["Y"])]
