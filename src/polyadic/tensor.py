"""CPTensor: a tensorized tensor in CP format that owns its factors; CPSlice: one layer of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyadic import checks
from polyadic._torch import whole
from polyadic.formats import is_int, positive_int, split_modes, tensorized_groups
from polyadic.init import Factors, cp_orthonormal_
from polyadic.interop.exchange import Exchanged, owned
from polyadic.kernels.multilinear import accumulate_dtype, khatri_rao

Parts = tuple[tuple[tuple[Tensor, ...], ...], Tensor | None]


def check_fits_memory(*sizes: int) -> None:
    """Refuse a tensor whose bytes no machine can count.

    Raises:
        ValueError: it is too large.
    """
    if math.prod(sizes) >= 2**58:
        raise ValueError(f"a tensor of {' × '.join(map(str, sizes))} entries is too large")


class CPTensor(Exchanged):
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
        weights: whether the tensor has weights λ (R,), initialised to ones.
        std: standard deviation of an entry of the tensor, as ``reset_parameters`` draws it;
            1/√(number of rows of the matrix) by default.
        device: of the factors.
        dtype: of the factors: floating point, complex64 or complex128.

    Attributes:
        factors: an ``nn.ParameterList`` of (mode, R) tensors, which has a ``reset_parameters``.
        weights: λ (R,) as a parameter, or None for ones.
        tensorized_shape: the groups, as tuples of plain ints; an int as a group of one mode.
        layer_modes: how many groups in front tell layers apart; 0 for the weight of one layer.
        rank: R.
        std: the standard deviation with which ``reset_parameters`` draws an entry of the tensor; a
            layer sets it to that of the torch layer it stands in for.

    Raises:
        TypeError: sizes or rank are not integers, dtype is neither floating point nor complex, or
            device is none.
        ValueError: sizes or rank are below 1, there is no group, an int stands behind a group, or
            torch knows no such device.
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
        std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._allocate(tensorized_shape, rank, weights, std, device, dtype)
        self.reset_parameters()

    def _allocate(
        self,
        tensorized_shape: Sequence[int | Sequence[int]],
        rank: int,
        weights: bool,
        std: float | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Make the parameters without values."""
        super().__init__()
        self.tensorized_shape, self.layer_modes = tensorized_groups(tensorized_shape)
        ends = [0, *itertools.accumulate(map(len, self.tensorized_shape))]
        self._pieces = [slice(start, end) for start, end in itertools.pairwise(ends)]
        self._names = tuple(map(str, range(ends[-1])))
        self.rank = positive_int(rank, "rank")
        dtype = torch.get_default_dtype() if dtype is None else checks.check_dtype(dtype)
        if device is not None:
            checks.check_device(device)
        check_fits_memory(max(map(max, self.tensorized_shape)), self.rank)
        self.factors = Factors(
            (
                nn.Parameter(torch.empty(mode, self.rank, device=device, dtype=dtype))
                for group in self.tensorized_shape
                for mode in group
            ),
            1 / math.sqrt(self.shape[self.layer_modes]) if std is None else std,
        )
        with_weights = checks.check_flag(weights, "weights")
        scale = torch.empty(self.rank, device=device, dtype=dtype) if with_weights else None
        self.register_parameter("weights", None if scale is None else nn.Parameter(scale))

    @classmethod
    def _without_values(
        cls,
        tensorized_shape: Sequence[int | Sequence[int]],
        rank: int,
        std: float | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> CPTensor:
        """Make a tensor without values for a layer, whose ``reset_parameters`` draws it."""
        made = cls.__new__(cls)
        made._allocate(tensorized_shape, rank, False, std, device, dtype)
        return made

    @property
    def std(self) -> float:
        """Standard deviation of an entry, as ``reset_parameters`` draws it."""
        rows = self.shape[self.layer_modes]
        return getattr(self.factors, "std", 1 / math.sqrt(rows))

    @std.setter
    def std(self, value: float) -> None:
        # torch's types let a module have tensors and modules alone for attributes.
        factors: Any = self.factors
        factors.std = value

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw the factors anew so that the entries of the tensor have standard deviation ``std``.

        Args:
            std: of an entry of the tensor, the attribute ``std`` by default.
        """
        cp_orthonormal_(list(self.factors), self.std if std is None else std)
        if self.weights is not None:
            nn.init.ones_(self.weights)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
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
        """Parameters that may be another module's too, for which transformers asks every module.

        Several layers can hold one tensor, or slices of it. transformers asks when it writes a
        state dict, so that what is shared is stored once; naming a parameter that is not shared
        does no harm. It is empty once the model as a whole names its ties
        (``polyadic.pretrained``).
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
        return self.parts()[0]

    def parts(self) -> Parts:
        """Return the factors, one tuple per group of ``tensorized_shape``, and λ or None.

        All that layers compute with comes from here. If a hook waits for a call of this module or
        of the list of factors, such as one that loads offloaded parameters, the module is called.
        """
        if self._forward_pre_hooks or self._forward_hooks:
            found: Parts = self()
            return found
        return self.forward()

    def forward(self) -> Parts:
        """Return what ``parts`` returns; a CP tensor is not a function of an input."""
        factors: Any = self._modules["factors"]
        if (
            type(factors) is Factors
            and len(factors._parameters) == len(self._names)
            and not factors._forward_pre_hooks
            and not factors._forward_hooks
            and "forward" not in factors.__dict__
        ):
            # This spares a call, and for each factor the getattr of a module, which is slow.
            stored: dict[str, Any] = factors._parameters
            every = tuple(map(stored.__getitem__, self._names))
        else:
            every = factors() if isinstance(factors, Factors) else tuple(factors)
        own = self._parameters
        # Not get(), which would look up the default each time.
        scale = own["weights"] if "weights" in own else self.weights  # noqa: SIM401
        return tuple(map(every.__getitem__, self._pieces)), scale

    def to_tensor(self) -> Tensor:
        """Build the full tensor, one dimension per mode; differentiable."""
        modes = [mode for group in self.tensorized_shape for mode in group]
        return self.to_matrix().view(modes)

    def to_matrix(self) -> Tensor:
        """Build the tensor with one dimension per group, such as (M, N) or (Cout, Cin, kh·kw).

        A layer mode is a dimension too.
        """
        left, right = self._sides()
        return left.sum(1) if right is None else (left @ right.t()).view(self.shape)

    def _to_transposed(self) -> Tensor:
        """Build the transpose (N, M) of the matrix of two groups, contiguous."""
        left, right = self._sides()
        assert right is not None
        return right @ left.t()

    def _sides(self) -> tuple[Tensor, Tensor | None]:
        """Return the Khatri-Rao products of the first group, times λ, and of all others."""
        groups, scale = self.parts()
        first, *rest = [tuple(map(whole, group)) for group in groups]
        left = khatri_rao(first)
        if scale is not None:
            left = left * whole(scale)
        return left, khatri_rao([f for group in rest for f in group]) if rest else None

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
            TypeError: factors are not tensors of one floating-point or complex dtype.
            ValueError: number, shapes, ranks or devices do not fit.
        """
        groups, _ = tensorized_groups(tensorized_shape)
        modes = tuple(mode for group in groups for mode in group)
        tensors = checks.check_factor_group(factors, "factors")
        sizes, (rank,) = checks.check_factors(weights, factors=tensors)
        if sizes != modes:
            raise ValueError(
                f"factors must have the modes {modes} of the tensorized shape, got {sizes}"
            )
        first = tensors[0]
        own = weights is not None
        cp = cls(tensorized_shape, rank, weights=own, device="meta", dtype=first.dtype)
        cp.factors = Factors((owned(factor) for factor in tensors), cp.std)
        if weights is not None:
            cp.weights = owned(weights)
        return cp

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

    It is a CP tensor of equal rank with the factors A of the joint tensor. Only its rows of the
    layer factors L are its own, and they enter as λ. It holds no other parameters than the joint
    tensor, which every slice registers, as tied weights are registered.

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
    def factors(self) -> tuple[Tensor, ...]:  # type: ignore[override]  # the joint tensor's
        """The factors all layers share."""
        return tuple(factor for group in self.factor_groups() for factor in group)

    @property
    def weights(self) -> Tensor:  # type: ignore[override]  # the joint tensor's
        """λ of this layer, formed in at least fp32 and rounded once."""
        scale = self.parts()[1]
        assert scale is not None
        return scale

    @property
    def std(self) -> float:
        """The standard deviation of the joint tensor."""
        return self.joint.std

    @std.setter
    def std(self, value: float) -> None:
        self.joint.std = value

    def forward(self) -> Parts:
        """Return the shared factors by group, and λ of this layer."""
        joint = self.joint
        groups, scale = joint.parts()
        rows = [factor[i] for (factor,), i in zip(groups, self.index, strict=False)]
        if scale is not None:
            rows.append(scale)
        first, *rest = rows
        if rest:
            wide = accumulate_dtype(first.dtype)
            first = math.prod([row.to(wide) for row in rest], start=first.to(wide)).to(first.dtype)
        return groups[joint.layer_modes :], first

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw the joint tensor anew, for all its layers.

        Args:
            std: of an entry of each layer's tensor, the attribute ``std`` by default.
        """
        self.joint.reset_parameters(std)

    def extra_repr(self) -> str:
        """Say which layer of which tensor."""
        index = self.index[0] if len(self.index) == 1 else self.index
        return f"layer {index} of {self.joint}"

    def __repr__(self) -> str:
        return f"CPSlice({self.extra_repr()})"


def _row(index: Any, size: int) -> int:
    if not is_int(index):
        raise TypeError(f"the index of a layer must be an int, got {index!r}")
    row = int(index.__index__())
    if not -size <= row < size:
        raise IndexError(
            f"there are {size} layers, so that the index must lie in [{-size}, {size}), got {row}"
        )
    return row % size
