"""Validation of what ``decompose`` is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, TypedDict

import torch
from torch import Tensor

from polyadic import checks
from polyadic.fitting.problem import wide
from polyadic.fitting.result import Decomposition
from polyadic.formats import Shape, is_int, mode_sizes, positive_int
from polyadic.kernels.backend import is_computed
from polyadic.tensor import CPTensor

Start: TypeAlias = Literal["auto", "orthogonal", "random"] | CPTensor | Decomposition


class SweepOptions(TypedDict, total=False):
    """Options that are handed on to ``polyadic.decompose``, by name so that a typo is an error."""

    damping: float
    start: Start | Sequence[Start]
    iterations: int
    tolerance: float
    regularization: float
    max_growth: float | None


STARTS: tuple[Literal["orthogonal", "random"], ...] = ("orthogonal", "random")


def groups(value: Any) -> tuple[Shape, ...]:
    """Return the tensorized shape as tuples of plain ints.

    Raises:
        TypeError: the value is no sequence of groups of integers.
        ValueError: there is no group, one is empty, or a size is below 1.
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(
            f"tensorized_shape must be a sequence of groups of mode sizes such as "
            f"((4, 4, 16), (4, 4, 8)), got {value!r}"
        )
    found = tuple(mode_sizes(group, f"tensorized_shape[{i}]") for i, group in enumerate(value))
    if not found:
        raise ValueError("tensorized_shape must have at least one group of modes, got none")
    return found


def weight(value: Any, shape: tuple[Shape, ...]) -> None:
    """Check that a weight is finite and that its dimensions are products of adjacent modes.

    Raises:
        TypeError: it is neither a floating-point nor a complex tensor.
        ValueError: its shape does not fit, it is not finite, or a process holds only a part of it.
    """
    checks.check_tensor(value, "weight")
    if not is_computed(value.dtype):
        raise TypeError(f"weight must be floating point or complex, got {value.dtype}; cast it")
    if value.is_meta:
        raise ValueError("weight must hold values, got a meta tensor; load the model first")
    if hasattr(value, "placements"):
        raise ValueError("weight must be whole, got a DTensor; give weight.full_tensor()")
    modes = tuple(mode for group in shape for mode in group)
    if not _joins(tuple(value.shape), modes):
        matrix = tuple(math.prod(group) for group in shape)
        raise ValueError(
            f"weight must have the modes {modes} of the tensorized shape or products of adjacent "
            f"ones, such as {matrix}, as its dimensions, got {tuple(value.shape)}; a linear "
            f"layer's weight is given as linear.weight.t()"
        )
    if not bool(value.isfinite().all()):
        raise ValueError("weight must be finite, got NaN or infinity among its entries")


def _joins(dims: Shape, modes: Shape) -> bool:
    """Whether ``dims`` are products of runs of ``modes``, sizes of 1 left out."""
    left = [mode for mode in modes if mode > 1]
    for dim in (d for d in dims if d != 1):
        product = 1
        while left and product < dim:
            product *= left.pop(0)
        if product != dim:
            return False
    return not left


def metric(value: Any, inside: Any, shape: tuple[Shape, ...], *, is_complex: bool) -> Shape:
    """Check the metric, and return the groups of the input side.

    Args:
        value: the metric or None.
        inside: indices of the groups of the input side.
        shape: all groups.
        is_complex: whether the weight is, which may then have a complex metric (P, P).

    Raises:
        TypeError: the metric is not a tensor of such numbers, or the groups are not ints.
        ValueError: the groups do not exist or are named twice; the metric has another size, is
            not finite, not symmetric, not positive semidefinite, or zero.
    """
    if isinstance(inside, (str, bytes)) or not isinstance(inside, Sequence):
        raise TypeError(f"metric_groups must be a sequence of ints, got {inside!r}")
    for i in inside:
        if not is_int(i):
            raise TypeError(f"metric_groups must be a sequence of ints, got {i!r} in it")
    named = tuple(inside)
    if not named or len(set(named)) < len(named) or not set(named) <= set(range(len(shape))):
        raise ValueError(
            f"metric_groups must name each group of the input side once, by its index below "
            f"{len(shape)}, got {tuple(inside)}"
        )
    if value is None:
        return named
    if not isinstance(value, Tensor) or not is_computed(value.dtype):
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"metric must be a floating-point tensor (P, P) or (P,), got {kind}")
    if value.is_complex() and not (is_complex and value.dim() == 2):
        what = "a diagonal (P,)" if is_complex else "that of a real weight"
        raise TypeError(f"metric must be floating point, got {value.dtype} for {what}; give .real")
    size = math.prod(mode for i in named for mode in shape[i])
    if tuple(value.shape) not in ((size,), (size, size)):
        raise ValueError(
            f"metric must have shape ({size}, {size}) or ({size},) for the groups {named} of "
            f"{shape}, got {tuple(value.shape)}"
        )
    if not bool(value.isfinite().all()):
        raise ValueError("metric must be finite, got NaN or infinity among its entries")
    diagonal = value if value.dim() == 1 else value.diagonal().real
    largest = float(diagonal.max())
    if largest <= 0 or float(diagonal.min()) < 0:
        raise ValueError(
            f"metric must be positive semidefinite and not zero, got diagonal entries from "
            f"{float(diagonal.min()):.3g} to {largest:.3g}"
        )
    if value.dim() == 2:
        _semidefinite(value, largest)
    return named


