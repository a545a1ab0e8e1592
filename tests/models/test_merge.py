"""Models with CP layers turned back into dense ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyadic
from cases.pretrained import Net, compressed
from polyadic.nn import CPConv1d, CPConv2d, CPConvTranspose2d, CPEmbedding, CPLinear
from polyadic.pretrained import attach


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_a_model_computes_the_same_and_is_dense() -> None:
    torch.manual_seed(0)
    net = compressed().double().eval()
    net.mlp.requires_grad_(False)
    net.conv.train()
    ids = torch.randint(11, (4, 7))
    before = net(ids)
    assert polyadic.merge(net) is net
    close(net(ids), before)
    dense = Net()
    assert {n: type(m) for n, m in net.named_modules()} == {
        n: type(m) for n, m in dense.named_modules()
    }
    assert net.state_dict().keys() == dense.state_dict().keys()
    # Values load strictly into a dense model. The zero row of padding has undone the tie.
    dense.head.weight = nn.Parameter(dense.head.weight.detach().clone())
    dense.double().eval().load_state_dict(net.state_dict())
    close(dense(ids), before)
    assert net.mlp[0] is net.again
    assert net.shared is net.head.bias
    assert net.conv.training
    assert not net.mlp[2].training
    assert not any(p.requires_grad for p in net.mlp.parameters())
    assert net.conv.weight.requires_grad


LAYERS: list[Any] = [
    (CPLinear(10, 12, rank=3, dtype=torch.float64), (2, 10)),
    (CPConv1d(4, 6, 3, padding=1, padding_mode="reflect", rank=3, dtype=torch.float64), (2, 4, 7)),
    (
        CPConv2d(4, 6, (3, 2), stride=2, groups=2, bias=False, rank=3, dtype=torch.float64),
        (2, 4, 7, 5),
    ),
    (
        CPConvTranspose2d(4, 6, 3, stride=2, output_padding=1, rank=3, dtype=torch.float64),
        (2, 4, 3, 5),
    ),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[type(p[0]).__name__ for p in LAYERS])
@pytest.mark.parametrize("alone", [False, True])
def test_every_layer(layer: nn.Module, shape: tuple[int, ...], alone: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    expected = layer(x)
    merged = polyadic.merge(layer if alone else nn.Sequential(layer))
    dense = merged if alone else merged[0]
    assert type(dense).__module__.startswith("torch.nn")
    close(merged(x), expected)


@pytest.mark.parametrize("padding", [None, 2])
def test_ties_of_embedding_and_head(padding: int | None) -> None:
    """Kept where they can be: not where the lookup of padding gives zeros and the head does not."""
    table = CPEmbedding(11, 6, padding_idx=padding, rank=4, dtype=torch.float64)
    net = nn.ModuleDict({"head": table.as_linear(bias=True), "table": table})
    ids, x = torch.arange(11), torch.randn(3, 6, dtype=torch.float64)
    rows, logits = net["table"](ids), net["head"](x)
    polyadic.merge(net)
    close(net["table"](ids), rows)
    close(net["head"](x), logits)
    assert (net["table"].weight is net["head"].weight) == (padding is None)


def test_layers_with_one_tensor_share_the_weight_and_joint_ones_do_not() -> None:
    net = nn.Sequential(CPLinear(6, 6, rank=2), CPLinear(6, 6, rank=2))
    net[1].cp = net[0].cp
    polyadic.merge(net)
    assert net[0].weight is net[1].weight
    net = polyadic.merge(nn.Sequential(*CPLinear.joint(2, 6, 6, rank=2)))
    assert not torch.equal(net[0].weight, net[1].weight)


def test_a_frozen_layer_is_merged_as_it_was() -> None:
    net = nn.Sequential(CPLinear(64, 48, rank=40, dtype=torch.float64))
    x = torch.randn(5, 64, dtype=torch.float64)
    expected = net(x)
    polyadic.freeze(net, batch=64)
    assert net[0].frozen is not None
    polyadic.merge(net)
    close(net(x), expected)
    assert net[0].weight.requires_grad


class Own(CPLinear):
    pass


def hooked() -> nn.Module:
    layer = CPLinear(4, 4, rank=2)
    layer.register_forward_hook(lambda *_: None)
    return nn.Sequential(CPLinear(4, 4, rank=2), layer)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: {}, TypeError, "Module, got dict"),
        (Net, ValueError, "Net holds no CP layer to merge"),
        (lambda: nn.Sequential(Own(4, 4, rank=2)), ValueError, "0 is Own, a class of its own"),
        (hooked, ValueError, "'1' has the forward hook <lambda>, which would be lost"),
    ],
)
def test_what_cannot_be_merged(make: Any, error: type[Exception], message: str) -> None:
    model = make()
    before = list(model.modules()) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=re.escape(message)):
        polyadic.merge(model)
    assert before is None or before == list(model.modules())


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("by_transformers", [False, True])
def test_a_model_of_transformers_is_an_ordinary_one_again(
    by_transformers: bool, padding: int | None, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        pad_token_id=padding,
    )
    model = transformers.BertForMaskedLM(config).eval()
    model.bert.embeddings.word_embeddings = CPEmbedding(60, 16, padding, rank=5)
    model.cls.predictions.decoder = model.bert.embeddings.word_embeddings.as_linear()
    model.cls.predictions.decoder.bias = model.cls.predictions.bias
    attach(model)
    ids = torch.tensor([[1, 5, 9, 2]])
    expected = model(ids).logits
    # Either of the two ways.
    assert (model.dequantize() if by_transformers else polyadic.merge(model)) is model
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    table, head = model.bert.embeddings.word_embeddings, model.cls.predictions.decoder
    assert (table.weight is head.weight) == (padding is None)
    model.save_pretrained(tmp_path)
    new, report = transformers.BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert not hasattr(new.config, "quantization_config")
    assert not any("polyadic" in type(m).__module__ for m in new.modules())
    assert torch.equal(new(ids).logits, model(ids).logits)


def test_dense_weights_are_not_rounded_by_a_callers_autocast() -> None:
    layer = CPLinear(16, 12, rank=8)
    with torch.autocast("cpu", torch.bfloat16):
        dense = layer.to_linear()
    assert torch.equal(dense.weight, layer.weight)
