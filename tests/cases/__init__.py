"""One table of irregular layers; values, derivatives, precision, compile and export all use it.

A case says which layer, which input and which gradient of the output. Its dense counterpart is
plain torch: the weight from one ``torch.einsum`` over all factors, then ``F.linear`` or
``F.conv*d``. Nothing here calls the library's own Khatri-Rao products.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyadic import CPTensor
from polyadic import functional as PF
from polyadic.nn import CPConv1d, CPConv2d, CPConv3d, CPLinear

LETTERS = "abcdefghijklmnopqstuvwxyz"  # r is the rank
HALVES = (torch.float32, torch.bfloat16, torch.float16)
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CP_CONVS = {1: CPConv1d, 2: CPConv2d, 3: CPConv3d}

Shape = tuple[int, ...]


def by_einsum(factors: Sequence[Tensor], *scales: Tensor) -> Tensor:
    """The CP tensor of factors (m, R) by one einsum, a dimension to a mode; differentiable.

    Each of the scales (R,), if there are any, multiplies the components.
    """
    letters = LETTERS[: len(factors)]
    terms = [*(f"{letter}r" for letter in letters), *("r" for _ in scales)]
    # The search for the best order takes longer than any order of tensors this small.
    with torch.backends.opt_einsum.flags(enabled=False):
        return torch.einsum(f"{','.join(terms)}->{letters}", *factors, *scales)


def cp_by_einsum(cp: CPTensor) -> Tensor:
    """The same of a CP tensor, its weights included."""
    return by_einsum(list(cp.factors), *([] if cp.weights is None else [cp.weights]))


@dataclass(frozen=True)
class Leaves:
    """Everything a layer's output depends on, as leaf tensors."""

    x: Tensor
    factors: tuple[Tensor, ...]
    bias: Tensor | None
    weights: Tensor | None

    def named(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        factors = {f"factor {i}": f for i, f in enumerate(self.factors)}
        every = {"x": self.x, **factors, "bias": self.bias, "weights": self.weights}
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    def to(self, dtype: torch.dtype) -> Leaves:
        """Detached copies in another dtype, x in the same strides."""
        return self.map(lambda t: t.detach().to(dtype, copy=True))

    def map(self, f: Any) -> Leaves:
        """Apply a function to every tensor."""
        return Leaves(
            f(self.x),
            tuple(map(f, self.factors)),
            None if self.bias is None else f(self.bias),
            None if self.weights is None else f(self.weights),
        )


@dataclass(frozen=True)
class Case:
    """A layer, its input and its dense counterpart.

    Args:
        id: name in test ids.
        tensorized_shape: (in, out) modes of a linear layer; (out, in, kernel) of a convolution.
        rank: R.
        lead: leading dimensions; for a convolution (B,) or () for unbatched.
        size: spatial size of a convolution's input, () for linear.
        bias: with a bias.
        weights: with λ.
        strides: how x lies in memory: contiguous, transposed, sliced, expanded, channels_last.
        options: stride, padding, dilation.
        dtypes: besides float64, those in which the sizes are large enough to compare errors.
    """

    id: str
    tensorized_shape: tuple[Shape, ...]
    rank: int
    lead: Shape
    size: Shape = ()
    bias: bool = True
    weights: bool = False
    strides: str = "contiguous"
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    dtypes: tuple[torch.dtype, ...] = ()

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer."""
        return len(self.tensorized_shape) == 2

    @property
    def modes(self) -> Shape:
        """All modes in the order of the factors."""
        return tuple(mode for group in self.tensorized_shape for mode in group)

    @property
    def in_features(self) -> int:
        """M or Cin."""
        return math.prod(self.tensorized_shape[0 if self.linear else 1])

    @property
    def out_features(self) -> int:
        """N or Cout."""
        return math.prod(self.tensorized_shape[1 if self.linear else 0])

    @property
    def x_shape(self) -> Shape:
        """Shape of the input."""
        return (*self.lead, self.in_features, *self.size)

    @property
    def numel(self) -> int:
        """Number of entries gradients are taken of."""
        return math.prod(self.x_shape) + self.rank * sum(self.modes)

    def leaves(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Leaves:
        """Random input and parameters, entries of order 1, the weight's of about fan_in^-1/2.

        Factor entries have moduli between 0.5 and 1.5 (times a scale): with normal ones a few
        components would outweigh all others, and errors would be those of a handful of numbers.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def moderate(*shape: int) -> Tensor:
            moduli = 0.5 + torch.rand(*shape, generator=generator, dtype=torch.float64)
            return moduli * normal(*shape).sign()

        kernel = math.prod(self.tensorized_shape[2]) if len(self.tensorized_shape) > 2 else 1
        scale = (self.rank * self.in_features * kernel) ** (-0.5 / len(self.modes))
        leaves = Leaves(
            self._laid_out(normal),
            tuple(scale * moderate(mode, self.rank) for mode in self.modes),
            normal(self.out_features) if self.bias else None,
            moderate(self.rank) if self.weights else None,
        )
        return leaves if dtype == torch.float64 else leaves.to(dtype)

    def _laid_out(self, normal: Any) -> Tensor:
        shape = self.x_shape
        if self.strides == "contiguous":
            return normal(*shape)
        if self.strides == "transposed":
            return normal(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
        if self.strides == "sliced":
            return normal(*shape[:-1], 2 * shape[-1])[..., ::2]
        if self.strides == "expanded":
            return normal(1, *shape[1:]).expand(shape)
        last = torch.channels_last if len(self.size) == 2 else torch.channels_last_3d
        return normal(*shape).contiguous(memory_format=last)

    def make(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        """The layer, with the parameters of ``leaves``."""
        groups, leaves = self.tensorized_shape, self.leaves(dtype, seed)
        layer: nn.Module
        if self.linear:
            layer = CPLinear(
                self.in_features,
                self.out_features,
                self.bias,
                rank=self.rank,
                in_shape=groups[0],
                out_shape=groups[1],
                dtype=dtype,
            )
        else:
            layer = CP_CONVS[len(self.size)](
                self.in_features,
                self.out_features,
                groups[2],
                **self.options,
                bias=self.bias,
                rank=self.rank,
                out_shape=groups[0],
                in_shape=groups[1],
                dtype=dtype,
            )
        layer.cp = CPTensor.from_factors(groups, leaves.factors, leaves.weights)
        if self.bias:
            with torch.no_grad():
                layer.bias.copy_(leaves.bias)
        return layer

    def groups(self, factors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Factors by group."""
        rest = iter(factors)
        return [[next(rest) for _ in group] for group in self.tensorized_shape]

    def cp(self, leaves: Leaves, **kwargs: Any) -> Tensor:
        """The library's differentiable function."""
        function = PF.cp_linear if self.linear else PF.cp_conv
        groups = self.groups(leaves.factors)
        return function(
            leaves.x, *groups, leaves.bias, weights=leaves.weights, **self.options, **kwargs
        )

    def cp_forward(self, leaves: Leaves, **kwargs: Any) -> tuple[Tensor, Any]:
        """The explicit forward, which has no bias."""
        function = PF.cp_linear_forward if self.linear else PF.cp_conv_forward
        groups = self.groups(leaves.factors)
        return function(leaves.x, *groups, weights=leaves.weights, **self.options, **kwargs)

    def cp_backward(self, grad_y: Tensor, saved: Any) -> dict[str, Tensor]:
        """The explicit backward, its results by the names of ``Leaves.named``."""
        function = PF.cp_linear_backward if self.linear else PF.cp_conv_backward
        grad_x, *rest = function(grad_y, saved)
        n_groups = len(self.tensorized_shape)
        factors = [grad for group in rest[:n_groups] for grad in group]
        named = {"x": grad_x, **{f"factor {i}": grad for i, grad in enumerate(factors)}}
        return {**named, **({"weights": rest[n_groups]} if self.weights else {})}

    def dense_weight(self, leaves: Leaves) -> Tensor:
        """The weight in torch's layout, (N, M) or (Cout, Cin, *k), by one einsum."""
        scales = [] if leaves.weights is None else [leaves.weights]
        full = by_einsum(leaves.factors, *scales)
        shape = [math.prod(group) for group in self.tensorized_shape[:2]]
        if self.linear:
            return full.reshape(shape).T
        return full.reshape(*shape, *self.tensorized_shape[2])

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What torch computes with the dense weight."""
        if self.linear:
            return F.linear(x, weight, bias)
        return CONVS[len(self.size)](x, weight, bias, **self.options)

    def expected(self, leaves: Leaves) -> Tensor:
        """Output by dense torch, differentiable in every leaf."""
        return self.dense(leaves.x, self.dense_weight(leaves), leaves.bias)

    def grad_y(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
        """A random gradient of the output."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(y_shape(self), generator=generator, dtype=torch.float64).to(dtype)


@functools.cache
def y_shape(case: Case) -> torch.Size:
    """Shape of the output, by dense torch."""
    with torch.no_grad():
        return case.expected(case.leaves().map(lambda t: t.to("meta"))).shape


def gradients(y: Tensor, leaves: Leaves, grad_y: Tensor) -> dict[str, Tensor]:
    """Gradients of every leaf, by name; an error where one is missing."""
    named = leaves.named()
    return dict(zip(named, torch.autograd.grad(y, list(named.values()), grad_y), strict=True))


@functools.cache
def truth(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and every gradient in float64, by dense torch and its autograd."""
    leaves = case.leaves().map(Tensor.requires_grad_)
    y = case.expected(leaves)
    return y.detach(), gradients(y, leaves, case.grad_y())


def linear(
    name: str, in_shape: Shape, out_shape: Shape, rank: int, lead: Shape, **kwargs: Any
) -> Case:
    """A linear layer."""
    return Case(f"linear-{name}", (in_shape, out_shape), rank, lead, **kwargs)


def conv(
    name: str,
    out_shape: Shape,
    in_shape: Shape,
    kernel: Shape,
    rank: int,
    lead: Shape,
    size: Shape,
    **kwargs: Any,
) -> Case:
    """A convolution."""
    options = {k: kwargs.pop(k) for k in ("stride", "padding", "dilation") if k in kwargs}
    shape = (out_shape, in_shape, kernel)
    return Case(f"conv-{name}", shape, rank, lead, size, options=options, **kwargs)


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
    linear("notebook", (4, 4, 16), (4, 4, 8), 100, (32,), dtypes=HALVES),
    linear("wide-lambda", (8, 4, 5), (6, 7, 8), 48, (7, 9), weights=True, dtypes=HALVES),
    linear("narrow-order4", (3, 4, 5, 2), (2, 2, 3, 3), 24, (50,), dtypes=HALVES),
    linear("order1-large", (211,), (97,), 31, (41,), bias=False, dtypes=HALVES),
]  # fmt: skip

CONV = [
    conv("1d-k1", (3,), (4,), (1,), 3, (2,), (5,)),
    conv("1d-k1-stride", (3,), (2, 2), (1,), 3, (2,), (7,), stride=3, weights=True),
    conv("1d-k1-pad", (3,), (2, 2), (1,), 3, (2,), (5,), padding=2),
    conv("1d-k3", (2, 3), (5,), (3,), 4, (2,), (9,), padding=1),
    conv("1d-k4-same", (2, 2), (3, 1), (4,), 3, (2,), (8,), padding="same", weights=True),
    conv("1d-k5-all-options", (5,), (3,), (5,), 2, (3,), (17,), stride=2, padding=3, dilation=2),
    conv("1d-unbatched", (3,), (2, 2), (3,), 3, (), (6,), padding="same", bias=False),
    conv("1d-k7-longer-than-input", (3,), (2,), (7,), 3, (2,), (3,), padding=3),
    conv("1x1", (3,), (2,), (1, 1), 1, (1,), (5, 4)),
    conv("1x1-rank-above-m", (2, 2), (3,), (1, 1), 13, (2,), (3, 4), weights=True),
    conv("1x1-stride", (2, 2), (3, 2), (1, 1), 5, (2,), (7, 6), stride=(2, 3)),
    conv("1x1-pad-stride", (2, 2), (3, 2), (1, 1), 3, (2,), (5, 4), stride=2, padding=(1, 2)),
    conv("1x1-unbatched-channels-last-batch1", (5,), (2, 3), (1, 1), 4, (1,), (4, 3),
         strides="channels_last"),
    conv("1x3", (2, 3), (5, 1), (1, 3), 3, (2,), (3, 5), padding="same"),
    conv("1x3-stride-on-both", (2, 3), (5, 1), (1, 3), 3, (2,), (7, 8), stride=2, padding=(0, 1)),
    conv("3x1-valid-lambda", (7,), (3, 2), (3, 1), 4, (2,), (5, 3), padding="valid", weights=True),
    conv("3x1-pad-on-1", (3,), (2, 2), (3, 1), 3, (2,), (4, 4), padding=(0, 2), stride=(1, 2)),
    conv("3x3", (3,), (2,), (3, 3), 7, (2,), (5, 6)),
    conv("3x3-rank1", (2, 2), (3, 1), (3, 3), 1, (2,), (4, 5), padding=1),
    conv("3x3-one-channel", (1,), (1,), (3, 3), 2, (2,), (4, 7), padding="same"),
    conv("3x3-one-pixel", (3,), (2,), (3, 3), 4, (2,), (1, 1), padding=1),
    conv("3x3-batch0", (2, 2), (3, 1), (3, 3), 3, (0,), (5, 4), padding=1, weights=True),
    conv("3x3-unbatched-lambda", (2, 2), (3, 2), (3, 3), 4, (), (5, 4), padding=1, weights=True),
    conv("3x3-stride-tuple", (2, 2), (3, 2), (3, 3), 4, (2,), (9, 8), stride=(2, 3), padding=1),
    conv("3x3-dilation", (3, 2), (2, 2), (3, 3), 3, (1,), (8, 9), dilation=(2, 3), padding="same"),
    conv("3x3-all-options", (2, 3), (4,), (3, 3), 5, (3,), (11, 9), stride=(3, 2), padding=(2, 1),
         dilation=(1, 2), weights=True),
    conv("3x3-channels-last", (3, 2), (2, 3), (3, 3), 4, (2,), (5, 6), padding=1,
         strides="channels_last"),
    conv("3x3-channels-last-lambda", (3,), (2, 3), (3, 3), 4, (3,), (6, 5), stride=2, weights=True,
         strides="channels_last", bias=False),
    conv("3x3-transposed", (3, 2), (2, 2), (3, 3), 4, (2,), (5, 6), padding=1,
         strides="transposed"),
    conv("3x3-sliced", (3, 2), (2, 2), (3, 3), 4, (2,), (5, 6), strides="sliced"),
    conv("3x3-expanded", (3, 2), (2, 2), (3, 3), 4, (3,), (5, 4), strides="expanded"),
    conv("3x3-order3", (1, 2, 3), (2, 1, 2), (3, 3), 4, (2,), (5, 3), padding=1),
    conv("3x3-order4-unequal", (1, 2, 1, 3), (2, 2), (3, 3), 4, (1,), (4, 3), padding=(1, 0)),
    conv("5x3", (2, 1), (1, 2), (5, 3), 4, (1,), (7, 5)),
    conv("5x3-same-primes", (5,), (7,), (5, 3), 3, (2,), (6, 5), padding="same", bias=False),
    conv("4x4-same", (2, 2), (3, 1), (4, 4), 5, (2,), (6, 7), padding="same"),
    conv("4x4-same-dilation", (3,), (2,), (4, 4), 2, (1,), (7, 8), padding="same", dilation=3),
    conv("4x4-stride", (2, 2), (3,), (4, 4), 3, (2,), (8, 9), stride=4, weights=True),
    conv("4x2-same-mixed", (3,), (2, 2), (4, 3), 3, (2,), (5, 5), padding="same",
         strides="channels_last"),
    conv("3d-2x3x2", (2, 2), (3,), (2, 3, 2), 3, (2,), (4, 5, 3)),
    conv("3d-2x3x2-same", (3,), (2, 2), (2, 3, 2), 4, (1,), (3, 4, 3), padding="same",
         weights=True),
    conv("3d-1x1x1", (3,), (2, 2), (1, 1, 1), 4, (2,), (2, 3, 2), stride=(1, 2, 1)),
    conv("3d-1x3x1-stride", (3,), (2,), (1, 3, 1), 3, (2,), (3, 5, 4), stride=2, padding=(0, 1, 1)),
    conv("3d-channels-last", (2, 2), (3,), (2, 1, 3), 3, (2,), (3, 3, 4), dilation=(2, 1, 1),
         strides="channels_last"),
    conv("3d-unbatched", (2,), (3,), (2, 2, 2), 3, (), (3, 3, 4), padding=1, bias=False),
    conv("notebook", (4, 8), (4, 4), (3, 3), 100, (2,), (8, 8), padding="same", dtypes=HALVES),
    conv("1x1-large", (4, 8), (5, 5), (1, 1), 20, (3,), (9, 8), weights=True, dtypes=HALVES),
    conv("5x3-large", (5, 4), (3, 7), (5, 3), 24, (3,), (12, 10), stride=(1, 2), padding=(2, 1),
         dtypes=HALVES),
    conv("4x4-large-channels-last", (6, 3), (4, 4), (4, 4), 16, (3,), (9, 11), padding="same",
         weights=True, strides="channels_last", dtypes=HALVES),
    conv("1d-k5-large", (5, 5), (4, 7), (5,), 32, (6,), (40,), padding=2, dilation=1,
         dtypes=HALVES),
    conv("3d-2x3x2-large", (4, 3), (2, 5), (2, 3, 2), 16, (3,), (4, 5, 4), padding=(1, 1, 0),
         dtypes=HALVES),
]  # fmt: skip

CASES = [*LINEAR, *CONV]
BY_ID = {case.id: case for case in CASES}


def params(cases: Sequence[Case]) -> list[Any]:
    """The cases as parameters named by their ids."""
    return [pytest.param(case, id=case.id) for case in cases]


every_case = pytest.mark.parametrize("case", params(CASES))
