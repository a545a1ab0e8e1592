"""CP spectral convolutions: validate, plan, run; and the product with the weight by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from polyadic import checks
from polyadic._torch import any_autocast, no_autocast
from polyadic.formats import Shape, SpectralFormat
from polyadic.functional.boundary import Asked, Call, Groups, as_batch, autocast_dtype, settled
from polyadic.kernels.dft import COMPLEX, Analysis, Synthesis
from polyadic.kernels.spectral import SpectralMap
from polyadic.planner.ask import plan_spectral
from polyadic.plans import Memory, SpectralPlan, Transforms

Norm = Literal["forward", "backward", "ortho"]
Precision = Literal["full", "mixed"]
NORMS: tuple[Norm, ...] = ("forward", "backward", "ortho")
PRECISIONS: tuple[Precision, ...] = ("full", "mixed")
TRANSFORMS: tuple[Transforms, ...] = ("any", "close")
REAL = {wide: real for real, wide in COMPLEX.items()}


@dataclass(frozen=True)
class _SpectralCall(Call):
    """A checked call: how a map becomes rows of kept modes, and how the rows become a map.

    Args:
        modes: numbers of kept modes.
        into: takes a real map to its kept modes; None where the input is a spectrum.
        out: takes kept modes to a real map; None where the output is a spectrum.
        rounded: whether the spectra are rounded to half of their width.
    """

    modes: Shape = ()
    into: Analysis | None = None
    out: Synthesis | None = None
    rounded: bool = False

    def run(self, x: Tensor, groups: Groups, bias: Tensor | None, weights: Tensor | None) -> Tensor:
        """Apply transforms and map, differentiably."""
        x = self.batched(x)
        spectrum = x if self.into is None else self.into.apply(x)
        last = range(2, spectrum.dim())
        # One copy at most, also of a spectrum that was cut out of a larger one.
        rows = spectrum.permute(*last, 0, 1).contiguous().flatten(0, -3)
        rows = rows.to(torch.complex32) if self.rounded else rows
        made = Call(self.map, self.weights_at).run(rows, groups, None, weights)
        if self.rounded:
            made = made.to(spectrum.dtype)
        if bias is not None:
            made = made + self._constant(bias)
        y: Tensor = made.permute(1, 2, 0)
        y = y.reshape(*y.shape[:2], *self.modes)
        return y if self.out is None else self.unbatched(self.out.apply(y))

    def _constant(self, bias: Tensor) -> Tensor:
        """Return the spectrum (s, 1, o) of the constants ``bias`` (o,), which is one mode of it.

        Added to a spectrum it takes a pass over the kept modes; the bias in space takes one over
        all positions, and so does its gradient.
        """
        assert self.out is not None
        before = 0
        for k in self.modes[:-1]:
            before = before * k + k // 2
        before *= self.modes[-1]
        behind = math.prod(self.modes) - 1 - before
        mode = (bias / self.out.scale).view(1, 1, -1)
        return torch.nn.functional.pad(mode, (0, 0, 0, 0, before, behind))


def _format(groups: Groups, weights: Tensor | None) -> tuple[SpectralFormat, Groups]:
    """Return the factors' format and the factors as tuples; a separable weight has no out ones."""
    ins = checks.check_factor_group(groups[0], "in_factors")
    modes = checks.check_factor_group(groups[2], "mode_factors")
    named = {"in_factors": ins, "mode_factors": modes}
    outs: tuple[Tensor, ...] = ()
    if len(groups[1]) > 0:
        outs = checks.check_factor_group(groups[1], "out_factors")
        named["out_factors"] = outs
    *shapes, (rank,) = checks.check_factors(weights, **named)
    in_shape, kept, *out_shape = shapes
    fmt = SpectralFormat(in_shape, out_shape[0] if outs else (), kept, rank)
    if ins[0].dtype not in REAL:
        raise TypeError(
            f"factors of a spectral convolution must be complex64 or complex128, got {ins[0].dtype}"
        )
    return fmt, (ins, outs, modes)


