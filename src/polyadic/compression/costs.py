"""What a layer costs, dense and in CP format: FLOPs by its shapes, seconds by the planner."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyadic.compression.targets import Form, Site
from polyadic.formats import ConvFormat, EmbeddingFormat, LinearFormat, Shape
from polyadic.kernels.depthwise import Geometry
from polyadic.nn import CPEmbedding
from polyadic.nn.conv import CPConvBase
from polyadic.planner import conv as conv_planner
from polyadic.planner import embedding as embedding_planner
from polyadic.planner import linear as linear_planner
from polyadic.planner.calibrated import machine_for, threads_of
from polyadic.planner.steps import dense_steps
from polyadic.planner.steps_conv import conv_forward_steps, dense_conv_steps
from polyadic.planner.steps_embedding import dense_embedding_steps, embedding_forward_steps
from polyadic.plans import ConvRoute


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        batch: rows of a linear layer, indices of an embedding, images of a convolution.
        size: spatial size of a convolution's input.
    """

    batch: int
    size: Shape = ()


@dataclass(frozen=True)
class Cost:
    """Of one pass over a batch, forward alone; None where calls or rates are not known.

    Attributes:
        parameters: entries of the weight, or of its factors.
        flops: two for each multiply-add.
        seconds: predicted.
    """

    parameters: int
    flops: int | None
    seconds: float | None


Calls = Mapping[str, Sequence[Call]]


def dense_cost(site: Site, calls: Calls) -> Cost:
    """What the layers cost as they are."""
    return _cost(site, calls, site.dense_parameters, None, 0)


def cp_cost(site: Site, calls: Calls, form: Form, rank: int) -> Cost:
    """What they cost in a format at a rank."""
    return _cost(site, calls, form.at(rank).parameters, form, rank)


def _cost(site: Site, calls: Calls, parameters: int, form: Form | None, rank: int) -> Cost:
    flops: int | None = 0
    seconds: float | None = 0.0
    for name, layer in zip(site.names, site.layers, strict=True):
        for call in calls.get(name, ()):
            more = _flops(layer, site.forms[0], form, rank, call)
            time = _seconds(layer, site.forms[0], form, rank, call)
            flops = None if flops is None else flops + more
            seconds = None if seconds is None else seconds + time
        if name not in calls:
            flops = seconds = None
    return Cost(parameters, flops, seconds)


def _flops(layer: Any, first: Form, form: Form | None, rank: int, call: Call) -> int:
    """Of a call; a lookup in a dense table has none."""
    if isinstance(layer, nn.Embedding):
        return 0 if form is None else 2 * call.batch * rank * layer.embedding_dim
    if isinstance(layer, nn.Linear):
        m, n = layer.in_features, layer.out_features
        return 2 * call.batch * (m * n if form is None else rank * (m + n))
    fmt, where = _convolution(first, form, rank)
    if form is None:
        steps = dense_conv_steps(fmt, where, call.batch, call.size, 4, training=False)
        return sum(step.flops for step in steps)
    routes = (ConvRoute(depthwise="merged"), ConvRoute(depthwise="separable"))
    return min(
        sum(s.flops for s in conv_forward_steps(fmt, where, call.batch, call.size, False, r, 4))
        for r in routes
    )


def _convolution(first: Form, form: Form | None, rank: int) -> tuple[ConvFormat, Geometry]:
    """Format and geometry; of a dense layer the format counts by its sizes alone."""
    probe, fmt = first.probe, (form or first).at(max(rank, 1))
    assert isinstance(probe, CPConvBase)
    assert isinstance(fmt, ConvFormat)
    return fmt, probe.geometry


def _seconds(layer: Any, first: Form, form: Form | None, rank: int, call: Call) -> float:
    """Predicted time of a call without gradients."""
    dtype, device = layer.weight.dtype, layer.weight.device.type
    if isinstance(layer, nn.Embedding):
        table = (form or first).at(max(rank, 1))
        assert isinstance(table, EmbeddingFormat)
        return _embedding_seconds(
            table, form is None, call.batch, dtype, device, threads_of(device)
        )
    if isinstance(layer, nn.Linear):
        modes = None
        if form is not None:
            ins, outs = form.probe.format.in_shape, form.probe.format.out_shape
            # An output head has the embedding's format, with the sides exchanged.
            modes = (outs, ins) if isinstance(form.probe, CPEmbedding) else (ins, outs)
        sizes = (layer.in_features, layer.out_features)
        return _linear_seconds(sizes, modes, rank, call.batch, dtype, device, threads_of(device))
    fmt, where = _convolution(first, form, rank)
    return _conv_seconds(
        fmt, where, form is None, call.batch, call.size, dtype, device, threads_of(device)
    )


@functools.lru_cache(maxsize=4096)
def _linear_seconds(
    sizes: tuple[int, int], modes: tuple[Shape, Shape] | None, rank: int, rows: int,
    dtype: torch.dtype, device: str, threads: int,
) -> float:  # fmt: skip
    machine = machine_for(device, dtype)
    if modes is None:
        fmt = LinearFormat((sizes[0],), (sizes[1],), 1)
        steps = dense_steps(fmt, rows, dtype.itemsize, training=False)
        return machine.total(steps) + machine.dense_call
    fmt = LinearFormat(*modes, rank)
    plan = linear_planner.choose_linear(fmt, linear_planner.bucket(rows), dtype, device, "balanced")
    time = linear_planner.predict_linear(plan, fmt, rows, dtype, device, training=False)
    return time + machine.call


@functools.lru_cache(maxsize=4096)
def _embedding_seconds(
    fmt: EmbeddingFormat, dense: bool, rows: int, dtype: torch.dtype, device: str, threads: int
) -> float:
    machine, item = machine_for(device, dtype), dtype.itemsize
    if dense:
        forward, _ = dense_embedding_steps(fmt, rows, item, training=False)
        return machine.total(forward) + machine.dense_call
    plan = embedding_planner.plan_embedding(fmt, rows, dtype, device, "balanced")
    return machine.total(embedding_forward_steps(fmt, rows, plan, item)) + machine.call


@functools.lru_cache(maxsize=4096)
def _conv_seconds(
    fmt: ConvFormat, where: Geometry, dense: bool, images: int, size: Shape, dtype: torch.dtype,
    device: str, threads: int,
) -> float:  # fmt: skip
    machine = machine_for(device, dtype)
    if dense:
        steps = dense_conv_steps(fmt, where, images, size, dtype.itemsize, training=False)
        return machine.total(steps) + machine.dense_call
    plan = conv_planner.choose_conv(
        fmt, where, linear_planner.bucket(images), size, False, dtype, device, "balanced"
    )
    time = conv_planner.predict_conv(plan, fmt, where, images, size, dtype, device, training=False)
    return time + machine.call
