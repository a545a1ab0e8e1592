"""Spectral convolutions, the layers of Fourier neural operators, with a weight in CP format."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyadic import checks, functional
from polyadic.formats import (
    Rank,
    Shape,
    SpectralFormat,
    factored_shape,
    positive_int,
    tensorize,
)
from polyadic.functional.spectral import NORMS, PRECISIONS, REAL, Norm, Precision, kept_modes
from polyadic.init import bias_
from polyadic.kernels.dft import COMPLEX
from polyadic.nn.inputs import call_recorded
from polyadic.nn.layer import CPLayer
from polyadic.planner.request import Request, request
from polyadic.planner.search import WORD_IMAGES
from polyadic.plans import Memory
from polyadic.tensor import CPTensor


class _CPSpectralConv(CPLayer):
    """A spectral convolution of ``_dims`` dimensions."""

    _dims: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        n_modes: int | Sequence[int],
        *,
        rank: Rank,
        max_n_modes: int | Sequence[int] | None = None,
        order: int = 1,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        separable: bool = False,
        bias: bool = True,
        fft_norm: Norm = "forward",
        resolution_scaling: float | Sequence[float] | None = None,
        precision: Precision = "full",
        memory: Memory = "balanced",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = positive_int(in_channels, "in_channels")
        self.out_channels = positive_int(out_channels, "out_channels")
        self.separable = checks.check_flag(separable, "separable")
        if self.separable and self.in_channels != self.out_channels:
            raise ValueError(
                f"a separable spectral convolution multiplies each channel by itself: in_channels "
                f"must be out_channels, got {in_channels} and {out_channels}"
            )
        if self.separable and out_shape:
            raise ValueError("a separable spectral convolution has no out_shape; give in_shape")
        default_in, default_out = tensorize(self.in_channels, self.out_channels, order)
        self.in_shape = factored_shape(in_shape, self.in_channels, default_in, "in_shape")
        self.out_shape: Shape = ()
        if not self.separable:
            self.out_shape = factored_shape(out_shape, self.out_channels, default_out, "out_shape")
        most, word = (n_modes, "n_modes") if max_n_modes is None else (max_n_modes, "max_n_modes")
        self.max_n_modes = checks.check_sizes(most, self._dims, word)
        self._n_modes = self.max_n_modes
        self.fft_norm = checks.check_word(fft_norm, "fft_norm", NORMS)
        self.precision = checks.check_word(precision, "precision", PRECISIONS)
        self.resolution_scaling = _scaling(resolution_scaling, self._dims)
        self.memory = checks.check_memory(memory)
        self._create_parameters(rank, checks.check_flag(bias, "bias"), device, dtype)
        self.n_modes = n_modes

    def _create_parameters(
        self,
        rank: Rank,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Create complex factors and a real bias, and fill them."""
        real = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(real, torch.dtype) or real not in COMPLEX:
            raise TypeError(
                f"dtype is that of the maps, torch.float32 or torch.float64, got {dtype!r}"
            )
        self.frozen = None
        resolved = self._resolved(rank, device, COMPLEX[real])
        groups = [g for g in (self.in_shape, self.out_shape, self._kept(self.max_n_modes)) if g]
        self.cp = CPTensor._without_values(groups, resolved, None, device, COMPLEX[real])
        values = torch.empty(self.out_channels, device=device, dtype=real) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values))
        self.reset_parameters()

    @staticmethod
    def _kept(n_modes: Shape) -> Shape:
        """Numbers of modes that a spectrum of real numbers tells apart."""
        *others, last = n_modes
        return (*others, last // 2 + 1)

    @property
    def n_modes(self) -> Shape:
        """Modes kept of each dimension, at most ``max_n_modes``; it may change in training.

        Raises:
            TypeError: it is set to what is not an int or as many ints as there are dimensions.
            ValueError: a number is below 1 or above that of ``max_n_modes``.
        """
        return self._n_modes

    @n_modes.setter
    def n_modes(self, value: int | Sequence[int]) -> None:
        modes = checks.check_sizes(value, self._dims, "n_modes")
        if any(few > most for few, most in zip(modes, self.max_n_modes, strict=True)):
            raise ValueError(
                f"n_modes must be at most {self.max_n_modes}, those the layer was made with, got "
                f"{modes}"
            )
        self._n_modes = modes

    def _format_of_rank_1(self) -> SpectralFormat:
        return SpectralFormat(self.in_shape, self.out_shape, self._kept(self._n_modes), 1)

    def _request_of_words(
        self, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> Request:
        """The request at rank 1 for which words are resolved: the product with the weight."""
        where = checks.check_device(torch.get_default_device() if device is None else device)
        wide = COMPLEX[torch.get_default_dtype()] if dtype is None else dtype
        unit = self._format_of_rank_1()
        where = "cpu" if where == "meta" else where
        return request(unit, WORD_IMAGES, wide, where, memory=self.memory)

    def _request_of_size(self, asked: Request, size: Any) -> Request:
        if size is None:
            raise ValueError("give the spatial size of the input, such as size=(64, 64)")
        sizes = checks.check_sizes(size, self._dims, "size")
        kept = kept_modes(self._kept(self._n_modes), sizes, sizes)
        fmt = SpectralFormat(self.in_shape, self.out_shape, kept, self.rank)
        return dataclasses.replace(asked, format=fmt, size=sizes)

    def _fan_in(self) -> int:
        return self.in_channels

    def _std(self) -> float:
        return math.sqrt(2 / (self.in_channels + self.out_channels))

    def reset_parameters(self) -> None:
        """Draw factors and bias anew, with the variance of neuraloperator's initial weights.

        E|W|² = 2/(Cin + Cout) for each entry of the weight, real and imaginary parts of equal
        variance (``polyadic.init.cp_orthonormal_``); the bias is normal with that variance.
        """
        std = self._std()
        self.cp.reset_parameters(std)
        if self.bias is not None:
            bias_(self.bias, lambda values: values.normal_(std=std))

    def _weight_shape(self) -> tuple[int, ...]:
        outs = () if self.separable else (self.out_channels,)
        return (self.in_channels, *outs, *self._kept(self.max_n_modes))

    def _dense_weight(self) -> Tensor:
        return self.cp.to_tensor().reshape(self._weight_shape())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Apply a function of tensors to the parts of complex ones, so that dtypes change alike.

        ``double()`` and ``to(torch.float64)`` are for floating-point tensors; torch's modules would
        keep complex ones as they are, or drop their imaginary parts.
        """

        def of_parts(tensor: Tensor) -> Tensor:
            if not tensor.is_complex():
                return fn(tensor)
            parts = fn(torch.view_as_real(tensor))
            if parts.dtype not in COMPLEX:
                return fn(tensor) if parts.is_complex() else tensor
            return torch.view_as_complex(parts)

        return super()._apply(of_parts, recurse)

    def _mode_factors(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """The rows of the modes that ``n_modes`` keeps."""
        if self._n_modes == self.max_n_modes:
            return list(factors)
        cut = []
        for d, (factor, few) in enumerate(zip(factors, self._kept(self._n_modes), strict=True)):
            start = 0 if d == self._dims - 1 else factor.shape[0] // 2 - few // 2
            cut.append(factor.narrow(0, start, few))
        return cut

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """(B, Cin, *S) → (B, Cout, *S), or on a grid of ``output_size`` in the place of S."""
        if not isinstance(x, Tensor) and (recorded := call_recorded(self, x)) is not None:
            return recorded
        (ins, *outs, modes), scale = self.cp.parts()
        if output_size is None and self.resolution_scaling is not None:
            output_size = self._scaled(x, self.resolution_scaling)
        return functional.cp_spectral_conv(
            x,
            ins,
            outs[0] if outs else (),
            self._mode_factors(modes),
            self.bias,
            weights=scale,
            fft_norm=self.fft_norm,
            output_size=output_size,
            precision=self.precision,
            memory=self.memory,
        )

    def _scaled(self, x: Any, scaling: Sequence[float]) -> list[int] | None:
        """The grid that is so many times as fine; None where x has none and will be refused."""
        if not isinstance(x, Tensor) or x.dim() < self._dims:
            return None
        each = zip(x.shape[-self._dims :], scaling, strict=True)
        return [max(1, round(n * r)) for n, r in each]

    @classmethod
    def from_spectral_conv(cls, conv: Any, *, memory: Memory = "balanced") -> Any:
        """Make the layer that computes what a ``SpectralConv`` of neuraloperator does.

        Factors, λ, bias, modes, dtype, device and ``training`` are kept; no storage is shared.
        Where neuraloperator narrows an even number of modes to an odd one it takes the modes one
        beside those that stand at the middle; this layer takes those at the middle.

        Args:
            conv: a ``SpectralConv`` for real data in full or mixed precision, whose weight is in CP
                format.
            memory: what may be kept for the backward.

        Raises:
            TypeError: ``conv`` is no such layer, or its weight is in another format.
            ValueError: it has other dimensions, or an option that this layer does not have.
        """
        weight: Any = getattr(conv, "weight", None)
        if not hasattr(weight, "factors") or not hasattr(weight, "weights"):
            raise TypeError(
                f"expected a SpectralConv of neuraloperator whose weight is in CP format, got "
                f"{type(conv).__name__} with a weight {type(weight).__name__}"
            )
        if conv.order != cls._dims or conv.complex_data or conv.fno_block_precision == "half":
            raise ValueError(
                f"{cls.__name__} takes a SpectralConv of {cls._dims} dimensions for real data in "
                f"full or mixed precision, got {conv.order} dimensions, complex_data="
                f"{conv.complex_data}, fno_block_precision={conv.fno_block_precision!r}"
            )
        factors = list(weight.factors)

        def whole(kept: Sequence[int]) -> Shape:
            return (*kept[:-1], max(1, 2 * (kept[-1] - 1)))

        made = cls(
            conv.in_channels,
            conv.out_channels,
            whole([f.shape[0] for f in factors[-cls._dims :]]),
            rank=factors[0].shape[1],
            separable=conv.separable,
            bias=conv.bias is not None,
            fft_norm=conv.fft_norm,
            resolution_scaling=conv.resolution_scaling_factor,
            precision=conv.fno_block_precision,
            memory=memory,
            device=factors[0].device,
            dtype=REAL[factors[0].dtype],
        )
        made.n_modes = whole(conv.n_modes)
        made.cp = CPTensor.from_factors(made.cp.tensorized_shape, factors, weight.weights)
        if made.bias is not None:
            with torch.no_grad():
                made.bias.copy_(conv.bias.flatten())
        return made.train(conv.training)

    def extra_repr(self) -> str:
        """Channels, modes, rank and parameter ratio."""
        modes = f"n_modes={self.n_modes}"
        if self.n_modes != self.max_n_modes:
            modes += f" of {self.max_n_modes}"
        return (
            f"in_channels={self.in_channels}, out_channels={self.out_channels}, {modes}, "
            f"separable={self.separable}, bias={self.bias is not None}, {self._ratio()}"
        )


def _scaling(value: Any, dims: int) -> tuple[float, ...] | None:
    """One factor per dimension, or None."""
    if value is None:
        return None
    each = tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims
    if len(each) != dims:
        raise ValueError(f"resolution_scaling must be a number or {dims} numbers, got {value!r}")
    return tuple(checks.a_number(one, "resolution_scaling", above=0) for one in each)


_TEXT = """{title}

    y = F⁻¹(W · F(x)) + b: the Fourier transform of x is cut to a number of modes, each of which is
    multiplied by a matrix of its own, and transformed back. W, of shape (Cin, Cout, *modes), is
    complex and in CP format. Stands in for neuraloperator's ``SpectralConv`` with
    ``factorization="CP"``. Transforms compute the kept modes alone, and the backward keeps nothing
    but those of x; ``polyadic.explain`` shows the plan. Source: Li et al., Fourier Neural Operator
    for Parametric Partial Differential Equations, 2021; Kossaifi et al., Multi-Grid Tensorized
    Fourier Neural Operator for High-Resolution PDEs, 2024.

    Args:
        in_channels: Cin.
        out_channels: Cout.
        n_modes: modes kept of each dimension, an int or one for each: the modes -⌊n/2⌋ … ⌈n/2⌉-1,
            of the last dimension 0 … ⌊n/2⌋, as the others are their conjugates.
        max_n_modes: modes of the weight, of which ``n_modes`` are used; ``n_modes`` by default.
        rank: R as an int; a float in (0, 1], the fraction of the dense weight's parameters; or
            ``"break-even"`` or ``"faster"`` (see ``polyadic.rank_for``). With a float the rank is
            often above break-even, as the parameters of all modes are counted together.
        order: modes per side into which channels are split, where ``in_shape`` or ``out_shape`` are
            not given.
        in_shape: modes with product Cin.
        out_shape: modes with product Cout.
        separable: multiply each channel by itself; the weight is (Cin, *modes).
        bias: own a bias (Cout,).
        fft_norm: ``"forward"``, ``"backward"`` or ``"ortho"``, as in torch.fft.
        resolution_scaling: how many times as fine the grid of the output is, a number or one for
            each dimension; None for the grid of the input.
        precision: ``"full"``, or ``"mixed"`` to round the spectra to half precision.
        memory: what may be kept for the backward: ``"fast"``, ``"balanced"`` or ``"least"``.
        device: of the parameters.
        dtype: of the maps and the bias, torch.float32 or torch.float64; the factors are complex
            numbers of such parts.

    Attributes:
        cp: the ``CPTensor`` of complex factors, its groups of modes in_shape, out_shape (unless
            separable) and the kept modes.
        bias: (Cout,) or None.
        weight: the dense weight (Cin, Cout, *modes), to read alone.
        n_modes: may be set to fewer modes than ``max_n_modes``, those the layer was made with.

    Shape:
        (B, Cin, *S) → (B, Cout, *S), or (Cin, *S) → (Cout, *S); S are {dims} sizes of at least 1.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, the rank, a shape or a word does not fit.
    """


class CPSpectralConv1d(_CPSpectralConv):
    """Spectral convolution of one dimension."""

    __doc__ = _TEXT.format(title=__doc__, dims=1)
    _dims = 1


class CPSpectralConv2d(_CPSpectralConv):
    """Spectral convolution of two dimensions."""

    __doc__ = _TEXT.format(title=__doc__, dims=2)
    _dims = 2


class CPSpectralConv3d(_CPSpectralConv):
    """Spectral convolution of three dimensions."""

    __doc__ = _TEXT.format(title=__doc__, dims=3)
    _dims = 3
