"""What models of transformers do with ``weight`` while they are loaded and while they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import polyadic
from polyadic.nn.layer import CPLayer
from polyadic.nn.weight import Weighted

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[1, 5, 9, 2], [3, 4, 59, 7]])


def t5(**options: Any) -> Any:
    config = transformers.T5Config(
        vocab_size=60,
        d_model=40,
        d_kv=8,
        d_ff=56,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        **options,
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def clip() -> Any:
    sizes = {
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 24,
    }
    text = {"vocab_size": 60, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config={**sizes, **text},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=24,
    )
    return transformers.CLIPModel(config).eval()


def bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=60,
        max_position_embeddings=16,
    )
    return transformers.BertModel(config).eval()


def converted(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model, _ = polyadic.compress(make(), ratio=1.5, orders=(1,), iterations=3)
    assert any(isinstance(module, CPLayer) for module in model.modules())
    return model


def output(model: Any) -> torch.Tensor:
    inputs: dict[str, Any] = {"input_ids": IDS}
    if isinstance(model, transformers.T5ForConditionalGeneration):
        inputs |= {"decoder_input_ids": IDS, "use_cache": False}
    if isinstance(model, transformers.CLIPModel):
        inputs["pixel_values"] = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    with torch.no_grad():
        found: torch.Tensor = model(**inputs, return_dict=False)[0]
    return found


READERS = [
    pytest.param(t5, id="T5"),
    pytest.param(lambda: t5(feed_forward_proj="gated-gelu"), id="T5-gated"),
    pytest.param(clip, id="CLIP"),
]


@pytest.mark.parametrize("make", READERS)
def test_models_that_ask_for_the_dtype_build_no_weight(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted(make)
    layers = [module for module in model.modules() if isinstance(module, CPLayer)]
    built: list[str] = []
    asked: list[str] = []
    monkeypatch.setattr(Weighted, "_built_weight", lambda self: built.append(type(self).__name__))
    reads = Weighted.weight.fget
    assert reads is not None
    for kind in {type(layer) for layer in layers}:
        monkeypatch.setattr(
            kind,
            "weight",
            property(lambda self: (asked.append(type(self).__name__), reads(self))[1]),
        )
    assert bool(output(model).isfinite().all())
    assert asked, "the model reads no weight, so that the test shows nothing"
    assert not built


@pytest.mark.parametrize("make", READERS)
def test_the_models_own_initialisation_spares_what_was_loaded(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    """It writes to ``layer.weight`` of the layers whose parameters were missing."""
    model = converted(make)
    polyadic.save_pretrained(model, tmp_path)
    again, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    assert torch.equal(output(again), output(model))


@pytest.mark.parametrize("disk", [["encoder.layer.1", "pooler"], ["embeddings", "encoder"]])
def test_a_device_map_with_a_part_on_the_disk(disk: list[str], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = converted(bert)
    polyadic.save_pretrained(model, tmp_path / "model")
    parts = ("embeddings", "encoder.layer.0", "encoder.layer.1", "pooler")
    places = {part: "cpu" for part in parts if not part.startswith(tuple(disk))}
    again = transformers.BertModel.from_pretrained(
        tmp_path / "model",
        device_map={**places, **dict.fromkeys(disk, "disk")},
        offload_folder=tmp_path / "offload",
    )
    layers = [module for module in again.modules() if isinstance(module, CPLayer)]
    assert any(layer.cp.factors[0].is_meta for layer in layers)
    for _ in range(2):
        assert torch.equal(output(again), output(model))
