"""What a layer costs, dense and in CP format: FLOPs by its shapes, seconds by the planner."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polyadic.compression.targets import Candidate, Target
from polyadic.formats import LinearFormat, Shape
from polyadic.nn.kinds import Family, family_of
from polyadic.planner import choice
from polyadic.planner.conv import dense_steps, forward_steps
from polyadic.planner.request import Request, request
from polyadic.plans import ConvRoute
from polyadic.surgery import is_head


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
    """The cost of a forward pass over one batch; None where calls or rates are not known.

    Attributes:
        parameters: entries of the weight, or of its factors.
        flops: floating-point operations, two for each multiply-add.
        seconds: predicted time.
    """

    parameters: int
    flops: int | None
    seconds: float | None


Calls = Mapping[str, Sequence[Call]]


def dense_cost(target: Target, calls: Calls) -> Cost:
    """Return what the layers cost with their dense weight."""
    return _cost(target, calls, target.dense_parameters, None, 0)


def cp_cost(target: Target, calls: Calls, candidate: Candidate, rank: int) -> Cost:
    """Return what the layers cost in a format at a rank."""
    return _cost(target, calls, candidate.at(rank).parameters, candidate, rank)


def _cost(
    target: Target, calls: Calls, parameters: int, candidate: Candidate | None, rank: int
) -> Cost:
    """Add up all calls of all layers; ``candidate`` is None for the dense weight."""
    flops: int | None = 0
    seconds: float | None = 0.0
    dense = candidate is None
    for name, layer in zip(target.names, target.layers, strict=True):
        for call in calls.get(name, ()):
            asked = _request(target, layer, candidate, rank, call)
            more = _flops(layer, asked, dense)
            time = _predicted(asked, dense)
            flops = None if flops is None else flops + more
            seconds = None if seconds is None else seconds + time
        if name not in calls:
            flops = seconds = None
    return Cost(parameters, flops, seconds)


def _request(
    target: Target, layer: Any, candidate: Candidate | None, rank: int, call: Call
) -> Request:
    """Return what one call of a layer asks of the planner.

    The sizes of a dense layer are read from the request too, in which the format's rank and the
    split into modes then count for nothing.
    """
    probe: Any = (candidate or target.candidates[0]).probe
    fmt = (candidate or target.candidates[0]).at(max(rank, 1))
    options: dict[str, Any] = {"dtype": layer.weight.dtype, "device": layer.weight.device.type}
    family = family_of(layer)
    if family == "linear" and candidate is None:
        fmt = LinearFormat((layer.in_features,), (layer.out_features,), 1)
    elif is_head(target.layer, layer):
        # An output head has the format of its embedding with the sides exchanged.
        fmt = LinearFormat(fmt.out_shape, fmt.in_shape, rank)
    elif family in ("conv", "conv_transpose"):
        options |= {"geometry": probe.geometry, "size": call.size}
    return request(fmt, call.batch, **options)


def _linear_flops(layer: Any, asked: Request, dense: bool) -> int:
    m, n = int(layer.in_features), int(layer.out_features)
    return 2 * asked.batch * (m * n if dense else asked.format.rank * (m + n))


def _embedding_flops(layer: Any, asked: Request, dense: bool) -> int:
    """A lookup in a dense table computes nothing."""
    return 0 if dense else 2 * asked.batch * asked.format.rank * int(layer.embedding_dim)


def _conv_flops(layer: Any, asked: Request, dense: bool) -> int:
    """The fewer of both ways to convolve: all kernel dimensions at once, or one after the other."""
    # FLOPs are those of the sizes alone, whatever device and dtype are planned for.
    asked = asked.at("cpu", torch.float32)
    if dense:
        return sum(step.flops for step in dense_steps(asked)[0])
    routes = (ConvRoute(depthwise="merged"), ConvRoute(depthwise="separable"))
    return min(sum(s.flops for s in forward_steps(asked, route)) for route in routes)


_FLOPS: dict[Family, Callable[[Any, Request, bool], int]] = {
    "linear": _linear_flops,
    "embedding": _embedding_flops,
    "conv": _conv_flops,
    "conv_transpose": _conv_flops,
}


def _flops(layer: Any, asked: Request, dense: bool) -> int:
    """FLOPs of one call of a torch layer, or of the CP layer in its place."""
    family = family_of(layer)
    assert family is not None
    return _FLOPS[family](layer, asked, dense)


@functools.lru_cache(maxsize=4096)
def _predicted(asked: Request, dense: bool) -> float:
    """Predicted seconds of a call without gradients."""
    return choice.predict_inference(asked, None if dense else choice.choose(asked))
