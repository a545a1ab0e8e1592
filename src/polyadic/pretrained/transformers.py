"""CP layers in models of transformers: what its ``from_pretrained`` and ``save_pretrained`` need.

transformers restores a model from ``config.json`` and a file of tensors. Between building the
model, on the meta device, and reading the tensors it hands it to the quantizer that
``quantization_config`` names; ours puts the CP layers in their places there. transformers is
imported with this module, which is therefore imported where it is needed and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from polyadic.nn.kinds import is_torch_layer
from polyadic.pretrained.config import ModelConfig
from polyadic.pretrained.dense import merge_layers
from polyadic.pretrained.exchange import prepare, refuse
from polyadic.pretrained.files import METHOD, held_by_tensors
from polyadic.pretrained.layers import (
    DTYPES,
    LayerConfig,
    build,
    describe,
    head_of,
    of_another_size,
)
from polyadic.tensor import CPTensor

# The name of a fusion of layers that a configuration asks for. transformers raises an error that
# quotes a name it does not know. Our quantizer, once it is registered, removes it before that.
UNREGISTERED = (
    f"{METHOD}, because this model has CP layers; call polyadic.register_transformers() before "
    f"from_pretrained"
)


class PolyadicConfig(QuantizationConfigMixin):
    """The entry ``quantization_config`` of ``config.json``.

    Args:
        content: a ``ModelConfig`` as plain data.

    Raises:
        ValueError: it is not one.
    """

    def __init__(self, **content: Any) -> None:
        self.quant_method = METHOD
        try:
            self.content = ModelConfig.from_dict(content)
        except ValueError as error:
            raise ValueError(f"quantization_config of polyadic: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {"quant_method": METHOD, **self.content.to_dict()}


class PolyadicQuantizer(HfQuantizer):
    """Puts CP layers into a model before its tensors are read."""

    requires_calibration = True
    # Names of layers that the model has in another size than was saved, while it is loaded.
    resized: Sequence[str] = ()
    # Of all tensors of the model, before they are loaded.
    shapes: Mapping[str, torch.Size]

    def update_attn_implementation(self, config: Any) -> Any:
        """Called with the configuration before its fusions are looked for."""
        _ask_for_no_fusion(config)
        return super().update_attn_implementation(config)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        content: ModelConfig = self.quantization_config.content
        held = held_by_tensors(checkpoint_files or ())
        if held is not None and content.saved not in (None, held.saved):
            # The configuration is of a save that was killed before its tensors were there.
            content = held
        # The dtype asked for, or that of the file.
        wanted = model.config.dtype
        layers = {
            name: _cast(layer, content.dtype, wanted)
            for name, layer in _in_names_of(model, content.layers).items()
        }
        layers |= _tied_to_tables(model, layers)
        self.resized = _of_another_size(model, layers)
        # Sizes that do not fit each other are a damaged file, not another model.
        build({name: layers[name] for name in self.resized if layers[name].tied_to is None}, {})
        prepare(model, {n: layer for n, layer in layers.items() if n not in self.resized}).apply()
        for name in self.resized:
            _stand_in(model.get_submodule(name), layers[name])
        _declare_ties(model)
        self.shapes = {name: value.shape for name, value in model.state_dict().items()}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        # From 5.23 on transformers compares the shapes itself, and knows ignore_mismatched_sizes.
        refuse(
            f"transformers {transformers.__version__} would load tensors of other shapes than the "
            "model's; load the model with the sizes it was saved with, or install transformers "
            "5.23 or later, which takes ignore_mismatched_sizes for such a model",
            (
                f"{name} has {tuple(value.shape)}, the model {tuple(self.shapes[name])}"
                for name, value in model.state_dict().items()
                if value.shape != self.shapes.get(name, value.shape)
            ),
        )
        for name in self.resized:
            del model.get_submodule(name).cp
        layers = {name: model.get_submodule(name) for name in describe(model)}
        missing = [
            f"{name}.cp.{key}"
            for name, layer in layers.items()
            for key, parameter in layer.cp.named_parameters()
            if not (_came_from_file(parameter) or _offloaded(layer.cp, key))
        ]
        refuse("tensors of CP layers are missing or have another shape", missing)
        for layer in layers.values():
            # It is a new head. transformers sets biases of new layers to zero.
            if layer.bias is not None and not _came_from_file(layer.bias):
                nn.init.zeros_(layer.bias)
        _attach(model)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Whether ``save_pretrained`` of transformers may save the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """CP layers are trained as other layers are."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """CP layers are trained without adapters too."""
        return True

    @property
    def is_compileable(self) -> bool:
        """CP layers compile."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> Any:
        merge_layers(model)
        _ask_for_no_fusion(model.config)
        _restore_ties(model)
        return model.to(dtype)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Called first when a model is saved: write down the layers as they are now."""
        _declare_ties(model)
        _attach(model)
        return None, {}


def register() -> None:
    """Make transformers know the quantizer; a second time does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(PolyadicConfig)
        register_quantizer(METHOD)(PolyadicQuantizer)


