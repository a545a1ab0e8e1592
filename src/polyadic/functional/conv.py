"""CP convolutions: validate, plan, run; and the explicit pair of forward and backward."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyadic import checks
from polyadic._torch import no_autocast
from polyadic.autograd import run
from polyadic.formats import ConvFormat, Shape
from polyadic.functional.boundary import (
    autocast,
    call_signature,
    gradient_like,
    known_calls,
    memory_now,
    nbytes,
)
from polyadic.kernels.conv import ConvMap
from polyadic.kernels.depthwise import Geometry
from polyadic.kernels.projections import in_layout
from polyadic.planner.ask import plan_conv
from polyadic.plans import ConvPlan, Memory


@dataclass(frozen=True)
class ConvSaved:
    """What ``cp_conv_forward`` hands to ``cp_conv_backward``.

    Attributes:
        x: the input (B, Cin, *S) or (Cin, *S) as it was given.
        kept: intermediates the plan keeps: the in-projection Z1 (B, R, *S), the depthwise
            result Z2 (B, R, *S'), or fewer.
        out_factors: (n_d, R) each.
        in_factors: (m_d, R) each.
        kernel_factors: (k_i, R) each.
        weights: λ (R,) or None.
        geometry: kernel size, stride, padding and dilation.
        plan: the plan the forward followed and the backward will.
        groups: groups of channels.
    """

    x: Tensor
    kept: tuple[Tensor, ...]
    out_factors: tuple[Tensor, ...]
    in_factors: tuple[Tensor, ...]
    kernel_factors: tuple[Tensor, ...]
    weights: Tensor | None
    geometry: Geometry
    plan: ConvPlan
    groups: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held: input, intermediates and factors."""
        factors = [*self.out_factors, *self.in_factors, *self.kernel_factors]
        return nbytes([self.x, *self.kept, *factors, self.weights])


def _conv(
    x: Tensor,
    groups: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
    weights: Tensor | None,
    where: tuple[Any, Any, Any],
    plan: ConvPlan | None,
    memory: Memory,
    cast: bool,
    n_groups: int = 1,
    padding_mode: str = "zeros",
    rebuild: bool = True,
) -> tuple[ConvFormat, ConvSaved]:
    """Validate the arguments of a convolution and settle its plan; nothing is kept yet.

    x is returned padded where the padding is not of zeros: what pads it is no part of the map.
    """
    outs = checks.check_factor_group(groups[0], "out_factors")
    ins = checks.check_factor_group(groups[1], "in_factors")
    kernels = checks.check_factor_group(groups[2], "kernel_factors")
    checks.check_not_sharded(kernels, "kernel_factors")
    if len(kernels) > 3:
        raise ValueError(f"kernel_factors must hold 1 to 3 spatial modes, got {len(kernels)}")
    out_shape, in_shape, kernel_size, (rank,) = checks.check_factors(
        weights, out_factors=outs, in_factors=ins, kernel_factors=kernels
    )
    n_groups = checks.check_channel_groups(n_groups, out_channels=math.prod(out_shape))
    fmt = ConvFormat(out_shape, in_shape, kernel_size, rank, n_groups)
    checks.check_like_factors(x, ins[0], "x", cast=cast)
    geometry = checks.check_geometry(kernel_size, *where)
    checks.check_conv_input(x, fmt, geometry)
    if checks.check_padding_mode(padding_mode) != "zeros":
        x, geometry = padded(x, geometry, padding_mode)
    if plan is None:
        plan = plan_conv(fmt, geometry, x, memory, rebuild)
    else:
        plan = checks.check_plan(plan, ConvPlan).covering(fmt)
        checks.check_backend(plan, "convolution", x)
    return fmt, ConvSaved(x, (), outs, ins, kernels, weights, geometry, plan, n_groups)


def padded(x: Tensor, where: Geometry, mode: str) -> tuple[Tensor, Geometry]:
    """Pad x by its own entries, and the geometry that is left to do."""
    checks.check_padding_fits(x, where, mode)
    widths = [width for pair in reversed(where.padding) for width in pair]
    none = ((0, 0),) * len(where.padding)
    rest = Geometry(where.kernel_size, where.stride, none, where.dilation)
    if not any(widths):
        return x, rest
    # torch's autocast would pad in float32 and leave the input so.
    with no_autocast(x):
        if x.dim() != len(where.padding) + 2:
            return F.pad(x.unsqueeze(0), widths, mode).squeeze(0), rest
        wider = F.pad(x, widths, mode)
    if mode == "circular" and x.stride(1) == 1 and x.shape[1] > 1:
        # Of torch's paddings the one that loses channels_last.
        wider = in_layout(wider, "channels_last")
    return wider, rest


def padded_size(size: Shape, where: Geometry, mode: str) -> tuple[Shape, Geometry]:
    """The same of a spatial size alone."""
    wider, rest = padded(torch.empty(1, 1, *size, device="meta"), where, mode)
    return tuple(wider.shape[2:]), rest


def _conv_map(saved: ConvSaved) -> ConvMap:
    """The map a plan stands for."""
    n_out, n_in = len(saved.out_factors), len(saved.in_factors)
    return ConvMap(saved.plan, saved.geometry, n_out, n_in, saved.groups)


def _factors(saved: ConvSaved) -> list[Tensor]:
    """What the map takes, λ as one more kernel factor."""
    scale = [] if saved.weights is None else [saved.weights.unsqueeze(0)]
    return [*saved.out_factors, *saved.in_factors, *scale, *saved.kernel_factors]


def cp_conv(
    x: Tensor,
    out_factors: Sequence[Tensor],
    in_factors: Sequence[Tensor],
    kernel_factors: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    plan: ConvPlan | None = None,
    memory: Memory = "balanced",
) -> Tensor:
    """1-, 2- or 3-D convolution by a kernel in CP format, without building the kernel.

    As many spatial dimensions as there are kernel factors; a cross-correlation as in torch. With
    groups the kernel is (Cout, Cin/groups, *k) as torch's: each group has its own rows of the out
    side, while in side and taps are the same for all.

    Args:
        x: (B, Cin, *S) or (Cin, *S), floating point.
        out_factors: tensors (n_d, R) with Π n_d = Cout.
        in_factors: tensors (m_d, R) with Π m_d = Cin / groups.
        kernel_factors: one tensor (k_i, R) per spatial dimension.
        bias: (Cout,) or None.
        weights: λ (R,) or None for ones.
        stride: int or one per spatial dimension.
        padding: on both sides; int, one per dimension, ``"same"`` (stride 1) or ``"valid"``.
        dilation: int or one per spatial dimension.
        groups: groups of channels that are convolved separately; divides Cin and Cout.
        padding_mode: ``"zeros"``, or ``"reflect"``, ``"replicate"`` or ``"circular"``: then x is
            padded first, and kept for the backward as padded.
        plan: a ConvPlan to obey; None lets the planner choose.
        memory: ``"fast"`` (keeps x and two R-channel maps), ``"balanced"`` (x and one) or
            ``"least"`` (x alone); a given plan says itself what is kept.

    Returns:
        (B, Cout, *S') or (Cout, *S'), in x's dtype (under autocast in autocast's); in
        channels_last strides where x has them or the plan computes in that layout.

    Raises:
        TypeError: an argument is of the wrong type, or dtypes are not floating or differ.
        ValueError: shapes, ranks or devices do not fit together, or the kernel does not fit.
    """
    where, factor_groups = (stride, padding, dilation), (out_factors, in_factors, kernel_factors)
    key = found = None
    if padding_mode == "zeros" and not torch.compiler.is_compiling():
        try:
            # Told apart by what is printed, as 1.0 and True are equal to 1.
            options = repr((where, groups)), memory, torch.is_grad_enabled(), plan, x.stride()
            key = call_signature(x, factor_groups, bias, weights, *options)
            found = known_calls.get(key)
        except (AttributeError, TypeError):
            # Not tensors, or of symbolic sizes, which have no hash.
            key = None
    if found is None:
        x, cast = autocast(x)
        fmt, saved = _conv(
            x, factor_groups, weights, where, plan, memory_now(memory), cast is not None, groups,
            padding_mode,
        )  # fmt: skip
        x = saved.x
        checks.check_bias(bias, fmt.out_channels, saved.in_factors[0], cast=cast is not None)
        if cast is not None and bias is not None:
            bias = bias.to(cast)
        # As tuples: an iterator was gone through when it was checked.
        out_factors, in_factors = saved.out_factors, saved.in_factors
        kernel_factors = saved.kernel_factors
        found = _conv_map(saved)
        if key is not None:
            known_calls[key] = found
    scale = () if weights is None else (weights.unsqueeze(0),)
    factors = (*out_factors, *in_factors, *scale, *kernel_factors)
    if x.dim() == len(kernel_factors) + 2:
        return run(found, x, bias, factors)
    return run(found, x.unsqueeze(0), bias, factors).squeeze(0)


def cp_conv_forward(
    x: Tensor,
    out_factors: Sequence[Tensor],
    in_factors: Sequence[Tensor],
    kernel_factors: Sequence[Tensor],
    *,
    weights: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    plan: ConvPlan | None = None,
) -> tuple[Tensor, ConvSaved]:
    """Forward of ``cp_conv`` and what its backward needs, without autograd.

    Args:
        x: (B, Cin, *S) or (Cin, *S).
        out_factors: tensors (n_d, R).
        in_factors: tensors (m_d, R).
        kernel_factors: one tensor (k_i, R) per spatial dimension.
        weights: λ (R,) or None.
        stride: as in ``cp_conv``.
        padding: as in ``cp_conv``.
        dilation: as in ``cp_conv``.
        groups: as in ``cp_conv``.
        plan: a ConvPlan to obey; None lets the planner choose one that does not build the kernel.

    Returns:
        y (B, Cout, *S') or (Cout, *S') and the saved structure.

    Raises:
        TypeError: see ``cp_conv``.
        ValueError: see ``cp_conv``.
    """
    where = (stride, padding, dilation)
    fmt, saved = _conv(
        x, (out_factors, in_factors, kernel_factors), weights, where, plan, "balanced",
        cast=False, n_groups=groups, rebuild=False,
    )  # fmt: skip
    batched = x.dim() == len(fmt.kernel_size) + 2
    layer_map, factors = _conv_map(saved), _factors(saved)
    y, kept = layer_map.forward(x if batched else x.unsqueeze(0), None, factors)
    return y if batched else y.squeeze(0), dataclasses.replace(saved, kept=kept)


def cp_conv_backward(grad_y: Tensor, saved: ConvSaved) -> tuple[Any, ...]:
    """Closed-form backward of ``cp_conv_forward``.

    The out-projection's and in-projection's gradients are GEMMs with KC and KA as in the linear
    map, with the positions as rows; between them stands the depthwise convolution's backward.

    Args:
        grad_y: (B, Cout, *S') or (Cout, *S'), the gradient of the output.
        saved: what the forward returned.

    Returns:
        ``(grad_x, grad_out_factors, grad_in_factors, grad_kernel_factors)``, the latter three
        lists of tensors shaped as the factors; with weights also ``grad_weights`` (R,).

    Raises:
        TypeError: ``saved`` is not a ConvSaved, or the dtype differs from x's.
        ValueError: ``grad_y`` has another shape than the output.
    """
    if not isinstance(saved, ConvSaved):
        raise TypeError(f"saved must come from cp_conv_forward, got {type(saved).__name__}")
    dims = len(saved.kernel_factors)
    out_channels = math.prod([f.shape[0] for f in saved.out_factors])
    lead, size = saved.x.shape[: -dims - 1], saved.geometry.output_size(saved.x.shape[-dims:])
    gradient_like(grad_y, saved.x, (*lead, out_channels, *size))
    batched = bool(lead)
    x = saved.x if batched else saved.x.unsqueeze(0)
    grad = grad_y if batched else grad_y.unsqueeze(0)
    layer_map, factors = _conv_map(saved), _factors(saved)
    needs = (True,) * (1 + len(factors))
    grad_x, grads = layer_map.backward(grad, x, saved.kept, factors, needs)
    assert grad_x is not None
    n_out, n_in = len(saved.out_factors), len(saved.in_factors)
    kernel = grads[n_out + n_in :]
    scale = [] if saved.weights is None else [kernel.pop(0)]
    return (
        grad_x if batched else grad_x.squeeze(0),
        grads[:n_out],
        grads[n_out : n_out + n_in],
        kernel,
        *(g.squeeze(0) for g in scale if g is not None),
    )
