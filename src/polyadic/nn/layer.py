"""What CP layers share: a CP weight, a bias, and the initialisation of the torch layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, cast

import torch
from torch import Tensor, nn

from polyadic.checks import check_device, check_dtype
from polyadic.formats import (
    ConvFormat,
    EmbeddingFormat,
    JointFormat,
    LinearFormat,
    Rank,
    Shape,
    SpectralFormat,
    positive_int,
    resolve_rank,
)
from polyadic.init import torch_bias_, torch_std
from polyadic.nn.frozen import Frozen
from polyadic.nn.ranks import warn_above_break_even
from polyadic.nn.weight import Weighted
from polyadic.planner.request import Request, request
from polyadic.planner.search import WORD_ROWS, rank_of_word
from polyadic.plans import Memory
from polyadic.tensor import CPTensor, check_fits_memory

# The arguments of a layer's constructor.
Arguments = ParamSpec("Arguments")
# Layers that one call makes; a longer sequence of arguments may be given.
MOST_LAYERS = 4096


class CPLayer(Weighted):
    """What CP layers share: a CP weight, a bias, and the initialisation of the torch layer."""

    bias: nn.Parameter | None
    memory: Memory
    frozen: Frozen | None
    _in_group, _out_group = 0, 1
    # Groups of the tensorized shape over which the input of the layer has its second moment.
    _metric_groups: tuple[int, ...] = (0,)
    _torch_class: type[nn.Module]
    # Arguments of the constructor that are attributes, here and in torch's layer.
    _shared_arguments: tuple[str, ...]

    def _create(
        self,
        tensorized_shape: Sequence[Shape],
        rank: Rank,
        bias: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Create the parameters and fill them; ``bias`` is its length, or None."""
        self.frozen = None
        if dtype is not None:
            check_dtype(dtype)
        # Made without values: reset_parameters draws them, once.
        resolved = self._resolved(rank, device, dtype)
        self.cp = CPTensor._without_values(tensorized_shape, resolved, None, device, dtype)
        if bias is not None:
            check_fits_memory(bias)
        values = None if bias is None else torch.empty(bias, device=device, dtype=dtype)
        self.register_parameter("bias", None if values is None else nn.Parameter(values))
        self.reset_parameters()

    def _resolved(
        self,
        rank: Rank,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        joint: Sequence[Any] = (),
    ) -> int:
        """Return the rank as an integer; with ``joint``, the rank of all these layers together.

        Words are resolved for this layer's options, dtype and device. FLOPs and time are those of
        one layer, whether or not it shares its weight.
        """
        unit = self._format_of_rank_1()
        if isinstance(rank, str) and rank in ("break-even", "faster"):
            return rank_of_word(rank, self._request_of_words(device, dtype))
        resolved = resolve_rank(rank, JointFormat(unit, len(joint)) if joint else unit)
        on_meta = device is not None and check_device(device) == "meta"
        if not on_meta and not isinstance(unit, EmbeddingFormat):
            # A lookup in a dense table has no FLOPs that a rank could save.
            asked = self._request_of_words(device, dtype)
            fmt = dataclasses.replace(unit, rank=resolved)
            warn_above_break_even(type(self), dataclasses.replace(asked, format=fmt))
        return resolved

    def _request_of_words(
        self, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> Request:
        """Return the request, at rank 1 and of a usual batch, for which words are resolved."""
        where = check_device(torch.get_default_device() if device is None else device)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        batch, size = self._usual_call()
        where = "cpu" if where == "meta" else where
        made = request(self._format_of_rank_1(), batch, dtype, where, memory=self.memory)
        return self._request_of_size(made, size)

    def _usual_call(self) -> tuple[int, Shape | None]:
        """Return the batch and the spatial size for which words are resolved."""
        return WORD_ROWS, None

    def __setattr__(self, name: str, value: Any) -> None:
        """Tell a CP tensor that becomes the weight how this layer draws it.

        Whoever calls ``reset_parameters`` of every module, in whatever order, ends with weights
        of the layer's distribution.
        """
        super().__setattr__(name, value)
        if name == "cp" and isinstance(value, CPTensor):
            value.std = self._std()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Tell the CP tensor again, as complex weights are drawn otherwise than real ones."""
        moved = super()._apply(fn, recurse)
        self.cp.std = self._std()
        return moved

    def _format_of_rank_1(self) -> LinearFormat | ConvFormat | SpectralFormat:
        """Return the layer's format at rank 1."""
        raise NotImplementedError

    def request(self, batch: int, size: int | Sequence[int] | None = None) -> Request:
        """Return what a call of this layer asks of the planner: sizes, batch, dtype and device.

        Args:
            batch: rows, images or indices.
            size: spatial size of a convolution's input, int or one per dimension.

        Raises:
            ValueError: the layer is frozen and follows no plan, or ``size`` is missing, does not
                fit or is given to a layer that has none.
        """
        if self.frozen is not None:
            raise ValueError(
                "the layer is frozen and follows no plan; call polyadic.unfreeze first"
            )
        first = self.cp.factors[0]
        made = request(self.format, batch, first.dtype, first.device.type, memory=self.memory)
        made = dataclasses.replace(made, weights=self.cp.weights is not None)
        return self._request_of_size(made, size)

    def _request_of_size(self, request: Request, size: Any) -> Request:
        if size is not None:
            raise ValueError(
                f"size is that of a convolution's input; a {type(self).__name__} has none, got "
                f"{size!r}"
            )
        return request

    def _fan_in(self) -> int:
        raise NotImplementedError

    def _std(self) -> float:
        """Return the standard deviation of an initial weight."""
        return torch_std(self._fan_in(), self.cp.factors[0].dtype)

    def _fit_target(self, weight: Tensor) -> Tensor:
        """Return what the CP tensor is fitted to, for a weight of the torch layer."""
        return weight

    def _fit_metric(self, metric: Tensor | None) -> Tensor | None:
        """Return the metric of the fit, for that of the torch layer's input, if there is one."""
        return metric

    @property
    def format(self) -> LinearFormat | ConvFormat | SpectralFormat:
        """Modes and rank of the layer."""
        return dataclasses.replace(self._format_of_rank_1(), rank=self.rank)

    @classmethod
    def joint(
        cls: Callable[Arguments, CPLayer],
        layers: int | Sequence[Mapping[str, Any]],
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> nn.ModuleList:
        """Make layers that share one CP tensor, with a mode in front that tells them apart.

        W_l = Σ_r L[l, r] · ⊗_k A_k[:, r]: the factors A are shared, and row l of L scales the
        components of layer l, so that each layer costs what it would alone. Each has a bias and
        options of its own and may be put anywhere in a model; the parameters exist once, gradients
        add up, and a state dict names them in each layer, as it does tied weights.

        Args:
            layers: how many, at most 4096; or for each of them a mapping of arguments that differ,
                such as ``[{}, {"stride": 2}]``.
            args: arguments of one layer, as the class takes them.
            options: keyword arguments of one layer. A rank given as a float is the fraction of the
                parameters of all dense layers together.

        Returns:
            A list of layers; ``layer.cp.joint`` of each is the tensor they share.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: there are no layers, their shapes, dtypes or devices differ, or an argument
                does not fit.
        """
        each = _differences(layers)
        kind, given = cast("type[CPLayer]", cls), cast("dict[str, Any]", options)
        first = kind(*args, **{**given, **each[0], "device": "meta"})
        rank = first._resolved(given["rank"], given.get("device"), given.get("dtype"), each)
        made = [kind(*args, **{**given, **own, "rank": rank}) for own in each]
        kinds = dict.fromkeys(layer._kind() for layer in made)
        if len(kinds) > 1:
            raise ValueError(
                f"layers of a joint weight must have one tensorized shape, dtype and device, got "
                f"{' and '.join(map(str, kinds))}"
            )
        ((shape, dtype, device),) = kinds
        joint = CPTensor._without_values((len(made), *shape), rank, None, device, dtype)
        for i, layer in enumerate(made):
            layer.cp = joint.layer(i)
        made[0].reset_parameters()
        return nn.ModuleList(made)

    def _kind(self) -> tuple[tuple[Shape, ...], torch.dtype, torch.device]:
        factor = self.cp.factors[0]
        return self.cp.tensorized_shape, factor.dtype, factor.device

    def reset_parameters(self) -> None:
        """Draw factors and bias anew with the output variance of the torch layer replaced.

        For inputs of independent entries with mean square q, Var(y) = fan_in · Var(W) · q + Var(b).
        torch draws W from U(−1/√fan_in, 1/√fan_in), so Var(W) = 1/(3 fan_in); the factors are drawn
        such that the entries of their CP tensor have that very variance
        (``polyadic.init.cp_orthonormal_``), and the bias as torch draws it.
        """
        self.cp.reset_parameters(self._std())
        if self.bias is not None:
            torch_bias_(self.bias, self._fan_in())

    @property
    def in_factors(self) -> tuple[Tensor, ...]:
        """Tensors (m_d, R) of the in modes."""
        return self.cp.factor_groups()[self._in_group]

    @property
    def out_factors(self) -> tuple[Tensor, ...]:
        """Tensors (n_d, R) of the out modes."""
        return self.cp.factor_groups()[self._out_group]

    @property
    def rank(self) -> int:
        """R, the number of rank-one components."""
        return self.cp.rank

    def _ratio(self) -> str:
        own = sum(f.numel() for f in self.cp.factors)
        dense = self._format_of_rank_1().dense_parameters
        return f"rank={self.rank}, parameters={own} of {dense} ({dense / own:.1f}x fewer)"


def _differences(layers: Any) -> list[Mapping[str, Any]]:
    """Return for each of some layers the arguments in which it differs from the others."""
    if isinstance(layers, Sequence) and not isinstance(layers, (str, bytes)):
        for i, own in enumerate(layers):
            if not isinstance(own, Mapping):
                raise TypeError(f"layers[{i}] must be a mapping of arguments, got {own!r}")
            if "rank" in own:
                raise ValueError(f"layers[{i}] must not have a rank of its own: all share one")
        if not layers:
            raise ValueError("layers must be at least one, got an empty sequence")
        return list(layers)
    return [{}] * positive_int(layers, "layers", MOST_LAYERS)
