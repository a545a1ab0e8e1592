"""Plans of a convolution, the steps of each plan, and the cheapest plan for a request.

The steps mirror ``kernels.conv``. There are few routes, so the planner prices each of them, and it
chooses the forward and the backward independently.

With g groups, the groups share the matrix of one side and each has its own rows of the other side's
matrix. Between the projections there are g·R channels. Each projection contracts the channels of
one group at a time, so it is priced as one product with g times as many positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from polyadic.formats import ConvFormat, Shape
from polyadic.kernels.backend import serves
from polyadic.kernels.cpu import WIDE_COLUMNS, has_wide_weight_gradient
from polyadic.kernels.depthwise import Geometry, Stage, Stages, stages
from polyadic.kernels.fused_conv import MOST_PROJECTED_CHANNELS
from polyadic.kernels.projections import better_as_rows
from polyadic.planner.calibrated import machine_for
from polyadic.planner.linear import Steps
from polyadic.planner.multilinear import khatri_rao_backward_steps, khatri_rao_steps
from polyadic.planner.request import Request
from polyadic.planner.steps import Step, gemm, stream, transpose
from polyadic.plans import ConvPlan, ConvRoute, Memory, fused_by_triton

# How many maps of R channels a memory level keeps for the backward.
KEPT_MAPS: dict[Memory, int] = {"fast": 2, "balanced": 1, "least": 0}


def _format(request: Request) -> ConvFormat:
    assert isinstance(request.format, ConvFormat)
    return request.format


def _geometry(request: Request) -> Geometry:
    assert request.geometry is not None
    return request.geometry


def candidates(request: Request) -> list[ConvPlan]:
    """List the plans that take one route in both directions."""
    keep = KEPT_MAPS[request.memory]
    routes = [
        ConvRoute(layout, form)
        for layout in ("channels_last", "channels_first")
        for form in ("merged", "separable")
    ]
    if serves("convolution", request.device, request.dtype) and fused_by_triton(_format(request)):
        routes.append(ConvRoute(by="triton"))
    if request.rebuild:
        routes += [
            ConvRoute("channels_last", kind="dense"),
            ConvRoute("channels_first", kind="dense"),
        ]
    return [ConvPlan(route, route, keep if route.kind == "factorized" else 0) for route in routes]


def simplest(request: Request) -> ConvPlan:
    """Return the plan for sizes that a compiler does not know; it is right for any sizes."""
    return ConvPlan(ConvRoute(), ConvRoute(), KEPT_MAPS[request.memory])


def choose(request: Request) -> ConvPlan:
    """Return the cheapest plan for the request as it is; ``choice.choose`` remembers it."""
    machine = machine_for(request)
    routes = [plan.forward for plan in candidates(request)]
    if request.is_half:
        # Each stage rounds its result. Separable stages round once more than merged ones, and would
        # exceed our limit of twice the error of a dense layer.
        routes = [route for route in routes if route.depthwise == "merged"]
    forward_routes = routes
    if request.channels_last:
        # As torch's layers do, ours return the memory layout that they are given.
        forward_routes = [route for route in routes if route.layout == "channels_last"]
    forward = min(forward_routes, key=lambda route: machine.total(forward_steps(request, route)))
    kept = KEPT_MAPS[request.memory] if forward.kind == "factorized" else 0
    backward = min(
        routes, key=lambda route: machine.total(backward_steps(request, route, kept=kept))
    )
    return ConvPlan(forward, backward, kept if backward.kind == "factorized" else 0)


def steps(request: Request, plan: ConvPlan) -> Steps:
    """List the steps of a plan, forward and backward."""
    kept = plan.keep if plan.forward.kind == "factorized" else 0
    return (
        forward_steps(request, plan.forward),
        backward_steps(request, plan.backward, kept=kept),
    )


def _sizes(split: Stages, size: Shape) -> list[Shape]:
    """List the spatial sizes before each stage and after the last one."""
    lifted = (1, *size) if len(size) == 1 else size
    sizes = [tuple(-(-n // step) for n, step in zip(lifted, split.skip, strict=True))]
    for stage in split.depthwise:
        sizes.append(stage.output_size(sizes[-1]))
    return sizes


class _Sizes:
    """The sizes of one convolution by one route, and the steps that are made of them."""

    def __init__(self, request: Request, route: ConvRoute) -> None:
        fmt, geometry = _format(request), _geometry(request)
        self.request, self.fmt, self.route = request, fmt, route
        self.batch, size, self.item = request.batch, request.size, request.item
        self.stages = stages(geometry, route.depthwise, len(fmt.kernel_size))
        self.sizes = _sizes(self.stages, size)
        self.positions = self.batch * math.prod(size)
        self.taken = self.batch * math.prod(self.sizes[0])
        self.out_positions = self.batch * math.prod(geometry.output_size(size))
        self.rank, self.groups = fmt.rank, fmt.groups
        self.maps = fmt.groups * fmt.rank
        # c in channels and n out channels belong to one group.
        self.c, self.n = (channels // fmt.groups for channels in fmt.channels)

    @property
    def inner(self) -> Sequence[int]:
        """Modes of the in-projection, which those of a 1×1 kernel join."""
        ins, kernel = self.fmt.in_shape, self.fmt.kernel_size
        return ins if self.stages.depthwise else (*kernel, *ins)

    @property
    def depthwise_taps(self) -> int:
        """Number of taps of the merged depthwise convolution."""
        return math.prod(self.fmt.kernel_size)

    def taps(self, stage: Stage) -> list[int]:
        """List the modes of the kernel factors that make the taps of one stage."""
        return [self.fmt.kernel_size[i] for i in stage.factor_positions]

    def project(self, name: str, positions: int, k: int, n: int) -> Step:
        """Price a projection of k to n channels at each of so many positions, group by group."""
        if self.route.layout == "channels_first":
            # In channels_first the positions are the columns of the product, not its rows.
            return gemm(self.request, name, n * self.groups, k, positions)
        return gemm(self.request, name, positions * self.groups, k, n)

    def outer(self, name: str, channels: int, positions: int, rows: bool) -> list[Step]:
        """Price the gradient of KA or KC; ``rows`` says that X (or dY) comes in channels_last."""
        product = gemm(self.request, name, channels, positions * self.groups, self.rank)
        if self.route.layout == "channels_last":
            if rows:
                return [product]
            if better_as_rows(self.maps, self.groups * positions // max(self.batch, 1)):
                side = name.split()[-2]
                return [self.to_rows(side, channels * self.groups, positions), product]
        partial = self.batch * self.groups * channels * self.rank
        return [product, stream(f"{name} over images", 2 * self.item * partial, partial)]

    def to_rows(self, name: str, channels: int, positions: int) -> Step:
        """Price the conversion of a map to channels_last."""
        return transpose(self.request, f"{name} to channels_last", channels * positions)

    def passed(self, read: int, written: int) -> int:
        """Count the bytes that a depthwise convolution moves.

        On a CPU, elements written to new memory count three times, because the first write to a
        page takes longer. In channels_first, torch's kernels convert what they read and write.
        """
        if not self.request.on_cpu:
            return self.item * (read + written)
        converted = 0 if self.route.layout == "channels_last" else 2 * (read + written)
        return self.item * (read + 3 * written + converted)

    def depthwise(self, name: str, stage: Stage, before: Shape, after: Shape) -> Step:
        """Price one stage: two FLOPs for each tap and each position of its output.

        A transposed stage has two for each tap and each position of its input.
        """
        read, written = self._elements(before, after)
        taps = math.prod(stage.kernel_size)
        return Step(
            name,
            "depthwise",
            2 * taps * (read if stage.transposed else written) * self.request.multiply_adds,
            self.passed(read, written),
            elements=written,
            channels_last=self.route.layout == "channels_last",
        )

    def _elements(self, before: Shape, after: Shape) -> tuple[int, int]:
        read, written = (self.maps * self.batch * math.prod(size) for size in (before, after))
        return read, written

    def depthwise_backward(self, stage: Stage, before: Shape, after: Shape) -> list[Step]:
        """Price the gradients of one stage: two convolutions at half the rate of the forward."""
        one = self.depthwise("", stage, before, after)
        z, grad = self._elements(before, after)
        calls, copied = 1, 0
        entries = self.maps * math.prod(before)
        # A CPU splits kernels with many columns; each part reads a copy of the map (kernels.cpu).
        wide = self.request.on_cpu and has_wide_weight_gradient(stage.kernel_size, entries)
        if wide and stage.kernel_size[0] > 1:
            calls = -(-stage.kernel_size[1] // WIDE_COLUMNS)
            copied = 2 * (calls + 1) * z
        d_z = dataclasses.replace(
            one,
            name="depthwise backward: dZ",
            padded_flops=2 * one.flops,
            nbytes=self.passed(grad, z),
            elements=z,
        )
        d_taps = dataclasses.replace(
            d_z,
            name="depthwise backward: dtaps",
            launches=calls,
            nbytes=self.passed(z + grad, 0) + self.item * copied,
            elements=self.maps * math.prod(stage.kernel_size),
        )
        return [d_z, d_taps]

    def dense(self, name: str) -> Step:
        """Price one convolution with the dense kernel."""
        fmt, (c, n) = self.fmt, self.fmt.channels
        at = self.positions if fmt.transposed else self.out_positions
        moved = self.positions * c + self.out_positions * n + fmt.dense_parameters
        return Step(
            name,
            "conv",
            2 * at * fmt.dense_parameters * self.request.multiply_adds,
            self.item * moved,
            elements=self.out_positions * n,
            channels_last=self.route.layout == "channels_last",
        )

    def kernel_sides(self) -> tuple[Shape, Shape]:
        """Return the modes of the first dimension of torch's kernel, and those of all others."""
        fmt = self.fmt
        if fmt.transposed:
            return fmt.in_shape, (*fmt.out_shape, *fmt.kernel_size)
        return fmt.out_shape, (*fmt.in_shape, *fmt.kernel_size)

    def kernel(self) -> list[Step]:
        """Price the making of the dense kernel from its factors."""
        (first, rest), request = self.kernel_sides(), self.request
        return [
            *khatri_rao_steps(request, "K of the kernel's first side", first, self.rank),
            *khatri_rao_steps(request, "K of the other side and taps", rest, self.rank),
            gemm(request, "W = K K'^T", math.prod(first), self.rank, math.prod(rest)),
        ]


