"""Convolution layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polyadic import functional
from polyadic._check import geometry
from polyadic._check import memory as check_memory
from polyadic._format import (
    ConvFormat,
    Shape,
    factored_shape,
    mode_sizes,
    positive_int,
    resolve_rank,
    tensorize,
)
from polyadic._plan import Memory
from polyadic.nn._layer import CPLayer, Rank


class _CPConv(CPLayer):
    """Convolution with a kernel in CP format; subclasses fix the number of spatial dimensions."""

    _dims: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        rank: Rank,
        order: int = 2,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        memory: Memory = "balanced",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if groups != 1:
            raise ValueError(f"{name} supports groups=1 only, got groups={groups!r}")
        if padding_mode != "zeros":
            raise ValueError(
                f"{name} supports padding_mode='zeros' only, got padding_mode={padding_mode!r}; "
                f"pad the input with torch.nn.functional.pad"
            )
        self.in_channels = positive_int(in_channels, "in_channels")
        self.out_channels = positive_int(out_channels, "out_channels")
        self.kernel_size = self._kernel_size(kernel_size)
        where = geometry(self.kernel_size, stride, padding, dilation)
        self.stride, self.dilation = where.stride, where.dilation
        self.padding = padding if isinstance(padding, str) else tuple(p for p, _ in where.padding)
        default_out, default_in = tensorize(out_channels, in_channels, order)
        self.out_shape = factored_shape(out_shape, self.out_channels, default_out, "out_shape")
        self.in_shape = factored_shape(in_shape, self.in_channels, default_in, "in_shape")
        self.memory = check_memory(memory)
        unit = ConvFormat(self.out_shape, self.in_shape, self.kernel_size, 1)
        self._own(
            (self.out_shape, self.in_shape, self.kernel_size), resolve_rank(rank, unit),
            self.out_channels if bias else None, device, dtype,
        )  # fmt: skip

    def _kernel_size(self, value: Any) -> Shape:
        sizes = mode_sizes(
            value if isinstance(value, Sequence) else (value,) * self._dims, "kernel_size"
        )
        if len(sizes) != self._dims:
            raise ValueError(f"kernel_size must be an int or {self._dims} ints, got {value!r}")
        return sizes

    def _fan_in(self) -> int:
        return self.in_channels * math.prod(self.kernel_size)

    @property
    def out_factors(self) -> tuple[Tensor, ...]:
        """Tensors (n_d, R)."""
        return self.cp.factor_groups()[0]

    @property
    def in_factors(self) -> tuple[Tensor, ...]:
        """Tensors (m_d, R)."""
        return self.cp.factor_groups()[1]

    @property
    def kernel_factors(self) -> tuple[Tensor, ...]:
        """One tensor (k_i, R) per spatial dimension."""
        return self.cp.factor_groups()[2]

    @property
    def weight(self) -> Tensor:
        """The dense kernel (Cout, Cin, *k), built anew at each access; read-only."""
        return self.cp.to_matrix().view(self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Cin, *S) → (B, Cout, *S'), or both without B."""
        if self.frozen is not None:
            y: Tensor = self.frozen(x, self.bias, self.stride, self.padding, self.dilation)
            return y
        out_factors, in_factors, kernel_factors = self.cp.factor_groups()
        return functional.cp_conv(
            x, out_factors, in_factors, kernel_factors, self.bias, weights=self.cp.weights,
            stride=self.stride, padding=self.padding, dilation=self.dilation, memory=self.memory,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Shapes, rank and parameter ratio."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding!r}, dilation={self.dilation}, "
            f"bias={self.bias is not None}, out_shape={self.out_shape}, "
            f"in_shape={self.in_shape}, {self._ratio()}"
        )


_CONV_DOC = """{dims}-D convolution whose kernel is in CP format and never built.

    Stands in for ``torch.nn.Conv{dims}d``: in-projection, depthwise convolution, out-projection
    (see ``polyadic.functional.cp_conv``).

    Args:
        in_channels: Cin.
        out_channels: Cout.
        kernel_size: int or one per spatial dimension.
        stride: int or one per spatial dimension.
        padding: int, one per spatial dimension, ``"same"`` (stride 1) or ``"valid"``.
        dilation: int or one per spatial dimension.
        groups: 1; another value is refused.
        bias: own a bias (Cout,).
        padding_mode: ``"zeros"``; another value is refused.
        rank: R as an int; a float in (0, 1], the fraction of the dense layer's parameters; or
            ``"break-even"``, the largest rank whose FLOPs do not exceed the dense layer's.
        order: D, modes per channel side, where ``in_shape`` or ``out_shape`` are not given.
        in_shape: in modes with product Cin; ``polyadic.tensorize(Cout, Cin)`` by default.
        out_shape: out modes with product Cout.
        memory: what may be kept for the backward: ``"fast"``, ``"balanced"`` or ``"least"``.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        cp: the ``CPTensor`` with tensorized shape (out_shape, in_shape, kernel_size).
        bias: (Cout,) or None.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, the rank or an option does not fit or is not supported.
    """


class CPConv1d(_CPConv):  # noqa: D101
    __doc__ = _CONV_DOC.format(dims=1)
    _dims = 1


class CPConv2d(_CPConv):  # noqa: D101
    __doc__ = _CONV_DOC.format(dims=2)
    _dims = 2


class CPConv3d(_CPConv):  # noqa: D101
    __doc__ = _CONV_DOC.format(dims=3)
    _dims = 3
