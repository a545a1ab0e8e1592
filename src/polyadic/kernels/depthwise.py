"""The geometry of a convolution, and the depthwise stages that its kernel is split into.

A 1-D convolution is lifted to 2-D with one row, so that stages always have two or more spatial
dimensions and the channels_last layout exists for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyadic._torch import known, memoized
from polyadic.kernels import cpu
from polyadic.kernels.complex_maps import (
    as_complex,
    as_real,
    is_by_parts,
    kernel_of_matrices,
    taps_by_parts,
    taps_of_matrices,
)

Ints = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Stride, padding and dilation, one entry per spatial dimension.

    Args:
        kernel_size: number of taps.
        stride: step of the kernel.
        padding: zeros in front and behind, as (low, high) pairs with low <= high; for a transposed
            convolution the positions that are cut off, with low == high.
        dilation: distance between neighbouring taps.
        transposed: whether it is a transposed convolution. That is the adjoint: a convolution with
            these numbers maps its output to its input.
        output_padding: for a transposed convolution, the number of positions added behind.
    """

    kernel_size: Ints
    stride: Ints
    padding: tuple[tuple[int, int], ...]
    dilation: Ints
    transposed: bool = False
    output_padding: Ints = ()

    def output_size(self, size: Sequence[int]) -> Ints:
        """Spatial size of the output for an input of spatial size ``size``."""
        return _output_size(self, size, tuple([low + high for low, high in self.padding]))


