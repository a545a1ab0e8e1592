"""Linear layers, and plans for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cases.protocol import COMPLEX, HALVES, Case, Forced, Leaves, Shape, paired
from cases.weights import contracted, expanded, khatri_rao
from polyadic import LinearPlan, LinearRoute
from polyadic import functional as PF
from polyadic.nn import CPLinear


def groupings(count: int) -> list[Shape]:
    """All ways to join neighbours of ``count`` modes, the whole Khatri-Rao product first."""
    cuts = itertools.product((False, True), repeat=count - 1)
    return [tuple(len(list(part)) for part in _split(count, cut)) for cut in cuts]


def _split(count: int, cut: tuple[bool, ...]) -> list[range]:
    ends = [0, *(i + 1 for i, here in enumerate(cut) if here), count]
    return [range(a, b) for a, b in itertools.pairwise(ends)]


def routes(in_modes: int, out_modes: int) -> list[LinearRoute]:
    """Every way to contract so many modes, and to rebuild the weight."""
    ins, outs = groupings(in_modes), groupings(out_modes)
    every = [LinearRoute(i, o) for i, o in itertools.product(ins, outs)]
    return [*every, LinearRoute(ins[0], outs[0], "dense")]


def linear_plans(in_modes: int, out_modes: int) -> Iterator[Forced]:
    """Every route forward and backward, Z kept or not."""
    for forward, backward in paired(routes(in_modes, out_modes)):
        for keep in ("x and z", "x"):
            yield {"plan": LinearPlan(forward, backward, keep)}
    khatri_rao = LinearRoute((in_modes,), (out_modes,))
    yield {"plan": LinearPlan(khatri_rao, khatri_rao, "autograd")}


@dataclass(frozen=True)
class FeaturesCase(Case):
    """A layer that maps rows of in features to rows of out features."""

    @property
    def in_features(self) -> int:
        """Entries of a row of the input."""
        raise NotImplementedError

    @property
    def out_features(self) -> int:
        """Entries of a row of the output."""
        raise NotImplementedError

    @property
    def fan_in(self) -> int:
        return self.in_features

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias,
        }

    @property
    def x_shape(self) -> Shape:
        return (*self.lead, self.in_features)

    @property
    def rows(self) -> int:
        return math.prod(self.lead)

    def orders(self, leaves: Leaves, into: list[Tensor], out: list[Tensor]) -> Iterator[Tensor]:
        """The output by torch: one factor after the other, and each side's factors at once."""
        for first, second in ((into, out), ([khatri_rao(into)], [khatri_rao(out)])):
            z = contracted(leaves.x.flatten(0, -2), first)
            z = z if leaves.weights is None else z * leaves.weights
            y = expanded(z, second)[:, : self.out_features].unflatten(0, self.lead)
            yield y if leaves.bias is None else y + leaves.bias


@dataclass(frozen=True)
class LinearCase(FeaturesCase):
    """A linear layer; its groups of modes are those of the input and of the output."""

    @property
    def cls(self) -> type[nn.Module]:
        return CPLinear

    @property
    def in_features(self) -> int:
        return math.prod(self.tensorized_shape[0])

    @property
    def out_features(self) -> int:
        return math.prod(self.tensorized_shape[1])

    @property
    def explicit(self) -> bool:
        return True

    def weight(self, leaves: Leaves) -> Tensor:
        return self.matrix(leaves).t()

    def cp(self, leaves: Leaves, **forced: Any) -> Tensor:
        groups = self.groups(leaves.factors)
        return PF.cp_linear(leaves.x, *groups, leaves.bias, weights=leaves.weights, **forced)

    def in_other_orders(self, leaves: Leaves) -> Iterator[Tensor]:
        return self.orders(leaves, *self.groups(leaves.factors))

    def cp_forward(self, leaves: Leaves, **forced: Any) -> tuple[Tensor, Any]:
        """The explicit forward, which has no bias."""
        groups = self.groups(leaves.factors)
        return PF.cp_linear_forward(leaves.x, *groups, weights=leaves.weights, **forced)

    def cp_backward(self, grad_y: Tensor, saved: Any) -> dict[str, Tensor]:
        """The explicit backward, its results by the names of ``Leaves.named``."""
        return named_gradients(*PF.cp_linear_backward(grad_y, saved), weights=self.weights)

    def plans(self) -> Iterator[Forced]:
        yield from linear_plans(*map(len, self.tensorized_shape))


def named_gradients(x: Tensor, *rest: Any, weights: bool) -> dict[str, Tensor]:
    """What an explicit backward returns, by the names of ``Leaves.named``."""
    groups = rest[:-1] if weights else rest
    factors = [grad for group in groups for grad in group]
    named = {"x": x, **{f"factor {i}": grad for i, grad in enumerate(factors)}}
    return {**named, "weights": rest[-1]} if weights else named


