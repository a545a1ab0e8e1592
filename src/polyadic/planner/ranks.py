"""``polyadic.rank_for``: the largest rank that a budget of parameters, FLOPs or time allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from polyadic import checks
from polyadic.formats import ConvFormat, EmbeddingFormat, LinearFormat, tensorize
from polyadic.planner.explanation import Layer, requested
from polyadic.planner.search import WORD_ROWS, NoRankError, largest


def rank_for(
    layer: Layer | LinearFormat | ConvFormat | tuple[int, int],
    *,
    parameters: float | None = None,
    flops: float | None = None,
    speedup: float | None = None,
    batch: int = WORD_ROWS,
    size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    output_padding: int | Sequence[int] = 0,
    training: bool = True,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> int:
    """Return the largest rank with which a layer costs no more than is allowed.

    Exactly one of ``parameters``, ``flops`` and ``speedup`` is given. The last two judge the plan
    that the planner would choose at each rank, all steps of it; times are predictions, by the
    machine's rates, so that another machine may give another rank. ``polyadic.calibrate()``
    measures the rates.

    Args:
        layer: ``(in_features, out_features)`` of a linear layer; a ``LinearFormat`` or
            ``ConvFormat``; or a CP layer. Its own rank does not matter.
        parameters: most parameters, as a fraction of the dense weight's; in (0, 1].
        flops: most FLOPs, as a fraction of the dense layer's; above 0.
        speedup: how many times as fast as the dense layer; above 0.
        batch: rows of a linear layer or embedding, images of a convolution.
        size: spatial size of a convolution's input, int or one per dimension.
        stride: stride of a ``ConvFormat``; it is refused for a layer, which has its own.
        padding: padding of a ``ConvFormat``.
        dilation: dilation of a ``ConvFormat``.
        output_padding: output padding of a transposed ``ConvFormat``.
        training: forward and backward, or forward alone.
        dtype: dtype of the computation; by default the layer's, or float32 for a format.
        device: type of device; by default the layer's, or ``"cpu"`` for a format.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: none or several of the three are given, a value does not fit, or not even rank
            1 is good enough.

    >>> rank_for((1024, 1024), parameters=0.05)
    728
    """
    wanted = {"parameters": parameters, "flops": flops, "speedup": speedup}
    given = {name: value for name, value in wanted.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"rank_for expects one of parameters, flops and speedup, got "
            f"{' and '.join(given) or 'none'}"
        )
    ((name, value),) = given.items()
    bound, training = _bound(name, value), checks.check_flag(training, "training")
    if isinstance(layer, tuple):
        if len(layer) != 2:
            raise ValueError(f"layer as a tuple must be (in_features, out_features), got {layer}")
        layer = LinearFormat(*tensorize(*layer), rank=1)
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    options["output_padding"] = output_padding
    if name == "parameters":
        fmt: Any = layer if isinstance(layer, (LinearFormat, ConvFormat)) else None
        fmt = getattr(layer, "format", None) if fmt is None else fmt
        if not isinstance(fmt, (LinearFormat, ConvFormat)):
            raise TypeError(f"rank_for expects a layer or a format, got {type(layer).__name__}")
        per_rank = dataclasses.replace(fmt, rank=1).parameters
        found = int(bound * fmt.dense_parameters / per_rank)
        if found < 1:
            raise NoRankError(
                f"rank 1 has {per_rank} parameters, more than {bound:g} of {fmt.dense_parameters}"
            )
        return found
    asked = requested(layer, batch, size, options, dtype, device)
    if isinstance(asked.format, EmbeddingFormat):
        raise ValueError(
            "a lookup in a dense table has no FLOPs to save and takes next to no time; choose an "
            "embedding's rank by parameters="
        )
    return largest(asked, flops=flops, speedup=speedup, training=training)


def _bound(name: str, value: Any) -> float:
    found = checks.a_number(value, name, above=0)
    if name == "parameters" and found > 1:
        raise ValueError(f"{name} must be in (0, 1], got {value}")
    return found
