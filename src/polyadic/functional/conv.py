"""CP convolutions, transposed ones too; and the explicit pair of forward and backward.

A transposed convolution is the adjoint of a convolution. Its factors come as those of a convolution
do, so that one flow serves both: (*out, *in, λ if any, *kernel).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polyadic import checks
from polyadic._torch import no_autocast
from polyadic.formats import ConvFormat, Shape
from polyadic.functional.boundary import Asked, Call, Groups, as_batch, call
from polyadic.functional.saved import Saved, explicit_backward, explicit_forward, gradient_like
from polyadic.kernels.conv import ConvMap
from polyadic.kernels.depthwise import Geometry
from polyadic.kernels.projections import in_layout
from polyadic.planner.ask import plan_conv
from polyadic.plans import ConvPlan, Memory

Prepare = Callable[[Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class ConvSaved(Saved):
    """What ``cp_conv_forward`` hands to ``cp_conv_backward``.

    Attributes:
        x: the input (B, Cin, *S) or (Cin, *S) as it was given.
        kept: the intermediates that the plan keeps, of the in-projection Z1 (B, R, *S) and the
            depthwise result Z2 (B, R, *S').
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


class _Options(NamedTuple):
    """What ``cp_conv`` and ``cp_conv_transpose`` are told beside tensors, as it was given.

    They hand it on as a plain tuple, which takes less time to make than one with names.
    """

    transposed: bool
    stride: Any
    padding: Any
    output_padding: Any  # of a transposed convolution alone
    dilation: Any
    groups: Any
    padding_mode: Any
    plan: ConvPlan | None
    memory: Any

    def geometry(self, kernel_size: Shape) -> Geometry:
        """Check and return what a plan and a kernel need of them."""
        if self.transposed:
            return checks.check_transposed_geometry(
                kernel_size, self.stride, self.padding, self.output_padding, self.dilation
            )
        return checks.check_geometry(kernel_size, self.stride, self.padding, self.dilation)


@dataclass(frozen=True)
class _Checked:
    """The arguments of a convolution after all checks.

    Args:
        fmt: sizes of the factors.
        geometry: kernel size, stride, padding and dilation, without a padding that is done before.
        plan: chosen or given.
        groups: factors out, in and kernel.
        prepare: pads a batch by its own entries; None if it is padded with zeros, by the map.
    """

    fmt: ConvFormat
    geometry: Geometry
    plan: ConvPlan
    groups: tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]
    prepare: Prepare | None = None

    def call(self, x: Tensor) -> Call:
        outs, ins, _ = self.groups
        return _call(
            x, self.plan, self.geometry, (len(outs), len(ins)), self.fmt.groups, self.prepare
        )


def _call(
    x: Tensor,
    plan: ConvPlan,
    geometry: Geometry,
    counts: tuple[int, int],
    n_groups: int,
    prepare: Prepare | None = None,
) -> Call:
    """Return the call of the map that a plan stands for; ``counts`` are of out and in factors."""
    layer_map = ConvMap(plan, geometry, *counts, n_groups)
    return Call(layer_map, sum(counts), as_batch(x, len(geometry.kernel_size) + 1), prepare)


def _checked(asked: Asked, memory: Memory, rebuild: bool = True) -> _Checked:
    """Check the arguments of a convolution, and choose a plan or check the one that is given."""
    x, options = asked.x, _Options(*asked.options)
    outs = checks.check_factor_group(asked.groups[0], "out_factors")
    ins = checks.check_factor_group(asked.groups[1], "in_factors")
    kernels = checks.check_factor_group(asked.groups[2], "kernel_factors")
    if len(kernels) > 3:
        raise ValueError(f"kernel_factors must hold 1 to 3 spatial modes, got {len(kernels)}")
    out_shape, in_shape, kernel_size, (rank,) = checks.check_factors(
        asked.weights, out_factors=outs, in_factors=ins, kernel_factors=kernels
    )
    # The side whose factors hold the rows of every group.
    divided = {"in_channels": in_shape} if options.transposed else {"out_channels": out_shape}
    n_groups = checks.check_channel_groups(
        options.groups, **{k: math.prod(v) for k, v in divided.items()}
    )
    fmt = ConvFormat(out_shape, in_shape, kernel_size, rank, n_groups, options.transposed)
    checks.check_like_factors(x, ins[0], "x", cast=asked.cast)
    geometry = options.geometry(kernel_size)
    checks.check_conv_input(x, fmt, geometry)
    prepare = None
    if checks.check_padding_mode(options.padding_mode) != "zeros":
        prepare = functools.partial(_pad, widths=_widths(geometry), mode=options.padding_mode)
        x, geometry = padded(x, geometry, options.padding_mode)
    plan = options.plan
    if plan is None:
        plan = plan_conv(fmt, geometry, x, memory, rebuild)
    else:
        plan = checks.check_plan(plan, ConvPlan).covering(fmt)
        checks.check_backend(plan, "convolution", x)
    return _Checked(fmt, geometry, plan, (outs, ins, kernels), prepare)


def _settle(asked: Asked) -> tuple[Call, Groups]:
    """Check and plan a call of ``cp_conv`` or ``cp_conv_transpose``."""
    memory = checks.check_memory(_Options(*asked.options).memory)
    # Nothing is kept where there are no gradients.
    found = _checked(asked, memory if torch.is_grad_enabled() else "least")
    checks.check_bias(asked.bias, found.fmt.channels[1], found.groups[1][0], cast=asked.cast)
    return found.call(asked.x), found.groups


def _widths(where: Geometry) -> list[int]:
    """Return a padding as ``torch.nn.functional.pad`` takes it, the last dimension first."""
    return [width for pair in reversed(where.padding) for width in pair]


