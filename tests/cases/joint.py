"""Layers that share a CP tensor with others: a factor of rows in front, one row to a layer.

A case is one of three such layers. Its leaves are those of the layer by itself and the factor in
front, "factor 0", whose row scales the components as λ does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cases.conv import conv
from cases.conv_transpose import conv_transpose
from cases.embedding import embedding
from cases.linear import linear
from cases.protocol import COMPLEX, HALVES, Case, Forced, Leaves, Shape

LAYERS, INDEX = 3, 1


@dataclass(frozen=True)
class JointCase(Case):
    """One of three layers of a kind."""

    inner: Any = None

    @property
    def cls(self) -> type[nn.Module]:
        return self.inner.cls

    @property
    def sizes(self) -> dict[str, Any]:
        return self.inner.sizes

    @property
    def x_shape(self) -> Shape:
        return self.inner.x_shape

    @property
    def fan_in(self) -> int:
        return self.inner.fan_in

    @property
    def in_features(self) -> int:
        """Entries of the input at one position."""
        return self.inner.in_features

    @property
    def out_features(self) -> int:
        return self.inner.out_features

    @property
    def differentiable(self) -> bool:
        return self.inner.differentiable

    @property
    def rows(self) -> int:
        return self.inner.rows

    def leaves(self, dtype: torch.dtype | None = None, seed: int = 0) -> Leaves:
        inner = self.inner.leaves(dtype, seed)
        generator = torch.Generator().manual_seed(seed + 100)
        rows = torch.rand(LAYERS, self.rank, generator=generator, dtype=self.exact) + 0.5
        rows = rows.to(self.of_its_numbers(dtype))
        return dataclasses.replace(inner, factors=(rows, *inner.factors))

    def row(self, leaves: Leaves) -> Leaves:
        """Leaves of the layer by itself, its row in the place of λ."""
        rows, *factors = leaves.factors
        scale = rows[INDEX] if leaves.weights is None else rows[INDEX] * leaves.weights
        return Leaves(leaves.x, tuple(factors), leaves.bias, scale)

    def build(self, **kwargs: Any) -> Any:
        return self.cls.joint(LAYERS, **self.inner.arguments, **kwargs)[INDEX]

    def filled(self, layer: Any, leaves: Leaves) -> Any:
        joint = layer.cp.joint
        with torch.no_grad():
            for own, value in zip(joint.factors, leaves.factors, strict=True):
                own.copy_(value)
            if leaves.bias is not None:
                layer.bias.copy_(leaves.bias)
        if leaves.weights is not None:
            joint.weights = nn.Parameter(leaves.weights.clone())
        return layer

    def parameters(self, layer: Any) -> dict[str, Tensor]:
        joint = layer.cp.joint
        factors = {f"factor {i}": f for i, f in enumerate(joint.factors)}
        every = {**factors, "bias": getattr(layer, "bias", None), "weights": joint.weights}
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    def matrix(self, leaves: Leaves) -> Tensor:
        return self.inner.matrix(self.row(leaves))

    def weight(self, leaves: Leaves) -> Tensor:
        return self.inner.weight(self.row(leaves))

    def torch_layer(self, **kwargs: Any) -> nn.Module:
        return self.inner.torch_layer(**kwargs)

    def cp(self, leaves: Leaves, **forced: Any) -> Tensor:
        return self.inner.cp(self.row(leaves), **forced)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.inner.apply(x, weight, bias)

    def in_other_orders(self, leaves: Leaves) -> Iterator[Tensor]:
        return self.inner.in_other_orders(self.row(leaves))

    def plans(self) -> Iterator[Forced]:
        yield from self.inner.plans()

    def in_complex(self) -> Case:
        return joint(self.id, self.inner.in_complex())

    def resized(self, batch: int) -> Case:
        return joint(self.id, self.inner.resized(batch))


def joint(name: str, inner: Case) -> JointCase:
    """A row of the table."""
    own = {f.name: getattr(inner, f.name) for f in dataclasses.fields(Case)}
    return JointCase(**{**own, "id": name}, inner=inner)


JOINT = [
    joint("joint-linear", linear("of-3", (2, 3), (2, 5), 4, (3, 2), weights=True)),
    joint("joint-linear-order3", linear("of-3", (2, 2, 3), (7,), 4, (1,), bias=False)),
    joint("joint-linear-no-rows", linear("of-3", (2, 3), (2, 5), 4, (0,), weights=True)),
    joint("joint-conv1d", conv("of-3", (2, 3), (2, 2), (3,), 4, (2,), (9,), stride=2,
                               weights=True)),
    joint("joint-conv2d", conv("of-3", (2, 3), (2, 2), (3, 2), 4, (2,), (7, 6), padding=1,
                               dilation=(1, 3), weights=True)),
    joint("joint-conv3d", conv("of-3", (3,), (2,), (1, 2, 2), 4, (1,), (4, 5, 3), stride=2)),
    joint("joint-conv-transpose", conv_transpose("of-3", (2, 3), (4,), (2, 2), 4, (2,), (3, 5),
                                                 stride=2, output_padding=1, weights=True)),
    joint("joint-embedding", embedding("of-3", 23, (3, 3, 3), (2, 3), 4, (5, 2), padding_idx=3)),
    joint("joint-small", linear("of-3", (2,), (3,), 2, (2,), weights=True)),
    joint("joint-complex", linear("of-3", (2, 2), (3,), 3, (2,), weights=True, **COMPLEX)),
    joint("joint-large", linear("of-3", (8, 4, 5), (6, 7, 8), 48, (7, 9), dtypes=HALVES)),
]  # fmt: skip
