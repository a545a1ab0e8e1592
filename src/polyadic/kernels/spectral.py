"""Forward and closed-form backward of the product of a spectrum with a CP weight, mode by mode.

A spectral convolution multiplies each kept mode s of the input's spectrum, a vector over the
channels, by a matrix of its own. With a weight in CP format that matrix is

    W_s = A diag(K[s]) Cᵀ (Cin, Cout)        K = λ ∘ (U_1 ⊙ … ⊙ U_D) (S, R)

where A and C are the Khatri-Rao products of the in and out factors, and U_d (k_d, R) is the factor
of the kept modes of dimension d. On the rows x[s, b] of the spectrum that is

    Z = X A        Y = (Z ∘ K) Cᵀ

and with g = dY the backward is

    H = g C        dC = gᵀ (Z ∘ K)        dK[s] = Σ_b Z ∘ H
    dX = (H ∘ K) Aᵀ        dA = Xᵀ (H ∘ K)

from which each factor's gradient follows by an MTTKRP. A few modes need only a few rows of X, Y and
K, and a few components only a few columns of A, C and K; Y and dX are sums over the components. So
a plan may take modes and components in pieces whose Z and H, and whose parts of A, C, dA and dC,
stay in a cache.

The dense route rebuilds all W_s by one product K (A ⊙ C)ᵀ (S, Cin·Cout). A separable layer has no
C: its weight W = K Aᵀ (S, Cin) multiplies each channel by itself.

Every formula is holomorphic and is written without conjugates. The boundary to autograd hands the
conjugates of X and of the factors to the backward, which is torch's convention for complex numbers.

Axes: s kept modes, b batch, i in channels, o out channels, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyadic._torch import is_fake, is_plain, observed, transformed
from polyadic.kernels.multilinear import cast, khatri_rao, khatri_rao_backward
from polyadic.plans import SpectralPlan, SpectralRoute


def _writes_to_memory(*tensors: Tensor) -> bool:
    """Whether results may be written to memory that stands ready; else pieces are of no use.

    They may not while a compiler, a transform or autograd records the operations.
    """
    if torch.compiler.is_compiling() or transformed() or observed():
        return False
    return all(is_plain(tensor) and not is_fake(tensor) for tensor in tensors)


def _pieces(count: int, at_once: int | None) -> Iterator[slice]:
    """Cut kept modes, or components, into pieces; None for one piece."""
    at_once = count if at_once is None else at_once
    for start in range(0, count, at_once):
        yield slice(start, min(start + at_once, count))


def _rows(x: Tensor) -> Tensor:
    """(s, b, c) → (s·b, c); reshape, unlike flatten, has a rule for batched gradients."""
    return x.reshape(-1, x.shape[2])


@dataclass(frozen=True)
class SpectralMap:
    """The map (x, None, *factors) → y with factors = (*in, *out, λ if any, *kept modes).

    Args:
        plan: in which pieces modes are contracted, or whether the weight is rebuilt.
        n_in: number of in factors.
        n_out: number of out factors; 0 for a separable weight.
    """

    plan: SpectralPlan
    n_in: int
    n_out: int

    output_channels_last = False
    autograd_backward = False

    def _groups(
        self, factors: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """Split the factors into those of in channels, out channels and kept modes."""
        last_out = self.n_in + self.n_out
        return factors[: self.n_in], factors[self.n_in : last_out], factors[last_out:]

    def forward(
        self, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return y (s, b, o) for x (s, b, i), and Z where the plan keeps it.

        Args:
            x: in the factors' dtype, or rounded to a complex dtype of half its width.
            bias: None; a bias is added in space.
            factors: (*in, *out, λ if any, *kept modes).
        """
        dtype, route = x.dtype, self.plan.forward
        ins, outs, modes = self._groups(factors)
        x, spectral, a = cast(x, factors[0].dtype), khatri_rao(modes), khatri_rao(ins)
        if not outs:
            return cast(x * (spectral @ a.t()).unsqueeze(1), dtype), ()
        if route.kind == "dense":
            weight = _rebuilt(spectral, [*ins, *outs], a.shape[0])
            return cast(torch.bmm(x, weight), dtype), ()
        c = khatri_rao(outs)
        if route.modes_at_once is None or not _writes_to_memory(x, *factors):
            # Products of all rows: a product for each mode would take far longer.
            z = (_rows(x) @ a).view(*x.shape[:2], a.shape[1])
            y = (_rows(z * spectral.unsqueeze(1)) @ c.t()).view(*x.shape[:2], c.shape[0])
            return cast(y, dtype), (z,) if self.plan.keep and route.modes_at_once is None else ()
        return cast(_forward_in_pieces(x, a, c, spectral, route), dtype), ()

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        factors: Sequence[Tensor],
        needs: Sequence[bool],
        wrt_bias: bool = False,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradients of x and of each factor, by the formulas at the top of this module.

        Args:
            grad_y: (s, b, o).
            x: (s, b, i).
            kept: what ``forward`` kept; empty to compute it again, as second derivatives need.
            factors: (*in, *out, λ if any, *kept modes).
            needs: whether x and each factor needs its gradient.
            wrt_bias: False; a bias is added in space.

        Raises:
            NotImplementedError: the gradient of a bias is wanted.
        """
        if wrt_bias:
            raise NotImplementedError("a bias is added in space, not to the spectrum")
        dtype, route, wide = x.dtype, self.plan.backward, factors[0].dtype
        ins, outs, modes = self._groups(factors)
        # The boundary hands over a conjugate as a view, which each product would resolve again.
        x, grad_y = cast(x.resolve_conj(), wide), cast(grad_y.resolve_conj(), wide).contiguous()
        wrt_x, wrt_factors = needs[0], any(needs[1:])
        spectral, a = khatri_rao(modes), khatri_rao(ins)
        d_channels: Sequence[Tensor]
        if not outs:
            d_x = grad_y * (spectral @ a.t()).unsqueeze(1) if wrt_x else None
            if not wrt_factors:
                return _cast_or_none(d_x, dtype), [None] * len(factors)
            d_weight = (x * grad_y).sum(1)  # (s, i)
            d_channels = khatri_rao_backward(d_weight.t() @ spectral, ins)
            d_spectral = d_weight @ a
        elif route.kind == "dense":
            d_x = None
            if wrt_x:
                d_x = torch.bmm(grad_y, _rebuilt(spectral, [*ins, *outs], a.shape[0]).mT)
            if not wrt_factors:
                return _cast_or_none(d_x, dtype), [None] * len(factors)
            d_weight = torch.bmm(x.mT, grad_y).reshape(x.shape[0], -1)  # (s, i·o)
            d_channels = khatri_rao_backward(d_weight.t() @ spectral, [*ins, *outs])
            d_spectral = d_weight @ khatri_rao([*ins, *outs])
        else:
            c = khatri_rao(outs)
            if route.modes_at_once is None or kept or not _writes_to_memory(grad_y, x, *factors):
                z = kept[0] if kept else (_rows(x) @ a).view(*x.shape[:2], a.shape[1])
                d_x, d_a, d_c, d_spectral = _backward_at_once(grad_y, x, z, a, c, spectral, wrt_x)
            else:
                d_x, d_a, d_c, d_spectral = _backward_in_pieces(
                    grad_y, x, a, c, spectral, route, wrt_x
                )
            if not wrt_factors:
                return _cast_or_none(d_x, dtype), [None] * len(factors)
            d_channels = [*khatri_rao_backward(d_a, ins), *khatri_rao_backward(d_c, outs)]
        d_factors: list[Tensor | None] = [*d_channels, *khatri_rao_backward(d_spectral, modes)]
        return _cast_or_none(d_x, dtype), d_factors


def _cast_or_none(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else cast(tensor, dtype)


def _rebuilt(spectral: Tensor, channels: Sequence[Tensor], in_channels: int) -> Tensor:
    """Return all of W (s, i, o) by one product, from K and the factors of the channels."""
    return (spectral @ khatri_rao(channels).t()).view(spectral.shape[0], in_channels, -1)


def _forward_in_pieces(
    x: Tensor, a: Tensor, c: Tensor, spectral: Tensor, route: SpectralRoute
) -> Tensor:
    """Return Y (s, b, o), with the Z of some modes and components at a time in memory."""
    modes, batch, channels = x.shape
    y, memory = x.new_empty(modes, batch, c.shape[0]), _memory(x, a, route)
    for part in _pieces(a.shape[1], route.components_at_once):
        a_part, c_part, scale = a[:, part], c[:, part], spectral[:, part].unsqueeze(1)
        for piece in _pieces(modes, route.modes_at_once):
            z = _matrix(memory, piece, part, batch)
            torch.mm(x[piece].reshape(-1, channels), a_part, out=z)
            z.view(piece.stop - piece.start, batch, z.shape[1]).mul_(scale[piece])
            y[piece].view(-1, c.shape[0]).addmm_(z, c_part.t(), beta=min(part.start, 1))
    return y


def _memory(x: Tensor, a: Tensor, route: SpectralRoute) -> Tensor:
    """Return memory for the products of some modes with some components."""
    modes, batch, _ = x.shape
    rank = a.shape[1]
    at_once = min(route.modes_at_once or modes, modes) * min(route.components_at_once or rank, rank)
    return x.new_empty(at_once * batch)


def _matrix(memory: Tensor, modes: slice, components: slice, batch: int) -> Tensor:
    """Return a part of a piece of memory as a matrix, a row for each mode and map."""
    width = components.stop - components.start
    rows = (modes.stop - modes.start) * batch
    return memory[: rows * width].view(rows, width)


def _backward_at_once(
    g: Tensor, x: Tensor, z: Tensor, a: Tensor, c: Tensor, spectral: Tensor, wrt_x: bool
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Return dX (None unless it is wanted), dA, dC and dK."""
    scale, rows_g = spectral.unsqueeze(1), _rows(g)
    h = (rows_g @ c).view(z.shape)
    d_spectral = (z * h).sum(1)
    scaled = _rows(h * scale)
    d_a = _rows(x).t() @ scaled
    d_c = rows_g.t() @ _rows(z * scale)
    d_x = (scaled @ a.t()).view(x.shape) if wrt_x else None
    return d_x, d_a, d_c, d_spectral


