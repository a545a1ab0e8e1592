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

    def to_tltorch(self, *, tensorized: bool = True) -> Any:
        """Copy to tltorch; λ is ones where there is none.

        Args:
            tensorized: make a ``CPTensorized``, as tltorch's linear and embedding layers own it,
                layer modes as ints; False makes a ``CPTensor``, as its convolutions own it.

        Raises:
            ImportError: tltorch, or something it needs, is not installed.
        """
        tltorch = _interop("tltorch")
        first = self.factors[0]
        weights = first.new_ones(self.rank) if self.weights is None else self.weights
        factors = [owned(factor) for factor in self.factors]
        if not tensorized:
            shape = tuple(mode for group in self.tensorized_shape for mode in group)
            return tltorch.CPTensor(owned(weights), factors, shape, rank=self.rank)
        joint, single = split_modes(self.tensorized_shape, self.layer_modes)
        return tltorch.CPTensorized(owned(weights), factors, (*joint, *single), rank=self.rank)

    @classmethod
    def from_tltorch(
        cls: type[Own], tensor: Any, tensorized_shape: Sequence[int | Sequence[int]] | None = None
    ) -> Own:
        """Make a CPTensor with copies of a tltorch CP tensor's weights λ and factors.

        Args:
            tensor: a ``CPTensorized`` (of a linear layer or an embedding), whose ints are modes of
                layers that share it; or a ``CPTensor`` (of a convolution).
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
        made: Own = cls.from_factors(groups, list(tensor.factors), tensor.weights)
        return made


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
