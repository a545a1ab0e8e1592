"""``polyadic.explain``: the plan of a layer step by step, its costs, and what was rejected."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch

from polyadic import _check, _planner, _planner_conv, _planner_embedding
from polyadic._cost import Machine
from polyadic._explanation import Costed, Explanation, Plan, costed, rejected
from polyadic._format import (
    ConvFormat,
    EmbeddingFormat,
    LinearFormat,
    Shape,
    mode_sizes,
    positive_int,
)
from polyadic._machines import machine_for
from polyadic._plan import ConvPlan, LinearPlan, LinearRoute, Memory
from polyadic._steps import dense_steps, plan_steps
from polyadic._steps_conv import conv_plan_steps, dense_conv_steps, kept_elements
from polyadic._steps_embedding import (
    INDEX,
    dense_embedding_steps,
    embedding_backward_steps,
    embedding_forward_steps,
)
from polyadic.kernels.stages import Geometry
from polyadic.nn import CPEmbedding, CPLinear
from polyadic.nn.conv import CPConvBase


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
    device: str | None = None,
) -> Explanation:
    """Explain how a layer will be computed, what that costs, and what was weighed against it.

    Times are predictions of a cost model (FLOPs, bytes and launches over the machine's rates);
    ``polyadic.calibrate()`` measures the rates of the machine at hand.

    Args:
        layer: a CP layer, or a ``LinearFormat`` or ``ConvFormat``.
        batch: rows of a linear layer (all leading dimensions multiplied), images of a convolution,
            indices of an embedding (distinct ones where they are looked up once).
        size: spatial size of a convolution's input, int or one per dimension.
        stride: of a ``ConvFormat``; a layer has its own.
        padding: of a ``ConvFormat``; a layer has its own.
        dilation: of a ``ConvFormat``; a layer has its own.
        output_padding: of a transposed ``ConvFormat``; a layer has its own.
        plan: a plan to explain in place of the planner's choice; an embedding takes none.
        memory: ``"fast"``, ``"balanced"`` or ``"least"``; the layer's own by default.
        training: forward and backward, or forward alone.
        dtype: the layer's by default, else float32.
        device: device type, the layer's by default, else ``"cpu"``.

    Raises:
        TypeError: ``layer`` or ``plan`` is of another type.
        ValueError: a size is missing or does not fit.
    """
    batch = positive_int(batch, "batch")
    where = None
    if isinstance(layer, (LinearFormat, ConvFormat)):
        fmt: LinearFormat | ConvFormat = layer
    elif isinstance(layer, (CPLinear, CPConvBase, CPEmbedding)):
        fmt = layer.format
        where = layer.geometry if isinstance(layer, CPConvBase) else None
    else:
        raise TypeError(
            f"explain expects a CPLinear, CPConvNd, CPConvTransposeNd, CPEmbedding, LinearFormat "
            f"or ConvFormat, got {type(layer).__name__}"
        )
    if isinstance(layer, torch.nn.Module):
        first = layer.cp.factors[0]
        memory, dtype = memory or layer.memory, dtype or first.dtype
        device = device or first.device.type
    memory = _check.memory(memory or "balanced")
    dtype, device = dtype or torch.float32, device or "cpu"
    machine = machine_for(device, dtype)
    if isinstance(fmt, LinearFormat):
        if size is not None:
            raise ValueError(
                f"size is of a convolution's input; a linear layer has none, got {size!r}"
            )
        if isinstance(fmt, EmbeddingFormat):
            if plan is not None:
                raise ValueError(f"an embedding takes no plan, got {plan}")
            return _explain_embedding(fmt, batch, memory, training, dtype, device, machine)
        return _explain_linear(fmt, batch, plan, memory, training, dtype, device, machine)
    if where is None and fmt.transposed:
        where = _check.transposed_geometry(
            fmt.kernel_size, stride, padding, output_padding, dilation
        )
    elif where is None:
        where = _check.geometry(fmt.kernel_size, stride, padding, dilation)
    if size is None:
        raise ValueError("give the spatial size of the convolution's input, such as size=(32, 32)")
    sizes = mode_sizes(
        size if isinstance(size, Sequence) else (size,) * len(fmt.kernel_size), "size"
    )
    if len(sizes) != len(fmt.kernel_size):
        raise ValueError(f"size must have {len(fmt.kernel_size)} entries, got {sizes}")
    return _explain_conv(fmt, where, batch, sizes, plan, memory, training, dtype, device, machine)


def _explain_linear(
    fmt: LinearFormat,
    rows: int,
    plan: Any,
    memory: Memory,
    training: bool,
    dtype: torch.dtype,
    device: str,
    machine: Machine,
) -> Explanation:
    item = dtype.itemsize

    def cost(p: LinearPlan) -> Costed:
        keeps = p.keep if p.forward.kind == "factorized" else 0
        kept = rows * (fmt.in_features + (fmt.rank if keeps else 0))
        if keeps == 2:
            kept += fmt.rank * (_products(fmt.in_shape) + _products(fmt.out_shape))
        return costed(p, plan_steps(fmt, rows, p, item, training=training), item * kept, machine)

    if plan is None:
        plan = _planner.choose_linear(fmt, _planner.bucket(rows), dtype, device, memory)
    chosen = cost(_check.linear_plan(plan, fmt))
    every = dense_steps(fmt, rows, item, training=training)
    dense = costed(None, (every[:1], every[1:]), item * rows * fmt.in_features, machine)
    plans = _planner.linear_plans(fmt, memory)
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

    plan = _planner_embedding.plan_embedding(fmt, rows, dtype, device, memory)
    ins = plan.forward.in_groups
    routes = [LinearRoute(ins, outs) for outs in _planner.groupings(len(fmt.out_shape))]
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
        kept = kept_elements(fmt, geometry, batch, size, p)
        return costed(p, steps, item * kept, machine)

    if plan is None:
        plan = _planner_conv.choose_conv(
            fmt, geometry, _planner.bucket(batch), size, False, dtype, device, memory
        )
    chosen = cost(_check.conv_plan(plan))
    every = dense_conv_steps(fmt, geometry, batch, size, item, training=training)
    dense = costed(None, (every[:1], every[1:]), item * inputs * c, machine)
    spatial, kernel = "x".join(map(str, size)), "x".join(map(str, fmt.kernel_size))
    of_groups = f" in {fmt.groups} groups of channels" if fmt.groups > 1 else ""
    title = (
        f"{'transposed ' if fmt.transposed else ''}convolution {c} -> {n}{of_groups}, kernel "
        f"{kernel}, modes out {fmt.out_shape} in {fmt.in_shape}, rank {fmt.rank}, {batch} images "
        f"of {spatial}, {dtype} on {device}, {'forward and backward' if training else 'forward'}, "
        f"memory={memory!r}"
    )
    others = rejected([cost(p) for p in _planner_conv.conv_plans(memory)], chosen, machine)
    return Explanation(title, chosen, dense, others, fmt.break_even_rank, fmt.rank, machine)