def _backward_in_pieces(
    g: Tensor,
    x: Tensor,
    a: Tensor,
    c: Tensor,
    spectral: Tensor,
    route: SpectralRoute,
    wrt_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Return the same as ``_backward_at_once``, of some modes and components at a time."""
    modes, batch, channels = x.shape
    d_x = torch.empty_like(x) if wrt_x else None
    d_a, d_c, d_spectral = torch.zeros_like(a), torch.zeros_like(c), torch.empty_like(spectral)
    memories = [_memory(x, a, route) for _ in range(3)]
    for part in _pieces(a.shape[1], route.components_at_once):
        a_part, c_part, scale = a[:, part], c[:, part], spectral[:, part].unsqueeze(1)
        for piece in _pieces(modes, route.modes_at_once):
            z, h, zh = (_matrix(memory, piece, part, batch) for memory in memories)
            rows, rows_g = x[piece].reshape(-1, channels), g[piece].view(-1, c.shape[0])
            by_mode = piece.stop - piece.start, batch, z.shape[1]
            torch.mm(rows, a_part, out=z)
            torch.mm(rows_g, c_part, out=h)
            torch.sum(torch.mul(z, h, out=zh).view(by_mode), 1, out=d_spectral[piece, part])
            z.view(by_mode).mul_(scale[piece])
            d_c[:, part].addmm_(rows_g.t(), z)
            h.view(by_mode).mul_(scale[piece])
            d_a[:, part].addmm_(rows.t(), h)
            if d_x is not None:
                into = d_x[piece].view(-1, channels)
                into.addmm_(h, a_part.t(), beta=min(part.start, 1))
    return d_x, d_a, d_c, d_spectral
