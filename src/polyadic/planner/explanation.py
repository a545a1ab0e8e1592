"""``polyadic.explain`` says which plan a layer follows, step by step, what it costs, and why."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol, overload

import torch
from torch import nn

from polyadic import checks
from polyadic.formats import (
    ConvFormat,
    EmbeddingFormat,
    LinearFormat,
    SpectralFormat,
    mode_sizes,
    positive_int,
)
from polyadic.kernels.backend import never
from polyadic.planner import choice, embedding, spectral, tucker
from polyadic.planner.calibrated import machine_for
from polyadic.planner.model import ModelExplanation, explained_model
from polyadic.planner.report import Costed, Explanation, costed, rejected
from polyadic.planner.request import Request, request
from polyadic.planner.search import break_even
from polyadic.plans import ConvPlan, LinearPlan, Memory, SpectralPlan

# The values of options that are not given.
_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}


class Layer(Protocol):
    """What ``explain`` asks of a layer: the request that it makes of the planner."""

    def request(self, batch: int, size: Any = None) -> Request:
        """Return the request that a call of the layer makes of the planner.

        Args:
            batch: rows, images or indices.
            size: spatial size of a convolution's input, int or one per dimension.

        Raises:
            ValueError: the layer follows no plan, or ``size`` is missing or does not fit.
        """


@overload
def explain(
    layer: Layer | LinearFormat | ConvFormat,
    *,
    batch: int,
    size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    output_padding: int | Sequence[int] = 0,
    plan: choice.Plan | None = None,
    memory: Memory | None = None,
    training: bool = True,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Explanation: ...
@overload
def explain(
    layer: nn.Module,
    *inputs: Any,
    memory: Memory | None = None,
    training: bool = True,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> ModelExplanation: ...
def explain(
    layer: Any,
    *inputs: Any,
    batch: int | None = None,
    size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    output_padding: int | Sequence[int] = 0,
    plan: choice.Plan | None = None,
    memory: Memory | None = None,
    training: bool = True,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Explanation | ModelExplanation:
    """Explain how a layer or a model will be computed, what that costs, and what was weighed.

    With ``inputs``, as in ``explain(model, x)``, the model is run on them once, in evaluation mode
    and without gradients, and every call of a CP layer is a row of a table, dense beside it.

    Times are predictions of a cost model (FLOPs, bytes and launches over the machine's rates);
    ``polyadic.calibrate()`` measures the rates of the machine at hand.

    Args:
        layer: a CP layer, or a ``LinearFormat`` or ``ConvFormat``; or any model, with its inputs.
        inputs: what the model is called with.
        batch: rows of a linear layer (all leading dimensions multiplied), images of a convolution,
            indices of an embedding (distinct ones where they are looked up once).
        size: spatial size of a convolution's input, int or one per dimension.
        stride: stride of a ``ConvFormat``; it is refused for a layer, which has its own.
        padding: padding of a ``ConvFormat``.
        dilation: dilation of a ``ConvFormat``.
        output_padding: output padding of a transposed ``ConvFormat``.
        plan: a plan to explain in place of the planner's choice; an embedding takes none.
        memory: ``"fast"``, ``"balanced"`` or ``"least"``; the layer's own by default.
        training: forward and backward, or forward alone.
        dtype: dtype of the computation; by default the layer's, or float32 for a format.
        device: type of device; by default the layer's, or ``"cpu"`` for a format.

    Raises:
        TypeError: ``layer`` or another argument is of another type.
        ValueError: a size is missing or does not fit, an option is given that is the layer's own,
            or the layer is frozen, which follows no plan; of a model, no CP layer is called.
    """
    training = checks.check_flag(training, "training")
    if inputs:
        given = {"batch": batch, "size": size, "plan": plan}
        told = [name for name, value in given.items() if value is not None]
        if told or not isinstance(layer, nn.Module):
            raise ValueError(
                f"inputs are those of a model, got them with {', '.join(told) or type(layer)}; "
                f"explain(model, *inputs) takes the batch from them"
            )
        places = {"memory": memory, "dtype": dtype, "device": device}
        own = all(value is None for value in places.values())
        return explained_model(layer, inputs, functools.partial(explain, **places), training, own)
    if batch is None:
        raise TypeError("explain expects batch=, or the inputs of a model: explain(model, x)")
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    options["output_padding"] = output_padding
    asked = requested(layer, batch, size, options, dtype, device)
    if memory is not None:
        asked = dataclasses.replace(asked, memory=checks.check_memory(memory))
    return explained(asked, plan, training)


def requested(
    layer: Any,
    batch: int,
    size: int | Sequence[int] | None,
    options: dict[str, Any],
    dtype: torch.dtype | None,
    device: str | torch.device | None,
) -> Request:
    """Return what a layer or format asks of the planner; the arguments are those of ``explain``.

    Raises:
        TypeError: ``layer`` or another argument is of another type.
        ValueError: a size is missing or does not fit, or an option is given that is the layer's.
    """
    batch = positive_int(batch, "batch")
    if isinstance(layer, ConvFormat):
        asked = _request_of_conv(_checked(layer), batch, size, options)
    else:
        _refuse(options, layer)
        if isinstance(layer, LinearFormat):
            asked = request(_checked(layer), batch)
            if size is not None:
                raise ValueError(f"size is that of a convolution's input, got {size!r} for {layer}")
        elif callable(getattr(layer, "request", None)):
            asked = layer.request(batch, size)
        else:
            raise TypeError(
                f"expected a CPLinear, CPConvNd, CPConvTransposeNd, CPSpectralConvNd, CPEmbedding, "
                f"LinearFormat or ConvFormat, got {type(layer).__name__}"
            )
    return asked.at(
        checks.check_device(asked.device if device is None else device),
        checks.check_dtype(asked.dtype if dtype is None else dtype),
    )


def explained(request: Request, plan: Any, training: bool) -> Explanation:
    """Explain a request: the plan given or chosen, the dense layer, and all other plans."""
    kind, machine = choice.kind_of(request), machine_for(request)
    indices = 0
    if isinstance(request.format, EmbeddingFormat):
        if plan is not None:
            raise ValueError(f"an embedding takes no plan, got {plan}")
        indices = embedding.kept_bytes_of_indices(request)
    is_spectral = isinstance(request.format, SpectralFormat)
    if plan is not None and isinstance(request.format, SpectralFormat):
        plan = checks.check_plan(plan, SpectralPlan).covering(request.format, len(request.size))
    elif plan is not None and not isinstance(request.format, SpectralFormat):
        if isinstance(request.format, ConvFormat):
            plan = checks.check_plan(plan, ConvPlan).covering(request.format)
            reason = never("convolution", request.device, request.dtype)
        else:
            plan = checks.check_plan(plan, LinearPlan).covering(request.format)
            reason = never("linear", request.device, request.dtype)
        if reason is not None and "triton" in (plan.forward.by, plan.backward.by):
            raise ValueError(f"the plan asks for by='triton', but {reason}; use by='torch'")

    def cost(plan: Any) -> Costed:
        if plan is None:
            (forward, backward), kept = kind.dense_steps(request), kind.dense_kept(request)
        else:
            forward, backward = kind.steps(request, plan)
            kept = kind.kept_elements(request, plan)
        steps = forward, backward if training else []
        return costed(plan, steps, request.item * kept + indices, machine)

    chosen = cost(choice.choose(request) if plan is None else plan)
    others = rejected([cost(other) for other in kind.candidates(request)], chosen, machine)
    passes = "forward and backward" if training else "forward"
    title = f"{kind.describe(request)} on {request.device}, {passes}, memory={request.memory!r}"
    fmt = request.format
    is_lookup = isinstance(fmt, EmbeddingFormat)
    judged = spectral.product_alone(request) if is_spectral else request
    even = fmt.break_even_rank if is_lookup else break_even(judged, training)
    note = tucker.note(request)
    return Explanation(title, chosen, cost(None), others, even, fmt.rank, machine, note)


def _request_of_conv(
    fmt: ConvFormat, batch: int, size: int | Sequence[int] | None, options: dict[str, Any]
) -> Request:
    if fmt.transposed:
        where = checks.check_transposed_geometry(fmt.kernel_size, **options)
    else:
        _refuse({"output_padding": options.pop("output_padding")}, fmt)
        where = checks.check_geometry(fmt.kernel_size, **options)
    sizes = checks.check_spatial_size(size, where)
    return request(fmt, batch, geometry=where, size=sizes)


def _checked(fmt: Any) -> Any:
    """Check the sizes of a format and return it with plain ints."""
    names = [name for name in ("in_shape", "out_shape", "kernel_size") if hasattr(fmt, name)]
    shapes = {name: mode_sizes(getattr(fmt, name), name) for name in names}
    fmt = dataclasses.replace(fmt, **shapes, rank=positive_int(fmt.rank, "rank"))
    if isinstance(fmt, ConvFormat):
        side = "in_channels" if fmt.transposed else "out_channels"
        checks.check_channel_groups(fmt.groups, **{side: getattr(fmt, side)})
        if len(fmt.kernel_size) > 3:
            raise ValueError(f"kernel_size must have 1 to 3 entries, got {fmt.kernel_size}")
    return fmt


def _refuse(options: dict[str, Any], layer: object) -> None:
    """Refuse options that a layer or format does not take, so that none is ignored."""
    for name, value in options.items():
        if not (isinstance(value, (int, str)) and value == _DEFAULTS[name]):
            raise ValueError(
                f"{name} is not an option of a {type(layer).__name__}, got {value!r}; a layer has "
                f"its own, a ConvFormat is given it"
            )
