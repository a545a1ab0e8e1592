"""Layers whose weight is a CP tensor. They own parameters; the arithmetic is in ``functional``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyadic import functional
from polyadic._check import geometry
from polyadic._check import memory as check_memory
from polyadic._format import (
    ConvFormat,
    LinearFormat,
    Shape,
    factored_shape,
    mode_sizes,
    positive_int,
    resolve_rank,
    tensorize,
)
from polyadic._plan import Memory
from polyadic.init import torch_bias_, torch_std
from polyadic.tensor import CPTensor

__all__ = ["CPConv1d", "CPConv2d", "CPConv3d", "CPLinear"]

Rank = int | float | str


class _CPLayer(nn.Module):
    """What layers share: a CP weight, a bias, and initialisation as the torch layer's."""

    cp: CPTensor
    bias: nn.Parameter | None
    memory: Memory

    def _own(
        self,
        tensorized_shape: Sequence[Shape],
        rank: int,
        bias: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Create the parameters and fill them; ``bias`` is its length, or None."""
        self.cp = CPTensor(tensorized_shape, rank, device=device, dtype=dtype)
        values = None if bias is None else torch.empty(bias, device=device, dtype=dtype)
        self.register_parameter("bias", None if values is None else nn.Parameter(values))
        self.reset_parameters()

    def _fan_in(self) -> int:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw factors and bias anew with the output variance of the torch layer replaced.

        For inputs of independent entries with mean square q, Var(y) = fan_in · Var(W) · q + Var(b).
        torch draws W from U(−1/√fan_in, 1/√fan_in), so Var(W) = 1/(3 fan_in); the factors are drawn
        such that the entries of their CP tensor have that very variance
        (``polyadic.init.cp_orthonormal_``), and the bias as torch draws it.
        """
        fan_in = self._fan_in()
        self.cp.reset_parameters(torch_std(fan_in))
        if self.bias is not None:
            torch_bias_(self.bias, fan_in)

    @property
    def rank(self) -> int:
        """R, the number of rank-one components."""
        return self.cp.rank

    def _ratio(self) -> str:
        own, dense = sum(f.numel() for f in self.cp.factors), math.prod(self.cp.shape)
        return f"rank={self.rank}, parameters={own} of {dense} ({dense / own:.1f}x fewer)"


class CPLinear(_CPLayer):
    """Linear layer y = x Wᵀ + b whose weight is in CP format and never built.

    Stands in for ``torch.nn.Linear``. Forward and backward are products with the Khatri-Rao
    products of the factors (see ``polyadic.functional.cp_linear``), 3·2·B·R·(M+N) FLOPs a training
    step against 3·2·B·M·N.

    Args:
        in_features: M.
        out_features: N.
        bias: own a bias (N,).
        rank: R as an int; a float in (0, 1], the fraction of the dense layer's parameters; or
            ``"break-even"``, the largest rank whose FLOPs do not exceed the dense layer's.
        order: D, modes per side, where ``in_shape`` or ``out_shape`` are not given.
        in_shape: in modes with product M; ``polyadic.tensorize`` by default.
        out_shape: out modes with product N; may differ in number from the in modes.
        memory: what may be kept for the backward: ``"fast"``, ``"balanced"`` or ``"least"``.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        cp: the ``CPTensor`` of shape (M, N) with tensorized shape (in_shape, out_shape).
        bias: (N,) or None.

    Shape:
        (..., M) → (..., N).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, the rank or a shape does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: Rank,
        order: int = 3,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        memory: Memory = "balanced",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = positive_int(in_features, "in_features")
        self.out_features = positive_int(out_features, "out_features")
        default_in, default_out = tensorize(in_features, out_features, order)
        self.in_shape = factored_shape(in_shape, self.in_features, default_in, "in_shape")
        self.out_shape = factored_shape(out_shape, self.out_features, default_out, "out_shape")
        self.memory = check_memory(memory)
        resolved = resolve_rank(rank, LinearFormat(self.in_shape, self.out_shape, 1))
        self._own(
            (self.in_shape, self.out_shape), resolved, self.out_features if bias else None,
            device, dtype,
        )  # fmt: skip

    def _fan_in(self) -> int:
        return self.in_features

    @property
    def in_factors(self) -> tuple[Tensor, ...]:
        """D tensors (m_d, R)."""
        return self.cp.factor_groups()[0]

    @property
    def out_factors(self) -> tuple[Tensor, ...]:
        """D tensors (n_d, R)."""
        return self.cp.factor_groups()[1]

    @property
    def weight(self) -> Tensor:
        """The dense weight (N, M) in torch's layout, built anew at each access; read-only."""
        return self.cp.to_matrix().t()

    def forward(self, x: Tensor) -> Tensor:
        """(..., M) → (..., N)."""
        in_factors, out_factors = self.cp.factor_groups()
        return functional.cp_linear(
            x, in_factors, out_factors, self.bias, weights=self.cp.weights, memory=self.memory
        )

    def extra_repr(self) -> str:
        """Shapes, rank and parameter ratio."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, in_shape={self.in_shape}, "
            f"out_shape={self.out_shape}, {self._ratio()}"
        )


class _CPConv(_CPLayer):
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
