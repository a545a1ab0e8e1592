"""The public functions ask for a plan here; a compiler may not know the sizes of their input."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from polyadic._torch import UNKNOWN_BATCH, known
from polyadic.formats import ConvFormat, EmbeddingFormat, LinearFormat, Shape, SpectralFormat
from polyadic.kernels.depthwise import Geometry
from polyadic.planner import choice, conv, embedding, linear, spectral
from polyadic.planner.request import Request, request
from polyadic.plans import ConvPlan, LinearPlan, Memory, SpectralPlan, Transforms

# Under torch.compile a convolution with a symbolic batch gets one plan for all sizes, which is the
# plan for this many images.
UNKNOWN_IMAGES = 8


def plan_linear(fmt: LinearFormat, x: Tensor, memory: Memory, rebuild: bool = True) -> LinearPlan:
    """Return the plan for x (..., M); ``rebuild`` admits plans that build the dense W."""
    lead = tuple(x.shape[:-1])
    options: dict[str, Any] = {"memory": memory, "rebuild": rebuild}
    if not torch.compiler.is_compiling():
        asked = request(fmt, math.prod(lead), x.dtype, x.device.type, **options)
        return cast(LinearPlan, choice.choose(asked))
    rows = math.prod(lead) if known(*lead) else UNKNOWN_BATCH
    asked = Request(fmt, rows, x.dtype, x.device.type, **options)
    if not known(*fmt.in_shape, *fmt.out_shape, fmt.rank):
        return linear.simplest(asked)
    return cast(LinearPlan, choice.choose_for_constants(asked.constants()))


def plan_embedding(
    fmt: EmbeddingFormat, rows: int, dtype: torch.dtype, device: str, memory: Memory
) -> LinearPlan:
    """Return the plan for a lookup of ``rows`` indices."""
    if not torch.compiler.is_compiling():
        asked = request(fmt, rows, dtype, device, memory=memory)
        return cast(LinearPlan, choice.choose(asked))
    asked = Request(fmt, rows, dtype, device, memory=memory)
    if not known(rows, *fmt.in_shape, *fmt.out_shape, fmt.rank):
        return embedding.simplest(asked)
    return cast(LinearPlan, choice.choose_for_constants(asked.constants()))


def plan_conv(
    fmt: ConvFormat, geometry: Geometry, x: Tensor, memory: Memory, rebuild: bool = True
) -> ConvPlan:
    """Return the plan for x (B, Cin, *S) or (Cin, *S).

    ``rebuild`` admits plans that build the dense kernel.
    """
    dims = len(fmt.kernel_size)
    batched, size = x.dim() == dims + 2, tuple(x.shape[-dims:])
    batch = x.shape[0] if batched else 1
    options: dict[str, Any] = {"memory": memory, "rebuild": rebuild, "geometry": geometry}
    options["size"] = size
    if not torch.compiler.is_compiling():
        last = batched and x.stride(1) == 1 and x.shape[1] > 1
        asked = request(fmt, batch, x.dtype, x.device.type, channels_last=last, **options)
        return cast(ConvPlan, choice.choose(asked))
    images = batch if known(batch) else UNKNOWN_IMAGES
    asked = Request(fmt, images, x.dtype, x.device.type, **options)
    sizes: Shape = (*fmt.out_shape, *fmt.in_shape, *fmt.kernel_size, fmt.rank, *size)
    if not known(*sizes):
        return conv.simplest(asked)
    return cast(ConvPlan, choice.choose_for_constants(asked.constants()))


def plan_spectral(
    fmt: SpectralFormat,
    batch: int,
    dtype: torch.dtype,
    device: str,
    size: Shape,
    memory: Memory,
    transforms: Transforms = "any",
) -> SpectralPlan:
    """Return the plan for a batch of maps of a spatial size, or of spectra where it is ()."""
    options: dict[str, Any] = {"memory": memory, "size": size, "transforms": transforms}
    if not torch.compiler.is_compiling():
        asked = request(fmt, batch, dtype, device, **options)
        return cast(SpectralPlan, choice.choose(asked))
    maps = batch if known(batch) else UNKNOWN_IMAGES
    asked = Request(fmt, maps, dtype, device, **options)
    if not known(*fmt.in_shape, *fmt.out_shape, *fmt.modes, fmt.rank, *size):
        return spectral.simplest(asked)
    return cast(SpectralPlan, choice.choose_for_constants(asked.constants()))
