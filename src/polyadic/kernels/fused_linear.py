"""A linear map on a GPU: cuBLAS makes the products, and Triton kernels all matrices and gradients.

    Z = X KA    Y = Z KCᵀ + b    G = dY KC    dX = G KAᵀ    dKA = Xᵀ G    dKC = dYᵀ Z

The forward has three launches: both Khatri-Rao matrices, and two products. The backward has six:
the matrices, four products, and the gradients of all factors; or five, where one kernel makes dKA
and dKC together (see ``_makes_both``). That kernel, or else the one that makes the matrices, begins
the gradient of the bias, and the one that makes the factors' gradients ends it. Columns of the
matrices, of Z and of G are padded with zeros to R' ≥ R.

With small tensors the GPU waits for the processor, and what that spends on a pass grows with the
number of functions called and of tensors made. So all that follows from sizes is made once for
them, and a pass asks nothing twice.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from polyadic.kernels.backend import has_warpgroups
from polyadic.kernels.fused import contiguous
from polyadic.kernels.pairs import padded_rank
from polyadic.kernels.products import HALVES, matmul_tn_in_float32

if TYPE_CHECKING:
    from polyadic.kernels.triton.mttkrp import Gradients


class FusedLinear:
    """Linear maps by factors of certain sizes and dtypes.

    Args:
        shapes: of the factors (*in_factors, *out_factors).
        n_in: number of in factors.
        dtype: of the factors.
        x_dtype: of x.
    """

    def __init__(
        self,
        shapes: tuple[Sequence[int], ...],
        n_in: int,
        dtype: torch.dtype,
        x_dtype: torch.dtype,
    ) -> None:
        from polyadic.kernels.triton.khatri_rao import matrices_of
        from polyadic.kernels.triton.outer import outer, serves

        self.shapes, self.n_in, self.dtype = shapes, n_in, dtype
        self.sum_dtype = torch.float32 if x_dtype in HALVES else x_dtype
        lengths = n_in, len(shapes) - n_in
        self.matrices = matrices_of(shapes, lengths, padded_rank(shapes[0][1]), dtype, x_dtype)
        self.gradients = functools.cache(self._gradients)
        (features, padded), (out_features, _) = self.matrices.sizes
        self.outer, self.outer_serves = outer, serves(features, out_features, padded, x_dtype)

    def forward(
        self, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return y (B, N) and z (B, R')."""
        ka, kc = self.matrices(contiguous(factors))
        z = torch.mm(x, ka)
        return F.linear(z, kc, bias), z

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        factors: Sequence[Tensor],
        wrt: tuple[bool, bool, bool, bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradients of x and of the factors, and that of the bias if it is wanted.

        Args:
            grad_y: (B, N).
            x: (B, M).
            kept: z, or nothing.
            factors: (*in_factors, *out_factors).
            wrt: whether the gradients of x, of the in and of the out factors, and of the bias are
                wanted.
        """
        wrt_x, wrt_in, wrt_out, wrt_bias = wrt
        factors = contiguous(factors)
        sums: Tensor | None = None
        both = wrt_in and wrt_out and self._makes_both(x, grad_y, kept)
        # Where no factor needs a gradient, nothing adds the sums up.
        if wrt_bias and not both and (wrt_in or wrt_out) and grad_y.is_contiguous():
            (ka, kc), sums = self.matrices.with_sums(factors, grad_y)
        elif wrt_x or wrt_in or not kept:
            ka, kc = self.matrices(factors)
        d_x: Tensor | None = None
        d_matrices: list[Tensor] = []
        if wrt_x or wrt_in:
            g = torch.mm(grad_y, kc)
            if wrt_x:
                d_x = F.linear(g, ka)
            if wrt_in and not both:
                d_matrices.append(matmul_tn_in_float32(x, g))
        if wrt_out:
            z = kept[0] if kept else torch.mm(x, ka)
            if both:
                *d_matrices, sums = self.outer(x, g, grad_y, z, biased=wrt_bias)
            else:
                d_matrices.append(matmul_tn_in_float32(grad_y, z))
        gradients: list[Tensor | None] = []
        if d_matrices:
            n_in = self.n_in
            # A z that another route has kept is not padded, and dKC has its columns.
            *pieces, _, columns = d_matrices[-1].shape
            make = self.gradients(wrt_in, wrt_out, columns, sums is not None, *pieces)
            wanted = factors[0 if wrt_in else n_in : None if wrt_out else n_in]
            gradients += make(d_matrices, wanted, sums)
        if not wrt_in:
            gradients[:0] = [None] * self.n_in
        if not wrt_out:
            gradients[self.n_in : self.n_in] = [None] * (len(factors) - self.n_in)
        if wrt_bias and sums is None:
            gradients.append(grad_y.sum(0))
        return d_x, gradients

    def _makes_both(self, x: Tensor, grad_y: Tensor, kept: Sequence[Tensor]) -> bool:
        """Whether one kernel makes dKA and dKC: on Hopper, where it was measured."""
        return (
            self.outer_serves
            and has_warpgroups(x.get_device())
            and x.is_contiguous()
            and grad_y.is_contiguous()
            and (not kept or kept[0].shape[1] == self.matrices.sizes[0][1])
        )

    def _gradients(
        self, wrt_in: bool, wrt_out: bool, columns: int, biased: bool, pieces: int | None = None
    ) -> Gradients:
        """Return what makes the gradients of one side or both, and of a bias if there is one.

        Args:
            wrt_in: whether those of the in factors are wanted.
            wrt_out: whether those of the out factors are wanted.
            columns: of the last dK.
            biased: whether partial sums of that of a bias come too.
            pieces: in how many pieces each dK comes, None where it is whole.
        """
        from polyadic.kernels.triton.mttkrp import gradients_of

        (rows_in, padded), (rows_out, _) = self.matrices.sizes
        n_in, shapes = self.n_in, self.shapes
        sizes: list[tuple[int, int]] = []
        groups: list[tuple[Sequence[int], ...]] = []
        if wrt_in:
            sizes.append((rows_in, padded if wrt_out else columns))
            groups.append(shapes[:n_in])
        if wrt_out:
            sizes.append((rows_out, columns))
            groups.append(shapes[n_in:])
        d_shapes: list[tuple[int, ...]] = [*sizes]
        d_strides: list[tuple[int, ...]] = [(width, 1) for _, width in sizes]
        if pieces is not None:
            d_shapes = [(pieces, *size) for size in sizes]
            d_strides = [(rows * width, width, 1) for rows, width in sizes]
        return gradients_of(
            tuple(d_shapes),
            tuple(d_strides),
            (self.sum_dtype,) * len(sizes),
            tuple(itertools.chain.from_iterable(groups)),
            tuple(map(len, groups)),
            self.dtype,
            rows_out if biased else 0,
        )


_shape_of = operator.attrgetter("shape")
_fused_of = functools.lru_cache(maxsize=4096)(FusedLinear)


def fused_of(x: Tensor, factors: Sequence[Tensor], n_in: int) -> FusedLinear:
    """Return the map by such factors, looked up by their shapes as they are."""
    return _fused_of(tuple(map(_shape_of, factors)), n_in, factors[0].dtype, x.dtype)
