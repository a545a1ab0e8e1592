"""Convolution layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from polyadic import checks, functional
from polyadic.formats import (
    ConvFormat,
    Rank,
    Shape,
    factored_shape,
    mode_sizes,
    positive_int,
    tensorize,
)
from polyadic.functional.conv import padded, padded_size
from polyadic.kernels.depthwise import Geometry
from polyadic.nn.convert import Exchangeable, FitOptions, Fitted, convert, revert
from polyadic.nn.inputs import call_recorded
from polyadic.planner.request import Request
from polyadic.planner.search import WORD_IMAGES, word_size
from polyadic.plans import Memory

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CPConvBase(Exchangeable):
    """What convolutions share; subclasses fix the number of spatial dimensions."""

    _dims: int
    padding_mode: str

    def _format_of_rank_1(self) -> ConvFormat:
        raise NotImplementedError

    def _set_sizes(
        self, in_channels: int, out_channels: int, groups: int, kernel_size: int | Sequence[int]
    ) -> None:
        """Check and set the sizes of the kernel."""
        self.in_channels = positive_int(in_channels, "in_channels")
        self.out_channels = positive_int(out_channels, "out_channels")
        self.groups = checks.check_channel_groups(
            groups, in_channels=self.in_channels, out_channels=self.out_channels
        )
        each = kernel_size if isinstance(kernel_size, Sequence) else (kernel_size,) * self._dims
        self.kernel_size = mode_sizes(each, "kernel_size")
        if len(self.kernel_size) != self._dims:
            raise ValueError(
                f"kernel_size must be an int or {self._dims} ints, got {kernel_size!r}"
            )

    def _factor(
        self,
        shared: tuple[int, int],
        order: int,
        out_shape: Sequence[int] | None,
        in_shape: Sequence[int] | None,
    ) -> None:
        """Set the mode sizes of a kernel that has ``shared`` (out, in) channels."""
        default_out, default_in = tensorize(*shared, order)
        self.out_shape = factored_shape(out_shape, shared[0], default_out, "out_shape")
        self.in_shape = factored_shape(in_shape, shared[1], default_in, "in_shape")

    @property
    def geometry(self) -> Geometry:
        """Kernel size, stride, padding and dilation."""
        raise NotImplementedError

    def _dense_weight(self) -> Tensor:
        return self.cp.to_matrix().view(self._weight_shape())

    def _request_of_size(self, request: Request, size: Any) -> Request:
        where = self.geometry
        mode = self.padding_mode
        # Reflect, replicate and circular padding happen before the map, which sees the result.
        sizes = checks.check_spatial_size(size, where)
        beside = 0
        if mode != "zeros":
            given, (sizes, where) = sizes, padded_size(sizes, where, mode)
            if mode != "circular" and sizes != given:
                # torch's gradient of these paddings keeps what it padded.
                channels, _ = self._format_of_rank_1().channels
                beside = request.batch * channels * math.prod(given)
        return dataclasses.replace(request, geometry=where, size=sizes, kept_beside=beside)

    def _usual_call(self) -> tuple[int, Shape]:
        where = self.geometry
        return WORD_IMAGES, word_size(where.kernel_size, where.dilation)

    @property
    def kernel_factors(self) -> tuple[Tensor, ...]:
        """One tensor (k_i, R) per spatial dimension."""
        return self.cp.factor_groups()[2]


Conv = TypeVar("Conv", bound="_CPConv")


class _CPConv(CPConvBase):
    """Convolution with a kernel in CP format."""

    _in_group, _out_group = 1, 0
    _metric_groups = (1, 2)
    _shared_arguments = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "bias", "padding_mode",
    )  # fmt: skip

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
        self._set_sizes(in_channels, out_channels, groups, kernel_size)
        self.padding_mode = checks.check_padding_mode(padding_mode)
        where = checks.check_geometry(self.kernel_size, stride, padding, dilation)
        self.stride, self.dilation = where.stride, where.dilation
        self.padding = padding if isinstance(padding, str) else tuple(p for p, _ in where.padding)
        self._factor(
            (self.out_channels, self.in_channels // self.groups), order, out_shape, in_shape
        )
        self.memory = checks.check_memory(memory)
        self._create(
            (self.out_shape, self.in_shape, self.kernel_size),
            rank,
            self.out_channels if checks.check_flag(bias, "bias") else None,
            device,
            dtype,
        )

    def _format_of_rank_1(self) -> ConvFormat:
        return ConvFormat(self.out_shape, self.in_shape, self.kernel_size, 1, self.groups)

    @property
    def geometry(self) -> Geometry:
        """Kernel size, stride, padding and dilation."""
        return checks.check_geometry(self.kernel_size, self.stride, self.padding, self.dilation)

    def _fan_in(self) -> int:
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    @classmethod
    def from_conv(
        cls: type[Conv],
        conv: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        *,
        rank: Rank | None = None,
        order: int = 2,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        memory: Memory = "balanced",
        cp: Fitted | None = None,
        **fit: Unpack[FitOptions],
    ) -> Conv:
        """Make the CP layer whose kernel is fitted to that of torch's convolution.

        Channels, geometry, groups, bias, dtype, device, ``training`` and ``requires_grad`` (the
        kernel's for every factor) are kept; no storage is shared. The fit is
        ``polyadic.decompose``'s, exact where the rank suffices.

        Args:
            conv: the trained layer, of as many dimensions.
            rank: as in the constructor; None where ``cp`` is given.
            order: D, modes per channel side, where ``in_shape`` or ``out_shape`` are not given.
            in_shape: in modes.
            out_shape: out modes.
            memory: what may be kept for the backward.
            cp: a fitted weight, a ``CPTensor`` or a ``Decomposition`` of this layer's tensorized
                shape, which is copied; nothing is fitted then.
            fit: options of ``polyadic.decompose``; ``metric`` is that of input patches
                (Cin / groups · Πk, Cin / groups · Πk).

        Raises:
            TypeError: ``conv`` is not torch's own layer, or its kernel is not plain.
            ValueError: its kernel is computed or has no values, something attached to it would be
                lost, or an argument does not fit.
        """
        return convert(
            cls,
            conv,
            "from_conv",
            rank,
            cp,
            order=order,
            in_shape=in_shape,
            out_shape=out_shape,
            memory=memory,
            **fit,
        )

    def to_conv(self) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
        """Make torch's layer with this layer's dense kernel; its flags are kept.

        Its kernel requires a gradient if a factor does.
        """
        return cast("nn.Conv1d | nn.Conv2d | nn.Conv3d", revert(self))

    def _weight_shape(self) -> Shape:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """(B, Cin, *S) → (B, Cout, *S'), or both without B."""
        if not isinstance(x, Tensor) and (recorded := call_recorded(self, x)) is not None:
            return recorded
        if self.frozen is not None:
            return self._forward_frozen(x)
        (out_factors, in_factors, kernel_factors), scale = self.cp.parts()
        return functional.cp_conv(
            x,
            out_factors,
            in_factors,
            kernel_factors,
            self.bias,
            weights=scale,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
            memory=self.memory,
        )

    def _forward_frozen(self, x: Tensor) -> Tensor:
        assert self.frozen is not None
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = padded(x, self.geometry, self.padding_mode)[0], (0,) * self._dims
        y: Tensor = self.frozen(x, self.bias, self.stride, padding, self.dilation, self.groups)
        return y

    def extra_repr(self) -> str:
        """Say shapes, rank and parameter ratio."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding!r}, dilation={self.dilation}, "
            f"groups={self.groups}, padding_mode={self.padding_mode!r}, "
            f"bias={self.bias is not None}, out_shape={self.out_shape}, "
            f"in_shape={self.in_shape}, {self._ratio()}"
        )


_CONV_DOC = """{dims}-D convolution whose kernel is in CP format.

    Stands in for ``torch.nn.Conv{dims}d``: in-projection, depthwise convolution, out-projection
    (see ``polyadic.functional.cp_conv``).

    Args:
        in_channels: Cin.
        out_channels: Cout.
        kernel_size: int or one per spatial dimension.
        stride: int or one per spatial dimension.
        padding: int, one per spatial dimension, ``"same"`` (stride 1) or ``"valid"``.
        dilation: int or one per spatial dimension.
        groups: groups of channels that are convolved separately; divides Cin and Cout. Each has
            its own rows of the out side; all share the in side and the taps.
        bias: whether the layer has a bias (Cout,).
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        rank: R as an int; a float in (0, 1], the fraction of the dense layer's parameters; or
            a word for the largest rank that does not compute more than the dense layer,
            ``"break-even"``, or is predicted to be faster, ``"faster"`` (see
            ``polyadic.rank_for``).
        order: D, modes per channel side, where ``in_shape`` or ``out_shape`` are not given.
        in_shape: in modes with product Cin / groups; ``polyadic.tensorize`` of both by default.
        out_shape: out modes with product Cout.
        memory: what may be kept for the backward: ``"fast"``, ``"balanced"`` or ``"least"``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Attributes:
        cp: the ``CPTensor`` with tensorized shape (out_shape, in_shape, kernel_size): out factors
            first, as in torch's kernel; a linear layer has its in factors first.
        bias: (Cout,) or None.
        weight: the dense kernel (Cout, Cin/groups, *k), read-only.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, the rank or an option does not fit or is not supported.
    """


class CPConv1d(_CPConv):  # noqa: D101 - the next line is its docstring
    __doc__ = _CONV_DOC.format(dims=1)
    _dims = 1
    _torch_class = nn.Conv1d


class CPConv2d(_CPConv):  # noqa: D101 - the next line is its docstring
    __doc__ = _CONV_DOC.format(dims=2)
    _dims = 2
    _torch_class = nn.Conv2d


class CPConv3d(_CPConv):  # noqa: D101 - the next line is its docstring
    __doc__ = _CONV_DOC.format(dims=3)
    _dims = 3
    _torch_class = nn.Conv3d
