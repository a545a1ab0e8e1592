"""Models of timm, torchvision and transformers through a whole life, where these are installed.

Converted, trained with the in-place activations they come with, saved, loaded, frozen, exported.
``make test-models`` installs the packages and runs these tests, which ``make test`` skips where the
packages are missing: torchvision has to be one that is made for the torch that is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyadic
from other_packages import imported
from polyadic.nn.layer import CPLayer

pytestmark = pytest.mark.slow

TIMM = (
    "test_byobnet", "test_coatnet", "test_convnext", "test_convnext2", "test_convnext3",
    "test_efficientnet", "test_efficientnet_evos", "test_efficientnet_gn", "test_efficientnet_ln",
    "test_mambaout", "test_maxvit", "test_nfnet", "test_resnet", "test_vit", "test_vit2",
    "test_vit3", "test_vit4", "test_vit_relpos",
)  # fmt: skip
TORCHVISION = ("resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5")
TRANSFORMERS = ("Bert", "T5", "ViT", "ResNet")


def life(
    make: Callable[[], nn.Module],
    inputs: dict[str, Any],
    folder: Path,
    output: Callable[[Any], Tensor] = lambda y: y,
) -> None:
    """Every step against the one before it; a fault of any is an exception or another number."""
    torch.manual_seed(0)
    model, report = polyadic.compress(make().eval(), ratio=1.5, orders=(1, 2), iterations=5)
    layers = [module for module in model.modules() if isinstance(module, CPLayer)]
    assert layers
    assert report.ratio >= 1.5

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        output(model(**inputs)).float().square().mean().backward()
        optimizer.step()
    called = [layer for layer in layers if layer.cp.factors[0].grad is not None]
    assert called
    for layer in called:
        assert all(bool(factor.grad.isfinite().all()) for factor in layer.cp.factors)

    model.eval()
    with torch.no_grad():
        expected = output(model(**inputs))
    assert bool(expected.isfinite().all())
    polyadic.save_pretrained(model, folder)
    again = polyadic.from_pretrained(folder, make().eval())
    with torch.no_grad():
        assert torch.equal(output(again(**inputs)), expected)

    close = {"rtol": 1e-3, "atol": 1e-3 * float(expected.abs().max())}
    exported = torch.export.export(model, (), inputs, strict=False).module()
    torch.testing.assert_close(output(exported(**inputs)), expected, **close)
    polyadic.freeze(again, size=8)
    with torch.no_grad():
        torch.testing.assert_close(output(again(**inputs)), expected, **close)
    frozen = torch.export.export(again, (), inputs, strict=False).module()
    torch.testing.assert_close(output(frozen(**inputs)), expected, **close)
    polyadic.merge(polyadic.unfreeze(model))
    assert not any(isinstance(module, CPLayer) for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(output(model(**inputs)), expected, **close)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str, tmp_path: Path) -> None:
    timm = imported("timm")
    if name not in timm.list_models("test_*"):
        pytest.skip(f"this timm has no {name}")

    def make() -> Any:
        torch.manual_seed(1)
        return timm.create_model(name, num_classes=7)

    size = make().default_cfg["input_size"]
    life(make, {"x": torch.randn(2, *size)}, tmp_path)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str, tmp_path: Path) -> None:
    models = imported("torchvision.models")

    def make() -> Any:
        torch.manual_seed(1)
        return models.get_model(name, weights=None, num_classes=7)

    life(make, {"x": torch.randn(2, 3, 64, 64)}, tmp_path)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str, tmp_path: Path) -> None:
    transformers = imported("transformers")
    small = {
        "Bert": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "vocab_size": 60,
            "max_position_embeddings": 16,
        },
        "T5": {
            "d_model": 32,
            "d_ff": 48,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 2,
            "vocab_size": 60,
            "decoder_start_token_id": 0,
        },
        "ViT": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": 16,
            "patch_size": 4,
        },
        "ResNet": {
            "embedding_size": 16,
            "hidden_sizes": [16, 24],
            "depths": [1, 1],
            "layer_type": "basic",
        },
    }[name]
    kind = {"T5": "T5ForConditionalGeneration"}.get(name, f"{name}Model")

    def make() -> Any:
        torch.manual_seed(1)
        return getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**small))

    ids = torch.tensor([[1, 5, 9, 2], [3, 4, 59, 7]])
    inputs = {"input_ids": ids}
    if name in ("ViT", "ResNet"):
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    flags = {"return_dict": False}
    if name == "T5":
        inputs["decoder_input_ids"] = ids
        flags["use_cache"] = False
    life(make, {**inputs, **flags}, tmp_path, lambda y: y[0])