def _semidefinite(value: Tensor, largest: float) -> None:
    asymmetry = float((value - value.mH).abs().max())
    if asymmetry > 1e-4 * largest:
        raise ValueError(
            f"metric must be {'Hermitian' if value.is_complex() else 'symmetric'}, entries differ "
            f"from their mirror images by up to {asymmetry:.3g}; give (metric + metric.mH) / 2 if "
            f"that is rounding"
        )
    exact = wide(value)
    exact = (exact + exact.mH) / 2
    exact.diagonal().add_(1e-4 * float(exact.diagonal().real.mean()))
    if int(torch.linalg.cholesky_ex(exact)[1]) != 0:
        raise ValueError(
            "metric must be positive semidefinite, it has an eigenvalue below -1e-4 times its "
            "mean diagonal; a second moment XᵀX of any inputs has none"
        )


def options(
    damping: Any,
    iterations: Any,
    tolerance: Any,
    regularization: Any,
    max_growth: Any,
    seed: Any,
    callback: Any,
) -> None:
    """Check all other options.

    Raises:
        TypeError: an option is of the wrong type.
        ValueError: an option is out of range.
    """
    positive_int(iterations, "iterations")
    checks.a_number(damping, "damping", above=0)
    checks.a_number(tolerance, "tolerance", least=0)
    checks.a_number(regularization, "regularization", least=0)
    if max_growth is not None:
        checks.a_number(max_growth, "max_growth", least=1)
    checks.a_seed(seed)
    checks.check_function(callback, "callback")


def starts(value: Any, shape: tuple[Shape, ...], *, is_complex: bool) -> list[Start]:
    """Return the starts to be raced.

    Raises:
        TypeError: a start is neither a name nor factors, or complex where the weight is real.
        ValueError: a name is unknown, there is no start, or factors are of another shape or not
            finite.
    """
    if isinstance(value, str) and value == "auto":
        return [*STARTS]
    single = isinstance(value, (str, CPTensor, Decomposition))
    if not single and not isinstance(value, Sequence):
        raise TypeError(f"start must be a name, factors or a sequence of these, got {value!r}")
    found: list[Start] = [value] if single else list(value)
    if not found:
        raise ValueError("start must name at least one start, got an empty sequence")
    for start in found:
        if isinstance(start, str):
            if start not in STARTS:
                raise ValueError(f"start must be 'auto' or one of {STARTS}, got {start!r}")
            continue
        if not isinstance(start, (CPTensor, Decomposition)):
            raise TypeError(f"start must be a name or factors, got {type(start).__name__}")
        cp = start.cp if isinstance(start, Decomposition) else start
        if cp.tensorized_shape != shape:
            raise ValueError(
                f"a start must have the tensorized shape {shape}, got {cp.tensorized_shape}"
            )
        if cp.factors[0].is_complex() and not is_complex:
            raise TypeError(f"a start for a real weight must be real, got {cp.factors[0].dtype}")
        if not all(bool(factor.isfinite().all()) for factor in cp.parameters()):
            raise ValueError("a start must have finite factors, got some with NaN or infinity")
    return found
