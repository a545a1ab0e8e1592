"""The exchange of CP tensors with tensorly and tltorch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from polyadic import checks
from polyadic.formats import Shape, split_modes

Own = TypeVar("Own", bound="Exchanged")


class Exchanged(nn.Module):
    """The methods of a CPTensor that exchange it with other libraries."""

    factors: nn.ParameterList
    weights: Tensor | None
    rank: int
    tensorized_shape: tuple[Shape, ...]
    layer_modes: int

    @classmethod
    def from_factors(
        cls,
        tensorized_shape: Sequence[int | Sequence[int]],
        factors: Sequence[Tensor],
        weights: Tensor | None = None,
    ) -> Any:
        """Make a CPTensor with copies of the given factors as its parameters."""
        raise NotImplementedError

    def to_tensorly(self) -> Any:
        """Copy to a ``tensorly.cp_tensor.CPTensor`` of torch tensors.

        Raises:
            ImportError: tensorly is not installed.
        """
        tensorly = _interop("tensorly")
        first = self.factors[0]
        weights = first.new_ones(self.rank) if self.weights is None else self.weights
        factors = [factor.detach().clone() for factor in self.factors]
        # The backend is set for this call alone; the user's setting stays.
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            return tensorly.cp_tensor.CPTensor((weights.detach().clone(), factors))

    @classmethod
    def from_tensorly(
        cls: type[Own], cp_tensor: Any, tensorized_shape: Sequence[Sequence[int]] | None = None
    ) -> Own:
        """Make a CPTensor with copies of a tensorly CP tensor's torch weights and factors.

        Args:
            cp_tensor: ``tensorly.cp_tensor.CPTensor`` or a pair (weights, factors).
            tensorized_shape: groups of modes; by default each mode is a group.

        Raises:
            TypeError: its factors are not torch tensors.
            ValueError: shapes do not fit.
        """
        weights, factors = cp_tensor
        factors = checks.check_factor_group(factors, "factors of the tensorly CP tensor")
        groups = tensorized_shape or [(factor.shape[0],) for factor in factors]
        made: Own = cls.from_factors(groups, factors, weights)
        return made

    def to_tltorch(self, *, tensorized: bool = True, as_real: bool = False) -> Any:
        """Copy to tltorch; λ is ones where there is none.

        Args:
            tensorized: make a ``CPTensorized``, as tltorch's linear and embedding layers own it,
                layer modes as ints; False makes a ``CPTensor``, as its convolutions own it.
            as_real: of complex factors make tltorch's ``"ComplexCP"``, whose parameters are their
                real and imaginary parts (mode, R, 2); False makes a tensor of complex parameters.

        Raises:
            TypeError: ``as_real`` for real factors.
            ImportError: tltorch, or something it needs, is not installed.
        """
        tltorch = _interop("tltorch")
        if as_real and not self.factors[0].is_complex():
            raise TypeError(f"as_real is for complex factors, got {self.factors[0].dtype}")
        first = self.factors[0]
        weights = first.new_ones(self.rank) if self.weights is None else self.weights
        factors = [owned(factor) for factor in self.factors]
        shape: tuple[Any, ...] = tuple(mode for group in self.tensorized_shape for mode in group)
        if tensorized:
            joint, single = split_modes(self.tensorized_shape, self.layer_modes)
            shape = (*joint, *single)
        name = f"{'Complex' if as_real else ''}CPTensor{'ized' if tensorized else ''}"
        return getattr(tltorch, name)(owned(weights), factors, shape, rank=self.rank)

    @classmethod
    def from_tltorch(
        cls: type[Own], tensor: Any, tensorized_shape: Sequence[int | Sequence[int]] | None = None
    ) -> Own:
        """Make a CPTensor with copies of a tltorch CP tensor's weights λ and factors.

        Args:
            tensor: a ``CPTensorized`` (of a linear layer or an embedding), whose ints are modes of
                layers that share it; or a ``CPTensor`` (of a convolution). Its parameters may be
                complex, or, in a ``"ComplexCP"``, real and imaginary parts; the copies are complex.
            tensorized_shape: groups of the modes; those of a ``CPTensorized`` by default. It has to
                be given for a ``CPTensor``, such as (3, (6,), (4,), (3, 3)) for three layers.

        Raises:
            TypeError: ``tensor`` is neither, or it has no groups and none are given.
            ValueError: the groups do not have its modes.
        """
        if not hasattr(tensor, "factors") or not hasattr(tensor, "weights"):
            raise TypeError(
                f"expected a tltorch CP tensor, got {type(tensor).__name__}; make one with "
                f"tltorch.TensorizedTensor.new(tensorized_shape, rank, factorization='CP')"
            )
        groups = tensorized_shape or getattr(tensor, "tensorized_shape", None)
        if groups is None:
            raise TypeError(
                f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} does not say which of "
                f"its modes belong together; give tensorized_shape, for a convolution "
                f"((out,), (in,), kernel)"
            )
        weights, *factors = _parts(tensor)
        made: Own = cls.from_factors(groups, factors, weights)
        return made


def _parts(tensor: Any) -> list[Tensor]:
    """λ and the factors of a tltorch tensor, complex ones with the flags of their real parameters.

    A ``"ComplexCP"`` shows its real parameters (…, 2) as complex tensors.
    """
    parts, stored = [tensor.weights, *tensor.factors], list(tensor.parameters())
    if len(stored) != len(parts) or stored[0].is_complex() == parts[0].is_complex():
        return parts
    flags = [parameter.requires_grad for parameter in stored]
    return [nn.Parameter(p.detach(), flag) for p, flag in zip(parts, flags, strict=True)]


def owned(tensor: Tensor) -> nn.Parameter:
    """Copy into a parameter that keeps the requires_grad flag of a parameter."""
    requires_grad = tensor.requires_grad if isinstance(tensor, nn.Parameter) else True
    return nn.Parameter(
        tensor.detach().clone(memory_format=torch.contiguous_format), requires_grad=requires_grad
    )


def _interop(name: str) -> Any:
    """Import an optional package; an ImportError names the extra that brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'conversion to {name} needs it: pip install "polyadic[interop]" ({error})'
        ) from error