def _output_size(where: Geometry | Stage, size: Sequence[int], padding: Ints) -> Ints:
    """Spatial size of an output, where ``padding`` counts both ends of each dimension together."""
    reach = [d * (k - 1) + 1 for k, d in zip(where.kernel_size, where.dilation, strict=True)]
    each = zip(size, padding, reach, where.stride, strict=True)
    if not where.transposed:
        return tuple([(n + p - r) // s + 1 for n, p, r, s in each])
    extra = where.output_padding
    return tuple([(n - 1) * s - p + r + e for (n, p, r, s), e in zip(each, extra, strict=True)])


@dataclass(frozen=True)
class Stage:
    """One convolution, dense or depthwise, along some of the spatial dimensions.

    Its padding is symmetric. With padding 'same' an end may need one more zero than the front: that
    zero, ``excess``, is added to the input beforehand.

    Args:
        factor_positions: indices of the kernel factors that this stage's taps are made of.
        transposed: whether it is a transposed convolution.
        output_padding: for a transposed convolution, the number of positions added behind.
    """

    kernel_size: Ints
    stride: Ints
    padding: Ints
    excess: Ints
    dilation: Ints
    factor_positions: Ints = field(default=())
    transposed: bool = False
    output_padding: Ints = field(default=())

    def conv_arguments(self) -> tuple[Any, ...]:
        """Return the arguments of torch.convolution from the stride to the output padding."""
        extra = self.output_padding or (0,) * len(self.stride)
        return self.stride, self.padding, self.dilation, self.transposed, extra

    def padded(self, x: Tensor) -> Tensor:
        """Add zeros at the end of each spatial dimension whose padding is asymmetric."""
        if not any(self.excess):
            return x
        return F.pad(x, [width for e in reversed(self.excess) for width in (0, e)])

    def output_size(self, size: Sequence[int]) -> Ints:
        """Spatial size of the output for an input of spatial size ``size``."""
        padded = zip(self.padding, self.excess, strict=True)
        return _output_size(self, size, tuple([2 * p + e for p, e in padded]))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """Convolve x (b, c, *s) with weight (n, c/groups, *k)."""
        if x.is_complex():
            parts = None if bias is None else torch.view_as_real(bias.resolve_conj()).reshape(-1)
            if is_by_parts(x, weight, groups):
                x, (re, im) = as_real(x), taps_by_parts(weight)
                by_re = as_complex(self.forward(x, re, parts, 2 * groups))
                by_im = as_complex(self.forward(x, im, None, 2 * groups))
                return torch.add(by_re, by_im, alpha=1j)
            block = kernel_of_matrices(weight, self.transposed)
            return as_complex(self.forward(as_real(x), block, parts, groups))
        if _in_float32(x, weight, groups):
            wide = None if bias is None else bias.float()
            y = self.forward(x.float(), weight.float(), wide, groups)
            return y.to(x.dtype)
        stride, padding, dilation, transposed, extra = self.conv_arguments()
        if not transposed and self._may_miss(x):
            x, padding = self._read_by(x, self.output_size(x.shape[2:])), (0,) * len(stride)
        else:
            x = self.padded(x)
        return torch.convolution(
            _unambiguous(x),
            _unambiguous(weight),
            bias,
            stride,
            padding,
            dilation,
            transposed,
            extra,
            groups,
        )

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, groups: int, wrt: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x and of weight; None for one that ``wrt`` does not ask for.

        Gradients of complex tensors are products with x and weight themselves, as the backward of a
        map wants them. torch's would be products with their conjugates.
        """
        if x.is_complex():
            block = kernel_of_matrices(weight.conj(), self.transposed)
            d_real, d_block = self.backward(as_real(grad), as_real(x.conj()), block, groups, wrt)
            d_weight = None if d_block is None else taps_of_matrices(d_block, self.transposed)
            return None if d_real is None else as_complex(d_real), d_weight
        if _in_float32(x, weight, groups):
            wide = self.backward(grad.float(), x.float(), weight.float(), groups, wrt)
            half_x, half_weight = (None if d is None else d.to(x.dtype) for d in wide)
            return half_x, half_weight
        x, size = self.padded(x), x.shape
        grad, x, weight = _unambiguous(grad), _unambiguous(x), _unambiguous(weight)
        d_x = d_weight = None
        if wrt[1] and self._is_apart(x, groups):
            d_weight, wrt = self._weight_gradient(grad, x, weight, groups), (wrt[0], False)
        if self.transposed:
            by_itself = self._may_miss(grad)
        else:
            by_itself = torch.compiler.is_compiling() and wrt == (True, True)
        if wrt[0] and by_itself:
            d_x, wrt = self._input_gradient(grad, x, weight, groups), (False, wrt[1])
        if any(wrt):
            through, narrow, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, *self.conv_arguments(), groups, [*wrt, False]
            )
            d_x = through if wrt[0] else d_x
            d_weight = narrow if wrt[1] else d_weight
        if d_x is None:
            return None, d_weight
        for dim, excess in enumerate(self.excess, start=2):
            if excess:
                d_x = d_x.narrow(dim, 0, size[dim])
        return d_x, d_weight

    def _input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """Return the gradient of x alone, by the adjoint convolution; x must be padded already.

        Inductor takes memory layouts from the convolutions in a graph and does not count
        convolution_backward as one.
        """
        none = (0,) * len(self.stride)
        adjoint = replace(self, transposed=not self.transposed, excess=none, output_padding=none)
        sizes = zip(x.shape[2:], adjoint.output_size(grad.shape[2:]), strict=True)
        extra = tuple(size - made for size, made in sizes)
        if not self.transposed:
            return replace(adjoint, output_padding=extra).forward(grad, weight, None, groups)
        d_x = adjoint.forward(grad, weight, None, groups)
        # An output padding of a whole stride or more makes positions that no input has.
        return F.pad(d_x, [width for e in reversed(extra) for width in (0, e)])

    def _may_miss(self, x: Tensor) -> bool:
        """Whether along some dimension of x (b, c, *s) it may be that no tap ever meets an entry.

        Taps of neighbouring outputs are at most max(stride, dilation) apart. Where x is smaller
        than that they can all fall into the padding, and then oneDNN reads memory it does not own.
        """
        if max(*self.stride, *self.dilation) == 1 or not any(self.padding):
            return False
        apart = [max(s, d) for s, d in zip(self.stride, self.dilation, strict=True)]
        compiling = torch.compiler.is_compiling()
        return any(
            p > 0 and (not compiling or known(n)) and n < a
            for n, a, p in zip(x.shape[2:], apart, self.padding, strict=True)
        )

    def _read_by(self, x: Tensor, outputs: Sequence[int]) -> Tensor:
        """Return the part of the padded x (b, c, *s) that outputs of this spatial size read."""
        widths: list[int] = []
        for dim in reversed(range(len(outputs))):
            taps = (self.kernel_size[dim] - 1) * self.dilation[dim] + 1
            span = (outputs[dim] - 1) * self.stride[dim] + taps
            low = self.padding[dim]
            if not torch.compiler.is_compiling() and span < low:
                # All taps fall into the padding in front, of which torch cuts nothing off.
                x, low = x.narrow(2 + dim, 0, 0), span
            widths += [low, span - low - x.shape[2 + dim]]
        return F.pad(x, widths)

    def _is_apart(self, x: Tensor, groups: int) -> bool:
        """Whether the weight gradient is computed alone and not together with that of x."""
        if x.device.type != "cpu":
            return False
        by_hand = len(self.kernel_size) == 3 and any(self.padding)
        return x.dtype.itemsize == 2 or by_hand or self._is_wide(x, groups)

    def _weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """Return the weight gradient alone, where torch's is wrong or slow on a CPU.

        oneDNN leaves some of its entries unwritten, which then hold whatever was in memory. In half
        precision this happens to taps that see nothing but padding, so we compute in float32. In
        float32 it happens in three dimensions, if a kernel overlaps the padding both in front and
        behind, so we pad by hand.
        """
        if x.dtype.itemsize == 2:
            wide = self._weight_gradient(grad.float(), x.float(), weight.float(), groups)
            return wide.to(weight.dtype)
        is_wide = self._is_wide(x, groups)
        if self.transposed:
            # The adjoint convolution has the same weight gradient, with input and output exchanged.
            grad, x = x, grad
        if is_wide:
            return self._wide_weight_gradient(grad, x, weight)
        padding = self.padding
        if len(padding) == 3 or any(self.output_padding):
            x, padding = self._read_by(x, grad.shape[2:]), (0,) * len(padding)
        return _weight_gradient(x, grad, weight, self.stride, padding, self.dilation, groups)

    def _is_wide(self, x: Tensor, groups: int) -> bool:
        """Whether torch is slow here. The batch, which may be symbolic, has no say in it."""
        if not x.is_cpu or groups != x.shape[1]:
            return False
        return cpu.has_wide_weight_gradient(self.kernel_size, math.prod(x.shape[1:]))

    def _wide_weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient (r, 1, h, w) of depthwise taps with many columns, in two dimensions.

        A few columns of taps are computed at a time, from x shifted to where these columns begin.
        If there is one row of taps, every row of x becomes an image of its own, and columns become
        rows.
        """
        channels, (height, width) = weight.shape[0], self.kernel_size
        if height == self.stride[0] == 1 and not self.padding[0] and not any(self.output_padding):
            where = self.stride[::-1], self.padding[::-1], self.dilation[::-1]
            pair = _rows_as_images(x), _rows_as_images(grad)
            return _weight_gradient(*pair, weight.mT, *where, channels).mT
        x = self._read_by(x, grad.shape[2:])
        pieces = []
        for first in range(0, width, cpu.WIDE_COLUMNS):
            taps = weight[..., first : first + cpu.WIDE_COLUMNS]
            lacking = (width - first - taps.shape[3]) * self.dilation[1]
            part = x[..., first * self.dilation[1] : x.shape[3] - lacking]
            stride, dilation = self.stride, self.dilation
            piece = _weight_gradient(part, grad, taps, stride, (0, 0), dilation, channels)
            pieces.append(piece)
        return torch.cat(pieces, 3)


def _in_float32(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether a convolution in half precision is computed in float32 on a CPU.

    There are two cases. One is a depthwise convolution that oneDNN does not support: torch's own is
    slow, and rounds each sum of taps to half precision. The other is a convolution whose groups
    have one channel on the side of the taps and several on the other side: oneDNN computes it
    wrongly if the kernel is larger than the input.
    """
    if x.dtype.itemsize != 2 or x.device.type != "cpu":
        return False
    if groups == x.shape[1] and not cpu.in_onednn(x.dtype):
        return True
    return weight.shape[1] == 1 and not groups == x.shape[1] == weight.shape[0]


def _unambiguous(x: Tensor) -> Tensor:
    """Return x (b, c, *s) of one channel in the strides of channels_first, any other as it is.

    With one channel, the strides of channels_last describe the same places in memory. But torch
    decides its layout by the strides, and then convolves and differentiates such tensors wrongly.
    """
    if x.shape[1] != 1 or x.stride(1) != 1:
        return x
    return x.squeeze(1).contiguous().unsqueeze(1)


def _rows_as_images(x: Tensor) -> Tensor:
    """(b, c, h, w) → (b·h, c, w, 1), a view where the channels are innermost."""
    b, c, h, w = x.shape
    return x.movedim(2, 1).reshape(b * h, c, w, 1)


def _weight_gradient(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> Tensor:
    """Return the weight gradient of a convolution, and no other gradient."""
    where = (stride, padding, dilation, False, (0,) * len(stride), groups)
    x, grad = _unambiguous(x), _unambiguous(grad)
    d_weight: Tensor = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *where, [False, True, False]
    )[1]
    return d_weight


@dataclass(frozen=True)
class Stages:
    """How the kernel of a CP convolution is applied.

    Args:
        skip: strides that are taken on the input, along dimensions in which the kernel has one tap
            and no padding.
        depthwise: the depthwise convolutions one after the other; none if the kernel is 1×1.
        dense: the single convolution with the rebuilt kernel and with all strides.
    """

    skip: Ints
    depthwise: tuple[Stage, ...]
    dense: Stage


@memoized
def stages(geometry: Geometry, form: str, n_kernel: int) -> Stages:
    """Split a kernel into depthwise stages.

    Args:
        geometry: kernel size, stride, padding, dilation.
        form: ``"merged"`` for one stage with all taps, ``"separable"`` for one per dimension.
        n_kernel: number of kernel factors; those before the spatial ones (λ) go to the first stage.
    """
    if len(geometry.kernel_size) == 1:
        g = Geometry(
            (1, *geometry.kernel_size),
            (1, *geometry.stride),
            ((0, 0), *geometry.padding),
            (1, *geometry.dilation),
            geometry.transposed,
            (0, *geometry.output_padding),
        )
    else:
        g = geometry
    dims = range(len(g.kernel_size))
    skip = tuple(
        g.stride[d] if g.kernel_size[d] == 1 and not any(g.padding[d]) and not g.transposed else 1
        for d in dims
    )

    def along(chosen: Sequence[int], held: Sequence[int], strides: Ints) -> Stage:
        def pick(values: Sequence[int], neutral: int) -> Ints:
            return tuple(values[d] if d in chosen else neutral for d in dims)

        return Stage(
            pick(g.kernel_size, 1),
            pick(strides, 1),
            pick([low for low, _ in g.padding], 0),
            pick([high - low for low, high in g.padding], 0),
            pick(g.dilation, 1),
            tuple(held),
            g.transposed,
            pick(g.output_padding, 0) if g.transposed else (),
        )

    dense = along(dims, range(n_kernel), g.stride)
    remaining = tuple(s // q for s, q in zip(g.stride, skip, strict=True))
    acting = [d for d in dims if g.kernel_size[d] > 1]
    moved = g.transposed and (max(g.stride) > 1 or any(g.output_padding))
    if not acting and not any(map(any, g.padding)) and not moved:
        return Stages(skip, (), dense)
    if form == "merged" or len(acting) < 2:
        return Stages(skip, (along(dims, range(n_kernel), remaining),), dense)
    first_spatial = n_kernel - len(g.kernel_size)
    alone = {first_spatial + d: d for d in acting[1:]}
    first = along(
        [d for d in dims if d not in acting[1:]],
        [i for i in range(n_kernel) if i not in alone],
        remaining,
    )
    rest = tuple(along([d], [i], remaining) for i, d in alone.items())
    return Stages(skip, (first, *rest), dense)