def forward_steps(request: Request, route: ConvRoute) -> list[Step]:
    """List the steps that make Y by one route."""
    s = _Sizes(request, route)
    if route.by == "triton":
        return _fused_forward(s)
    if route.kind == "dense":
        steps = s.kernel()
        if route.layout == "channels_last" and not request.channels_last:
            steps.append(s.to_rows("X", s.fmt.channels[0], s.positions))
        return [*steps, s.dense("dense convolution")]
    steps = khatri_rao_steps(request, "KA", s.inner, s.rank)
    steps.append(s.project("Z1 = X KA", s.taken, s.c, s.rank))
    for stage, before, after in zip(s.stages.depthwise, s.sizes, s.sizes[1:], strict=False):
        steps += khatri_rao_steps(request, "taps", s.taps(stage), s.rank)
        steps.append(s.depthwise("depthwise", stage, before, after))
    steps += khatri_rao_steps(request, "KC", s.fmt.out_shape, s.rank)
    return [*steps, s.project("Y = Z2 KC^T", s.out_positions, s.rank, s.n)]


def backward_steps(request: Request, route: ConvRoute, *, kept: int) -> list[Step]:
    """List the steps that make all gradients by one route.

    ``kept`` is the number of R-channel maps that the forward has kept. We assume that the gradient
    of Y comes in the layout of the route.
    """
    s = _Sizes(request, route)
    if route.by == "triton":
        return _fused_backward(s, kept)
    if route.kind == "dense":
        return _dense_backward(s)
    steps = khatri_rao_steps(request, "KA", s.inner, s.rank)
    steps += khatri_rao_steps(request, "KC", s.fmt.out_shape, s.rank)
    for stage in s.stages.depthwise:
        steps += khatri_rao_steps(request, "taps", s.taps(stage), s.rank)
    if not kept:
        steps.append(s.project("Z1 = X KA again", s.taken, s.c, s.rank))
    through = list(zip(s.stages.depthwise, s.sizes, s.sizes[1:], strict=False))
    for stage, before, after in through if kept < 2 else through[:-1]:
        steps.append(s.depthwise("depthwise again", stage, before, after))
    steps += [
        *s.outer("dKC = dY Z2", s.n, s.out_positions, rows=True),
        *khatri_rao_backward_steps(request, "MTTKRP out", s.fmt.out_shape, s.rank),
        s.project("dZ2 = dY KC", s.out_positions, s.n, s.rank),
    ]
    for stage, before, after in reversed(through):
        steps += s.depthwise_backward(stage, before, after)
        steps += khatri_rao_backward_steps(request, "MTTKRP taps", s.taps(stage), s.rank)
    return [
        *steps,
        *s.outer("dKA = X dZ1", s.c, s.taken, rows=request.channels_last),
        *khatri_rao_backward_steps(request, "MTTKRP in", s.inner, s.rank),
        s.project("dX = dZ1 KA^T", s.taken, s.rank, s.c),
    ]


