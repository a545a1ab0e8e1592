"""Factors, and the tensors that must fit them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from polyadic._torch import is_traced, memoized
from polyadic.checks.arguments import check_tensor
from polyadic.formats import Shape
from polyadic.kernels.backend import is_computed

_Seen = tuple[Shape, torch.dtype, torch.device]


def check_factor_group(factors: Any, name: str) -> tuple[Tensor, ...]:
    """Return one group of factors as a tuple of tensors; ``check_factors`` looks at their shapes.

    Raises:
        TypeError: not a sequence of tensors.
        ValueError: empty.
    """
    if isinstance(factors, Tensor) or not isinstance(factors, Iterable):
        raise TypeError(
            f"{name} must be a sequence of tensors (mode, rank), got {type(factors).__name__}"
        )
    group = tuple(factors)
    if not group:
        raise ValueError(f"{name} must hold at least one factor, got none")
    for i, factor in enumerate(group):
        check_tensor(factor, f"{name}[{i}]")
    return group


def check_dense(tensor: Tensor, name: str) -> None:
    """Raise a TypeError where a tensor is sparse, nested or in a layout of oneDNN."""
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}; pass to_dense() or values()")


def check_factors(weights: Tensor | None, **groups: Sequence[Tensor]) -> tuple[Shape, ...]:
    """Check that all factors belong together, and return each group's modes and then (rank,).

    Args:
        weights: λ (R,) or None.
        groups: factors by the name of their group.

    Raises:
        TypeError: dtypes are neither floating point nor complex, or differ.
        ValueError: a factor is not 2-D, ranks or devices differ, a size is 0, λ is not (R,).
    """
    if weights is not None:
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights must be a tensor (R,), got {type(weights).__name__}")
        check_dense(weights, "weights")
    for name, group in groups.items():
        for i, factor in enumerate(group):
            check_dense(factor, f"{name}[{i}]")
    seen = tuple(
        [
            (name, tuple([(tuple(f.shape), f.dtype, f.device) for f in group]))
            for name, group in groups.items()
        ]
    )
    scale = None if weights is None else (tuple(weights.shape), weights.dtype, weights.device)
    return _check_factors(seen, scale)


@memoized
def _check_factors(
    groups: tuple[tuple[str, tuple[_Seen, ...]], ...], scale: _Seen | None
) -> tuple[Shape, ...]:
    (first_name, (first, *_)), *_ = groups
    for name, group in groups:
        for i, (shape, dtype, device) in enumerate(group):
            if len(shape) != 2:
                raise ValueError(f"{name}[{i}] must have shape (mode, rank), got {shape}")
            if not is_computed(dtype):
                raise TypeError(
                    f"factors must be floating point or complex, {name}[{i}] is {dtype}; cast it"
                )
            if shape[0] == 0 or shape[1] == 0:
                raise ValueError(
                    f"modes and rank must be at least 1, {name}[{i}] has shape {shape}"
                )
            if shape[1] != first[0][1]:
                raise ValueError(
                    f"all factors must have the same rank (second dimension): {first_name}[0] has "
                    f"{first[0][1]}, {name}[{i}] has {shape[1]}"
                )
            if dtype != first[1]:
                raise TypeError(
                    f"all factors must have one dtype: {first_name}[0] is {first[1]}, "
                    f"{name}[{i}] is {dtype}"
                )
            if device != first[2]:
                raise ValueError(
                    f"all factors must be on one device: {first_name}[0] is on {first[2]}, "
                    f"{name}[{i}] on {device}"
                )
    (_, rank), dtype, device = first
    if scale is not None:
        if scale[0] != (rank,):
            raise ValueError(f"weights must have shape ({rank},), got {scale[0]}")
        if scale[1:] != (dtype, device):
            raise ValueError(
                f"weights must be {dtype} on {device} like the factors, got {scale[1]} on "
                f"{scale[2]}"
            )
    return (*(tuple([shape[0] for shape, _, _ in group]) for _, group in groups), (rank,))


def check_like_factors(tensor: Any, like: Tensor, name: str, *, cast: bool = False) -> None:
    """Check that ``tensor`` is a tensor of numbers, of the factors' dtype and device.

    Real and complex numbers are never mixed, with autocast or without.

    Args:
        tensor: what the user gave.
        like: a factor.
        name: of the argument, for the message.
        cast: autocast will change the dtype, so that it need not match.

    Raises:
        RuntimeError: under torch.jit.trace, where no size is a number to plan by.
    """
    check_tensor(tensor, name)
    if not torch.compiler.is_compiling() and is_traced():
        raise RuntimeError(
            "CP layers do not support torch.jit.trace, which torch has deprecated; use "
            "torch.export or torch.compile, or polyadic.freeze a linear layer first"
        )
    check_dense(tensor, name)
    if tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device}, the factors on {like.device}; move one of them"
        )
    if not is_computed(tensor.dtype):
        raise TypeError(f"{name} must be floating point or complex, got {tensor.dtype}; cast it")
    if tensor.dtype.is_complex != like.dtype.is_complex:
        real, wanted = ("the factors", tensor) if tensor.is_complex() else (name, like)
        raise TypeError(
            f"{name} is {tensor.dtype}, the factors {like.dtype}; real and complex numbers do not "
            f"mix: make {real} complex by .to({wanted.dtype})"
        )
    if not cast and tensor.dtype != like.dtype:
        how = "" if tensor.is_complex() else " or use autocast"
        raise TypeError(
            f"{name} is {tensor.dtype}, the factors {like.dtype}; cast one of them{how}"
        )


def check_last_dimension(x: Tensor, size: int, name: str) -> None:
    """Check that ``x`` is (..., size)."""
    if x.dim() == 0 or x.shape[-1] != size:
        raise ValueError(f"{name} must have shape (..., {size}), got {tuple(x.shape)}")


def check_bias(bias: Tensor | None, size: int, like: Tensor, *, cast: bool) -> None:
    """Check that a bias is None or (size,)."""
    if bias is None:
        return
    check_like_factors(bias, like, "bias", cast=cast)
    if bias.shape != (size,):
        raise ValueError(f"bias must have shape ({size},), got {tuple(bias.shape)}")
