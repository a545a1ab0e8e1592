"""Fourier transforms of real maps that compute the kept modes alone, and their adjoints.

``Analysis`` takes a real map (b, c, *n) to the kept modes of its spectrum (b, c, *k), ``Synthesis``
takes kept modes to a map. In the last dimension, whose spectrum is that of real numbers, the modes
0 … k-1 are kept, in every other one the modes -⌊k/2⌋ … ⌈k/2⌉-1, in this order. With w_f(j) =
exp(-2πi f j / n) in each dimension, where f is a mode and j a position, they compute

    X̂[f] = α v_f Σ_j w_f(j) x[j]        x[j] = α Re Σ_f v_f conj(w_f(j)) X̂[f]

where v_f is a weight of the mode of the last dimension. With v_f = 1 the first is torch.fft.rfftn
followed by a cut to the kept modes. With v_f = 2, except v_f = 1 for the modes 0 and n/2, which are
their own mirror image, the second is torch.fft.irfftn: a mode stands for itself and for its mirror
image, which is its conjugate. The adjoint of either is the other with the same α and v, and that is
the whole backward.

The dimensions are transformed one after the other, and each is cut before the next is transformed,
which then works on few modes. A dimension takes either a product with the truncated matrix
(w_f(j)), of real numbers in the last dimension, or a fast transform and a cut. ``"fft-dft"`` is the
fast transform in an analysis and the product in a synthesis.

Axes: b batch, c channels, n positions and k modes of a dimension, l all dimensions in front of one,
t all behind it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from polyadic._torch import forward_mode_level, in_transform, no_autocast, observed
from polyadic.plans import Transform

Shape = tuple[int, ...]

COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


@dataclass(frozen=True)
class Transformation:
    """What an analysis and a synthesis have in common.

    It is not called as a function: the compiler of torch 2.11 traces no call of a frozen dataclass.

    Args:
        sizes: positions, one number per dimension.
        modes: kept modes, one number per dimension.
        forward_by: how each dimension is transformed forward.
        backward_by: how each dimension is transformed in the backward.
        scale: α.
        doubled: whether v_f is 2 for modes that stand for their mirror image too; else it is 1.
    """

    sizes: Shape
    modes: Shape
    forward_by: tuple[Transform, ...]
    backward_by: tuple[Transform, ...]
    scale: float
    doubled: bool

    def apply(self, x: Tensor) -> Tensor:
        """Transform x differentiably; nothing is kept for the backward."""
        alone = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        # A Function would hand tangents on as constants.
        if alone or forward_mode_level() >= 0:
            return self.compute(x)
        y: Tensor = _Linear.apply(self, x)
        return y

    def compute(self, x: Tensor) -> Tensor:
        """Transform."""
        # torch has no fast transform of an empty batch.
        if x.shape[0] == 0:
            return self._empty(x)
        with no_autocast(x):
            return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _empty(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def adjoint(self) -> Transformation:
        """Return the adjoint, which takes a gradient of the output to one of the input."""
        raise NotImplementedError

    def _swapped(self, kind: Callable[..., Transformation]) -> Transformation:
        ways = self.backward_by, self.forward_by
        return kind(self.sizes, self.modes, *ways, self.scale, self.doubled)


class Analysis(Transformation):
    """A real map (b, c, *n) → the kept modes of its spectrum (b, c, *k)."""

    def _compute(self, x: Tensor) -> Tensor:
        """Transform the last dimension first, then the others from the back."""
        n, k, way = self.sizes[-1], self.modes[-1], self.forward_by[-1]
        weights = n, k, self.scale, self.doubled
        if way == "dft":
            table = _on(_real_table, x, *weights)
            y = torch.view_as_complex((x @ table.t()).view(*x.shape[:-1], k, 2))
        else:
            y = torch.fft.rfft(x)[..., :k] * _on(_mode_weights, x, *weights)
        for d in reversed(range(len(self.sizes) - 1)):
            y = _to_modes(y, d, self.sizes[d], self.modes[d], self.forward_by[d])
        return y

    def _empty(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:2], *self.modes, dtype=COMPLEX[x.dtype])

    def adjoint(self) -> Transformation:
        """Return the synthesis with the same scale and weights of modes."""
        return self._swapped(Synthesis)


class Synthesis(Transformation):
    """The kept modes of a spectrum (b, c, *k) → a real map (b, c, *n)."""

    def _compute(self, x: Tensor) -> Tensor:
        """Transform the first dimension first, the last one last."""
        for d in range(len(self.sizes) - 1):
            x = _to_positions(x, d, self.sizes[d], self.modes[d], self.forward_by[d])
        n, k, way = self.sizes[-1], self.modes[-1], self.forward_by[-1]
        if way != "fft":
            # reshape, not flatten, which gradients batched by autograd have no rule for.
            parts = torch.view_as_real(x.resolve_conj()).reshape(*x.shape[:-1], 2 * k)
            return parts @ _on(_real_table, parts, n, k, self.scale, self.doubled)
        # irfft counts twice each mode that stands for its mirror image too.
        if not self.doubled or self.scale != 1.0:
            x = x * _on(_mode_weights, x.real, n, k, self.scale, self.doubled, halved=True)
        y: Tensor = torch.fft.irfft(x, n=n, norm="forward")
        return y

    def _empty(self, x: Tensor) -> Tensor:
        return x.real.new_zeros(*x.shape[:2], *self.sizes)

    def adjoint(self) -> Transformation:
        """Return the analysis with the same scale and weights of modes."""
        return self._swapped(Analysis)


class _Linear(Function):
    """A transformation as autograd sees it: it is linear, so that its backward is its adjoint.

    torch's own Functions for real transforms keep their input, of which they read the size alone.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(transformation: Transformation, x: Tensor) -> Tensor:
        return transformation.compute(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        (ctx.transformation, _) = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, ctx.transformation.adjoint().apply(grad)


def _to_modes(x: Tensor, d: int, n: int, k: int, way: Transform) -> Tensor:
    """(b, c, …, n, …) → (b, c, …, k, …) in spatial dimension d, of complex numbers."""
    if way == "dft":
        return _times(_on(_complex_table, x.real, n, k), x, d, k)
    y = torch.fft.fft(x, dim=d + 2)
    negative = k // 2
    pieces = y.narrow(d + 2, n - negative, negative), y.narrow(d + 2, 0, k - negative)
    return torch.cat(pieces, d + 2)


def _to_positions(x: Tensor, d: int, n: int, k: int, way: Transform) -> Tensor:
    """(b, c, …, k, …) → (b, c, …, n, …) in spatial dimension d, of complex numbers."""
    if way != "fft":
        # As a view that is yet to be conjugated, it would be copied for each row of the batch.
        return _times(_on(_complex_table, x.real, n, k).mH.resolve_conj(), x, d, n)
    negative = k // 2
    below, above = x.narrow(d + 2, 0, negative), x.narrow(d + 2, negative, k - negative)
    zeros = x.new_zeros(*x.shape[: d + 2], n - k, *x.shape[d + 3 :])
    y: Tensor = torch.fft.ifft(torch.cat((above, zeros, below), d + 2), dim=d + 2, norm="forward")
    return y


def _times(matrix: Tensor, x: Tensor, d: int, m: int) -> Tensor:
    """Multiply a matrix (m, n) to spatial dimension d of x (b, c, …, n, …)."""
    lead, n, trail = x.shape[: d + 2], x.shape[d + 2], x.shape[d + 3 :]
    y = matrix @ x.reshape(math.prod(lead), n, math.prod(trail))
    return y.view(*lead, m, *trail)


def _on(table: Callable[..., Tensor], like: Tensor, *sizes: Any, **options: Any) -> Tensor:
    """Return a table on the device of a real tensor and in its dtype, remembered."""
    # Compiled code makes its tables anew, as a compiler takes no tensor for a constant of a graph.
    if torch.compiler.is_compiling() or in_transform() or observed():
        return table(like.dtype, like.device, *sizes, **options)
    return _remembered(table, like.dtype, like.device, *sizes, **options)


@functools.lru_cache(maxsize=256)
def _remembered(table: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    # A tensor of inference mode could not be used where gradients are asked for.
    with torch.inference_mode(False), torch.no_grad():
        return table(*args, **options)


def _phases(n: int, modes: Tensor) -> Tensor:
    """Return 2π f j / n (k, n) in float64, less whole turns, which keeps the digits."""
    positions = torch.arange(n, device=modes.device)
    turned = torch.remainder(modes.unsqueeze(1) * positions, n)
    return turned.to(torch.float64) * (2 * math.pi / n)


def _complex_table(dtype: torch.dtype, device: torch.device, n: int, k: int) -> Tensor:
    """Return w_f(j) (k, n) of the modes -⌊k/2⌋ … ⌈k/2⌉-1."""
    phases = _phases(n, torch.arange(k, device=device) - k // 2)
    return torch.polar(torch.ones_like(phases), -phases).to(COMPLEX[dtype])


def _real_table(
    dtype: torch.dtype, device: torch.device, n: int, k: int, scale: float, doubled: bool
) -> Tensor:
    """Return α v_f w_f(j) of the modes 0 … k-1 as (2k, n): real and imaginary parts in turn."""
    phases = _phases(n, torch.arange(k, device=device))
    parts = torch.stack((phases.cos(), -phases.sin()), 1)
    weights = _mode_weights(torch.float64, device, n, k, scale, doubled)
    return (parts * weights.view(-1, 1, 1)).flatten(0, 1).to(dtype)


def _mode_weights(
    dtype: torch.dtype,
    device: torch.device,
    n: int,
    k: int,
    scale: float,
    doubled: bool,
    halved: bool = False,
) -> Tensor:
    """α v_f (k,) of the modes 0 … k-1; ``halved`` where each that has a mirror image counts twice.

    The modes 0 and n/2 are their own mirror image.
    """
    factor = scale * (2 if doubled else 1) * (0.5 if halved else 1)
    weights = torch.full((k,), factor, device=device, dtype=torch.float64)
    weights[0] = scale
    if 2 * (k - 1) == n and k > 1:
        weights[-1] = scale
    return weights.to(dtype)
