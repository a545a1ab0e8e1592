"""Spectral convolutions, what they depend on, and whole transforms with a dense weight.

The library computes kept modes alone; here torch's fast transforms compute all of them, of which
those that are kept are looked up by their frequencies, and the weight is made by one einsum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cases.weights import by_einsum, weight
from polyadic import functional as PF

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """Sizes of a call; ``outs`` is () of a separable weight, ``out`` the grid of the output."""

    size: Shape
    modes: Shape
    ins: Shape = (3,)
    outs: Shape = (4,)
    rank: int = 5
    batch: int | None = 2
    norm: str = "forward"
    out: Shape | None = None
    weights: bool = True
    bias: bool = True

    @property
    def dims(self) -> int:
        return len(self.size)


def leaves(case: Case, dtype: torch.dtype = torch.complex128) -> dict[str, Tensor]:
    """Everything the output depends on."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    real = dtype.to_real()
    lead = () if case.batch is None else (case.batch,)
    groups = {"in": case.ins, "out": case.outs, "mode": case.modes}
    found = {"x": normal(*lead, math.prod(case.ins), *case.size, dtype=real)}
    for group, sizes in groups.items():
        found |= {f"{group} {i}": normal(size, case.rank) for i, size in enumerate(sizes)}
    if case.weights:
        found["weights"] = normal(case.rank)
    if case.bias:
        found["bias"] = normal(math.prod(case.outs or case.ins), dtype=real)
    return found


def groups_of(named: dict[str, Tensor]) -> list[list[Tensor]]:
    return [[t for n, t in named.items() if n.startswith(f"{g} ")] for g in ("in", "out", "mode")]


def ours(case: Case, named: dict[str, Tensor], **options: Any) -> Tensor:
    return PF.cp_spectral_conv(
        named["x"],
        *groups_of(named),
        named.get("bias"),
        weights=named.get("weights"),
        fft_norm=case.norm,
        output_size=case.out,
        **options,
    )


def dense(case: Case, named: dict[str, Tensor]) -> Tensor:
    """What a dense weight gives."""
    x, (ins, outs, modes) = named["x"], groups_of(named)
    scale = [named["weights"]] if "weights" in named else []
    channels = (math.prod(case.ins), *([math.prod(case.outs)] if outs else []))
    full = by_einsum([*ins, *outs, *modes], *scale).reshape(*channels, *case.modes)
    batch = x.unsqueeze(0) if case.batch is None else x
    y = by_whole_transforms(batch, full, named.get("bias"), case.norm, case.out, not outs)
    return y.squeeze(0) if case.batch is None else y


def dense_spectral(layer: Any, x: Tensor) -> Tensor:
    """What a dense weight gives in the place of a CPSpectralConv's, all of whose modes are kept."""
    *channels, _ = weight(layer).shape
    full = weight(layer).reshape(*channels, *layer.cp.tensorized_shape[-1])
    return by_whole_transforms(x, full, layer.bias, layer.fft_norm, None, layer.separable)


def _frequencies(modes: Shape, size: Shape, out: Shape) -> list[Tensor]:
    """The modes of each dimension that both grids have."""
    found = []
    for d, k in enumerate(modes):
        n = min(size[d], out[d])
        if d == len(modes) - 1:
            found.append(torch.arange(min(k, n // 2 + 1)))
        else:
            few = min(k, n)
            found.append(torch.arange(few) - few // 2)
    return found


def by_whole_transforms(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: str, out: Shape | None, separable: bool
) -> Tensor:
    """A spectral convolution of x (b, i, *n) by a dense weight (i, o, *k), or (i, *k)."""
    channels = 1 if separable else 2
    modes, size = weight.shape[channels:], x.shape[2:]
    out = tuple(size) if out is None else out
    if x.shape[0] == 0:
        # torch transforms no empty batch.
        parts = x.sum() + weight.abs().sum() + (0 if bias is None else bias.sum())
        return x.new_zeros(0, weight.shape[channels - 1], *out) + 0 * parts
    dims = tuple(range(2, x.dim()))
    spectrum = torch.fft.rfftn(x, dim=dims, norm=norm)
    kept = _frequencies(tuple(modes), tuple(size), out)
    last = len(kept) - 1
    for d, f in enumerate(kept):
        spectrum = spectrum.index_select(2 + d, f % size[d])
        weight = weight.index_select(channels + d, f if d == last else f + modes[d] // 2)
    equation = "bi...,i...->bi..." if separable else "bi...,io...->bo..."
    y = torch.einsum(equation, spectrum, weight)
    for d, f in enumerate(kept):
        n = out[d] // 2 + 1 if d == last else out[d]
        empty = y.new_zeros(*y.shape[: 2 + d], n, *y.shape[3 + d :])
        y = empty.index_copy(2 + d, f % out[d], y)
    if last:
        y = torch.fft.ifftn(y, dim=dims[:-1], norm=norm)
    y = torch.fft.irfft(y, n=out[-1], norm=norm)
    return y if bias is None else y + bias.view(-1, *[1] * len(out))