def _matrices(s: _Sizes) -> Step:
    """Price the launch that makes KA, KC and the taps."""
    elements = s.rank * (s.c + s.n + math.prod(s.fmt.kernel_size))
    return Step("KA, KC and taps", "fused", 0, s.item * elements, elements=elements)


def _fused_forward(s: _Sizes) -> list[Step]:
    """List the steps of ``kernels.fused_conv``, forward.

    A GEMM makes the in-projection, then one kernel makes the depthwise stage and the
    out-projection. With many out channels the out-projection is a GEMM too.
    """
    steps = [_matrices(s)]
    if not s.request.channels_last:
        steps.append(s.to_rows("X", s.fmt.channels[0], s.positions))
    steps.append(s.project("Z1 = X KA", s.taken, s.c, s.rank))
    if s.groups == 1 and s.n > MOST_PROJECTED_CHANNELS and s.stages.depthwise:
        flops = 2 * s.out_positions * s.maps * s.depthwise_taps
        moved = s.item * s.maps * (s.taken + s.out_positions)
        stage = Step("Z2 from Z1", "fused", flops, moved, elements=s.out_positions * s.maps)
        return [*steps, stage, s.project("Y = Z2 KC^T", s.out_positions, s.rank, s.n)]
    flops = 2 * s.out_positions * s.rank * (s.n * s.groups + s.groups * s.depthwise_taps)
    moved = s.item * (s.taken * s.maps + s.out_positions * s.n * s.groups)
    return [*steps, Step("Y from Z1", "fused", flops, moved, elements=s.out_positions * s.n)]


