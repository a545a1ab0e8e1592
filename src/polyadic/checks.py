"""Validation at the public boundary: each rule stated once, with what was expected and got."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from polyadic._torch import is_traced, memoized
from polyadic.formats import ConvFormat, Shape, is_int, mode_sizes, positive_int
from polyadic.kernels.backend import is_computed, why_not
from polyadic.kernels.depthwise import Geometry
from polyadic.plans import MEMORY, ConvPlan, LinearPlan, Memory, SpectralPlan

Plan = TypeVar("Plan", LinearPlan, ConvPlan, SpectralPlan)
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def an_int(value: Any, name: str, least: int | None = None) -> int:
    """Return ``value`` as a plain int.

    Raises:
        TypeError: ``value`` is not an integer (bool and float are refused).
        ValueError: it is below ``least``.
    """
    if not is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def a_seed(value: Any) -> int:
    """Return a seed as a plain int, or raise a TypeError."""
    return an_int(value, "seed")


def a_number(
    value: Any, name: str, *, least: float | None = None, above: float | None = None
) -> float:
    """Return a finite number as a float.

    Raises:
        TypeError: ``value`` is not an int or a float (bool is refused).
        ValueError: it is not finite, below ``least`` or not above ``above``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    too_small = (least is not None and value < least) or (above is not None and value <= above)
    if too_small or not math.isfinite(value):
        bound = "" if least is None else f" and at least {least:g}"
        bound += "" if above is None else f" and above {above:g}"
        raise ValueError(f"{name} must be finite{bound}, got {value}")
    return float(value)


def check_module(model: object, argument: str = "model") -> None:
    """Raise a TypeError for what is no torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{argument} must be a torch.nn.Module, got {type(model).__name__}")


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
        if not isinstance(factor, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor, got {type(factor).__name__}")
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
    if weights is not None and not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor (R,), got {type(weights).__name__}")
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


_Seen = tuple[Shape, torch.dtype, torch.device]


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
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
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


def check_memory(value: Any) -> Memory:
    """Return ``memory=`` if it is a known level."""
    for level in MEMORY:
        if value == level:
            return level
    raise ValueError(f"memory must be one of {', '.join(map(repr, MEMORY))}, got {value!r}")


def check_plan(plan: Any, kind: type[Plan]) -> Plan:
    """Return a given plan if it is of the kind that the layer follows."""
    if not isinstance(plan, kind):
        raise TypeError(f"plan must be a polyadic.{kind.__name__}, got {type(plan).__name__}")
    return plan


def check_backend(plan: LinearPlan | ConvPlan, kind: str, x: Tensor) -> None:
    """Check that the kernels a given plan asks for can run where x is.

    Raises:
        ValueError: a route is by "triton" and they cannot.
    """
    if plan.forward.by == plan.backward.by == "torch":
        return
    reason = why_not(kind, x.device.type, x.dtype)
    if reason is not None:
        raise ValueError(f"the plan asks for by='triton', but {reason}; use by='torch'")


def check_device(device: Any) -> str:
    """Return the type of a device, such as ``"cpu"``.

    Raises:
        TypeError: ``device`` is neither a device nor text.
        ValueError: it names no device.
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be text such as 'cpu', got {device!r}")
    try:
        return torch.device(device).type
    except RuntimeError:
        raise ValueError(f"device must be one torch knows, such as 'cpu', got {device!r}") from None


def check_dtype(dtype: Any) -> torch.dtype:
    """Return a dtype if layers compute in it.

    Raises:
        TypeError: it is neither floating point of two bytes or more, nor complex64 or complex128.
    """
    if isinstance(dtype, torch.dtype) and is_computed(dtype):
        return dtype
    raise TypeError(
        f"dtype must be floating point of two bytes or more, complex64 or complex128, got {dtype!r}"
    )