def _call(
    fmt: SpectralFormat, groups: Groups, weights: Tensor | None, plan: SpectralPlan, **rest: Any
) -> _SpectralCall:
    ins, outs, _ = groups
    layer_map = SpectralMap(plan, len(ins), len(outs))
    return _SpectralCall(layer_map, len(ins) + len(outs), modes=fmt.modes, **rest)


def _settle_product(asked: Asked) -> tuple[_SpectralCall, Groups]:
    """Check and plan a call of ``cp_spectral_product``."""
    x, weights = asked.x, asked.weights
    plan, memory = asked.options
    fmt, groups = _format(asked.groups, weights)
    first = groups[0][0]
    checks.check_tensor(x, "x")
    rounded = x.dtype == torch.complex32 and first.dtype == torch.complex64
    if not rounded:
        checks.check_like_factors(x, first, "x")
    expected = fmt.in_channels, *fmt.modes
    if x.dim() != 1 + len(expected) or tuple(x.shape[1:]) != expected:
        raise ValueError(
            f"x must have shape (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}"
        )
    memory = checks.check_memory(memory)
    if plan is None:
        plan = plan_spectral(fmt, x.shape[0], first.dtype, x.device.type, (), memory)
    else:
        plan = checks.check_plan(plan, SpectralPlan).covering(fmt, 0)
    return _call(fmt, groups, weights, plan), groups


def cp_spectral_product(
    x: Tensor,
    in_factors: Sequence[Tensor],
    out_factors: Sequence[Tensor],
    mode_factors: Sequence[Tensor],
    *,
    weights: Tensor | None = None,
    plan: SpectralPlan | None = None,
    memory: Memory = "balanced",
) -> Tensor:
    """Multiply a spectrum by a CP weight, mode by mode, without building the weight.

        y[b, o, k] = Σ_i x[b, i, k] W[i, o, k]
        W[i, o, k] = Σ_r λ_r A[i, r] C[o, r] Π_d U_d[k_d, r]

    where A and C are the Khatri-Rao products of the in and of the out factors. Differentiable, also
    twice and in forward mode; works under torch.func and torch.compile.

    Args:
        x: (B, Cin, *K), in the factors' dtype; or complex32 beside factors of complex64, which is
            multiplied in complex64 and rounded once.
        in_factors: complex tensors A_d (m_d, R) with Π m_d = Cin.
        out_factors: complex tensors C_d (n_d, R) with Π n_d = Cout; none of them for a separable
            weight, W[i, k], which multiplies each channel by itself.
        mode_factors: a complex tensor U_d (K_d, R) for each dimension of the spectrum.
        weights: λ (R,), complex, or None for ones.
        plan: a SpectralPlan without transforms to obey; None lets the planner choose.
        memory: ``"balanced"`` and ``"least"`` keep x for the backward, ``"fast"`` may keep
            (K, B, R) numbers besides. A given plan says itself what is kept.

    Returns:
        (B, Cout, *K), in x's dtype.

    Raises:
        TypeError: an argument is of the wrong type, or dtypes are not complex or differ.
        ValueError: shapes, ranks or devices do not fit together, or the plan does not.
    """
    factors: Any = (in_factors, out_factors, mode_factors)
    found, groups = settled(_settle_product, x, factors, None, weights, (plan, memory))
    return found.run(x, groups, None, weights)


def _scales(norm: Norm, sizes: Shape, out_sizes: Shape) -> tuple[float, float]:
    """Return the scales of a forward and of an inverse transform by torch's word for them."""
    n, out = math.prod(sizes), math.prod(out_sizes)
    if norm == "forward":
        return 1 / n, 1.0
    return (1.0, 1 / out) if norm == "backward" else (n**-0.5, out**-0.5)


