"""Tools that take models apart: torch-pruning beside CP layers, torchvision's feature extractor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import polyadic
from other_packages import imported
from polyadic.nn import CPConv2d, CPLinear


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_torch_pruning_prunes_around_a_cp_layer(kind: str) -> None:
    """As the page on the rest of torch says: the layer keeps its channels, the others lose some."""
    pruning = imported("torch_pruning")

    class Kept(pruning.BasePruningFunc):
        def prune_out_channels(self, layer: Any, idxs: Any) -> Any:
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: Any) -> int:
            return int(layer.weight.shape[0])

        def get_in_channels(self, layer: Any) -> int:
            return int(layer.weight.shape[1])

    if kind == "linear":
        model = nn.Sequential(
            nn.Linear(16, 20),
            nn.ReLU(),
            nn.Linear(20, 32),
            nn.ReLU(),
            CPLinear(32, 24, rank=4),
            nn.ReLU(),
            nn.Linear(24, 30),
            nn.ReLU(),
            nn.Linear(30, 10),
        )
        x = torch.randn(2, 16)
    else:
        model = nn.Sequential(
            nn.Conv2d(3, 20, 3),
            nn.ReLU(),
            nn.Conv2d(20, 32, 3),
            nn.ReLU(),
            CPConv2d(32, 24, 3, rank=4),
            nn.ReLU(),
            nn.Conv2d(24, 30, 1),
            nn.ReLU(),
            nn.Conv2d(30, 10, 1),
        )
        x = torch.randn(2, 3, 9, 9)
    layer = model[4]
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    pruning.pruner.MagnitudePruner(
        model,
        x,
        importance=pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        customized_pruners={type(layer): Kept()},
        ignored_layers=[layer, model[-1]],
        root_module_types=[nn.Linear, nn.Conv2d],
    ).step()
    sizes = [tuple(part.weight.shape[:2]) for part in model if hasattr(part, "weight")]
    inputs = x.shape[1]
    assert sizes == [(10, inputs), (32, 10), (24, 32), (15, 24), (10, 15)]
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert model(x).shape[1] == 10


def test_torchvision_extracts_features_of_a_converted_model() -> None:
    models = imported("torchvision.models")
    extraction = imported("torchvision.models.feature_extraction")
    torch.manual_seed(0)
    model = models.resnet18(num_classes=7).eval()
    polyadic.compress(model, ratio=2, orders=(1,), iterations=3)
    x = torch.randn(1, 3, 64, 64)
    wanted: dict[str, Any] = {}
    names = ["layer1", "layer3.0.conv1"]
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, given, y, name=name: wanted.setdefault(name, y)
        )
    model(x)
    found = extraction.create_feature_extractor(model, names)(x)
    assert list(found) == names
    for name in names:
        torch.testing.assert_close(found[name], wanted[name])
