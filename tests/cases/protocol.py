"""What a case of any kind of layer offers; every law in ``tests/laws`` asks for no more.

A case is a layer with its input: ``make()`` is the layer, ``leaves()`` are the tensors its output
depends on, ``cp()`` is the library's function of them, ``dense()`` is what torch's own layer
computes with the weight that one ``torch.einsum`` makes of them, and ``plans()`` are all the ways
in which the function can be told to compute it.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cases.weights import by_einsum
from polyadic import CPTensor
from polyadic.nn.kinds import BY_CP, Kind

HALVES = (torch.float32, torch.bfloat16, torch.float16)
# Option of a case of complex numbers.
COMPLEX: dict[str, Any] = {"exact": torch.complex128}

Shape = tuple[int, ...]
# Arguments of the function that force one way of computing it.
Forced = dict[str, Any]


@dataclass(frozen=True)
class Leaves:
    """Everything a layer's output depends on, as leaf tensors; indices have no gradient."""

    x: Tensor
    factors: tuple[Tensor, ...]
    bias: Tensor | None
    weights: Tensor | None

    def named(self) -> dict[str, Tensor]:
        """The tensors that have a gradient, by name."""
        factors = {f"factor {i}": f for i, f in enumerate(self.factors)}
        x = self.x if self.x.is_floating_point() or self.x.is_complex() else None
        every = {"x": x, **factors, "bias": self.bias, "weights": self.weights}
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    def of(self, named: dict[str, Tensor]) -> Leaves:
        """Leaves with other tensors, as ``named`` names them."""
        factors = tuple(named[f"factor {i}"] for i in range(len(self.factors)))
        return Leaves(named.get("x", self.x), factors, named.get("bias"), named.get("weights"))

    def to(self, dtype: torch.dtype) -> Leaves:
        """Detached copies in another dtype, x in the same strides; indices stay what they are."""
        return self.map(lambda t: t.detach().to(dtype, copy=True))

    def map(self, f: Callable[[Tensor], Tensor]) -> Leaves:
        """Apply a function to every tensor that has a gradient."""
        return self.of({name: f(tensor) for name, tensor in self.named().items()})


