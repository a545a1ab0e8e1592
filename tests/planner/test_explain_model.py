"""``explain`` of a model: a row for each call, dense beside it, the verdict first."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import polyadic
from polyadic import ModelExplanation, explain
from polyadic.nn import CPConv2d, CPConvTranspose2d, CPEmbedding, CPLinear
from polyadic.testing import LiveBytes

X = torch.randn(8, 64, 12, 12)


def model() -> nn.Sequential:
    return nn.Sequential(
        CPConv2d(64, 64, 3, padding=1, rank=32),
        nn.BatchNorm2d(64),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        CPLinear(1024, 1024, rank=64),
        CPLinear(1024, 10, rank=4),
    )


def test_a_row_is_what_explain_says_of_the_layer() -> None:
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = explain(net, X)
    assert isinstance(found, ModelExplanation)
    assert [row.name for row in found.layers] == ["0", "4", "5"]
    alone = [explain(net[0], batch=8, size=12), explain(net[4], batch=8), explain(net[5], batch=8)]
    assert [str(row.found) for row in found.layers] == [str(each) for each in alone]
    assert found.seconds == sum(each.chosen.seconds for each in alone)
    assert found.dense_seconds == sum(each.dense.seconds for each in alone)
    assert [row.parameters for row in found.layers] == [
        sum(p.numel() for p in net[i].cp.parameters()) for i in (0, 4, 5)
    ]
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_the_verdict_is_the_first_line_and_slower_layers_are_named() -> None:
    found = explain(model(), X)
    lines = str(found).splitlines()
    assert lines[0] == found.verdict
    assert "times as fast as dense" in lines[0]
    assert found.slower == ("5",)
    assert any(line.startswith("dense is faster for 5") for line in lines)
    assert any(line.startswith("sum") for line in lines)
    slow = explain(nn.Sequential(CPLinear(16, 10, rank=2)), torch.randn(4, 16))
    assert "times as slow as dense" in slow.verdict
    assert json.loads(json.dumps(found.to_dict()))["slower"] == ["5"]


def test_inference_is_of_the_forward_alone() -> None:
    found = explain(model(), X, training=False)
    assert all(not row.found.chosen.backward for row in found.layers if row.found)
    assert "forward (" in found.verdict


def test_repeated_tied_joint_and_frozen_layers() -> None:
    layer = CPLinear(256, 256, rank=8)
    found = explain(nn.Sequential(layer, layer), torch.randn(64, 256))
    weights = sum(p.numel() for p in layer.cp.parameters())
    assert [(r.parameters, r.dense_parameters) for r in found.layers] == [
        (weights, 256 * 256),
        (0, 0),
    ]
    table = CPEmbedding(3000, 64, rank=8)
    found = explain(nn.Sequential(table, table.as_linear()), torch.randint(3000, (4, 9)))
    assert [row.parameters > 0 for row in found.layers] == [True, False]
    assert next(row.found.title.split()[0] for row in found.layers if row.found) == "embedding"
    joint = CPLinear.joint(2, 256, 256, rank=8)
    found = explain(nn.Sequential(*joint), torch.randn(64, 256))
    assert [row.dense_parameters for row in found.layers] == [256 * 256] * 2
    assert found.layers[1].parameters == 0
    frozen = polyadic.freeze(nn.Sequential(CPLinear(512, 512, rank=8)), batch=64)
    found = explain(frozen, torch.randn(64, 512))
    assert "frozen" in str(found)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: explain(nn.Linear(3, 3), torch.ones(1, 3)), ValueError, "Linear has none"),
        (lambda: explain(model(), X, batch=8), ValueError, "takes the batch from them"),
        (lambda: explain("a", X), ValueError, "inputs are those of a model"),
        (lambda: explain(model()), TypeError, "expects batch="),
    ],
)
def test_mistakes_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def measured(layer: nn.Module, x: torch.Tensor) -> int:
    """The most bytes alive at once in a real call with its backward, besides parameters."""
    own = list(layer.parameters())
    with LiveBytes([x, *own]) as live:
        y = layer(x)
        wanted = [value for value in (x, *own) if value.requires_grad]
        torch.autograd.grad(y, wanted, torch.ones_like(y))
    return live.peak - sum(value.nbytes for value in own)


def test_the_peak_of_memory_is_that_of_a_call() -> None:
    table = CPEmbedding(50, 12, rank=4)
    rows = torch.randn(7, 96, requires_grad=True)
    image = torch.randn(2, 64, 9, 9, requires_grad=True)
    head = torch.randn(5, 12, requires_grad=True)
    pairs: list[tuple[Any, nn.Module, torch.Tensor]] = [
        (CPLinear(96, 64, rank=5), nn.Linear(96, 64), rows),
        (CPConv2d(64, 32, 3, rank=5), nn.Conv2d(64, 32, 3), image),
        (CPConvTranspose2d(64, 32, 3, rank=5), nn.ConvTranspose2d(64, 32, 3), image),
        (table, nn.Embedding(50, 12), torch.arange(6)),
        (table.as_linear(True), nn.Linear(12, 50), head),
    ]
    for layer, dense, x in pairs:
        before = layer(x)
        found = explain(layer, x)
        (row,) = found.layers
        assert row.peak_bytes == measured(layer, x) == found.peak_bytes, type(layer)
        assert row.dense_peak_bytes == measured(dense, x) == found.dense_peak_bytes, type(layer)
        # Nothing without values is left in what layers remember.
        assert torch.equal(layer(x), before)


def test_the_peak_of_a_model_is_what_is_kept_and_the_most_on_top() -> None:
    found = explain(model(), X)
    kept = [row.found.chosen.kept_bytes for row in found.layers if row.found is not None]
    peaks = [row.peak_bytes or 0 for row in found.layers]
    assert found.peak_bytes == sum(kept) + max(p - k for p, k in zip(peaks, kept, strict=True))
    assert "peak, B" in str(found)
    # With other options than the layers' own there is no call to count.
    assert explain(model(), X, memory="least").layers[0].peak_bytes is None
