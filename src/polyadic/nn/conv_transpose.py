"""Transposed convolution layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from polyadic import checks, functional
from polyadic.formats import ConvFormat, Rank, Shape, is_int
from polyadic.kernels.depthwise import Geometry
from polyadic.nn.conv import CPConvBase
from polyadic.nn.convert import FitOptions, Fitted, convert, revert
from polyadic.nn.inputs import call_recorded
from polyadic.plans import Memory

if TYPE_CHECKING:
    from typing_extensions import Unpack

Transposed = TypeVar("Transposed", bound="_CPConvTranspose")


class _CPConvTranspose(CPConvBase):
    """Transposed convolution with a kernel in CP format."""

    _shared_arguments = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding",
        "groups", "bias", "dilation", "padding_mode",
    )  # fmt: skip

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
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
        if padding_mode != "zeros":
            raise ValueError(
                f"{type(self).__name__} supports padding_mode='zeros' only, as torch's, got "
                f"padding_mode={padding_mode!r}"
            )
        self._set_sizes(in_channels, out_channels, groups, kernel_size)
        self.padding_mode = padding_mode
        where = checks.check_transposed_geometry(
            self.kernel_size, stride, padding, output_padding, dilation
        )
        self.stride, self.dilation = where.stride, where.dilation
        self.padding = tuple(p for p, _ in where.padding)
        self.output_padding = where.output_padding
        self._factor(
            (self.out_channels // self.groups, self.in_channels), order, out_shape, in_shape
        )
        self.memory = checks.check_memory(memory)
        self._create(
            (self.in_shape, self.out_shape, self.kernel_size),
            rank,
            self.out_channels if checks.check_flag(bias, "bias") else None,
            device,
            dtype,
        )

    def _format_of_rank_1(self) -> ConvFormat:
        return ConvFormat(
            self.out_shape, self.in_shape, self.kernel_size, 1, self.groups, transposed=True
        )

    @property
    def geometry(self) -> Geometry:
        """Kernel size, stride, padding, output padding and dilation."""
        return checks.check_transposed_geometry(
            self.kernel_size, self.stride, self.padding, self.output_padding, self.dilation
        )

    def _fan_in(self) -> int:
        # As in torch: the sizes of a kernel (Cin, Cout/groups, *k) except for the first.
        return self.out_channels // self.groups * math.prod(self.kernel_size)

    @classmethod
    def from_conv_transpose(
        cls: type[Transposed],
        conv_transpose: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d,
        *,
        rank: Rank | None = None,
        order: int = 2,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        memory: Memory = "balanced",
        cp: Fitted | None = None,
        **fit: Unpack[FitOptions],
    ) -> Transposed:
        """Make the CP layer whose kernel is fitted to that of torch's transposed convolution.

        Channels, geometry, groups, bias, dtype, device, ``training`` and ``requires_grad`` (the
        kernel's for every factor) are kept; no storage is shared. The fit is
        ``polyadic.decompose``'s, exact where the rank suffices.

        Args:
            conv_transpose: the trained layer, of as many dimensions.
            rank: as in the constructor; None where ``cp`` is given.
            order: D, modes per channel side, where ``in_shape`` or ``out_shape`` are not given.
            in_shape: in modes.
            out_shape: out modes.
            memory: what may be kept for the backward.
            cp: a fitted weight, a ``CPTensor`` or a ``Decomposition`` of this layer's tensorized
                shape, which is copied; nothing is fitted then.
            fit: options of ``polyadic.decompose``; ``metric`` is that of the input (Cin, Cin).

        Raises:
            TypeError: ``conv_transpose`` is not torch's own layer, or its kernel is not plain.
            ValueError: its kernel is computed or has no values, something attached to it would be
                lost, or an argument does not fit.
        """
        return convert(
            cls,
            conv_transpose,
            "from_conv_transpose",
            rank,
            cp,
            order=order,
            in_shape=in_shape,
            out_shape=out_shape,
            memory=memory,
            **fit,
        )

    def to_conv_transpose(self) -> nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d:
        """Make torch's layer with this layer's dense kernel; its flags are kept.

        Its kernel requires a gradient if a factor does.
        """
        return cast("nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d", revert(self))

    def _weight_shape(self) -> Shape:
        return self.in_channels, self.out_channels // self.groups, *self.kernel_size

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """(B, Cin, *S) → (B, Cout, *S'), or both without B.

        Args:
            x: the input.
            output_size: S' where the stride leaves a choice, instead of ``output_padding``; may
                be preceded by the output's other dimensions.

        Raises:
            TypeError: ``output_size`` holds what is no int.
            ValueError: it has another length, or no output padding gives it.
        """
        if (
            not isinstance(x, Tensor)
            and (recorded := call_recorded(self, x, output_size)) is not None
        ):
            return recorded
        extra = self.output_padding if output_size is None else self._extra(x, output_size)
        (in_factors, out_factors, kernel_factors), scale = self.cp.parts()
        return functional.cp_conv_transpose(
            x,
            in_factors,
            out_factors,
            kernel_factors,
            self.bias,
            weights=scale,
            stride=self.stride,
            padding=self.padding,
            output_padding=extra,
            groups=self.groups,
            dilation=self.dilation,
            memory=self.memory,
        )

    def _extra(self, x: Tensor, output_size: Any) -> Shape:
        """Return the output padding that gives a wanted size."""
        if not isinstance(x, Tensor) or x.dim() - self._dims not in (1, 2):
            # The function refuses such an input, whatever is wanted of it.
            return self.output_padding
        wanted = tuple(output_size) if isinstance(output_size, (tuple, list)) else ()
        wanted = wanted[-self._dims :] if len(wanted) == x.dim() else wanted
        if len(wanted) != self._dims or not all(map(is_int, wanted)):
            raise (TypeError if len(wanted) == self._dims else ValueError)(
                f"output_size must be {self._dims} ints, or {x.dim()} as the whole shape of the "
                f"output, got {output_size!r}"
            )
        plain = checks.check_transposed_geometry(
            self.kernel_size, self.stride, self.padding, 0, self.dilation
        )
        least = plain.output_size(x.shape[-self._dims :])
        most = tuple(low + s - 1 for low, s in zip(least, self.stride, strict=True))
        if any(not a <= size <= b for size, a, b in zip(wanted, least, most, strict=True)):
            raise ValueError(
                f"output_size must lie between {least} and {most} for this input, got "
                f"{tuple(output_size)}"
            )
        return tuple(size - low for size, low in zip(wanted, least, strict=True))

    def extra_repr(self) -> str:
        """Say shapes, rank and parameter ratio."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, "
            f"output_padding={self.output_padding}, groups={self.groups}, "
            f"dilation={self.dilation}, bias={self.bias is not None}, in_shape={self.in_shape}, "
            f"out_shape={self.out_shape}, {self._ratio()}"
        )


_DOC = """{dims}-D transposed convolution whose kernel is in CP format.

    Stands in for ``torch.nn.ConvTranspose{dims}d``: in-projection, depthwise transposed
    convolution, out-projection (see ``polyadic.functional.cp_conv_transpose``).

    Args:
        in_channels: Cin.
        out_channels: Cout.
        kernel_size: int or one per spatial dimension.
        stride: int or one per spatial dimension.
        padding: positions cut off on both sides; int or one per spatial dimension.
        output_padding: positions added behind; int or one per spatial dimension.
        groups: groups of channels that are convolved separately; divides Cin and Cout. Each has
            its own rows of the in side; all share the out side and the taps.
        bias: whether the layer has a bias (Cout,).
        dilation: int or one per spatial dimension.
        padding_mode: ``"zeros"``; torch refuses every other value too.
        rank: R as an int; a float in (0, 1], the fraction of the dense layer's parameters; or
            a word for the largest rank that does not compute more than the dense layer,
            ``"break-even"``, or is predicted to be faster, ``"faster"`` (see
            ``polyadic.rank_for``).
        order: D, modes per channel side, where ``in_shape`` or ``out_shape`` are not given.
        in_shape: in modes with product Cin; ``polyadic.tensorize`` of both by default.
        out_shape: out modes with product Cout / groups.
        memory: what may be kept for the backward: ``"fast"``, ``"balanced"`` or ``"least"``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Attributes:
        cp: the ``CPTensor`` with tensorized shape (in_shape, out_shape, kernel_size).
        bias: (Cout,) or None.
        weight: the dense kernel (Cin, Cout/groups, *k), read-only.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, the rank or an option does not fit or is not supported.
    """


class CPConvTranspose1d(_CPConvTranspose):  # noqa: D101 - the next line is its docstring
    __doc__ = _DOC.format(dims=1)
    _dims = 1
    _torch_class = nn.ConvTranspose1d


class CPConvTranspose2d(_CPConvTranspose):  # noqa: D101 - the next line is its docstring
    __doc__ = _DOC.format(dims=2)
    _dims = 2
    _torch_class = nn.ConvTranspose2d


class CPConvTranspose3d(_CPConvTranspose):  # noqa: D101 - the next line is its docstring
    __doc__ = _DOC.format(dims=3)
    _dims = 3
    _torch_class = nn.ConvTranspose3d
