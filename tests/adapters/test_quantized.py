"""Adapters on quantized layers: what is added is added to the quantized layer's own output."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import get_peft_model

from adapters.adapted import change, parts
from other_packages import imported
from polyadic.adapters import CPConfig


def by_bitsandbytes(layer: nn.Linear) -> nn.Module:
    bnb: Any = imported("bitsandbytes")
    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def by_bitsandbytes_to_four_bits(layer: nn.Linear) -> nn.Module:
    bnb: Any = imported("bitsandbytes")
    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4"
    )
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def torchao_config() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def by_torchao(layer: nn.Linear) -> nn.Module:
    quantize_ = imported("torchao.quantization").quantize_
    model = nn.Sequential(layer)
    quantize_(model, torchao_config())
    return model[0]


@pytest.mark.parametrize("share", ["none", "layers"])
@pytest.mark.parametrize("quantize", [by_bitsandbytes, by_torchao])
def test_a_quantized_layer_is_adapted(
    quantize: Callable[[nn.Linear], nn.Module], share: str
) -> None:
    base = nn.Sequential(quantize(nn.Linear(32, 48)), nn.ReLU())
    config = CPConfig(r=4, alpha=8, share=share, target_modules=["0"], init_weights=False)
    # As transformers' quantized models say how torchao quantizes a merged weight again.
    known = SimpleNamespace(get_apply_tensor_subclass=torchao_config)
    base.hf_quantizer = SimpleNamespace(quantization_config=known)
    model = get_peft_model(base, config).eval()
    layer = model.base_model.model[0]
    assert layer.quantization_backend is not None
    x = torch.randn(6, 32)
    want = torch.relu(layer.base_layer(x) + x @ change(layer).t())
    torch.testing.assert_close(model(x), want)
    gradients = torch.autograd.grad(model(x).square().sum(), parts(layer))
    torch.testing.assert_close(gradients, torch.autograd.grad(want.square().sum(), parts(layer)))
    # Merging rounds to eight bits again, and so does taking it out.
    model.merge_adapter()
    torch.testing.assert_close(model(x), want, rtol=0.1, atol=0.1)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), want, rtol=0.1, atol=0.1)


def test_four_bits_are_merged_after_an_evaluation() -> None:
    """bitsandbytes may reorder a weight at its first evaluation, and then its bytes read wrong."""
    model = get_peft_model(
        nn.Sequential(by_bitsandbytes_to_four_bits(nn.Linear(64, 96))),
        CPConfig(r=4, alpha=2, target_modules=["0"], init_weights=False),
    ).eval()
    layer, x = model.base_model.model[0], torch.randn(6, 64)
    weight = layer.get_base_weight()
    want = layer.base_layer.bias + x @ (weight + change(layer)).t()
    torch.testing.assert_close(model(x), want, rtol=0.02, atol=0.02)
    model.merge_adapter()
    changed = layer.get_base_weight() - weight
    # NF4 has 16 values from -s to s, of which the farthest neighbours are 0.304 s apart.
    assert (changed - change(layer)).abs().max() < 0.16 * (weight + change(layer)).abs().max()
