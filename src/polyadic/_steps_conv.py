"""The steps of a convolution's plan, with their costs: a mirror of ``kernels.conv`` on sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from polyadic._cost import Step
from polyadic._format import ConvFormat, Shape
from polyadic._plan import ConvPlan, ConvRoute
from polyadic._steps import gemm, khatri_rao_backward_steps, khatri_rao_steps
from polyadic.kernels.stages import Geometry, Stage, Stages, stages


def _lifted(size: Shape) -> Shape:
    return (1, *size) if len(size) == 1 else size


def _taken(size: Shape, skip: Shape) -> Shape:
    return tuple(-(-n // step) for n, step in zip(size, skip, strict=True))


def _layout(name: str, channels: int, positions: int, item: int) -> Step:
    elements = channels * positions
    # A transpose reads or writes with a stride: about half the bandwidth of a copy.
    return Step(f"{name} to channels_last", "layout", 0, 4 * item * elements, 1, elements=elements)


def _sizes(plan: Stages, size: Shape) -> list[Shape]:
    """Spatial size in front of each stage and behind the last."""
    sizes = [_taken(_lifted(size), plan.skip)]
    for stage in plan.depthwise:
        sizes.append(stage.output_size(sizes[-1]))
    return sizes


def _depthwise(
    stage: Stage, rank: int, batch: int, before: Shape, after: Shape, route: ConvRoute, item: int,
    *, times: int = 1, name: str = "depthwise",
) -> Step:  # fmt: skip
    positions = batch * math.prod(after)
    flops = 2 * times * rank * positions * math.prod(stage.kernel_size)
    moved = item * rank * batch * (math.prod(before) + math.prod(after)) * times
    return Step(
        name, "depthwise", flops, moved, 2 * times, elements=rank * positions,
        channels_last=route.layout == "channels_last",
    )  # fmt: skip


def _project(name: str, positions: int, k: int, n: int, item: int) -> Step:
    return gemm(name, positions, k, n, item)


def _inner(fmt: ConvFormat, plan: Stages) -> Sequence[int]:
    """Modes of the in-projection: a 1×1 kernel's join the in modes."""
    return fmt.in_shape if plan.depthwise else (*fmt.kernel_size, *fmt.in_shape)


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
    plan = stages(geometry, route.depthwise, len(fmt.kernel_size))
    positions = batch * math.prod(size)
    r, c, n = fmt.rank, fmt.in_channels, fmt.out_channels
    out_positions = batch * math.prod(geometry.output_size(size))
    steps: list[Step] = []
    if route.kind == "dense":
        steps += _kernel_steps(fmt, item)
        if route.layout == "channels_last" and not channels_last:
            steps.append(_layout("X", c, positions, item))
        return [
            *steps,
            _dense_conv("dense convolution", fmt, positions, out_positions, item, route),
        ]
    sizes = _sizes(plan, size)
    taken = batch * math.prod(sizes[0])
    steps += khatri_rao_steps("KA", _inner(fmt, plan), r, item)
    steps.append(_project("Z1 = X KA", taken, c, r, item))
    for stage, before, after in zip(plan.depthwise, sizes, sizes[1:], strict=False):
        steps += khatri_rao_steps("taps", [fmt.kernel_size[i] for i in stage.held], r, item)
        steps.append(_depthwise(stage, r, batch, before, after, route, item))
    steps += khatri_rao_steps("KC", fmt.out_shape, r, item)
    return [*steps, _project("Y = Z2 KC^T", out_positions, r, n, item)]


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
    """All gradients by one route, with ``kept`` R-channel maps from the forward."""
    plan = stages(geometry, route.depthwise, len(fmt.kernel_size))
    positions = batch * math.prod(size)
    r, c, n = fmt.rank, fmt.in_channels, fmt.out_channels
    out_positions = batch * math.prod(geometry.output_size(size))
    inner = (*fmt.in_shape, *fmt.kernel_size)
    steps: list[Step] = []
    if route.kind == "dense":
        steps += _kernel_steps(fmt, item)
        if route.layout == "channels_last" and not channels_last:
            steps.append(_layout("X", c, positions, item))
        steps.append(_dense_conv("dX", fmt, positions, out_positions, item, route))
        steps.append(_dense_conv("dW", fmt, positions, out_positions, item, route))
        taps = math.prod(inner)
        steps += [gemm("dK = dW^T KC", taps, n, r, item), gemm("dKC = dW K", n, taps, r, item)]
        steps += khatri_rao_backward_steps("MTTKRP out", fmt.out_shape, r, item)
        return steps + khatri_rao_backward_steps("MTTKRP in", inner, r, item)
    sizes = _sizes(plan, size)
    taken = batch * math.prod(sizes[0])
    steps += khatri_rao_steps("KA", _inner(fmt, plan), r, item)
    steps += khatri_rao_steps("KC", fmt.out_shape, r, item)
    if not kept:
        steps.append(_project("Z1 = X KA again", taken, c, r, item))
    again = plan.depthwise if kept < 2 else plan.depthwise[:-1]
    for stage, before, after in zip(again, sizes, sizes[1:], strict=False):
        steps.append(
            _depthwise(stage, r, batch, before, after, route, item, name="depthwise again")
        )
    steps += [
        gemm("dKC = dY Z2", n, out_positions, r, item),
        *khatri_rao_backward_steps("MTTKRP out", fmt.out_shape, r, item),
        _project("dZ2 = dY KC", out_positions, n, r, item),
    ]
    for stage, before, after in zip(plan.depthwise, sizes, sizes[1:], strict=False):
        held = [fmt.kernel_size[i] for i in stage.held]
        steps.append(
            _depthwise(
                stage, r, batch, before, after, route, item, times=2, name="depthwise backward"
            )
        )
        steps += khatri_rao_backward_steps("MTTKRP taps", held, r, item)
    return [
        *steps,
        gemm("dKA = X dZ1", c, taken, r, item),
        *khatri_rao_backward_steps("MTTKRP in", _inner(fmt, plan), r, item),
        _project("dX = dZ1 KA^T", taken, r, c, item),
    ]


def _kernel_steps(fmt: ConvFormat, item: int) -> list[Step]:
    """The dense kernel from its factors."""
    inner = (*fmt.in_shape, *fmt.kernel_size)
    return [
        *khatri_rao_steps("KC", fmt.out_shape, fmt.rank, item),
        *khatri_rao_steps("K of in and kernel", inner, fmt.rank, item),
        gemm("W = KC K^T", fmt.out_channels, fmt.rank, math.prod(inner), item, transposed=True),
    ]


def _dense_conv(
    name: str, fmt: ConvFormat, positions: int, out_positions: int, item: int, route: ConvRoute
) -> Step:
    flops = 2 * out_positions * fmt.dense_parameters
    moved = item * (
        positions * fmt.in_channels + out_positions * fmt.out_channels + fmt.dense_parameters
    )
    return Step(
        name, "conv", flops, moved, 2, elements=out_positions * fmt.out_channels,
        channels_last=route.layout == "channels_last",
    )  # fmt: skip


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


def dense_conv_steps(
    fmt: ConvFormat, geometry: Geometry, batch: int, size: Shape, item: int, *, training: bool
) -> list[Step]:
    """What a dense convolution layer does: one convolution forward, two backward."""
    positions = batch * math.prod(size)
    out_positions = batch * math.prod(geometry.output_size(size))
    names = ["Y", "dX", "dW"] if training else ["Y"]
    route = ConvRoute("channels_first", kind="dense")
    return [_dense_conv(name, fmt, positions, out_positions, item, route) for name in names]
