"""The layers of the matrix, with options that are not the defaults, and what torch computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cases.spectral import dense_spectral
from cases.weights import (
    dense_conv,
    dense_conv_transpose,
    dense_embedding,
    dense_linear,
    dense_tied,
)
from compare import assert_close
from polyadic import CPTensor
from polyadic import nn as pnn


@dataclass(frozen=True)
class Layer:
    """A layer of the table.

    Args:
        build: makes it, given device and dtype.
        dense: what torch computes with its parameters.
        sample: shape of one sample of the input.
        scaled: put a λ into its CP tensor.
        exact: float64, or complex128 of a layer of complex numbers.
    """

    build: Callable[..., Any]
    dense: Callable[[Any, Tensor], Tensor]
    sample: tuple[int, ...]
    scaled: bool = True
    exact: torch.dtype = torch.float64

    def make(self, dtype: torch.dtype | None = None, seed: int = 0) -> Any:
        """The layer, all parameters of order 1 drawn by the seed, every one by itself."""
        torch.manual_seed(seed)
        layer = self.build(dtype=self.exact)
        owner: CPTensor = getattr(layer.cp, "joint", layer.cp)
        if self.scaled:
            owner.weights = nn.Parameter(torch.empty(owner.rank, dtype=owner.factors[0].dtype))
        with torch.no_grad():
            for parameter in layer.parameters():
                signs = torch.randn_like(parameter).sgn()
                moduli = torch.rand(parameter.shape, dtype=torch.float64)
                parameter.copy_(signs * (0.5 + moduli))
            # Outputs of order 1: what is compared in half precision must not grow with the sizes.
            for factor in owner.factors:
                factor.mul_(owner.rank ** (-0.5 / owner.order))
        return layer.to(dtype or self.exact)

    def in_complex(self) -> Layer:
        """The layer of complex numbers."""
        return dataclasses.replace(self, exact=torch.complex128)

    def input(self, batch: int = 3, dtype: torch.dtype | None = None, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.indices:
            return torch.randint(23, (batch, *self.sample), generator=generator)
        shape = (batch, *self.sample)
        return torch.randn(shape, generator=generator, dtype=self.exact).to(dtype or self.exact)

    @property
    def indices(self) -> bool:
        """Whether the input are indices, which have no gradient."""
        return self.dense is dense_embedding

    @property
    def dims(self) -> int:
        """Spatial dimensions of the input."""
        of_space = self.dense in (dense_conv, dense_conv_transpose, dense_spectral)
        return len(self.sample) - 1 if of_space else 0

    @property
    def spectral(self) -> bool:
        """Whether real maps are transformed, so that the factors are complex."""
        return self.dense is dense_spectral


def _linear(**kwargs: Any) -> Any:
    return pnn.CPLinear(12, 10, rank=4, in_shape=(2, 3, 2), out_shape=(2, 5), **kwargs)


def _embedding(**kwargs: Any) -> Any:
    return pnn.CPEmbedding(23, 6, 3, rank=4, in_shape=(2, 3, 4), out_shape=(2, 3), **kwargs)


def _conv(name: str, *args: Any, **own: Any) -> Callable[..., Any]:
    return lambda **kwargs: getattr(pnn, name)(*args, rank=4, **own, **kwargs)


def _joint(cls: Any, *args: Any, **own: Any) -> Callable[..., Any]:
    return lambda **kwargs: cls.joint(3, *args, rank=4, **own, **kwargs)[1]


LAYERS = {
    "CPLinear": Layer(_linear, dense_linear, (12,)),
    "CPConv1d": Layer(
        _conv("CPConv1d", 6, 4, 4, padding="same", dilation=2), dense_conv, (6, 11), scaled=False
    ),
    "CPConv2d": Layer(
        _conv("CPConv2d", 6, 4, (3, 2), 2, (2, 1), groups=2, padding_mode="circular"),
        dense_conv, (6, 7, 5),
    ),
    "CPConv3d": Layer(_conv("CPConv3d", 4, 6, (2, 3, 1), (1, 2, 1), 1), dense_conv, (4, 3, 5, 2)),
    "CPConvTranspose1d": Layer(
        _conv("CPConvTranspose1d", 6, 4, 3, 2, 1, 1, bias=False), dense_conv_transpose, (6, 5)
    ),
    "CPConvTranspose2d": Layer(
        _conv("CPConvTranspose2d", 6, 4, (3, 2), 2, 1, groups=2), dense_conv_transpose, (6, 4, 3)
    ),
    "CPConvTranspose3d": Layer(
        _conv("CPConvTranspose3d", 4, 6, (1, 2, 3), (2, 1, 1)), dense_conv_transpose, (4, 2, 3, 2)
    ),
    "CPEmbedding": Layer(_embedding, dense_embedding, (5,)),
    "CPTiedLinear": Layer(lambda **kw: _embedding(**kw).as_linear(True), dense_tied, (6,)),
    "CPSpectralConv1d": Layer(
        _conv("CPSpectralConv1d", 6, 4, 5, out_shape=(2, 2)), dense_spectral, (6, 9)
    ),
    "CPSpectralConv2d": Layer(
        _conv("CPSpectralConv2d", 4, 6, (3, 4), in_shape=(2, 2), fft_norm="ortho"),
        dense_spectral, (4, 5, 6),
    ),
    "CPSpectralConv3d": Layer(
        _conv("CPSpectralConv3d", 4, 4, (3, 2, 2), separable=True, bias=False),
        dense_spectral, (4, 4, 3, 4), scaled=False,
    ),
    "CPLinear.joint": Layer(
        _joint(pnn.CPLinear, 12, 10, in_shape=(2, 2, 3), out_shape=(2, 5)), dense_linear, (12,)
    ),
    "CPConv2d.joint": Layer(
        _joint(pnn.CPConv2d, 4, 6, 3, padding=1), dense_conv, (4, 5, 6), scaled=False
    ),
    "CPEmbedding.joint": Layer(
        _joint(pnn.CPEmbedding, 23, 6, 3, out_shape=(2, 3)), dense_embedding, (5,)
    ),
}  # fmt: skip


def results(layer: Any, call: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Output, and gradients of input and parameters for one and the same gradient of the output."""
    leaves = dict(layer.named_parameters())
    if x.is_floating_point() or x.is_complex():
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        leaves = {"x": x, **leaves}
    y = call(x)
    generator = torch.Generator().manual_seed(2)
    exact = torch.promote_types(y.dtype, torch.float64)
    grad_y = torch.randn(y.shape, generator=generator, dtype=exact).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor], **kwargs: Any) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], name, **kwargs)


def assert_near(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float) -> None:
    """Relative L2 error of results in a lower precision against float64 or complex128."""
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name].to(want[name].dtype) - want[name]).norm() / want[name].norm()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"
