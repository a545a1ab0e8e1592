"""``polyadic.explain``: the plan of a layer step by step, its costs, and what was rejected."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch

from polyadic import checks
from polyadic.formats import (
    ConvFormat,
    EmbeddingFormat,
    LinearFormat,
    Shape,
    mode_sizes,
    positive_int,
)
from polyadic.functional.conv import padded_size
from polyadic.kernels.depthwise import Geometry
from polyadic.nn import CPEmbedding, CPLinear
from polyadic.nn.conv import CPConvBase
from polyadic.planner import conv as conv_planner
from polyadic.planner import embedding as embedding_planner
from polyadic.planner import linear as linear_planner
from polyadic.planner.calibrated import computed_dtype, device_type, machine_for
from polyadic.planner.machine import Machine
from polyadic.planner.report import Costed, Explanation, Plan, costed, rejected
from polyadic.planner.steps import dense_steps, plan_steps
from polyadic.planner.steps_conv import conv_plan_steps, dense_conv_steps, kept_elements
from polyadic.planner.steps_embedding import (
    INDEX,
    dense_embedding_steps,
    embedding_backward_steps,
    embedding_forward_steps,
)
from polyadic.plans import ConvPlan, LinearPlan, LinearRoute, Memory

# What an option is where it is not given.
_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}


def explain(
    layer: CPLinear | CPConvBase | CPEmbedding | LinearFormat | ConvFormat,
    *,
    batch: int,
    size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    output_padding: int | Sequence[int] = 0,
    plan: Plan | None = None,
    memory: Memory | None = None,
    training: bool = True,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Explanation:
    """Explain how a layer will be computed, what that costs, and what was weighed against it.

    Times are predictions of a cost model (FLOPs, bytes and launches over the machine's rates);
    ``polyadic.calibrate()`` measures the rates of the machine at hand.

    Args:
        layer: a CP layer, or a ``LinearFormat`` or ``ConvFormat``.
        batch: rows of a linear layer (all leading dimensions multiplied), images of a convolution,
            indices of an embedding (distinct ones where they are looked up once).
        size: spatial size of a convolution's input, int or one per dimension.
        stride: of a ``ConvFormat``; a layer has its own, and is refused one.
        padding: likewise.
        dilation: likewise.
        output_padding: likewise, of a transposed ``ConvFormat``.
        plan: a plan to explain in place of the planner's choice; an embedding takes none.
        memory: ``"fast"``, ``"balanced"`` or ``"least"``; the layer's own by default.
        training: forward and backward, or forward alone.
        dtype: the layer's by default, else float32.
        device: device type, the layer's by default, else ``"cpu"``.

    Raises:
        TypeError: ``layer`` or another argument is of another type.
        ValueError: a size is missing or does not fit, an option is given that is the layer's own,
            or the layer is frozen, which follows no plan.
    """
    batch = positive_int(batch, "batch")
    given = {"stride": stride, "padding": padding, "dilation": dilation}
    if isinstance(layer, (LinearFormat, ConvFormat)):
        fmt = _checked(layer)
    elif isinstance(layer, (CPLinear, CPConvBase, CPEmbedding)):
        fmt = layer.format
        if layer.frozen is not None:
            raise ValueError(
                "the layer is frozen and follows no plan; call polyadic.unfreeze first"
            )
    else:
        raise TypeError(
            f"explain expects a CPLinear, CPConvNd, CPConvTransposeNd, CPEmbedding, LinearFormat "
            f"or ConvFormat, got {type(layer).__name__}"
        )
    scaled = False
    if isinstance(layer, torch.nn.Module):
        first, scaled = layer.cp.factors[0], layer.cp.weights is not None
        memory = layer.memory if memory is None else memory
        dtype, device = dtype or first.dtype, device or first.device.type
    memory = checks.memory("balanced" if memory is None else memory)
    dtype, device = computed_dtype(dtype or torch.float32), device_type(device or "cpu")
    machine = machine_for(device, dtype)
    if not isinstance(layer, ConvFormat):
        _refuse({**given, "output_padding": output_padding}, layer)
    elif not layer.transposed:
        _refuse({"output_padding": output_padding}, layer)
    if isinstance(fmt, LinearFormat):
        if size is not None:
            raise ValueError(
                f"size is of a convolution's input; a linear layer has none, got {size!r}"
            )
        if isinstance(fmt, EmbeddingFormat):
            if plan is not None:
                raise ValueError(f"an embedding takes no plan, got {plan}")
            return _explain_embedding(fmt, batch, memory, training, dtype, device, machine)
        return _explain_linear(fmt, scaled, batch, plan, memory, training, dtype, device, machine)
    if isinstance(layer, CPConvBase):
        where = layer.geometry
    elif fmt.transposed:
        where = checks.transposed_geometry(
            fmt.kernel_size, stride, padding, output_padding, dilation
        )
    else:
        where = checks.geometry(fmt.kernel_size, **given)
    if size is None:
        raise ValueError("give the spatial size of the convolution's input, such as size=(32, 32)")
    sizes = mode_sizes(
        size if isinstance(size, Sequence) else (size,) * len(fmt.kernel_size), "size"
    )
    if len(sizes) != len(fmt.kernel_size):
        raise ValueError(f"size must have {len(fmt.kernel_size)} entries, got {sizes}")
    mode, beside = getattr(layer, "padding_mode", "zeros"), 0
    if mode != "zeros":
        # What pads by an input's own entries is no part of the map, which gets it padded.
        given_size, (sizes, where) = sizes, padded_size(sizes, where, mode)
        if mode != "circular" and sizes != given_size:
            # torch's gradient of these paddings keeps what it padded.
            beside = batch * fmt.channels[0] * math.prod(given_size)
    return _explain_conv(
        fmt, where, batch, sizes, beside, plan, memory, training, dtype, device, machine
    )


def _checked(fmt: Any) -> Any:
    """A format with plain ints, after a check of them."""
    names = [name for name in ("in_shape", "out_shape", "kernel_size") if hasattr(fmt, name)]
    shapes = {name: mode_sizes(getattr(fmt, name), name) for name in names}
    fmt = dataclasses.replace(fmt, **shapes, rank=positive_int(fmt.rank, "rank"))
    if isinstance(fmt, ConvFormat):
        side = "in_channels" if fmt.transposed else "out_channels"
        checks.channel_groups(fmt.groups, **{side: getattr(fmt, side)})
        if len(fmt.kernel_size) > 3:
            raise ValueError(f"kernel_size must have 1 to 3 entries, got {fmt.kernel_size}")
    return fmt


def _refuse(options: dict[str, Any], layer: object) -> None:
    """Refuse what a layer or format has no use for, so that nothing is ignored."""
    for name, value in options.items():
        if value != _DEFAULTS[name]:
            raise ValueError(
                f"{name} is not an option of a {type(layer).__name__}, got {value!r}; a layer has "
                f"its own, a ConvFormat is given it"
            )


def _explain_linear(
    fmt: LinearFormat,
    scaled: bool,
    rows: int,
    plan: Any,
    memory: Memory,
    training: bool,
    dtype: torch.dtype,
    device: str,
    machine: Machine,
) -> Explanation:
    item = dtype.itemsize

    # λ comes as one more in factor.
    run = dataclasses.replace(fmt, in_shape=(1, *fmt.in_shape)) if scaled else fmt

    def cost(p: LinearPlan) -> Costed:
        keeps = p.keep if p.forward.kind == "factorized" else 0
        kept = rows * (fmt.in_features + (fmt.rank if keeps else 0))
        if keeps == 2:
            kept += fmt.rank * (_products(run.in_shape) + _products(run.out_shape))
        obeyed = checks.with_scale(p) if scaled else p
        steps = plan_steps(run, rows, obeyed, item, training=training)
        return costed(p, steps, item * kept, machine)

    if plan is None:
        plan = linear_planner.choose_linear(fmt, linear_planner.bucket(rows), dtype, device, memory)
    chosen = cost(checks.linear_plan(plan, fmt))
    every = dense_steps(fmt, rows, item, training=training)
    dense = costed(None, (every[:1], every[1:]), item * rows * fmt.in_features, machine)
    plans = linear_planner.linear_plans(fmt, memory)
    title = (
        f"linear {fmt.in_features} -> {fmt.out_features}, modes {fmt.in_shape} -> "
        f"{fmt.out_shape}, rank {fmt.rank}, {rows} rows of {dtype} on {device}, "
        f"{'forward and backward' if training else 'forward'}, memory={memory!r}"
    )
    others = rejected([cost(p) for p in plans], chosen, machine)
    return Explanation(title, chosen, dense, others, fmt.break_even_rank, fmt.rank, machine)


def _explain_embedding(
    fmt: EmbeddingFormat,
    rows: int,
    memory: Memory,
    training: bool,
    dtype: torch.dtype,
    device: str,
    machine: Machine,
) -> Explanation:
    item, indices = dtype.itemsize, INDEX * rows

    def cost(p: LinearPlan) -> Costed:
        forward = embedding_forward_steps(fmt, rows, p, item)
        backward = embedding_backward_steps(fmt, rows, p, item, by_product=device != "cpu")
        kept = indices + (item * rows * fmt.rank if p.keep else 0)
        return costed(p, (forward, backward if training else []), kept, machine)

    plan = embedding_planner.plan_embedding(fmt, rows, dtype, device, memory)
    ins = plan.forward.in_groups
    routes = [LinearRoute(ins, outs) for outs in linear_planner.groupings(len(fmt.out_shape))]
    steps = dense_embedding_steps(fmt, rows, item, training=training)
    title = (
        f"embedding {fmt.num_embeddings} -> {fmt.out_features}, modes {fmt.in_shape} -> "
        f"{fmt.out_shape}, rank {fmt.rank}, {rows} indices, {dtype} on {device}, "
        f"{'forward and backward' if training else 'forward'}, memory={memory!r}"
    )
    chosen = cost(plan)
    others = rejected([cost(LinearPlan(r, r, plan.keep)) for r in routes], chosen, machine)
    dense = costed(None, steps, indices, machine)
    return Explanation(title, chosen, dense, others, fmt.break_even_rank, fmt.rank, machine)


def _products(modes: Shape) -> int:
    """Rows of all partial Khatri-Rao products on the way to the whole one."""
    rows: int = sum(itertools.accumulate(modes, operator.mul))
    return rows - modes[0]


def _explain_conv(
    fmt: ConvFormat,
    geometry: Geometry,
    batch: int,
    size: Shape,
    beside: int,
    plan: Any,
    memory: Memory,
    training: bool,
    dtype: torch.dtype,
    device: str,
    machine: Machine,
) -> Explanation:
    item, (c, n) = dtype.itemsize, fmt.channels
    inputs = batch * math.prod(size)
    if inputs and min(geometry.output_size(size)) < 1:
        raise ValueError(f"the kernel {fmt.kernel_size} does not fit into an input of size {size}")

    def cost(p: ConvPlan) -> Costed:
        steps = conv_plan_steps(fmt, geometry, batch, size, False, p, item, training=training)
        kept = beside + kept_elements(fmt, geometry, batch, size, p)
        return costed(p, steps, item * kept, machine)

    if plan is None:
        plan = conv_planner.choose_conv(
            fmt, geometry, linear_planner.bucket(batch), size, False, dtype, device, memory
        )
    chosen = cost(checks.conv_plan(plan))
    every = dense_conv_steps(fmt, geometry, batch, size, item, training=training)
    dense = costed(None, (every[:1], every[1:]), item * (beside + inputs * c), machine)
    spatial, kernel = "x".join(map(str, size)), "x".join(map(str, fmt.kernel_size))
    of_groups = f" in {fmt.groups} groups of channels" if fmt.groups > 1 else ""
    title = (
        f"{'transposed ' if fmt.transposed else ''}convolution {c} -> {n}{of_groups}, kernel "
        f"{kernel}, modes out {fmt.out_shape} in {fmt.in_shape}, rank {fmt.rank}, {batch} images "
        f"of {spatial}, {dtype} on {device}, {'forward and backward' if training else 'forward'}, "
        f"memory={memory!r}"
    )
    others = rejected([cost(p) for p in conv_planner.conv_plans(memory)], chosen, machine)
    return Explanation(title, chosen, dense, others, fmt.break_even_rank, fmt.rank, machine)