def _pad(x: Tensor, widths: list[int], mode: str) -> Tensor:
    """Pad a batch by its own entries."""
    if not any(widths):
        return x
    # Under autocast torch would pad in float32, and the result would stay in it.
    with no_autocast(x):
        wider = F.pad(x, widths, mode)
    if mode == "circular" and x.stride(1) == 1 and x.shape[1] > 1:
        # Circular padding is the only one of torch's that loses channels_last.
        wider = in_layout(wider, "channels_last")
    return wider


def padded(x: Tensor, where: Geometry, mode: str) -> tuple[Tensor, Geometry]:
    """Pad x by its own entries; return it with the geometry of the convolution without padding."""
    checks.check_padding_fits(x, where, mode)
    none = ((0, 0),) * len(where.padding)
    rest = Geometry(where.kernel_size, where.stride, none, where.dilation)
    if x.dim() == len(where.padding) + 2:
        return _pad(x, _widths(where), mode), rest
    return _pad(x.unsqueeze(0), _widths(where), mode).squeeze(0), rest


def padded_size(size: Shape, where: Geometry, mode: str) -> tuple[Shape, Geometry]:
    """Return the spatial size, and the geometry, of what ``padded`` would return."""
    wider, rest = padded(torch.empty(1, 1, *size, device="meta"), where, mode)
    return tuple(wider.shape[2:]), rest


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

    There are as many spatial dimensions as kernel factors. It is a cross-correlation, as in torch.
    With groups the kernel is (Cout, Cin/groups, *k), as in torch: each group has its own rows of
    the out side, while all groups share the in side and the taps.

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
        padding_mode: ``"zeros"``; or ``"reflect"``, ``"replicate"`` or ``"circular"``, with which x
            is padded first, and the padded x is kept for the backward.
        plan: a ConvPlan to obey; None lets the planner choose.
        memory: ``"fast"`` (keeps x and two R-channel maps), ``"balanced"`` (x and one) or
            ``"least"`` (x alone); with a plan, the plan says what is kept.

    Returns:
        (B, Cout, *S') or (Cout, *S'), in x's dtype (under autocast in autocast's); in
        channels_last strides where x has them or the plan computes in that layout.

    Raises:
        TypeError: an argument is of the wrong type, or dtypes are not floating or differ.
        ValueError: shapes, ranks or devices do not fit together, or the kernel does not fit.
    """
    options = (False, stride, padding, None, dilation, groups, padding_mode, plan, memory)
    return call(_settle, x, (out_factors, in_factors, kernel_factors), bias, weights, options)


def cp_conv_transpose(
    x: Tensor,
    in_factors: Sequence[Tensor],
    out_factors: Sequence[Tensor],
    kernel_factors: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    plan: ConvPlan | None = None,
    memory: Memory = "balanced",
) -> Tensor:
    """1-, 2- or 3-D transposed convolution by a kernel in CP format, without building the kernel.

    The kernel is (Cin, Cout/groups, *k), as in torch, and the factors are given in this order. The
    map is the adjoint of ``cp_conv`` with the sides exchanged: in-projection, depthwise transposed
    convolution, out-projection. Each group has its own rows of the in side, and all groups share
    the out side and the taps.

    Args:
        x: (B, Cin, *S) or (Cin, *S), floating point.
        in_factors: tensors (m_d, R) with Π m_d = Cin.
        out_factors: tensors (n_d, R) with Π n_d = Cout / groups.
        kernel_factors: one tensor (k_i, R) per spatial dimension.
        bias: (Cout,) or None.
        weights: λ (R,) or None for ones.
        stride: int or one per spatial dimension.
        padding: positions cut off on both sides; int or one per spatial dimension.
        output_padding: positions added behind, fewer than stride or dilation; int or one per
            spatial dimension.
        groups: groups of channels that are convolved separately; divides Cin and Cout.
        dilation: int or one per spatial dimension.
        plan: a ConvPlan to obey; None lets the planner choose.
        memory: as in ``cp_conv``.

    Returns:
        (B, Cout, *S') or (Cout, *S') with S' = (S−1)·stride − 2·padding + dilation·(k−1) +
        output_padding + 1, in x's dtype (under autocast in autocast's).

    Raises:
        TypeError: an argument is of the wrong type, or dtypes are not floating or differ.
        ValueError: shapes, ranks or devices do not fit together, or nothing would be left.
    """
    options = (True, stride, padding, output_padding, dilation, groups, "zeros", plan, memory)
    return call(_settle, x, (out_factors, in_factors, kernel_factors), bias, weights, options)


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
    options = (False, stride, padding, None, dilation, groups, "zeros", plan, "balanced")
    sides = (out_factors, in_factors, kernel_factors)
    found = _checked(Asked(x, sides, None, weights, options), "balanced", rebuild=False)
    y, kept = explicit_forward(found.call(x), x, found.groups, weights)
    fmt, geometry = found.fmt, found.geometry
    return y, ConvSaved(x, kept, *found.groups, weights, geometry, found.plan, fmt.groups)


def cp_conv_backward(grad_y: Tensor, saved: ConvSaved) -> tuple[Any, ...]:
    """Closed-form backward of ``cp_conv_forward``.

    The gradients of both projections are GEMMs with KC and KA, as in the linear map, with positions
    for rows; the backward of the depthwise convolution comes between them.

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
    groups = saved.out_factors, saved.in_factors, saved.kernel_factors
    counts = len(saved.out_factors), len(saved.in_factors)
    found = _call(saved.x, saved.plan, saved.geometry, counts, saved.groups)
    return explicit_backward(found, grad_y, saved.x, saved.kept, groups, saved.weights)