def _fused_backward(s: _Sizes, kept: int) -> list[Step]:
    """List the steps of ``kernels.fused_conv``, backward.

    GEMMs make the products; one kernel makes both gradients of the depthwise stage and Z2 again.
    """
    request = s.request
    again = [] if kept else [s.project("Z1 = X KA again", s.taken, s.c, s.rank)]
    flops = 6 * s.out_positions * s.maps * s.depthwise_taps
    moved = s.item * s.maps * 2 * (s.taken + s.out_positions)
    inner = math.prod(s.inner) + s.n + math.prod(s.fmt.kernel_size)
    # Partial sums of dtaps, of which each program leaves its own.
    sums = 8 * s.rank * 1024
    return [
        _matrices(s),
        *again,
        s.project("dZ2 = dY KC", s.out_positions, s.n, s.rank),
        Step("dZ1, dtaps and Z2", "fused", flops, moved, elements=s.maps * s.taken),
        gemm(request, "dKC = dY^T Z2", s.n, s.out_positions, s.rank),
        s.project("dX = dZ1 KA^T", s.taken, s.rank, s.c),
        gemm(request, "dKA = X^T dZ1", s.c, s.taken, s.rank),
        Step("MTTKRPs", "fused", 0, 4 * 3 * inner * s.rank + sums, elements=inner * s.rank),
    ]


def _dense_backward(s: _Sizes) -> list[Step]:
    """List the steps that make all gradients by way of the dense kernel."""
    steps, request = s.kernel(), s.request
    if s.route.layout == "channels_last" and not request.channels_last:
        steps.append(s.to_rows("X", s.fmt.channels[0], s.positions))
    first, rest = s.kernel_sides()
    rows, columns = math.prod(first), math.prod(rest)
    return [
        *steps,
        s.dense("dX"),
        s.dense("dW"),
        gemm(request, "dK = dW K'", rows, columns, s.rank),
        gemm(request, "dK' = dW^T K", columns, rows, s.rank),
        *khatri_rao_backward_steps(request, "MTTKRP of the first side", first, s.rank),
        *khatri_rao_backward_steps(request, "MTTKRP of the other side and taps", rest, s.rank),
    ]


def kept_elements(request: Request, plan: ConvPlan) -> int:
    """Count the elements that stay for the backward besides parameters: X and the kept maps."""
    s = _Sizes(request, plan.forward)
    kept = s.positions * s.fmt.channels[0] + request.kept_beside
    if plan.forward.kind == "dense" or not plan.keep:
        return kept
    two = plan.keep == 2 and bool(s.stages.depthwise)
    return kept + s.maps * (s.taken + (s.out_positions if two else 0))


def dense_steps(request: Request) -> Steps:
    """List the steps of a dense convolution layer: one convolution forward, two backward."""
    s = _Sizes(request, ConvRoute("channels_first", kind="dense"))
    return [s.dense("Y")], [s.dense("dX"), s.dense("dW")]


def dense_kept(request: Request) -> int:
    """Count the elements that a dense layer keeps for the backward besides parameters: X."""
    channels, _ = _format(request).channels
    return request.batch * math.prod(request.size) * channels + request.kept_beside


def describe(request: Request) -> str:
    """Say format and batch in words."""
    fmt = _format(request)
    c, n = fmt.channels
    kernel, spatial = ("x".join(map(str, sizes)) for sizes in (fmt.kernel_size, request.size))
    of_groups = f" in {fmt.groups} groups of channels" if fmt.groups > 1 else ""
    return (
        f"{'transposed ' if fmt.transposed else ''}convolution {c} -> {n}{of_groups}, kernel "
        f"{kernel}, modes out {fmt.out_shape} in {fmt.in_shape}, rank {fmt.rank}, {request.batch} "
        f"images of {spatial}, {request.dtype}"
    )
