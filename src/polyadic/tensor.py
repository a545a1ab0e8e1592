"""CPTensor: a tensorized tensor in CP format that owns its factors; CPSlice: one layer of it."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyadic import checks
from polyadic.formats import positive_int, split_modes, tensorized_groups
from polyadic.init import cp_orthonormal_
from polyadic.kernels.multilinear import accumulate_dtype, khatri_rao


class CPTensor(nn.Module):
    """A tensor in CP (canonical polyadic) format whose modes come in groups.

        T[i_1, …, i_K] = Σ_r λ_r · Π_k factors[k][i_k, r]

    A linear layer's weight has the groups (in, out), a convolution's (out, in, kernel); each
    group is one dimension of the matrix. Factors are in the order of the flattened groups.
    Method and notation: Kolda & Bader, SIAM Review 2009, §3.

    Several layers can share one such tensor. Their number is then a mode in front, written as an
    int: (3, (4, 4, 16), (4, 4, 8)) holds three weights, and ``layer`` is the way to one of them.

    Args:
        tensorized_shape: a group of mode sizes per dimension, such as ((4, 4, 16), (4, 4, 8)); ints
            in front of the groups are modes that tell layers apart.
        rank: R, the number of rank-one components.
        weights: own a λ (R,), initialised to ones.
        device: of the factors.
        dtype: of the factors, floating point.

    Attributes:
        factors: ``nn.ParameterList`` of (mode, R) tensors.
        weights: λ (R,) as a parameter, or None for ones.
        tensorized_shape: the groups, as tuples of plain ints; an int as a group of one mode.
        layer_modes: how many groups in front tell layers apart; 0 for the weight of one layer.
        rank: R.

    Raises:
        TypeError: sizes or rank are not integers, or dtype is not floating point.
        ValueError: sizes or rank are below 1, there is no group, or an int stands behind a group.
    """

    weights: Tensor | None
    ties_declared = False
    _version = 1  # of the names and shapes in a state dict

    def __init__(
        self,
        tensorized_shape: Sequence[int | Sequence[int]],
        rank: int,
        *,
        weights: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.tensorized_shape, self.layer_modes = tensorized_groups(tensorized_shape)
        ends = [0, *itertools.accumulate(map(len, self.tensorized_shape))]
        self._pieces = [slice(start, end) for start, end in itertools.pairwise(ends)]
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
        rows = self.shape[self.layer_modes]
        cp_orthonormal_(list(self.factors), 1 / math.sqrt(rows) if std is None else std)
        if self.weights is not None:
            nn.init.ones_(self.weights)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Refuse a state dict of a later version than this code writes."""
        version = local_metadata.get("version") or 1
        if version > self._version:
            error_msgs.append(
                f"{prefix.rstrip('.') or 'the CP tensor'} was saved in version {version} of the "
                f"format, and this polyadic reads up to {self._version}; install a newer one"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """What transformers asks every module for: parameters that may be another module's too.

        Several layers can hold one tensor, or slices of it. It is asked when a state dict is
        written, so that what is shared is stored once; the name of what is not shared does no
        harm. Empty once the model as a whole says under which name (``polyadic.pretrained``).
        """
        return {} if self.ties_declared else {name: name for name, _ in self.named_parameters()}

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
        # The dicts skip a slow getattr each; parametrized factors are not in them.
        factors = self._modules["factors"]
        stored = factors._parameters  # type: ignore[union-attr]
        complete = len(stored) == self._pieces[-1].stop
        every = tuple(stored.values()) if complete else tuple(self.factors)
        return tuple([every[piece] for piece in self._pieces])

    def to_tensor(self) -> Tensor:
        """Build the full tensor, one dimension per mode; differentiable."""
        modes = [mode for group in self.tensorized_shape for mode in group]
        return self.to_matrix().view(modes)

    def to_matrix(self) -> Tensor:
        """Build the tensor with one dimension per group, such as (M, N) or (Cout, Cin, kh·kw).

        A layer mode is a dimension too.
        """
        first, *rest = self.factor_groups()
        matrix = khatri_rao(first)
        if self.weights is not None:
            matrix = matrix * self.weights
        if not rest:
            return matrix.sum(1)
        other = khatri_rao([factor for group in rest for factor in group])
        return (matrix @ other.t()).view(self.shape)

    def layer(self, *index: int) -> CPSlice:
        """Return the weight of one of the layers that share this tensor.

        Args:
            index: which layer, an int per layer mode; counted from the end where negative.

        Raises:
            TypeError: an index is not an int.
            ValueError: there is another number of layer modes.
            IndexError: there are fewer layers.
        """
        return CPSlice(self, index)

    @classmethod
    def from_factors(
        cls,
        tensorized_shape: Sequence[int | Sequence[int]],
        factors: Sequence[Tensor],
        weights: Tensor | None = None,
    ) -> CPTensor:
        """Make a CPTensor with copies of the given factors as its parameters.

        Args:
            tensorized_shape: groups of mode sizes, ints in front for layers.
            factors: one (mode, R) tensor per mode, in order.
            weights: λ (R,) or None.

        Raises:
            TypeError: factors are not floating tensors of one dtype.
            ValueError: number, shapes, ranks or devices do not fit.
        """
        groups, _ = tensorized_groups(tensorized_shape)
        modes = tuple(mode for group in groups for mode in group)
        tensors = checks.factor_group(factors, "factors")
        sizes, (rank,) = checks.ranked(weights, factors=tensors)
        if sizes != modes:
            raise ValueError(
                f"factors must have the modes {modes} of the tensorized shape, got {sizes}"
            )
        first = tensors[0]
        own = weights is not None
        cp = cls(tensorized_shape, rank, weights=own, device="meta", dtype=first.dtype)
        cp.factors = nn.ParameterList(_own(factor) for factor in tensors)
        if weights is not None:
            cp.weights = _own(weights)
        return cp

    def to_tensorly(self) -> Any:
        """Copy to a ``tensorly.cp_tensor.CPTensor`` of torch tensors.

        Raises:
            ImportError: tensorly is not installed.
        """
        tensorly = _interop("tensorly")
        first = self.factors[0]
        weights = first.new_ones(self.rank) if self.weights is None else self.weights
        factors = [factor.detach().clone() for factor in self.factors]
        # for this call alone: the user's own setting is left as it is
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            return tensorly.cp_tensor.CPTensor((weights.detach().clone(), factors))

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
        factors = checks.factor_group(factors, "factors of the tensorly CP tensor")
        groups = tensorized_shape or [(factor.shape[0],) for factor in factors]
        return cls.from_factors(groups, factors, weights)

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
        factors = [_own(factor) for factor in self.factors]
        if not tensorized:
            shape = tuple(mode for group in self.tensorized_shape for mode in group)
            return tltorch.CPTensor(_own(weights), factors, shape, rank=self.rank)
        joint, single = split_modes(self.tensorized_shape, self.layer_modes)
        return tltorch.CPTensorized(_own(weights), factors, (*joint, *single), rank=self.rank)

    @classmethod
    def from_tltorch(
        cls, tensor: Any, tensorized_shape: Sequence[int | Sequence[int]] | None = None
    ) -> CPTensor:
        """Make a CPTensor with copies of a tltorch CP tensor's weights λ and factors.

        Args:
            tensor: a ``CPTensorized`` (of a linear layer or an embedding), whose ints are modes of
                layers that share it; or a ``CPTensor`` (of a convolution).
            tensorized_shape: groups of the same modes; a ``CPTensorized``'s own by default. It has
                to be given for a ``CPTensor``, such as (3, (6,), (4,), (3, 3)) for three layers.

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
        return cls.from_factors(groups, list(tensor.factors), tensor.weights)

    def extra_repr(self) -> str:
        """Shapes, rank and parameter counts."""
        own, dense = sum(p.numel() for p in self.parameters()), math.prod(self.shape)
        joint, single = split_modes(self.tensorized_shape, self.layer_modes)
        return (
            f"shape={tuple(self.shape)}, tensorized_shape={(*joint, *single)}, "
            f"rank={self.rank}, parameters={own} of {dense} ({dense / own:.1f}x fewer)"
        )

    def __repr__(self) -> str:
        return f"CPTensor({self.extra_repr()})"


class CPSlice(CPTensor):
    """The weight of one of the layers that share a CPTensor; made by ``CPTensor.layer``.

        T_l[i] = Σ_r (λ_r · Π_j L_j[l_j, r]) · Π_k A_k[i_k, r]

    A CP tensor of the same rank whose factors A are those of the joint tensor; what is its own are
    the rows of the layer factors L, which enter as λ. It holds no parameter but those of the joint
    tensor, which every slice of it registers, as tied weights are.

    Args:
        joint: the tensor with layer modes.
        index: which layer, an int per layer mode; counted from the end where negative.

    Attributes:
        joint: the ``CPTensor`` that owns the parameters.
        index: which layer, counted from the front.
        factors: the factors all layers share, (mode, R) each.
        weights: λ (R,), computed at each access; differentiable in the joint tensor's parameters.

    Raises:
        TypeError: an index is not an int, or ``joint`` not a CPTensor.
        ValueError: ``joint`` has another number of layer modes.
        IndexError: there are fewer layers.
    """

    joint: CPTensor

    def __init__(self, joint: CPTensor, index: Sequence[int]) -> None:
        nn.Module.__init__(self)
        if not isinstance(joint, CPTensor):
            raise TypeError(f"joint must be a CPTensor, got {type(joint).__name__}")
        layers, single = split_modes(joint.tensorized_shape, joint.layer_modes)
        if len(index) != len(layers):
            raise ValueError(
                f"a layer of a tensor with {len(layers)} layer modes is chosen by as many ints, "
                f"got {tuple(index)}; layer modes are ints in front of tensorized_shape, as in "
                f"(3, (4, 4), (2, 8))"
            )
        self.index = tuple(_row(i, size) for i, size in zip(index, layers, strict=True))
        self.tensorized_shape, self.layer_modes = single, 0
        self.rank = joint.rank
        self.joint = joint

    @property
    def factors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        """The factors all layers share."""
        return tuple(factor for group in self.factor_groups() for factor in group)

    @property
    def weights(self) -> Tensor:  # type: ignore[override]
        """λ of this layer, formed in at least fp32 and rounded once."""
        joint = self.joint
        groups = joint.factor_groups()[: joint.layer_modes]
        rows = [factor[i] for (factor,), i in zip(groups, self.index, strict=True)]
        if joint.weights is not None:
            rows.append(joint.weights)
        first, *rest = rows
        if not rest:
            return first
        wide = accumulate_dtype(first.dtype)
        return math.prod([row.to(wide) for row in rest], start=first.to(wide)).to(first.dtype)

    def factor_groups(self) -> tuple[tuple[Tensor, ...], ...]:
        """Return the shared factors, one tuple per group of ``tensorized_shape``."""
        return self.joint.factor_groups()[self.joint.layer_modes :]

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw the joint tensor anew, for all its layers.

        Args:
            std: of an entry of each layer's tensor, 1/√(number of rows of its matrix) by default.
        """
        self.joint.reset_parameters(std)

    def extra_repr(self) -> str:
        """Which layer of what."""
        index = self.index[0] if len(self.index) == 1 else self.index
        return f"layer {index} of {self.joint}"

    def __repr__(self) -> str:
        return f"CPSlice({self.extra_repr()})"


def _row(index: Any, size: int) -> int:
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        raise TypeError(f"the index of a layer must be an int, got {index!r}")
    row = int(index.__index__())
    if not -size <= row < size:
        raise IndexError(f"there are {size} layers, so that the index must lie in "
                         f"[{-size}, {size}), got {row}")  # fmt: skip
    return row % size


def _own(tensor: Tensor) -> nn.Parameter:
    """Copy into a parameter that keeps the requires_grad flag of a parameter."""
    requires_grad = tensor.requires_grad if isinstance(tensor, nn.Parameter) else True
    return nn.Parameter(
        tensor.detach().clone(memory_format=torch.contiguous_format), requires_grad=requires_grad
    )


def _interop(name: str) -> Any:
    """An optional package, or which extra brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'conversion to {name} needs it: pip install "polyadic[interop]" ({error})'
        ) from error
