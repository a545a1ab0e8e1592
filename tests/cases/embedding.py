"""Lookups in a table, and output heads tied to one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cases.linear import FeaturesCase, linear_plans
from cases.protocol import COMPLEX, HALVES, Case, Forced, Leaves, Shape
from cases.weights import expanded, khatri_rao, without_row
from polyadic import functional as PF
from polyadic.nn import CPEmbedding, CPTiedLinear


@dataclass(frozen=True)
class EmbeddingCase(Case):
    """A lookup; its groups of modes are the rows of the table, padded, and the entries of a row.

    ``strides`` may be ``"int32"`` too, for indices of that dtype.
    """

    num_embeddings: int = 0
    bias: bool = False

    @property
    def cls(self) -> type[nn.Module]:
        return CPEmbedding

    @property
    def out_features(self) -> int:
        return math.prod(self.tensorized_shape[1])

    @property
    def fan_in(self) -> int:
        return 1

    @property
    def sizes(self) -> dict[str, Any]:
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.out_features}

    @property
    def x_shape(self) -> Shape:
        return self.lead

    @property
    def differentiable(self) -> bool:
        return False

    @property
    def rows(self) -> int:
        return math.prod(self.lead)

    @property
    def padding_idx(self) -> int | None:
        """Option ``padding_idx``, counted from the front."""
        index = self.options.get("padding_idx")
        return None if index is None else index % self.num_embeddings

    def draw_x(self, normal: Callable[..., Tensor]) -> Tensor:
        """Indices, the row that padding points to among them."""
        share = normal(*self.lead).real.frac().abs()
        indices = (share * self.num_embeddings).to(torch.int64)
        if self.padding_idx is not None:
            indices.view(-1)[:1] = self.padding_idx
        if self.strides == "transposed":
            return indices.movedim(0, -1).contiguous().movedim(-1, 0) if self.lead else indices
        return indices.int() if self.strides == "int32" else indices

    def weight(self, leaves: Leaves) -> Tensor:
        rows = self.matrix(leaves)[: self.num_embeddings]
        return rows if self.padding_idx is None else without_row(rows, self.padding_idx)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Torch cannot differentiate a lookup of no index twice, nor one of complex rows at all.
        as_torch = x.numel() and not weight.is_complex()
        return super().apply(x, weight, bias) if as_torch else weight[x]

    def cp(self, leaves: Leaves, **forced: Any) -> Tensor:
        groups = self.groups(leaves.factors)
        return PF.cp_embedding(
            leaves.x,
            *groups,
            weights=leaves.weights,
            padding_idx=self.padding_idx,
            num_embeddings=self.num_embeddings,
            **forced,
        )

    def in_other_orders(self, leaves: Leaves) -> Iterator[Tensor]:
        """Every occurrence of an index looked up in the factors and added by itself.

        One factor of the columns comes after the other, or all of them at once.
        """
        rows, columns = self.groups(leaves.factors)
        places = torch.unravel_index(leaves.x.long(), [len(rows) for rows in rows])
        for order in (columns, [khatri_rao(columns)]):
            z = math.prod(factor[place] for factor, place in zip(rows, places, strict=True))
            z = z if leaves.weights is None else z * leaves.weights
            if self.padding_idx is not None:
                z = z * (leaves.x != self.padding_idx).unsqueeze(-1)
            yield expanded(z.flatten(0, -2), order).unflatten(0, self.lead)

    def plans(self) -> Iterator[Forced]:
        """Each distinct index looked up once or not, Z kept or not."""
        for unique in (True, False):
            for memory in ("fast", "balanced", "least"):
                yield {"unique": unique, "memory": memory}


@dataclass(frozen=True)
class HeadCase(FeaturesCase):
    """An output head tied to an embedding, whose groups of modes it has."""

    num_embeddings: int = 0

    @property
    def cls(self) -> type[nn.Module]:
        return CPTiedLinear

    @property
    def in_features(self) -> int:
        return math.prod(self.tensorized_shape[1])

    @property
    def out_features(self) -> int:
        return self.num_embeddings

    def build(self, **kwargs: Any) -> Any:
        embedding = CPEmbedding(
            self.num_embeddings, self.in_features, rank=self.rank, **self.shapes, **kwargs
        )
        return embedding.as_linear(self.bias)

    def weight(self, leaves: Leaves) -> Tensor:
        return self.matrix(leaves)[: self.num_embeddings]

    def cp(self, leaves: Leaves, **forced: Any) -> Tensor:
        rows, columns = self.groups(leaves.factors)
        y = PF.cp_linear(leaves.x, columns, rows, weights=leaves.weights, **forced)
        y = y[..., : self.num_embeddings]
        return y if leaves.bias is None else y + leaves.bias

    def in_other_orders(self, leaves: Leaves) -> Iterator[Tensor]:
        rows, columns = self.groups(leaves.factors)
        return self.orders(leaves, columns, rows)

    def plans(self) -> Iterator[Forced]:
        yield from linear_plans(*map(len, reversed(self.tensorized_shape)))


def embedding(
    name: str, size: int, in_shape: Shape, out_shape: Shape, rank: int, lead: Shape, **kwargs: Any
) -> EmbeddingCase:
    """A row of the table: ``size`` entries of ``in_shape`` modes."""
    own = {k: kwargs.pop(k) for k in list(kwargs) if k in Case.__dataclass_fields__}
    shape = (in_shape, out_shape)
    return EmbeddingCase(
        f"embedding-{name}", shape, rank, lead, num_embeddings=size, options=kwargs, **own
    )


def head(
    name: str, size: int, in_shape: Shape, out_shape: Shape, rank: int, lead: Shape, **kwargs: Any
) -> HeadCase:
    """A row of the table."""
    shape = (in_shape, out_shape)
    return HeadCase(f"head-{name}", shape, rank, lead, num_embeddings=size, **kwargs)


# Tables of 131,072 entries.
COUNTED = [
    embedding("count", 500, (8, 8, 8), (16, 16), 3, (5,)),
    head("count", 500, (8, 8, 8), (16, 16), 3, (5,)),
]

EMBEDDING = [
    embedding("order1", 7, (7,), (5,), 3, (4,)),
    embedding("order1-padded-lambda", 5, (7,), (5,), 3, (4,), weights=True),
    embedding("scalar", 1, (1,), (1,), 1, (3,)),
    embedding("order2", 11, (3, 4), (2, 3), 4, (2, 5)),
    embedding("order2-one-index", 12, (3, 4), (2, 3), 1, ()),
    embedding("order2-no-index", 12, (3, 4), (2, 3), 5, (0,)),
    embedding("order2-lead-with-0", 12, (3, 4), (2, 3), 5, (2, 0, 3), weights=True),
    embedding("order2-transposed", 12, (3, 4), (2, 3), 2, (4, 3), strides="transposed"),
    embedding("order2-int32", 12, (3, 4), (2, 3), 2, (4, 3), strides="int32"),
    embedding("order3", 23, (2, 3, 4), (3, 2, 2), 6, (3, 1, 4), padding_idx=5),
    embedding("order3-padding-last-lambda", 23, (2, 3, 4), (3, 2, 2), 6, (9,), padding_idx=-1,
              weights=True),
    embedding("order3-size1", 23, (4, 1, 6), (1, 7, 1), 4, (9,), padding_idx=0),
    embedding("order4-to-2", 30, (2, 2, 3, 3), (2, 5), 7, (4, 4)),
    embedding("rank-above-both", 30, (5, 7), (2, 1, 3, 2), 40, (11,), weights=True),
    embedding("many-repeats", 9, (9,), (2, 3, 2), 4, (700,), padding_idx=3),
    embedding("few-repeats", 2000, (13, 13, 13), (4, 3), 4, (600,)),
    embedding("small-lambda", 7, (2, 2, 2), (2, 2), 3, (2, 3), padding_idx=3, weights=True),
    embedding("complex-lambda", 7, (2, 2, 2), (3, 2), 3, (2, 3), padding_idx=3, weights=True,
              **COMPLEX),
    embedding("large", 1000, (10, 10, 10), (4, 8), 24, (300,), weights=True, dtypes=HALVES),
]  # fmt: skip
HEAD = [
    head("order2", 23, (4, 6), (2, 3), 4, (5,)),
    head("order3-lambda", 23, (2, 3, 4), (3, 2), 5, (3, 2), weights=True),
    head("order3-no-bias", 24, (2, 3, 4), (3, 2), 5, (3, 2), bias=False),
    head("small-lambda", 3, (2, 2), (2,), 2, (2,), weights=True),
    head("complex", 7, (2, 4), (2, 3), 3, (4,), **COMPLEX),
    head("large", 300, (7, 7, 7), (4, 8), 24, (40,), weights=True, dtypes=HALVES),
]