def attach(model: nn.Module) -> None:
    """Make the ``save_pretrained`` of every transformers model in a model save its CP layers."""
    for part in _outermost(model):
        if describe(part):
            register()
            _declare_ties(part)
            _attach(part)


def detach(model: nn.Module) -> None:
    """Undo ``attach`` in models where no CP layer is left."""
    for part in _outermost(model):
        ours = isinstance(getattr(part, "hf_quantizer", None), PolyadicQuantizer)
        if ours and not describe(part):
            part.hf_quantizer.remove_quantization_config(part)
            _ask_for_no_fusion(part.config)
            _restore_ties(part)


def _attach(model: PreTrainedModel) -> None:
    content = ModelConfig(describe(model), dtype=_name(model.dtype))
    config = PolyadicConfig(**content.to_dict())
    model.config.quantization_config = config
    asked = getattr(model.config, "fusion_config", None) or {}
    model.config.fusion_config = {**asked, UNREGISTERED: True}
    model.hf_quantizer = PolyadicQuantizer(config, pre_quantized=True)
    # Nothing is quantized: half(), float() and training are as for any model.
    model.is_quantized = False


def _ask_for_no_fusion(config: Any) -> None:
    """Take our name out of the fusions that a configuration asks for."""
    asked = getattr(config, "fusion_config", None) or {}
    others = {name: value for name, value in asked.items() if not name.startswith(METHOD)}
    if others:
        config.fusion_config = others
    elif asked:
        del config.fusion_config


def _outermost(model: nn.Module) -> list[PreTrainedModel]:
    """Return the transformers models in a model that are not parts of another one."""
    if isinstance(model, PreTrainedModel):
        return [model]
    return [part for child in model.children() for part in _outermost(child)]


def _restore_ties(model: PreTrainedModel) -> None:
    """Tell transformers of a dense model's ties again, as its class has them."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in parts:
        vars(part).pop("_tied_weights_keys", None)
    for part in parts:
        part.all_tied_weights_keys = part.get_expanded_tied_weights_keys(all_submodels=True)


def _came_from_file(parameter: torch.Tensor) -> bool:
    """Whether transformers has marked a parameter as read; others hold arbitrary values."""
    return bool(getattr(parameter, "_is_hf_initialized", False))


def _offloaded(module: nn.Module, key: str) -> bool:
    """Whether hooks of accelerate bring a parameter's values for each call, from memory or disk.

    They put a parameter without values, and without transformers' mark, in the place of each.
    """
    path, _, name = key.rpartition(".")
    owner = module.get_submodule(path)
    hook = getattr(owner, "_hf_hook", None)
    maps = [getattr(one, "weights_map", None) for one in getattr(hook, "hooks", [hook])]
    without = owner.get_parameter(name).is_meta
    return without and any(name in values for values in maps if values is not None)


def _name(dtype: torch.dtype) -> str | None:
    return next((name for name, one in DTYPES.items() if one == dtype), None)


def _cast(layer: LayerConfig, saved: str | None, wanted: Any) -> LayerConfig:
    """Give a layer of the model's dtype the dtype that is asked for; others keep their own."""
    follows = saved is not None and layer.dtype == DTYPES[saved] and wanted in DTYPES.values()
    return dataclasses.replace(layer, dtype=wanted) if follows else layer