@dataclass(frozen=True)
class Case(ABC):
    """A layer, its input and its dense counterpart.

    Args:
        id: name in test ids.
        tensorized_shape: groups of modes in the order of the CP tensor.
        rank: R.
        lead: leading dimensions of x; for a convolution (B,), or () for unbatched.
        size: spatial size of a convolution's input.
        bias: with a bias.
        weights: with λ.
        strides: how x lies in memory: contiguous, transposed, sliced, expanded, channels_last.
        options: the layer's options beside its sizes, which torch's layer has too.
        dtypes: besides float64, those in which the sizes are large enough to compare errors.
        exact: float64, or complex128 of a layer of complex numbers.
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
    exact: torch.dtype = torch.float64

    @property
    @abstractmethod
    def cls(self) -> type[nn.Module]:
        """The class of the CP layer."""

    @property
    @abstractmethod
    def sizes(self) -> dict[str, Any]:
        """Arguments of torch's layer: its sizes, and whether it has a bias."""

    @property
    @abstractmethod
    def x_shape(self) -> Shape:
        """Shape of the input."""

    @property
    @abstractmethod
    def fan_in(self) -> int:
        """How many products each entry of the output adds."""

    @property
    @abstractmethod
    def out_features(self) -> int:
        """Entries of the output at one position."""

    @abstractmethod
    def cp(self, leaves: Leaves, **forced: Any) -> Tensor:
        """The library's differentiable function."""

    @abstractmethod
    def plans(self) -> Iterator[Forced]:
        """Every way in which ``cp`` can be told to compute."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Entries of the first intermediate to each component."""

    # What most kinds have in common.

    @property
    def kind(self) -> Kind:
        """The row of the library's table of layers."""
        return BY_CP[self.cls]

    @property
    def modes(self) -> Shape:
        """All modes in the order of the factors."""
        return tuple(mode for group in self.tensorized_shape for mode in group)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the CP layer's class."""
        return {**self.sizes, **self.options, "rank": self.rank, **self.shapes}

    @property
    def shapes(self) -> dict[str, Shape]:
        """Its modes, by the names of the arguments."""
        return {"in_shape": self.tensorized_shape[0], "out_shape": self.tensorized_shape[1]}

    @property
    def differentiable(self) -> bool:
        """Whether the input has a gradient, as indices have not."""
        return True

    @property
    def explicit(self) -> bool:
        """Whether there is an explicit pair of functions, forward and backward, for it."""
        return False

    @property
    def numel(self) -> int:
        """Number of entries gradients are taken of."""
        return sum(leaf.numel() for leaf in self.leaves().named().values())

    def draw_x(self, normal: Callable[..., Tensor]) -> Tensor:
        """The input, as it lies in memory."""
        shape = self.x_shape
        if self.strides == "contiguous":
            return normal(*shape)
        if self.strides == "transposed":
            return normal(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
        if self.strides == "sliced":
            return normal(*shape[:-1], 2 * shape[-1])[..., ::2]
        if self.strides == "expanded":
            return normal(1, *shape[1:]).expand(shape)
        return normal(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

    def of_its_numbers(self, dtype: torch.dtype | None) -> torch.dtype:
        """A dtype, where the case is complex the complex one; the exact one for None."""
        if dtype is None:
            return self.exact
        return torch.promote_types(dtype, torch.complex64) if self.exact.is_complex else dtype

    def leaves(self, dtype: torch.dtype | None = None, seed: int = 0) -> Leaves:
        """Random input and parameters, entries of order 1, the weight's of about fan_in^-1/2.

        Factor entries have moduli between 0.5 and 1.5 (times a scale): with normal ones a few
        components would outweigh all others, and errors would be those of a handful of numbers.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=self.exact)

        def moderate(*shape: int) -> Tensor:
            moduli = 0.5 + torch.rand(*shape, generator=generator, dtype=torch.float64)
            return moduli * normal(*shape).sgn()

        scale = (self.rank * self.fan_in) ** (-0.5 / len(self.modes))
        leaves = Leaves(
            self.draw_x(normal),
            tuple(scale * moderate(mode, self.rank) for mode in self.modes),
            normal(self.out_features) if self.bias else None,
            moderate(self.rank) if self.weights else None,
        )
        dtype = self.of_its_numbers(dtype)
        return leaves if dtype == self.exact else leaves.to(dtype)

    def build(self, **kwargs: Any) -> Any:
        """The layer as its class makes it, given dtype, device and memory."""
        return self.cls(**self.arguments, **kwargs)

    def make(self, dtype: torch.dtype | None = None, seed: int = 0, **kwargs: Any) -> Any:
        """The layer, with the parameters of ``leaves``."""
        dtype = self.of_its_numbers(dtype)
        return self.filled(self.build(dtype=dtype, **kwargs), self.leaves(dtype, seed))

    def filled(self, layer: Any, leaves: Leaves) -> Any:
        """Give a layer the parameters of ``leaves``."""
        layer.cp = CPTensor.from_factors(self.tensorized_shape, leaves.factors, leaves.weights)
        if leaves.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(leaves.bias)
        return layer

    def parameters(self, layer: Any) -> dict[str, Tensor]:
        """The parameters of a layer, as ``Leaves`` names them."""
        factors = {f"factor {i}": f for i, f in enumerate(layer.cp.factors)}
        every = {**factors, "bias": getattr(layer, "bias", None), "weights": layer.cp.weights}
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    def groups(self, factors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Factors by group."""
        rest = iter(factors)
        return [[next(rest) for _ in group] for group in self.tensorized_shape]

    def matrix(self, leaves: Leaves) -> Tensor:
        """The weight, a dimension to a group of modes, by one einsum."""
        scales = [] if leaves.weights is None else [leaves.weights]
        shape = [math.prod(group) for group in self.tensorized_shape]
        return by_einsum(leaves.factors, *scales).reshape(shape)

    @abstractmethod
    def weight(self, leaves: Leaves) -> Tensor:
        """The weight in the layout of torch's layer, by one einsum."""

    def torch_layer(self, **kwargs: Any) -> nn.Module:
        """Torch's own layer with these options."""
        assert self.kind.dense is not None
        return self.kind.dense(**self.sizes, **self.options, **kwargs)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What torch's layer computes with a weight."""
        values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return functional_call(_on_meta(self), values, (x,))

    def dense(self, leaves: Leaves) -> Tensor:
        """Output of torch's layer, differentiable in every leaf."""
        return self.apply(leaves.x, self.weight(leaves), leaves.bias)

    @abstractmethod
    def in_other_orders(self, leaves: Leaves) -> Iterator[Tensor]:
        """The output of a batch by torch's own operations, which add up in other orders."""

    def grad_y(self, dtype: torch.dtype | None = None, seed: int = 1) -> Tensor:
        """A random gradient of the output."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(y_shape(self), generator=generator, dtype=self.exact)
        return drawn.to(self.of_its_numbers(dtype))

    def in_complex(self) -> Case:
        """The case in complex numbers."""
        return replace(self, exact=torch.complex128)

    def resized(self, batch: int) -> Case:
        """The case with another leading size."""
        return replace(self, lead=(batch, *self.lead[1:]), strides="contiguous")


@functools.cache
def _on_meta(case: Case) -> nn.Module:
    return case.torch_layer(device="meta")


@functools.cache
def y_shape(case: Case) -> torch.Size:
    """Shape of the output, by torch's layer."""
    with torch.no_grad():
        return case.dense(case.leaves()).shape


def gradients(y: Tensor, leaves: Leaves, grad_y: Tensor) -> dict[str, Tensor]:
    """Gradients of every leaf, by name; an error where one is missing."""
    named = leaves.named()
    return dict(zip(named, torch.autograd.grad(y, list(named.values()), grad_y), strict=True))


@functools.cache
def truth(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and every gradient in float64, by torch's layer and its autograd."""
    leaves = case.leaves().map(Tensor.requires_grad_)
    y = case.dense(leaves)
    return y.detach(), gradients(y, leaves, case.grad_y())


def paired(routes: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Every route forward and backward, together with itself and with another one."""
    yield from zip(routes, routes, strict=True)
    for forward, backward in zip(routes, reversed(routes), strict=True):
        if forward != backward:
            yield forward, backward