def linear(
    name: str, in_shape: Shape, out_shape: Shape, rank: int, lead: Shape, **kwargs: Any
) -> LinearCase:
    """A row of the table."""
    return LinearCase(f"linear-{name}", (in_shape, out_shape), rank, lead, **kwargs)


# Sizes at which a test of counts can tell W (196,608 entries) from (M, R) and (B, M).
COUNTED = [
    linear("count", (8, 8, 8), (6, 8, 8), 6, (8,)),
    linear("count-lambda", (8, 8, 8), (6, 8, 8), 6, (2, 4), weights=True),
]

LINEAR = [
    linear("order1-primes", (7,), (5,), 3, (4,)),
    linear("order1-rank1", (7,), (5,), 1, (3,)),
    linear("order1-scalar", (1,), (1,), 1, (1,)),
    linear("order1-rank-above-m", (3,), (2,), 11, (5,)),
    linear("order1-no-bias-lambda", (6,), (11,), 4, (3,), bias=False, weights=True),
    linear("order1-batch0", (7,), (5,), 3, (0,)),
    linear("order1-batch1", (7,), (5,), 3, (1,)),
    linear("order1-vector", (7,), (5,), 3, ()),
    linear("order2", (2, 3), (5, 4), 3, (4,)),
    linear("order2-primes", (7, 11), (13, 3), 5, (2,)),
    linear("order2-rank1-lambda", (4, 3), (2, 5), 1, (3,), weights=True),
    linear("order2-size1", (1, 6), (5, 1), 3, (4,)),
    linear("order2-all-size1", (1, 1), (1, 1), 2, (3,)),
    linear("order2-many-leads", (2, 3), (3, 2), 4, (2, 1, 3)),
    linear("order2-lead-with-0", (2, 3), (3, 2), 4, (2, 0, 3), weights=True),
    linear("order2-vector-no-bias", (2, 3), (5, 2), 3, (), bias=False),
    linear("order2-transposed", (2, 3), (5, 2), 3, (4, 5), strides="transposed"),
    linear("order2-sliced", (2, 3), (5, 2), 3, (4,), strides="sliced"),
    linear("order2-expanded", (2, 3), (5, 2), 3, (4,), strides="expanded"),
    linear("order3", (2, 3, 4), (3, 2, 5), 6, (5,)),
    linear("order3-rank-above-m", (2, 2, 2), (2, 2, 2), 17, (5,)),
    linear("order3-rank1", (3, 2, 2), (2, 2, 3), 1, (2,), bias=False),
    linear("order3-primes-lambda", (2, 7, 3), (5, 3, 2), 4, (3,), weights=True),
    linear("order3-size1-first", (1, 5, 4), (1, 3, 7), 4, (3,)),
    linear("order3-size1-last", (5, 4, 1), (3, 7, 1), 4, (3,), weights=True),
    linear("order3-size1-middle", (3, 1, 5), (1, 2, 7), 4, (13,)),
    linear("order3-batch0-lambda", (2, 3, 2), (2, 2, 3), 3, (0,), weights=True),
    linear("order3-batch1", (2, 3, 2), (2, 2, 3), 3, (1,)),
    linear("order3-transposed-lambda", (2, 2, 3), (4, 2, 1), 5, (3, 2), weights=True,
           strides="transposed"),
    linear("order4", (2, 3, 1, 5), (3, 1, 2, 2), 6, (2,)),
    linear("order4-all-size1", (1, 1, 1, 1), (1, 1, 1, 1), 2, (1,)),
    linear("order4-primes", (3, 2, 5, 2), (2, 3, 2, 3), 7, (3,), weights=True),
    linear("order4-batch0", (2, 2, 2, 2), (2, 2, 2, 2), 3, (0,)),
    linear("unequal-1-3", (6,), (2, 1, 3), 4, (2,)),
    linear("unequal-3-1", (2, 3, 2), (7,), 4, (2,), weights=True),
    linear("unequal-4-2", (2, 1, 3, 2), (5, 2), 3, (3,), bias=False),
    linear("unequal-2-4-rank-above-m", (2, 2), (2, 1, 2, 3), 9, (3,)),
    linear("complex-lambda", (2, 3, 2), (5, 2), 4, (3, 2), weights=True, **COMPLEX),
    linear("complex-small", (2, 1), (3,), 2, (2,), strides="transposed", **COMPLEX),
    linear("notebook", (4, 4, 16), (4, 4, 8), 100, (32,), dtypes=HALVES),
    linear("wide-lambda", (8, 4, 5), (6, 7, 8), 48, (7, 9), weights=True, dtypes=HALVES),
    linear("narrow-order4", (3, 4, 5, 2), (2, 2, 3, 3), 24, (50,), dtypes=HALVES),
    linear("order1-large", (211,), (97,), 31, (41,), bias=False, dtypes=HALVES),
]  # fmt: skip