def _per_dimension(value: Any, dims: int, name: str, least: int) -> Shape:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims
    if not all(map(is_int, values)):
        raise TypeError(f"{name} must be an int or a tuple of {dims} ints, got {value!r}")
    if len(values) != dims:
        raise ValueError(f"{name} must be an int or a tuple of {dims} ints, got {value!r}")
    if any(v < least for v in values):
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    if any(v >= 2**31 for v in values):
        raise ValueError(f"{name} must be below 2**31, got {value!r}")
    return tuple(int(v) for v in values)


def check_sizes(value: Any, dims: int, name: str) -> Shape:
    """Return sizes of at least 1, an int or one for each of ``dims`` dimensions."""
    return _per_dimension(value, dims, name, 1)


def check_geometry(kernel_size: Shape, stride: Any, padding: Any, dilation: Any) -> Geometry:
    """Check stride, padding ('same' and 'valid' too) and dilation, one entry per dimension.

    Raises:
        TypeError: not ints, tuples of ints or (padding) a string.
        ValueError: wrong length, too small, an unknown string, or 'same' with a stride.
    """
    dims = len(kernel_size)
    strides = _per_dimension(stride, dims, "stride", 1)
    dilations = _per_dimension(dilation, dims, "dilation", 1)
    if not isinstance(padding, str):
        pairs = tuple((p, p) for p in _per_dimension(padding, dims, "padding", 0))
    elif padding == "valid":
        pairs = ((0, 0),) * dims
    elif padding == "same":
        if any(s != 1 for s in strides):
            raise ValueError(f"padding='same' needs stride 1, got stride {stride!r}")
        totals = [d * (k - 1) for d, k in zip(dilations, kernel_size, strict=True)]
        pairs = tuple((total // 2, total - total // 2) for total in totals)
    else:
        raise ValueError(f"padding must be an int, a tuple, 'same' or 'valid', got {padding!r}")
    return Geometry(kernel_size, strides, pairs, dilations)


def check_transposed_geometry(
    kernel_size: Shape, stride: Any, padding: Any, output_padding: Any, dilation: Any
) -> Geometry:
    """Check a transposed convolution's options, one entry per dimension.

    Raises:
        TypeError: not ints or tuples of ints.
        ValueError: wrong length, too small, or an output padding as large as stride and dilation.
    """
    dims = len(kernel_size)
    strides = _per_dimension(stride, dims, "stride", 1)
    dilations = _per_dimension(dilation, dims, "dilation", 1)
    pairs = tuple([(p, p) for p in _per_dimension(padding, dims, "padding", 0)])
    extra = _per_dimension(output_padding, dims, "output_padding", 0)
    for e, s, d in zip(extra, strides, dilations, strict=True):
        if e >= max(s, d):
            raise ValueError(
                f"output_padding must be smaller than the stride or the dilation, got "
                f"{output_padding!r} with stride {strides} and dilation {dilations}"
            )
    return Geometry(kernel_size, strides, pairs, dilations, True, extra)


def check_spatial_size(size: Any, where: Geometry) -> Shape:
    """Return the spatial size of an input, one entry per dimension, if the kernel fits into it.

    Raises:
        ValueError: it is missing, of another length, or smaller than the kernel.
    """
    dims = len(where.kernel_size)
    if size is None:
        raise ValueError("give the spatial size of the convolution's input, such as size=(32, 32)")
    sizes = mode_sizes(size if isinstance(size, Sequence) else (size,) * dims, "size")
    if len(sizes) != dims:
        raise ValueError(f"size must have {dims} entries, got {sizes}")
    if min(where.output_size(sizes)) < 1:
        raise ValueError(
            f"the kernel {where.kernel_size} does not fit into an input of size {sizes}"
        )
    return sizes


def check_channel_groups(value: Any, **channels: int) -> int:
    """Return ``groups`` if it divides every number of channels."""
    groups = positive_int(value, "groups")
    for name, number in channels.items():
        if number % groups:
            raise ValueError(f"{name} must be divisible by groups={groups}, got {number}")
    return groups


def check_padding_mode(value: Any) -> str:
    """Return ``padding_mode`` if torch knows it."""
    if value not in PADDING_MODES:
        known = ", ".join(map(repr, PADDING_MODES))
        raise ValueError(f"padding_mode must be one of {known}, got {value!r}")
    return str(value)


def check_padding_fits(x: Tensor, where: Geometry, mode: str) -> None:
    """Check that an input is large enough to be padded by its own entries."""
    if torch.compiler.is_compiling() or mode in ("zeros", "replicate"):
        return
    for size, pair in zip(x.shape[-len(where.padding) :], where.padding, strict=True):
        most = size - 1 if mode == "reflect" else size
        if max(pair) > most:
            raise ValueError(
                f"padding_mode={mode!r} can pad a dimension of size {size} by at most {most}, got "
                f"padding {where.padding}"
            )


def check_conv_input(x: Tensor, fmt: ConvFormat, where: Geometry) -> None:
    """Check that x is (B, Cin, *S) or (Cin, *S) and that the kernel fits into it."""
    dims, channels = len(fmt.kernel_size), fmt.channels[0]
    spatial = ", ".join(f"S{i + 1}" for i in range(dims))
    if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != channels:
        raise ValueError(
            f"x must have shape (B, {channels}, {spatial}) or ({channels}, "
            f"{spatial}), got {tuple(x.shape)}"
        )
    size = x.shape[-dims:]
    if not torch.compiler.is_compiling() and min(where.output_size(size)) < 1:
        raise ValueError(
            f"the kernel {fmt.kernel_size} with dilation {where.dilation} does not fit into an "
            f"input of spatial size {tuple(size)} with padding {where.padding}"
        )
    if not torch.compiler.is_compiling() and 0 in size and (x.dim() == dims + 1 or x.shape[0]):
        raise ValueError(f"x must not be empty in a spatial dimension, got {tuple(x.shape)}")


def check_indices(value: Any, like: Tensor) -> None:
    """Check that ``value`` is a tensor of indices on the factors' device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"indices must be a tensor, got {type(value).__name__}")
    check_dense(value, "indices")
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices must be int64 or int32, got {value.dtype}; cast them")
    if value.device != like.device:
        raise ValueError(
            f"indices are on {value.device}, the factors on {like.device}; move one of them"
        )


def check_table_rows(num_embeddings: Any, in_shape: Shape) -> int:
    """Return V, by default all Π m_d rows of the table, after a check that they are enough."""
    rows = math.prod(in_shape)
    if num_embeddings is None:
        return rows
    size = positive_int(num_embeddings, "num_embeddings")
    if size > rows:
        raise ValueError(
            f"the in modes {in_shape} make {rows} rows, fewer than num_embeddings={size}; give "
            f"modes whose product is at least {size}"
        )
    return size


def check_padding_index(value: Any, num_embeddings: int) -> int | None:
    """Return ``padding_idx`` counted from the front, or None.

    Raises:
        TypeError: not an int or None.
        ValueError: outside the table.
    """
    if value is None:
        return None
    if not is_int(value):
        raise TypeError(f"padding_idx must be an int or None, got {value!r}")
    index = int(value.__index__())
    if not -num_embeddings <= index < num_embeddings:
        raise ValueError(
            f"padding_idx must lie in [{-num_embeddings}, {num_embeddings}), got {index}"
        )
    return index % num_embeddings


def check_in_range(flat: Tensor, size: int) -> None:
    """Check indices (b,) against [0, size) without reading them: a lookup that does so itself.

    Raises:
        IndexError: one is outside (on a CPU; a CUDA device reports it asynchronously).
    """
    try:
        torch.zeros((), device=flat.device).expand(size).index_select(0, flat)
    except IndexError:
        raise IndexError(f"every index must lie in [0, {size}), one of them does not") from None
