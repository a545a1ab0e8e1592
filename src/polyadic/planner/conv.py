"""Choice of a plan for a convolution, batch, size and machine: the cheapest by predicted time.

Routes are few, so all are weighed, forward and backward each by itself.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from polyadic._torch import known, not_traced
from polyadic.formats import ConvFormat, Shape
from polyadic.kernels.depthwise import Geometry
from polyadic.planner.calibrated import machine_for, threads_of
from polyadic.planner.linear import bucket, settled
from polyadic.planner.steps_conv import conv_backward_steps, conv_forward_steps, conv_plan_steps
from polyadic.plans import ConvPlan, ConvRoute, Memory

# As of a symbolic batch of rows: one plan for all numbers of images.
UNKNOWN_IMAGES = 8


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
    return [ConvPlan(route, route, keep if route.kind == "factorized" else 0) for route in routes]


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
        if not known(*every):
            return ConvPlan(ConvRoute(), ConvRoute(), _conv_keep(memory))
        batch = bucket(batch) if known(batch) else UNKNOWN_IMAGES
        plan: ConvPlan = _constant_conv(
            (fmt.out_shape, fmt.in_shape, fmt.kernel_size, fmt.rank, fmt.groups, fmt.transposed),
            (geometry.stride, geometry.padding, geometry.dilation, geometry.output_padding),
            batch, size, x.dtype, x.device.type, memory, rebuild,
        )  # fmt: skip
        return plan
    last = x.dim() == dims + 2 and _is_channels_last(x)
    return choose_conv(
        fmt, geometry, bucket(batch), size, last, x.dtype, x.device.type, memory, rebuild
    )


def _is_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1


@not_traced
def _constant_conv(
    numbers: tuple[Shape, Shape, Shape, int, int, bool],
    where: tuple[Shape, tuple[tuple[int, int], ...], Shape, Shape],
    batch: int,
    size: Shape,
    dtype: torch.dtype,
    device_type: str,
    memory: Memory,
    rebuild: bool,
) -> ConvPlan:
    fmt = ConvFormat(*numbers)
    stride, padding, dilation, extra = where
    geometry = Geometry(fmt.kernel_size, stride, padding, dilation, fmt.transposed, extra)
    return choose_conv(fmt, geometry, batch, size, False, dtype, device_type, memory, rebuild)


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
    # A layer hands on the layout it is given, as torch's do.
    onward = [r for r in routes if r.layout == "channels_last"] if channels_last else routes
    forward = min(onward, key=lambda r: machine.total(conv_forward_steps(*where, r, item)))
    kept = keep if forward.kind == "factorized" else 0
    backward = min(
        routes, key=lambda r: machine.total(conv_backward_steps(*where, r, item, kept=kept))
    )
    return ConvPlan(forward, backward, kept if backward.kind == "factorized" else 0)


def forget() -> None:
    """Forget all choices, as a machine description has changed."""
    _cheapest_conv.cache_clear()
    settled.clear()


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
