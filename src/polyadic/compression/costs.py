"""What a layer costs, dense and in CP format: FLOPs by its shapes, seconds by the planner."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from polyadic.compression.targets import Form, Site
from polyadic.formats import ConvFormat, EmbeddingFormat, LinearFormat, Shape
from polyadic.kernels.depthwise import Geometry
from polyadic.nn import CPEmbedding
from polyadic.nn.conv import CPConvBase
from polyadic.planner import choice
from polyadic.planner.conv import dense_steps, forward_steps
from polyadic.planner.request import Request, request
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
    asked = request(fmt, call.batch, geometry=where, size=call.size)
    if form is None:
        return sum(step.flops for step in dense_steps(asked)[0])
    routes = (ConvRoute(depthwise="merged"), ConvRoute(depthwise="separable"))
    return min(sum(s.flops for s in forward_steps(asked, route)) for route in routes)


def _convolution(first: Form, form: Form | None, rank: int) -> tuple[ConvFormat, Geometry]:
    """Format and geometry; of a dense layer the format counts by its sizes alone."""
    probe, fmt = first.probe, (form or first).at(max(rank, 1))
    assert isinstance(probe, CPConvBase)
    assert isinstance(fmt, ConvFormat)
    return fmt, probe.geometry


def _seconds(layer: Any, first: Form, form: Form | None, rank: int, call: Call) -> float:
    """Predicted time of a call without gradients."""
    options: dict[str, Any] = {"dtype": layer.weight.dtype, "device": layer.weight.device.type}
    fmt: Any
    if isinstance(layer, nn.Embedding):
        fmt = (form or first).at(max(rank, 1))
        assert isinstance(fmt, EmbeddingFormat)
    elif isinstance(layer, nn.Linear):
        fmt = LinearFormat((layer.in_features,), (layer.out_features,), 1)
        if form is not None:
            ins, outs = form.probe.format.in_shape, form.probe.format.out_shape
            # An output head has the embedding's format, with the sides exchanged.
            modes = (outs, ins) if isinstance(form.probe, CPEmbedding) else (ins, outs)
            fmt = LinearFormat(*modes, rank)
    else:
        fmt, options["geometry"] = _convolution(first, form, rank)
        options["size"] = call.size
    return _predicted(request(fmt, call.batch, **options), form is None)


@functools.lru_cache(maxsize=4096)
def _predicted(asked: Request, dense: bool) -> float:
    return choice.predict_inference(asked, None if dense else choice.choose(asked))
