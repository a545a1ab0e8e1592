"""What every adapted layer does: hold adapters, add what they change, merge it into the weight.

A layer's weight W gets ΔW = s Σ_r λ_r ⊗_d A_d[:, r] ⊗_e C_e[:, r] with s = α/R. Factors stand in a
``CPTensor`` whose groups are (in, out), of a convolution (out, in, kernel), of an embedding (rows,
columns). Layers that share factors hold the same ``CPTensor``, and λ of their own.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from polyadic.adapters.config import CPConfig
from polyadic.formats import Shape
from polyadic.init import cp_orthonormal_
from polyadic.kernels.multilinear import khatri_rao
from polyadic.nn.inputs import by_rows
from polyadic.nn.weight import Weighted
from polyadic.tensor import CPTensor

Groups = tuple[tuple[Tensor, ...], ...]
BASE = "__base__"


@dataclass(frozen=True)
class Adapter:
    """What a layer is given to make an adapter of.

    Args:
        name: of the adapter.
        config: of the adapter.
        modes: the groups of modes of ΔW.
        rank: R.
        alpha: α.
        shared: the factors of a layer before it to share; None for factors of its own.
    """

    name: str
    config: CPConfig
    modes: tuple[Shape, ...]
    rank: int
    alpha: float
    shared: CPTensor | None = None


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """A layer of a model with CP adapters, by kind in ``polyadic.adapters.kinds``.

    Args:
        base_layer: the layer, or another layer of PEFT's around it.
        adapter: the first adapter.
        quantization: what PEFT's backends of quantized layers need to know of the model.

    Attributes:
        polyadic_cp: the ``CPTensor`` of each adapter.
        polyadic_rows: λ (R,) of each adapter that shares factors.
        polyadic_dropout: of each adapter.
        scaling: s of each adapter.
    """

    adapter_layer_names: tuple[str, ...] = ("polyadic_cp", "polyadic_rows")
    other_param_names: tuple[str, ...] = ("polyadic_dropout", "r", "alpha", "scaling")
    # Which groups of ΔW's modes are the in side, the out side.
    in_groups: ClassVar[tuple[int, ...]] = (0,)
    out_group: ClassVar[int] = 1
    # torch.jit.script is refused by name.
    __prepare_scriptable__ = Weighted.__prepare_scriptable__
    # What PEFT's class has, of which a type checker knows nothing.
    get_base_layer: Any
    get_base_weight: Any
    set_base_weight: Any
    active_adapters: Any
    disable_adapters: Any
    merged: Any
    set_adapter: Any
    _cast_input_dtype: Any
    _get_embed_scale: Any
    _move_adapter_to_device_of_base_layer: Any

    def __init__(
        self, base_layer: nn.Module, adapter: Adapter, quantization: dict[str, Any]
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), **quantization
        )
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.polyadic_dropout = nn.ModuleDict()
        self.polyadic_cp = nn.ModuleDict()
        self.polyadic_rows = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self._active_adapter = adapter.name
        self.update_layer(adapter)

    @property
    def in_features(self) -> int:
        """Of the base layer; a convolution's channels, a table's rows."""
        return self.features()[0]

    @property
    def out_features(self) -> int:
        """Of the base layer; a convolution's channels, a table's columns."""
        return self.features()[1]

    def features(self) -> tuple[int, int]:
        """In and out features of the base layer."""
        raise NotImplementedError

    @classmethod
    def modes(cls, base: Any, order: int, ins: Shape | None, outs: Shape | None) -> Any:
        """The groups of modes of ΔW for a base layer.

        Args:
            base: the layer to adapt.
            order: modes a side.
            ins: modes of the in features, None for what ``order`` gives.
            outs: modes of the out features.

        Raises:
            ValueError: given modes do not fit the layer.
        """
        raise NotImplementedError

    def delta(self, x: Tensor, groups: Groups, weights: Tensor | None) -> Tensor:
        """What an adapter adds to the output for the input x, but for its scaling."""
        raise NotImplementedError

    def dense(self, groups: Groups, weights: Tensor | None) -> Tensor:
        """ΔW in the shape of the base layer's weight, in float32 at least."""
        raise NotImplementedError

    def lora(self, adapter: str, name: str) -> dict[str, Tensor]:
        """The two matrices of the LoRA that is this adapter, by their keys below the layer.

        Args:
            adapter: its name.
            name: of the layer, for a message.

        Raises:
            ValueError: PEFT's LoRA of such a layer would do something else.
        """
        raise NotImplementedError

    def fan_in(self) -> int:
        """How many products an entry of the output sums up."""
        return self.in_features

    def update_layer(self, adapter: Adapter) -> None:
        """Add an adapter, or make it anew."""
        name = adapter.name
        if name == "factors" or name.isdigit():
            raise ValueError(
                f"an adapter must not be called {name!r}: names of factors in state dicts end so; "
                f"choose another name"
            )
        self.r[name], self.alpha[name] = adapter.rank, adapter.alpha
        self.set_scale(name, 1.0)
        dropout = adapter.config.dropout
        self.polyadic_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()
        if adapter.shared is not None:
            self.polyadic_cp[name] = adapter.shared
        else:
            cp = CPTensor._without_values(adapter.modes, adapter.rank, None, None, None)
            self.fill(cp, adapter.config.init_weights)
            self.polyadic_cp[name] = cp
        if adapter.config.share == "layers":
            # Rows of ones would tie all layers to one direction at the start.
            signs = torch.randint(0, 2, (adapter.rank,)).mul_(2).sub_(1)
            self.polyadic_rows[name] = nn.Parameter(signs.to(torch.get_default_dtype()))
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=adapter.config.inference_mode)

    def fill(self, cp: CPTensor, zero: bool) -> None:
        """Draw factors so that the in side has the size of LoRA's A, and ΔW = 0 where asked for.

        The mean square of the in side's Khatri-Rao product is 1/(3 fan_in), that of
        ``kaiming_uniform_`` with a = √5, so that A x has a third of the mean square of x. Each out
        factor has mean square 1, but for the largest, which is zero: with one zero factor that
        factor has a gradient at the first step, with two none would have.

        Without a zero, the out side's product has the mean square 1/(3 R) of a LoRA's B that is
        drawn as its A is.
        """
        groups = [cp.factors[piece] for piece in cp._pieces]
        ins = [factor for g in self.in_groups for factor in groups[g]]
        outs = list(groups[self.out_group])
        cp_orthonormal_(ins, math.sqrt(cp.rank / (3 * self.fan_in())))
        cp_orthonormal_(outs, math.sqrt(cp.rank if zero else 1 / 3))
        if zero:
            nn.init.zeros_(max(outs, key=len))

    def cp(self, name: str) -> CPTensor:
        """The factors of an adapter, which other layers may have too."""
        found: Any = self.polyadic_cp[name]
        cp: CPTensor = found
        return cp

    def parts(self, name: str) -> tuple[Groups, Tensor | None]:
        """The factors of an adapter by group, and λ or None; its scaling is in none of them."""
        groups, _ = self.cp(name).parts()
        rows = self.polyadic_rows.get(name)
        return groups, rows

    def scaled_parts(self, name: str) -> tuple[Groups, Tensor | None]:
        """The same with the scaling in the first out factor."""
        groups, rows = self.parts(name)
        at = self.out_group
        first, *rest = groups[at]
        return (*groups[:at], (first * self.scaling[name], *rest), *groups[at + 1 :]), rows

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus what the active adapters add to it.

        Args:
            x: input of the base layer.
            args: further arguments of the base layer.
            kwargs: likewise; ``adapter_names`` names the adapter of each row of x.
        """
        names = kwargs.pop("adapter_names", None)
        if names is not None:
            self._check_names(x, names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if names is not None:
            return self._mixed(x, result, names)
        for name in self.active_adapters:
            if name in self.polyadic_cp:
                # A scaled factor would be one more tensor to keep for the backward.
                result = torch.add(result, self._added(name, x), alpha=self.scaling[name])
        return result.to(dtype)

    def _added(self, name: str, x: Tensor) -> Tensor:
        if x.is_nested:
            return by_rows(functools.partial(self._added, name), x)
        groups, weights = self.parts(name)
        first = groups[0][0]
        if first.device != x.device:
            # Shared factors live on the device of one of the layers.
            groups = tuple(tuple(factor.to(x.device) for factor in group) for group in groups)
            weights = None if weights is None else weights.to(x.device)
        if x.is_floating_point():
            x = self.polyadic_dropout[name](self._cast_input_dtype(x, first.dtype))
        return self.delta(x, groups, weights)

    def _mixed(self, x: Tensor, result: Tensor, names: Sequence[str]) -> Tensor:
        for name in dict.fromkeys(names):
            if name == BASE or name not in self.polyadic_cp:
                continue
            rows = torch.tensor([i for i, n in enumerate(names) if n == name], device=x.device)
            added = self._added(name, x.index_select(0, rows)).to(result.dtype)
            result = result.index_add(0, rows, added, alpha=self.scaling[name])
        return result

    def _check_names(self, x: Tensor, names: Sequence[str]) -> None:
        if len(x) != len(names):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, one name "
                f"for each row, but got {len(names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Form ΔW of an adapter, in the shape and order of the base layer's weight.

        Args:
            adapter: its name.

        Returns:
            ΔW in the factors' dtype, in float32 for half precisions.
        """
        groups, weights = self.scaled_parts(adapter)
        wide = torch.promote_types(groups[0][0].dtype, torch.float32)
        groups = tuple(tuple(factor.to(wide) for factor in group) for group in groups)
        return self.dense(groups, None if weights is None else weights.to(wide))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of adapters to the base weight, rounded once.

        Args:
            safe_merge: refuse a weight that would not be finite, and leave it as it is.
            adapter_names: which adapters; the active ones by default.

        Raises:
            ValueError: with ``safe_merge``, a merged weight would not be finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.polyadic_cp:
                continue
            merged = self._shifted(name, 1)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the merged adapters out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.polyadic_cp:
                self.set_base_weight(self._shifted(name, -1))

    def _shifted(self, name: str, sign: int) -> Tensor:
        if self.quantization_backend is not None:
            # As it first evaluates four-bit weights on a processor with AVX512-BF16, bitsandbytes
            # reorders them, of which PEFT's dequantization does not know; a state dict undoes it.
            self.get_base_layer().state_dict()
        weight = self.get_base_weight()
        delta = self.get_delta_weight(name).to(weight.device)
        shifted: Tensor = (weight.to(delta.dtype) + sign * delta).to(weight.dtype)
        return shifted

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale what an adapter adds by ``scale`` times α/R.

        Args:
            adapter: its name; where the layer has none of this name, nothing happens.
            scale: 1 for the scaling of the configuration.
        """
        if adapter in self.r:
            self.scaling[adapter] = scale * self.alpha[adapter] / self.r[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters by ``scale``."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by ``scale``; None for the configuration's."""
        for name in self.active_adapters:
            if name in self.scaling:
                if scale is None:
                    self.set_scale(name, 1.0)
                else:
                    self.scaling[name] /= scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """An adapter is a ΔW that is added, so that PEFT can approximate it by a LoRA too."""
        return True

    def extra_repr(self) -> str:
        """Name the backend of a quantized base layer."""
        return str(quantization_extra_repr(self))

    def __repr__(self) -> str:
        return f"polyadic.{super().__repr__()}"


def columns(factors: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    """The Khatri-Rao product (Π m, R) of factors, times λ."""
    product = khatri_rao(factors)
    return product if weights is None else product * weights


def matrix(left: Sequence[Tensor], right: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    """The matrix whose sides have these factors, and λ: (Π left, Π right)."""
    return khatri_rao(left) @ columns(right, weights).t()


@contextmanager
def adapter_of_each_row(layers: Sequence[nn.Module], names: Sequence[str]) -> Iterator[None]:
    """Hand the names of the rows' adapters to layers for the calls within a ``with`` block."""

    def hand_over(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": names}

    hook: Callable[..., Any] = hand_over
    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