def _settle(asked: Asked) -> tuple[_SpectralCall, Groups]:
    """Check and plan a call of ``cp_spectral_conv``, whose factors are cut to what is kept."""
    x, weights = asked.x, asked.weights
    norm, out_sizes, precision, transforms, plan, memory = asked.options
    fmt, groups = _format(asked.groups, weights)
    first, dims = groups[0][0], len(fmt.modes)
    real = torch.empty(0, dtype=REAL[first.dtype], device=first.device)
    if x.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"a spectral convolution transforms maps in {real.dtype}, the dtype of its factors' "
            f"parts, got x in {x.dtype}; give it x.to({real.dtype}), and precision='mixed' to "
            f"round the spectra to half precision"
        )
    checks.check_like_factors(x, real, "x")
    if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != fmt.in_channels:
        sizes_text = ", ".join(f"S{d + 1}" for d in range(dims))
        raise ValueError(
            f"x must have shape (B, {fmt.in_channels}, {sizes_text}) or ({fmt.in_channels}, "
            f"{sizes_text}), got {tuple(x.shape)}"
        )
    checks.check_bias(asked.bias, fmt.out_channels, real, cast=False)
    sizes = tuple(x.shape[-dims:])
    out_sizes = sizes if out_sizes is None else out_sizes
    memory = checks.check_memory(memory)
    if plan is None:
        batch = x.shape[0] if x.dim() == dims + 2 else 1
        where = x.device.type
        plan = plan_spectral(fmt, batch, first.dtype, where, sizes, memory, transforms)
    else:
        plan = checks.check_plan(plan, SpectralPlan).covering(fmt, dims)
    into_scale, out_scale = _scales(norm, sizes, out_sizes)
    ways = plan.forward.transforms, plan.backward.transforms
    found = _call(
        fmt,
        groups,
        weights,
        plan,
        batch=as_batch(x, dims + 1),
        into=Analysis(sizes, fmt.modes, *ways, into_scale, False),
        out=Synthesis(out_sizes, fmt.modes, *ways, out_scale, True),
        rounded=precision == "mixed",
    )
    return found, groups


def kept_modes(modes: Shape, sizes: Shape, out_sizes: Shape) -> Shape:
    """Return how many of the modes of each dimension both grids have.

    Args:
        modes: numbers of modes, in the last dimension those from 0 on.
        sizes: of the grid of the input.
        out_sizes: of the grid of the output.
    """
    few = list(map(min, sizes, out_sizes))
    few[-1] = few[-1] // 2 + 1
    return tuple(map(min, modes, few))


def _rows_kept(factors: Sequence[Tensor], sizes: Shape, out_sizes: Shape) -> list[Tensor]:
    """Return the rows of the modes that both grids have: around 0, in the last dimension from 0."""
    modes = tuple([factor.shape[0] for factor in factors])
    kept, last = [], len(modes) - 1
    for d, few in enumerate(kept_modes(modes, sizes, out_sizes)):
        start = 0 if d == last else modes[d] // 2 - few // 2
        kept.append(factors[d] if few == modes[d] else factors[d].narrow(0, start, few))
    return kept


def _checked_options(
    x: Any, mode_factors: Any, norm: Any, output_size: Any, precision: Any, transforms: Any
) -> tuple[tuple[Tensor, ...], Shape, Shape]:
    """Return the mode factors as a tuple, and the sizes of both grids."""
    modes = checks.check_factor_group(mode_factors, "mode_factors")
    dims = len(modes)
    checks.check_tensor(x, "x")
    if dims > 3 or x.dim() not in (dims + 1, dims + 2) or 0 in x.shape[-dims:]:
        raise ValueError(
            f"x must have {dims} spatial dimensions, one for each of 1 to 3 mode factors, none of "
            f"size 0, got shape {tuple(x.shape)} and {dims} mode factors"
        )
    checks.check_word(norm, "fft_norm", NORMS)
    # Fourier transforms in half precision, which another precision would need, are not supported.
    checks.check_word(precision, "precision", PRECISIONS)
    checks.check_word(transforms, "transforms", TRANSFORMS)
    sizes = tuple(x.shape[-dims:])
    if output_size is None:
        return modes, sizes, sizes
    return modes, sizes, checks.check_sizes(output_size, dims, "output_size")


