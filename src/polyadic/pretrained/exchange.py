"""CP layers are put into a skeleton: the exchange is planned and checked as a whole, then made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyadic import surgery
from polyadic.nn.frozen import Frozen
from polyadic.pretrained.layers import LayerConfig, build, describe, differences


@dataclass(frozen=True)
class Exchange:
    """Layers to be put into a model, which stays unchanged until ``apply``.

    Attributes:
        model: the skeleton.
        layers: new layers by name, on the meta device.
        state: the state dict that the model will have; tensors of new layers are on the meta
            device, and a tied parameter is one tensor under each of its names.
        devices: by name, the device of the tensor that is replaced.
    """

    model: nn.Module
    layers: dict[str, nn.Module]
    state: dict[str, Tensor]
    devices: dict[str, torch.device]

    def apply(self) -> None:
        """Put the layers in their places."""
        for name, layer in self.layers.items():
            surgery.replace(self.model, name, layer)


def prepare(model: nn.Module, configs: Mapping[str, LayerConfig]) -> Exchange:
    """Check a skeleton and make the layers for it.

    Args:
        model: the skeleton, with a torch layer, or an equal CP layer, in the place of each layer.
        configs: the layers by name.

    Raises:
        ValueError: a layer does not fit the model.
    """
    places: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    own = describe(model)
    for name, module in places.items():
        if isinstance(module, Frozen):
            raise ValueError(f"{name} is frozen; call polyadic.unfreeze(model) first")
    elsewhere = surgery.kept_elsewhere(model)
    wrong = []
    for name, config in configs.items():
        if name not in places:
            wrong.append(f"it has no {name!r:.80}")
            continue
        kept = own.get(name)
        found = differences(config, places[name], kept)
        if name == "" and kept is None:
            found = [f"it is itself what would be replaced; give a {config.kind}"]
        if kept is None:
            reasons = surgery.reason_to_keep(places[name]), elsewhere.get(id(places[name]))
            found += [f"it {why}" for why in reasons if why is not None]
        wrong += [f"of {name!r:.80} {text}" for text in found]
    refuse(f"{type(model).__name__} is not what was saved", wrong)
    layers = build(configs, {name: places[name] for name in configs if name in own})
    for name, layer in layers.items():
        layer.requires_grad_(any(p.requires_grad for p in places[name].parameters()))
    state = _state(model, places, layers)
    devices = {key: value.device for key, value in state.items()}
    for name, layer in layers.items():
        device = next(places[name].parameters()).device
        for alias in (alias for alias, module in places.items() if module is places[name]):
            devices.update(dict.fromkeys(layer.state_dict(prefix=f"{alias}."), device))
    return Exchange(model, layers, state, devices)


def _state(
    model: nn.Module, places: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Return the state dict after the exchange, with parameters themselves; the model stays."""
    replaced = {id(places[name]): layer for name, layer in layers.items()}
    state = model.state_dict(keep_vars=True)
    biases: dict[int, Tensor] = {}
    for alias, module in places.items():
        if (layer := replaced.get(id(module))) is not None:
            for key in [key for key in state if key.startswith(f"{alias}.")]:
                del state[key]
            state.update(layer.state_dict(prefix=f"{alias}.", keep_vars=True))
            old, new = module._parameters.get("bias"), layer._parameters.get("bias")
            if old is not None and new is not None:
                biases[id(old)] = new
    # Parameters that were tied to the bias of a replaced layer are tied to the new layer's bias.
    return {key: biases.get(id(value), value) for key, value in state.items()}


def refuse(what: str, wrong: Iterable[str]) -> None:
    """Raise a ValueError that names what is wrong, if anything is."""
    every = list(wrong)
    if every:
        more = f"; and {len(every) - 8} more" if len(every) > 8 else ""
        raise ValueError(f"{what}: {'; '.join(every[:8])}{more}")


def fill(
    exchange: Exchange,
    tensors: Mapping[str, Tensor],
    sources: Mapping[str, str],
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """Make the state dict to be loaded, in which a tied parameter stands under each of its names.

    Args:
        exchange: the exchange whose state is to be filled.
        tensors: the stored tensors by name.
        sources: by every name in the state, the name of the stored tensor it takes.
        device: device for what the skeleton holds on the meta device.
    """
    made: dict[tuple[str, bool], Tensor] = {}
    filled: dict[str, Tensor] = {}
    for name, like in exchange.state.items():
        trained = isinstance(like, nn.Parameter)
        key = sources[name], trained
        if key not in made:
            place = exchange.devices[name]
            value = tensors[key[0]].to((device or "cpu") if place.type == "meta" else place)
            made[key] = nn.Parameter(value, requires_grad=like.requires_grad) if trained else value
        filled[name] = made[key]
    return filled
