"""The CP layers of a model are turned back into torch layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polyadic import surgery
from polyadic.nn.kinds import BY_CP
from polyadic.pretrained.exchange import refuse
from polyadic.pretrained.layers import describe


def merge_layers(model: nn.Module) -> nn.Module:
    """Replace all CP layers of a model by torch layers with the dense weights.

    Layers that share a CP tensor share the dense weight if it is equal.

    Returns:
        The model, or the torch layer in the place of a model that is a CP layer.

    Raises:
        ValueError: there is no CP layer, torch has no layer in the place of one, or something
            attached to one would be lost.
    """
    configs = describe(model)
    layers = {name: model.get_submodule(name) for name in configs}
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no CP layer to merge")
    elsewhere = surgery.kept_elsewhere(model)
    lost = [
        f"{name!r} {why}"
        for name, layer in layers.items()
        if (why := surgery.reason_to_keep(layer) or elsewhere.get(id(layer)))
    ]
    lost += [
        f"{name!r} is a {config.kind}, which stands in for no layer of torch"
        for name, config in configs.items()
        if config.row.to_dense is None
    ]
    refuse("layers cannot be merged", lost)
    made: dict[int, list[Any]] = {}
    for name, layer in layers.items():
        dense = BY_CP[type(layer)].unmake(layer)
        for other in made.setdefault(id(layer.cp), []):
            # The row of padding_idx is zero in an embedding, but not in its head.
            if torch.equal(other.weight, dense.weight):
                dense.weight = other.weight
                break
        made[id(layer.cp)].append(dense)
        if name == "":
            merged: nn.Module = dense
            return merged
        surgery.replace(model, name, dense)
    return model