def cp_spectral_conv(
    x: Tensor,
    in_factors: Sequence[Tensor],
    out_factors: Sequence[Tensor],
    mode_factors: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    fft_norm: Norm = "forward",
    output_size: Sequence[int] | None = None,
    precision: Precision = "full",
    transforms: Transforms = "any",
    plan: SpectralPlan | None = None,
    memory: Memory = "balanced",
) -> Tensor:
    """Spectral convolution by a weight in CP format: y = F⁻¹(W · F(x)) + bias on the kept modes.

    The Fourier transforms compute the kept modes alone; ``cp_spectral_product`` is what lies
    between them. In every dimension but the last the modes -⌊K_d/2⌋ … ⌈K_d/2⌉-1 are kept, in the
    last one 0 … K_d-1, since the spectrum of real numbers repeats the others. Where the grid of x
    or of the output is too coarse for some of them, those around mode 0 are taken. Source: Li et
    al., Fourier Neural Operator for Parametric Partial Differential Equations, 2021.
    Differentiable, also twice and in forward mode; works under torch.func and torch.compile.
    Autocast does not change the precision, as it does not change that of torch's transforms.

    Args:
        x: (B, Cin, *S) or (Cin, *S), real, in the dtype of the factors' parts.
        in_factors: complex tensors A_d (m_d, R) with Π m_d = Cin.
        out_factors: complex tensors C_d (n_d, R) with Π n_d = Cout; none for a separable weight.
        mode_factors: 1 to 3 complex tensors U_d (K_d, R), one for each spatial dimension.
        bias: (Cout,), real, or None.
        weights: λ (R,), complex, or None for ones.
        fft_norm: ``"forward"``, ``"backward"`` or ``"ortho"``: which transform is scaled, as in
            torch.fft.
        output_size: the grid on which the output is evaluated, that of x by default.
        precision: ``"full"``; or ``"mixed"``, which rounds both spectra to half precision and keeps
            that of x so for the backward.
        transforms: of which the planner chooses one for each dimension. ``"any"`` are torch's fast
            transforms and products with Fourier matrices; ``"close"`` has these products into the
            spectrum of at most 32 positions and out of at most 32 kept modes alone, up to which
            they round like fast transforms.
        plan: a SpectralPlan to obey; None lets the planner choose.
        memory: ``"balanced"`` and ``"least"`` keep the kept modes of x's spectrum for the backward,
            ``"fast"`` may keep (K, B, R) numbers besides. A given plan says itself what is kept.

    Returns:
        (B, Cout, *output_size) or (Cout, *output_size), in x's dtype (under autocast in that of the
        factors' parts).

    Raises:
        TypeError: an argument is of the wrong type, or a dtype does not fit.
        ValueError: shapes, ranks or devices do not fit together, an option is unknown, or the plan
            does not fit.
    """
    modes, sizes, out_sizes = _checked_options(
        x, mode_factors, fft_norm, output_size, precision, transforms
    )
    real = REAL.get(modes[0].dtype)
    if any_autocast() and real is not None and autocast_dtype(x) is not None:
        x = x.to(real)
        bias = None if bias is None else bias.to(real)
    groups: Any = (in_factors, out_factors, _rows_kept(modes, sizes, out_sizes))
    resized = None if out_sizes == sizes else out_sizes
    options = fft_norm, resized, precision, transforms, plan, memory
    with no_autocast(x):
        found, groups = settled(_settle, x, groups, bias, weights, options)
        return found.run(x, groups, bias, weights)