def _in_names_of(model: PreTrainedModel, layers: dict[str, LayerConfig]) -> dict[str, LayerConfig]:
    """Return the layers by their names in this class, with the base model's prefix or without.

    A class with another head has no place for the layers of the head that was saved; transformers
    reports their tensors as unexpected.
    """
    places = {name for name, _ in model.named_modules(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."
    names: dict[str, str] = {}
    for name in layers:
        candidates = [name, name.removeprefix(prefix), prefix + name]
        found = [candidate for candidate in candidates if candidate in places]
        if found:
            names[name] = found[0]
        elif type(model).__name__ in (model.config.architectures or []):
            raise ValueError(f"{type(model).__name__} has no layer {name!r:.80}")
    renamed = {}
    for name, own in names.items():
        layer = layers[name]
        if layer.tied_to is not None:
            if layer.tied_to not in names:
                raise ValueError(
                    f"{type(model).__name__} has no layer {layer.tied_to!r:.80}, to "
                    f"which {name!r:.80} is tied"
                )
            layer = dataclasses.replace(layer, tied_to=names[layer.tied_to])
        renamed[own] = layer
    return renamed


def _of_another_size(model: PreTrainedModel, layers: dict[str, LayerConfig]) -> list[str]:
    """Name layers that the model has in another size than was saved, such as one for other labels.

    These layers stay dense, and so do those that are tied to them. transformers draws them anew if
    it is told to ignore mismatched sizes, and refuses them if not.
    """
    resized = [
        name
        for name, layer in layers.items()
        if layer.joint is None
        and layer.tied_to is None
        and of_another_size(layer, model.get_submodule(name))
    ]
    return resized + [name for name, layer in layers.items() if layer.tied_to in resized]


def _stand_in(module: nn.Module, layer: LayerConfig) -> None:
    """Put empty tensors under the names of those that were saved, while transformers loads.

    transformers compares shapes by name, and does and says what is right where they differ.
    """
    module.cp = nn.Module()
    if layer.tied_to is None:
        count = sum(len(layer.arguments[key]) for key in ("in_shape", "out_shape"))
        count += len(layer.arguments.get("kernel_size", ()))
        module.cp.factors = nn.ParameterList(
            nn.Parameter(torch.empty(0, device="meta")) for _ in range(count)
        )


def _tied_to_tables(
    model: PreTrainedModel, layers: dict[str, LayerConfig]
) -> dict[str, LayerConfig]:
    """Return further layers of this class whose weight is tied to a table in CP format.

    Those that were saved are among the layers already. One that was not, such as the head if the
    base model was saved alone, is tied to the table as the dense layer would be.
    """
    added: dict[str, LayerConfig] = {}
    for pair in model.all_tied_weights_keys.items():
        for source, target in (pair, pair[::-1]):
            table, name = (one.removesuffix(".weight") for one in (source, target))
            if table not in layers or layers[table].family != "embedding" or name in layers:
                continue
            layer: Any = model.get_submodule(name)
            config = layers[table]
            if is_torch_layer(layer, "linear"):
                added[name] = head_of(config, table, layer.bias is not None)
            elif is_torch_layer(layer, "embedding"):
                arguments = {**config.arguments, "padding_idx": layer.padding_idx}
                added[name] = dataclasses.replace(
                    config, arguments=arguments, tied_to=config.tied_to or table
                )
    return added


def _declare_ties(model: PreTrainedModel) -> None:
    """Tell transformers which parameters are shared: factors, and the dense weights no longer."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            state = part.state_dict(keep_vars=True)
            kept = {
                target: source
                for target, source in part.all_tied_weights_keys.items()
                if target in state and source in state and ".cp." not in target
            }
            known = {*kept, *kept.values()}
            first: dict[int, str] = {}
            shared = {
                name: source
                for name, value in state.items()
                if (source := first.setdefault(id(value), name)) != name and name not in known
            }
            part._tied_weights_keys = kept | shared
            part.all_tied_weights_keys = dict(part._tied_weights_keys)
    for module in model.modules():
        if isinstance(module, CPTensor):
            module.ties_declared = True
