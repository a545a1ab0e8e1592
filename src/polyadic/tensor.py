"""CPTensor: a tensorized tensor in CP format that owns its factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyadic import _check
from polyadic._format import Shape, mode_sizes, positive_int
from polyadic.init import cp_orthonormal_
from polyadic.kernels.modes import khatri_rao


class CPTensor(nn.Module):
    """A tensor in CP (canonical polyadic) format whose modes come in groups.

        T[i_1, …, i_K] = Σ_r λ_r · Π_k factors[k][i_k, r]

    A linear layer's weight has the groups (in, out), a convolution's (out, in, kernel); each
    group is one dimension of the matrix. Factors are in the order of the flattened groups.
    Method and notation: Kolda & Bader, SIAM Review 2009, §3.

    Args:
        tensorized_shape: a group of mode sizes per dimension, such as ((4, 4, 16), (4, 4, 8)).
        rank: R, the number of rank-one components.
        weights: own a λ (R,), initialised to ones.
        device: of the factors.
        dtype: of the factors, floating point.

    Attributes:
        factors: ``nn.ParameterList`` of (mode, R) tensors.
        weights: λ (R,) as a parameter, or None for ones.
        tensorized_shape: the groups, as tuples of plain ints.
        rank: R.

    Raises:
        TypeError: sizes or rank are not integers.
        ValueError: sizes or rank are below 1, or there is no group.
    """

    weights: nn.Parameter | None

    def __init__(
        self,
        tensorized_shape: Sequence[Sequence[int]],
        rank: int,
        *,
        weights: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.tensorized_shape = _groups(tensorized_shape)
        self.rank = positive_int(rank, "rank")
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating point, got {dtype}")
        self.factors = nn.ParameterList(
            nn.Parameter(torch.empty(mode, self.rank, device=device, dtype=dtype))
            for group in self.tensorized_shape
            for mode in group
        )
        scale = torch.empty(self.rank, device=device, dtype=dtype) if weights else None
        self.register_parameter("weights", None if scale is None else nn.Parameter(scale))
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw the factors anew so that the entries of the tensor have standard deviation ``std``.

        Args:
            std: of an entry of the tensor, 1/√(number of rows of the matrix) by default.
        """
        cp_orthonormal_(list(self.factors), 1 / math.sqrt(self.shape[0]) if std is None else std)
        if self.weights is not None:
            nn.init.ones_(self.weights)

    @property
    def order(self) -> int:
        """Total number of modes, and of factors."""
        return sum(map(len, self.tensorized_shape))

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix: the product of each group."""
        return torch.Size(math.prod(group) for group in self.tensorized_shape)

    def factor_groups(self) -> tuple[tuple[Tensor, ...], ...]:
        """Return the factors, one tuple per group of ``tensorized_shape``."""
        stored = self.factors._parameters
        # The dict skips a getattr per factor; parametrized factors are not in it.
        every = tuple(stored.values()) if len(stored) == self.order else tuple(self.factors)
        groups, start = [], 0
        for group in self.tensorized_shape:
            groups.append(every[start : start + len(group)])
            start += len(group)
        return tuple(groups)  # type: ignore[arg-type]

    def to_tensor(self) -> Tensor:
        """Build the full tensor, one dimension per mode; differentiable."""
        modes = [mode for group in self.tensorized_shape for mode in group]
        return self.to_matrix().view(modes)

    def to_matrix(self) -> Tensor:
        """Build the tensor with one dimension per group, such as (M, N) or (Cout, Cin, kh·kw)."""
        first, *rest = self.factor_groups()
        matrix = khatri_rao(first)
        if self.weights is not None:
            matrix = matrix * self.weights
        if not rest:
            return matrix.sum(1)
        other = khatri_rao([factor for group in rest for factor in group])
        return (matrix @ other.t()).view(self.shape)

    @classmethod
    def from_factors(
        cls,
        tensorized_shape: Sequence[Sequence[int]],
        factors: Sequence[Tensor],
        weights: Tensor | None = None,
    ) -> CPTensor:
        """Make a CPTensor with copies of the given factors as its parameters.

        Args:
            tensorized_shape: groups of mode sizes.
            factors: one (mode, R) tensor per mode, in order.
            weights: λ (R,) or None.

        Raises:
            TypeError: factors are not floating tensors of one dtype.
            ValueError: number, shapes, ranks or devices do not fit.
        """
        groups = _groups(tensorized_shape)
        modes = tuple(mode for group in groups for mode in group)
        tensors = _check.factor_group(factors, "factors")
        sizes, (rank,) = _check.ranked(weights, factors=tensors)
        if sizes != modes:
            raise ValueError(
                f"factors must have the modes {modes} of the tensorized shape, got {sizes}"
            )
        first = tensors[0]
        cp = cls(groups, rank, weights=weights is not None, device="meta", dtype=first.dtype)
        cp.factors = nn.ParameterList(_own(factor) for factor in tensors)
        if weights is not None:
            cp.weights = _own(weights)
        return cp

    def to_tensorly(self) -> Any:
        """Copy to a ``tensorly.cp_tensor.CPTensor`` of torch tensors."""
        from tensorly.cp_tensor import CPTensor as TensorlyCP

        first = self.factors[0]
        weights = first.new_ones(self.rank) if self.weights is None else self.weights
        factors = [factor.detach().clone() for factor in self.factors]
        with _torch_backend():
            return TensorlyCP((weights.detach().clone(), factors))

    @classmethod
    def from_tensorly(
        cls, cp_tensor: Any, tensorized_shape: Sequence[Sequence[int]] | None = None
    ) -> CPTensor:
        """Make a CPTensor with copies of a tensorly CP tensor's torch weights and factors.

        Args:
            cp_tensor: ``tensorly.cp_tensor.CPTensor`` or a pair (weights, factors).
            tensorized_shape: groups of modes; by default each mode is a group.

        Raises:
            TypeError: its factors are not torch tensors.
            ValueError: shapes do not fit.
        """
        weights, factors = cp_tensor
        factors = _check.factor_group(factors, "factors of the tensorly CP tensor")
        groups = tensorized_shape or [(factor.shape[0],) for factor in factors]
        return cls.from_factors(groups, factors, weights)

    def to_tltorch(self) -> Any:
        """Copy to a tltorch ``CPTensorized``; λ is ones where there is none."""
        import tltorch

        first = self.factors[0]
        weights = first.new_ones(self.rank) if self.weights is None else self.weights
        return tltorch.factorized_tensors.CPTensorized(
            _own(weights), [_own(factor) for factor in self.factors], self.tensorized_shape,
            rank=self.rank,
        )  # fmt: skip

    @classmethod
    def from_tltorch(cls, tensor: Any) -> CPTensor:
        """Make a CPTensor with copies of a tltorch ``CPTensorized``'s weights λ and factors.

        Raises:
            TypeError: ``tensor`` is not a CP tensorized tensor.
            ValueError: it has a mode that is in no group (a joint tensor of several layers).
        """
        groups = getattr(tensor, "tensorized_shape", None)
        if groups is None or not hasattr(tensor, "factors") or not hasattr(tensor, "weights"):
            raise TypeError(
                f"expected a tltorch CPTensorized, got {type(tensor).__name__}; make one with "
                f"tltorch.TensorizedTensor.new(tensorized_shape, rank, factorization='CP')"
            )
        if any(isinstance(group, int) for group in groups):
            raise ValueError(
                f"every entry of tensorized_shape must be a group of modes, got {groups}; joint "
                f"tensors of several layers are not supported"
            )
        return cls.from_factors(groups, list(tensor.factors), tensor.weights)

    def extra_repr(self) -> str:
        """Shapes, rank and parameter counts."""
        own, dense = sum(p.numel() for p in self.parameters()), math.prod(self.shape)
        return (
            f"shape={tuple(self.shape)}, tensorized_shape={self.tensorized_shape}, "
            f"rank={self.rank}, parameters={own} of {dense} ({dense / own:.1f}x fewer)"
        )

    def __repr__(self) -> str:
        return f"CPTensor({self.extra_repr()})"


def _groups(tensorized_shape: Any) -> tuple[Shape, ...]:
    if isinstance(tensorized_shape, (str, bytes)) or not isinstance(tensorized_shape, Sequence):
        raise TypeError(
            f"tensorized_shape must be a sequence of groups of mode sizes such as "
            f"((4, 4, 16), (4, 4, 8)), got {tensorized_shape!r}"
        )
    groups = tuple(
        mode_sizes(group, f"tensorized_shape[{i}]") for i, group in enumerate(tensorized_shape)
    )
    if not groups:
        raise ValueError("tensorized_shape must have at least one group of modes, got none")
    return groups


def _own(tensor: Tensor) -> nn.Parameter:
    """Copy into a parameter that keeps the requires_grad flag of a parameter."""
    requires_grad = tensor.requires_grad if isinstance(tensor, nn.Parameter) else True
    return nn.Parameter(
        tensor.detach().clone(memory_format=torch.contiguous_format), requires_grad=requires_grad
    )


def _torch_backend() -> Any:
    """Tensorly's torch backend for one block, the user's own setting left as it is."""
    import tensorly

    return tensorly.backend_context("pytorch", local_threadsafe=True)
