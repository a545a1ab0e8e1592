"""CP transposed convolutions, the adjoints of CP convolutions: validate, plan, run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from polyadic import checks
from polyadic.autograd import run
from polyadic.formats import ConvFormat
from polyadic.functional.boundary import autocast, memory_now
from polyadic.kernels.conv import ConvMap
from polyadic.planner.ask import plan_conv
from polyadic.plans import ConvPlan, Memory


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

    The kernel is (Cin, Cout/groups, *k) as torch's, factors in this order. The adjoint of
    ``cp_conv`` with the sides exchanged: in-projection, depthwise transposed convolution,
    out-projection. With groups each has its own rows of the in side; out side and taps are the
    same for all.

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
    x, cast = autocast(x)
    ins = checks.check_factor_group(in_factors, "in_factors")
    outs = checks.check_factor_group(out_factors, "out_factors")
    kernels = checks.check_factor_group(kernel_factors, "kernel_factors")
    checks.check_not_sharded(kernels, "kernel_factors")
    if len(kernels) > 3:
        raise ValueError(f"kernel_factors must hold 1 to 3 spatial modes, got {len(kernels)}")
    in_shape, out_shape, kernel_size, (rank,) = checks.check_factors(
        weights, in_factors=ins, out_factors=outs, kernel_factors=kernels
    )
    groups = checks.check_channel_groups(groups, in_channels=math.prod(in_shape))
    fmt = ConvFormat(out_shape, in_shape, kernel_size, rank, groups, transposed=True)
    checks.check_like_factors(x, ins[0], "x", cast=cast is not None)
    where = checks.check_transposed_geometry(kernel_size, stride, padding, output_padding, dilation)
    checks.check_conv_input(x, fmt, where)
    checks.check_bias(bias, fmt.channels[1], ins[0], cast=cast is not None)
    memory = memory_now(memory)
    if plan is None:
        plan = plan_conv(fmt, where, x, memory)
    else:
        plan = checks.check_plan(plan, ConvPlan).covering(fmt)
        checks.check_backend(plan, "convolution", x)
    if cast is not None and bias is not None:
        bias = bias.to(cast)
    scale = [] if weights is None else [weights.unsqueeze(0)]
    layer_map = ConvMap(plan, where, len(outs), len(ins), groups)
    factors = [*outs, *ins, *scale, *kernels]
    if x.dim() == len(kernel_size) + 2:
        return run(layer_map, x, bias, factors)
    return run(layer_map, x.unsqueeze(0), bias, factors).squeeze(0)
