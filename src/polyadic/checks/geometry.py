"""Sizes, strides, padding and dilation of convolutions, and the inputs that they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polyadic.checks.arguments import check_word
from polyadic.formats import ConvFormat, Shape, is_int, mode_sizes, positive_int
from polyadic.kernels.depthwise import Geometry

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


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
    return check_word(value, "padding_mode", PADDING_MODES)


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
