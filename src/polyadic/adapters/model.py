"""The tuner: which modules of a model get an adapter, and how adapters are saved and loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
)
from torch import Tensor, nn

from polyadic.adapters.combine import combined
from polyadic.adapters.config import CPConfig
from polyadic.adapters.kinds import check_called, kind_of
from polyadic.adapters.layer import BASE, AdaptedLayer, Adapter, adapter_of_each_row
from polyadic.formats import positive_int
from polyadic.nn.wrapped import check_unwrapped
from polyadic.tensor import CPTensor

StateDict = dict[str, Tensor]


class CPModel(BaseTuner):
    """A model with CP adapters; PEFT makes it from a ``CPConfig``.

    Factors that layers share are held by these layers, and none by the tuner, so that direct
    injection, deletion, casts and moves to a device work as for adapters that share nothing. A
    saved adapter has them once, under the name of the first layer that holds them.
    """

    prefix: str = "polyadic_"
    tuner_layer_cls = AdaptedLayer
    target_module_mapping: ClassVar[Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Refuse a wrapped model, whose processes would each train adapters of their own."""
        check_unwrapped(model, "get_peft_model")

    def _create_and_replace(
        self,
        config: CPConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        base: nn.Module = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        kind = kind_of(base, current_key)
        check_called(parent, target, current_key)
        modes = kind.modes(base, config.order, *config.shapes_of(current_key))
        rank, alpha = config.rank_of(current_key), config.alpha_of(current_key)
        shared = None
        if config.share == "layers":
            shared = self._shared(kind, adapter_name, modes, rank)
        adapter = Adapter(adapter_name, config, modes, rank, alpha, shared)
        if isinstance(target, AdaptedLayer):
            target.update_layer(adapter)
            return
        layer = kind(target, adapter, get_quantization_kwargs(self))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _shared(
        self, kind: type[AdaptedLayer], name: str, modes: tuple[Any, ...], rank: int
    ) -> CPTensor | None:
        """The factors that the first layer of this kind and shape made for an adapter."""
        for _, layer in layers_with(self.model, name):
            cp = layer.cp(name)
            if type(layer) is kind and (cp.tensorized_shape, cp.rank) == (modes, rank):
                return cp
        return None

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Let each row of a batch have the adapter that ``adapter_names`` names for it."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        there = {n for m in self.modules() if isinstance(m, AdaptedLayer) for n in m.polyadic_cp}
        unknown = sorted(set(names) - {BASE} - there)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        encoder = _encoder(self.model)
        inside = set() if encoder is None else set(encoder.modules())
        taking = [
            m for m in self.modules() if isinstance(m, (AdaptedLayer, AuxiliaryTrainingWrapper))
        ]
        beams = kwargs.get("num_beams")
        # A beam search repeats each row for the decoder, and not for the encoder.
        repeated = [n for n in names for _ in range(beams if isinstance(beams, int) else 1)]
        with ExitStack() as hooks:
            hooks.enter_context(
                adapter_of_each_row([m for m in taking if m not in inside], repeated)
            )
            hooks.enter_context(adapter_of_each_row([m for m in taking if m in inside], names))
            yield

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
        rank: int | None = None,
    ) -> dict[str, float]:
        """Add the adapter Σ w_i ΔW_i: exactly, of the sum of ranks, or fitted to a rank.

        Args:
            adapters: names of adapters whose factors have the same modes.
            weights: w_i, one for each.
            adapter_name: of the new adapter; it is frozen and not active.
            combination_type: ``"cat"`` is exact: the components of the sum are those of all.
                ``"fit"`` forms the sum in each layer, and fits factors of that layer's own to it
                by ``polyadic.decompose``. Other ways of PEFT's LoRA average factors, or prune and
                round ΔW, which has no exact CP format.
            rank: for ``"fit"``.

        Returns:
            ‖ΔW − ΔŴ‖ / ‖ΔW‖ of each layer by its name, 0 for ``"cat"``.

        Raises:
            TypeError: ``rank`` is no integer.
            ValueError: an adapter is unknown or the new one known, the number of weights differs,
                modes differ, a module is saved by several of them, ``combination_type`` is another
                one, or ``rank`` does not go with it.
        """
        if combination_type not in ("cat", "fit"):
            raise ValueError(
                f"combination_type must be 'cat', which is exact for CP adapters, or 'fit', got "
                f"{combination_type!r}"
            )
        if (rank is None) == (combination_type == "fit"):
            raise ValueError(
                f"combination_type 'fit' needs a rank, and 'cat' has the sum of ranks; got "
                f"{combination_type!r} with rank={rank!r}"
            )
        rank = None if rank is None else positive_int(rank, "rank")
        config, values, errors = combined(self, adapters, weights, adapter_name, rank)
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        self.set_requires_grad(adapter_name, False)
        for name, layer in layers_with(self.model, adapter_name):
            factors, rows = values[name]
            cp = layer.cp(adapter_name)
            for own, value in zip(cp.factors, factors, strict=True):
                own.data = value.to(own)
            if rows is not None:
                layer.polyadic_rows[adapter_name].data = rows.to(cp.factors[0])
        return errors

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # ….polyadic_cp.NAME.factors.0 in the model is ….polyadic_cp.factors.0 in a file.
        factors = rf"((?:^|\.)polyadic_cp)\.{re.escape(adapter_name)}\."
        shorter, found = re.subn(factors, r"\1.", key)
        return shorter if found else str(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: CPConfig,
        adapter_name: str,
        state_dict: StateDict,
        unwanted_adapter_names: list[str],
    ) -> StateDict:
        found: StateDict = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        copies = tuple(copy for copy, _ in _copies(model, adapter_name))
        return {key: value for key, value in found.items() if not key.startswith(copies)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: CPConfig, adapter_name: str, state_dict: StateDict
    ) -> StateDict:
        found: StateDict = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        for copy, first in _copies(model, adapter_name):
            for key in [key for key in found if key.startswith(first)]:
                found.setdefault(copy + key.removeprefix(first), found[key])
        return found


def layers_with(model: nn.Module, adapter: str) -> list[tuple[str, AdaptedLayer]]:
    """The layers of a model that have an adapter of this name, by their names."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLayer) and adapter in module.polyadic_cp
    ]


def _copies(model: nn.Module, adapter: str) -> list[tuple[str, str]]:
    """Prefixes of keys of factors that another layer has too, with those of the first such layer.

    FSDP's wrapper around the whole model is in the names of modules and not in those of keys.
    """
    first: dict[int, str] = {}
    found = []
    for name, layer in layers_with(model, adapter):
        key = f"{name.removeprefix('_fsdp_wrapped_module.')}.polyadic_cp.{adapter}."
        earlier = first.setdefault(id(layer.polyadic_cp[adapter]), key)
        if earlier != key:
            found.append((key, earlier))
    return found


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of a model with encoder and decoder."""
    ask = getattr(model, "get_encoder", None)
    if ask is None or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    found: Any = ask()
    return found if isinstance(found, nn.Module) else None
