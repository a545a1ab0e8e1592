"""freeze(): the same map with contracted factors, and back without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import polyadic
from polyadic.nn import CPConv2d, CPLinear
from polyadic.nn._frozen import FrozenKernel, FrozenPair, FrozenWeight


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        CPConv2d(4, 6, (3, 2), padding="same", rank=3, dtype=torch.float64),
        nn.Flatten(),
        CPLinear(120, 8, rank=2, dtype=torch.float64),
    ).eval()


def test_frozen_gives_the_same_and_unfreeze_gives_back() -> None:
    model, x = _model(), torch.randn(3, 4, 5, 4, dtype=torch.float64)
    flags = [p.requires_grad for p in model.parameters()]
    model[2].bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before, keys = model(x), list(model.state_dict())
    assert polyadic.freeze(model, batch=3, size=(5, 4)) is model
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert list(model.state_dict()) == keys
    assert not any(p.requires_grad for p in model.parameters())
    polyadic.unfreeze(model)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys


def test_the_form_is_the_cheaper_one() -> None:
    small = polyadic.freeze(CPLinear(16, 10, rank=8, order=2))
    assert isinstance(small.frozen, FrozenWeight)
    wide = polyadic.freeze(CPLinear(2048, 2048, rank=16), batch=64)
    assert isinstance(wide.frozen, FrozenPair)
    tiny = polyadic.freeze(CPConv2d(8, 8, 3, rank=60), size=8)
    assert isinstance(tiny.frozen, FrozenKernel)
    huge = polyadic.freeze(CPLinear(4096, 4096, rank=256), batch=1)
    assert huge.frozen is None
    low = polyadic.freeze(CPConv2d(256, 256, 3, padding=1, rank=16), batch=8, size=28)
    assert low.frozen is None


def test_weights_are_contracted_too() -> None:
    layer = CPLinear(2048, 2048, rank=4, dtype=torch.float64)
    layer.cp.weights = nn.Parameter(torch.rand(4, dtype=torch.float64))
    x = torch.randn(2, 2048, dtype=torch.float64)
    before = layer(x)
    polyadic.freeze(layer, batch=2)
    assert isinstance(layer.frozen, FrozenPair)
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)


def test_gradients_still_reach_the_input() -> None:
    layer = CPLinear(12, 8, rank=3, dtype=torch.float64)
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    polyadic.freeze(layer)
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_stale_frozen_layer_refuses_to_run() -> None:
    layer = polyadic.freeze(CPLinear(12, 8, rank=3))
    other = CPLinear(12, 8, rank=3)
    layer.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"polyadic\.unfreeze"):
        layer(torch.randn(2, 12))
    polyadic.freeze(polyadic.unfreeze(layer))
    torch.testing.assert_close(layer(torch.ones(2, 12)), other(torch.ones(2, 12)))


def test_a_copy_and_a_cast_stay_frozen_and_right() -> None:
    model, x = _model(), torch.randn(3, 4, 5, 4)
    polyadic.freeze(model, batch=3, size=(5, 4))
    twin = copy.deepcopy(model).float()
    torch.testing.assert_close(twin(x), model(x.double()).float())
    polyadic.unfreeze(twin)
    torch.testing.assert_close(twin(x), model(x.double()).float())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: polyadic.freeze(3), TypeError, "torch.nn.Module"),
        (lambda: polyadic.unfreeze(3), TypeError, "torch.nn.Module"),
        (lambda: polyadic.freeze(nn.Linear(2, 2)), ValueError, "no CPLinear or CPConvNd"),
        (lambda: polyadic.freeze(CPLinear(4, 4, rank=1), batch=0), ValueError, "batch"),
        (lambda: polyadic.freeze(CPConv2d(4, 4, 3, rank=1), size=(8,) * 3), ValueError, "size"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
