"""Choice of a plan for a layer, batch and machine: the cheapest by predicted time.

A linear layer's four pieces (each side, forward and backward) are independent of each other, so
each takes its own cheapest grouping; rebuilding W competes with the factorized whole. Choices are
cached by format and batch bucket (the next power of two), so that the hot path only looks up.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from polyadic._cost import Step
from polyadic._format import ConvFormat, LinearFormat, Shape
from polyadic._machines import machine_for, threads_of
from polyadic._plan import ConvPlan, ConvRoute, Groups, LinearPlan, LinearRoute, Memory
from polyadic._steps import (
    backward_steps,
    contract_steps,
    expand_steps,
    forward_steps,
    partials_steps,
    plan_steps,
)
from polyadic._steps_conv import conv_backward_steps, conv_forward_steps, conv_plan_steps
from polyadic.kernels.stages import Geometry

# A symbolic batch under torch.compile gets one plan for all sizes: that of a large batch.
UNKNOWN_BATCH = 256
UNKNOWN_IMAGES = 8


def bucket(rows: int) -> int:
    """The next power of two, at least 1."""
    return 1 << (max(rows, 1) - 1).bit_length()


def compositions(total: int) -> Iterator[Groups]:
    """All ways to cut ``total`` modes into consecutive groups, the single group first."""
    for first in range(total, 0, -1):
        if first == total:
            yield (total,)
        else:
            for rest in compositions(total - first):
                yield (first, *rest)


def groupings(order: int) -> list[Groups]:
    """The groupings weighed: all for small orders, else one or two groups and per factor."""
    if order <= 5:
        return list(compositions(order))
    two = [(left, order - left) for left in range(1, order)]
    return [(order,), *two, (1,) * order]


def linear_plans(fmt: LinearFormat, memory: Memory = "balanced") -> list[LinearPlan]:
    """Every plan with the same route forward and backward: each grouping, and rebuilding W."""
    keep = int(memory != "least")
    m, n = len(fmt.in_shape), len(fmt.out_shape)
    routes = [LinearRoute(i, o) for i, o in itertools.product(groupings(m), groupings(n))]
    routes.append(LinearRoute((m,), (n,), "dense"))
    return [LinearPlan(route, route, keep) for route in routes]


def _known(*sizes: int) -> bool:
    """Whether torch.compile, which is tracing, knows all sizes as constants."""
    # Imported while tracing, as it takes half a second.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    known = True
    for size in sizes:
        known = known and has_static_value(size)
    return known


def plan_linear(fmt: LinearFormat, x: Tensor, memory: Memory, rebuild: bool = True) -> LinearPlan:
    """The plan for x (..., M); one for all batch sizes where the batch is symbolic.

    With ``rebuild`` W may be built where that is cheapest.
    """
    shape = tuple(x.shape[:-1])
    if not torch.compiler.is_compiling():
        return choose_linear(fmt, bucket(math.prod(shape)), x.dtype, x.device.type, memory, rebuild)
    modes = (*fmt.in_shape, *fmt.out_shape, fmt.rank)
    if not _known(*modes):
        route = LinearRoute((len(fmt.in_shape),), (len(fmt.out_shape),))
        return LinearPlan(route, route, int(memory != "least"))
    rows = UNKNOWN_BATCH
    if _known(*shape):
        rows = bucket(math.prod(shape))
    plan: LinearPlan = _constant_linear(
        fmt.in_shape, fmt.out_shape, fmt.rank, rows, x.dtype, x.device.type, memory, rebuild
    )
    return plan


def _constant_linear(
    in_shape: Shape,
    out_shape: Shape,
    rank: int,
    rows: int,
    dtype: torch.dtype,
    device_type: str,
    memory: Memory,
    rebuild: bool,
) -> LinearPlan:
    fmt = LinearFormat(in_shape, out_shape, rank)
    return choose_linear(fmt, rows, dtype, device_type, memory, rebuild)


# What torch.compiler.assume_constant_result sets, without its import of the whole compiler.
_constant_linear._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_linear(
    fmt: LinearFormat,
    rows: int,
    dtype: torch.dtype,
    device_type: str,
    memory: Memory,
    rebuild: bool = True,
) -> LinearPlan:
    """The cheapest plan for ``rows`` rows of ``dtype`` on this machine; cached."""
    threads = threads_of(device_type)
    return _cheapest_linear(fmt, rows, dtype, device_type, threads, memory, rebuild)


def forget() -> None:
    """Forget all choices, as a machine description has changed."""
    _cheapest_linear.cache_clear()
    _cheapest_conv.cache_clear()


@functools.lru_cache(maxsize=4096)
def _cheapest_linear(
    fmt: LinearFormat,
    rows: int,
    dtype: torch.dtype,
    device_type: str,
    threads: int,
    memory: Memory,
    rebuild: bool,
) -> LinearPlan:
    # The key names the machine, for a description's own hash takes longer than the look-up.
    machine, item = machine_for(device_type, dtype), dtype.itemsize
    keep = memory != "least"
    ins, outs = groupings(len(fmt.in_shape)), groupings(len(fmt.out_shape))
    m, n, r = fmt.in_shape, fmt.out_shape, fmt.rank

    def best(candidates: list[Groups], steps: dict[Groups, list[Step]]) -> Groups:
        return min(candidates, key=lambda groups: machine.total(steps[groups]))

    forward = LinearRoute(
        best(ins, {g: contract_steps(rows, m, r, g, item) for g in ins}),
        best(outs, {g: expand_steps(rows, n, r, g, item) for g in outs}),
    )

    def in_gradients(groups: Groups) -> list[Step]:
        again = [] if keep else contract_steps(rows, m, r, groups, item)
        return again + partials_steps(rows, m, r, groups, item, wrt_x=True, wrt_z=False)

    backward = LinearRoute(
        best(ins, {g: in_gradients(g) for g in ins}),
        best(
            outs,
            {g: partials_steps(rows, n, r, g, item, wrt_x=False, wrt_z=True) for g in outs},
        ),
    )
    dense = [LinearRoute((len(m),), (len(n),), "dense")] if rebuild else []
    forward = min(
        (forward, *dense), key=lambda route: machine.total(forward_steps(fmt, rows, route, item))
    )
    kept = int(keep and forward.kind == "factorized")
    backward = min(
        (backward, *dense),
        key=lambda route: machine.total(backward_steps(fmt, rows, route, item, kept=kept)),
    )
    if memory == "fast" and forward.is_khatri_rao and backward == forward:
        return LinearPlan(forward, backward, keep=2)
    # Z is of no use to a backward that rebuilds W.
    return LinearPlan(forward, backward, keep=kept if backward.kind == "factorized" else 0)


def predict_linear(
    plan: LinearPlan,
    fmt: LinearFormat,
    rows: int,
    dtype: torch.dtype = torch.float32,
    device_type: str = "cpu",
    *,
    training: bool = True,
) -> float:
    """Predicted seconds of forward (and backward) by a plan, without per-call overhead."""
    forward, backward = plan_steps(fmt, rows, plan, dtype.itemsize, training=training)
    machine = machine_for(device_type, dtype)
    return machine.total(forward) + machine.total(backward)


def conv_plans(memory: Memory = "balanced") -> list[ConvPlan]:
    """Every plan with the same route forward and backward."""
    keep = _conv_keep(memory)
    routes = [
        ConvRoute(layout, form)
        for layout in ("channels_last", "channels_first")
        for form in ("merged", "separable")
    ]
    routes += [
        ConvRoute("channels_last", kind="dense"),
        ConvRoute("channels_first", kind="dense"),
    ]
    return [ConvPlan(route, route, keep) for route in routes]


def _conv_keep(memory: Memory) -> int:
    return {"fast": 2, "balanced": 1, "least": 0}[memory]


def plan_conv(
    fmt: ConvFormat, geometry: Geometry, x: Tensor, memory: Memory, rebuild: bool = True
) -> ConvPlan:
    """The plan for x (B, Cin, *S) or (Cin, *S); one for all sizes where a size is symbolic.

    With ``rebuild`` the dense kernel may be built where that is cheapest.
    """
    dims = len(fmt.kernel_size)
    size = tuple(x.shape[-dims:])
    batch = x.shape[0] if x.dim() == dims + 2 else 1
    if torch.compiler.is_compiling():
        every = (*fmt.out_shape, *fmt.in_shape, *fmt.kernel_size, fmt.rank, *size)
        if not _known(*every):
            return ConvPlan(ConvRoute(), ConvRoute(), _conv_keep(memory))
        batch = bucket(batch) if _known(batch) else UNKNOWN_IMAGES
        plan: ConvPlan = _constant_conv(
            (fmt.out_shape, fmt.in_shape, fmt.kernel_size), fmt.rank,
            (geometry.stride, geometry.padding, geometry.dilation), batch, size,
            x.dtype, x.device.type, memory, rebuild,
        )  # fmt: skip
        return plan
    last = x.dim() == dims + 2 and _is_channels_last(x)
    return choose_conv(
        fmt, geometry, bucket(batch), size, last, x.dtype, x.device.type, memory, rebuild
    )


def _is_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1


def _constant_conv(
    shapes: tuple[Shape, Shape, Shape],
    rank: int,
    where: tuple[Shape, tuple[tuple[int, int], ...], Shape],
    batch: int,
    size: Shape,
    dtype: torch.dtype,
    device_type: str,
    memory: Memory,
    rebuild: bool,
) -> ConvPlan:
    fmt, geometry = ConvFormat(*shapes, rank), Geometry(shapes[2], *where)
    return choose_conv(fmt, geometry, batch, size, False, dtype, device_type, memory, rebuild)


_constant_conv._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_conv(
    fmt: ConvFormat,
    geometry: Geometry,
    batch: int,
    size: Shape,
    channels_last: bool,
    dtype: torch.dtype,
    device_type: str,
    memory: Memory,
    rebuild: bool = True,
) -> ConvPlan:
    """The cheapest plan for an input (batch, Cin, *size) on this machine; cached."""
    return _cheapest_conv(
        fmt, geometry, batch, size, channels_last, dtype, device_type, threads_of(device_type),
        memory, rebuild,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _cheapest_conv(
    fmt: ConvFormat,
    geometry: Geometry,
    batch: int,
    size: Shape,
    channels_last: bool,
    dtype: torch.dtype,
    device_type: str,
    threads: int,
    memory: Memory,
    rebuild: bool,
) -> ConvPlan:
    machine = machine_for(device_type, dtype)
    routes = [plan.forward for plan in conv_plans()]
    if not rebuild:
        routes = [route for route in routes if route.kind == "factorized"]
    if dtype.itemsize == 2:
        # Separable stages round once more than torch's error, twice over, allows.
        routes = [route for route in routes if route.depthwise == "merged"]
    keep, item = _conv_keep(memory), dtype.itemsize
    where = (fmt, geometry, batch, size, channels_last)
    forward = min(routes, key=lambda r: machine.total(conv_forward_steps(*where, r, item)))
    kept = keep if forward.kind == "factorized" else 0
    backward = min(
        routes, key=lambda r: machine.total(conv_backward_steps(*where, r, item, kept=kept))
    )
    return ConvPlan(forward, backward, kept if backward.kind == "factorized" else 0)


def predict_conv(
    plan: ConvPlan,
    fmt: ConvFormat,
    geometry: Geometry,
    batch: int,
    size: Shape,
    dtype: torch.dtype = torch.float32,
    device_type: str = "cpu",
    *,
    channels_last: bool = False,
    training: bool = True,
) -> float:
    """Predicted seconds of forward (and backward) by a plan, without per-call overhead."""
    forward, backward = conv_plan_steps(
        fmt, geometry, batch, size, channels_last, plan, dtype.itemsize, training=training
    )
    machine = machine_for(device_type, dtype)
    return machine.total(forward) + machine.total(backward)
