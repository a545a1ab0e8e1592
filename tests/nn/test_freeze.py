"""freeze(): the same map with contracted factors, and back without a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import polyadic
from cases import FEW, params
from polyadic.nn import CPConv2d, CPLinear
from polyadic.nn.frozen import FrozenKernel, FrozenPair, FrozenWeight


def _model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        CPConv2d(4, 6, (3, 2), padding="same", rank=3, dtype=dtype),
        nn.Flatten(),
        CPLinear(120, 8, rank=2, dtype=dtype),
    ).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_frozen_gives_the_same_and_unfreeze_gives_back(dtype: torch.dtype) -> None:
    model, x = _model(dtype), torch.randn(3, 4, 5, 4, dtype=dtype)
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


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
def test_one_size_stands_for_the_convolutions_of_a_whole_model(mode: str) -> None:
    """As those of a vision transformer, whose first kernel may be wider than the size given."""
    model = nn.Sequential(
        CPConv2d(3, 8, 16, stride=16, rank=2),
        CPConv2d(8, 8, (1, 3), padding=(0, 5), dilation=(1, 3), rank=2, padding_mode=mode),
    ).eval()
    x = torch.randn(1, 3, 96, 112)
    before = model(x)
    polyadic.freeze(model, size=1)
    torch.testing.assert_close(model(x), before)


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


def _double(own: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(2 * own.detach())


@pytest.mark.parametrize(
    "replace",
    [
        lambda layer: layer.load_state_dict(
            {name: 2 * value for name, value in layer.state_dict().items()}, assign=True
        ),
        lambda layer: setattr(layer.cp, "weights", nn.Parameter(torch.full((3,), 2.0))),
        lambda layer: layer.cp.factors.__setitem__(0, _double(layer.cp.factors[0])),
    ],
    ids=["load_state_dict", "weights", "factor"],
)
def test_a_frozen_layer_whose_factors_are_replaced_refuses_to_run(replace) -> None:
    layer, x = polyadic.freeze(CPLinear(12, 8, rank=3)), torch.randn(2, 12)
    before = layer(x)
    replace(layer)
    with pytest.raises(RuntimeError, match=r"polyadic\.unfreeze"):
        layer(x)
    after = polyadic.unfreeze(layer)(x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(polyadic.freeze(layer)(x), after)
    assert not any(p.requires_grad for p in layer.parameters())


def test_functional_call_with_other_factors_is_refused() -> None:
    layer, other = polyadic.freeze(CPLinear(12, 8, rank=3)), CPLinear(12, 8, rank=3)
    x = torch.randn(2, 12)
    with pytest.raises(RuntimeError, match=r"polyadic\.unfreeze"):
        torch.func.functional_call(layer, other.state_dict(), (x,))
    layer(x)


def _required(layer: Any, x: Tensor) -> Tensor:
    layer.requires_grad_(True)
    try:
        return layer(x)
    finally:
        layer.requires_grad_(False)


def _of_parameters(
    transform: Callable[[Callable[..., Tensor], dict[str, Tensor]], Any],
) -> Callable[[Any, Tensor], Any]:
    """A transform of what a layer computes, as a function of its parameters."""

    def call(layer: Any, x: Tensor) -> Any:
        values = {name: p.detach() for name, p in layer.named_parameters()}
        return transform(lambda given: functional_call(layer, given, (x,)), values)

    return call


def _dual(f: Callable[..., Tensor], values: dict[str, Tensor]) -> Tensor:
    with forward_ad.dual_level():
        return f({name: forward_ad.make_dual(p, p.clone()) for name, p in values.items()})


def _batched(f: Callable[..., Tensor], values: dict[str, Tensor]) -> Tensor:
    return vmap(f)({name: torch.stack([p, 2 * p]) for name, p in values.items()})


DERIVATIVES: dict[str, Callable[[Any, Tensor], Any]] = {
    "requires_grad": _required,
    "grad": _of_parameters(lambda f, values: grad(lambda given: f(given).abs().sum())(values)),
    "jvp": _of_parameters(lambda f, values: jvp(f, (values,), (values,))),
    "forward mode": _of_parameters(_dual),
    "vmap": _of_parameters(_batched),
}
FREEZABLE = [case for case in FEW if case.kind.family in ("linear", "conv")]


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("case", params(FREEZABLE))
def test_derivatives_by_the_factors_of_a_frozen_layer_are_refused(
    case: Any, derivative: str
) -> None:
    """They would be zero or missing, as the factors have no part in what is computed."""
    layer, x = case.make(), case.leaves().x
    polyadic.freeze(layer, batch=256, size=9)
    assert layer.frozen is not None
    before = layer(x)
    with pytest.raises(RuntimeError, match=r"derivative.*polyadic\.unfreeze"):
        DERIVATIVES[derivative](layer, x)
    assert torch.equal(layer(x), before)
    values = {name: p.detach() for name, p in layer.named_parameters()}
    if x.is_floating_point():
        given = grad(lambda x: functional_call(layer, values, (x,)).sum())(x)
        x = x.detach().requires_grad_()
        torch.testing.assert_close(given, torch.autograd.grad(layer(x).sum(), x)[0])


@pytest.mark.parametrize("name", ["joint-linear", "joint-conv2d"])
def test_a_layer_frozen_alone_sends_no_gradient_past_shared_factors(name: str) -> None:
    """Unfreezing one of the layers that share factors gives these their gradients back."""
    (case,) = [case for case in FEW if case.id == name]
    layers, x = case.cls.joint(2, **case.inner.arguments, dtype=torch.float64), case.leaves().x
    polyadic.freeze(layers, batch=256, size=9)
    polyadic.unfreeze(layers[0])
    assert layers[0](x).requires_grad
    with pytest.raises(RuntimeError, match=r"derivative.*polyadic\.unfreeze"):
        layers[1](x)
    with torch.no_grad():
        frozen = layers[1](x)
        torch.testing.assert_close(polyadic.unfreeze(layers)[1](x), frozen)


def test_the_bias_is_free_while_the_layer_is_frozen() -> None:
    layer, x = CPLinear(12, 8, rank=3), torch.randn(2, 12)
    without = layer(x) - layer.bias
    polyadic.freeze(layer)
    with torch.no_grad():
        layer.bias.fill_(1)
    torch.testing.assert_close(layer(x), without + 1)
    layer.bias = None
    torch.testing.assert_close(layer(x), without)
    polyadic.unfreeze(layer)
    assert all(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_layers_that_share_factors_get_their_flags_back_in_any_order(order) -> None:
    layers = CPLinear.joint(2, 12, 8, rank=6)
    for i in order:
        polyadic.freeze(layers[i])
    polyadic.unfreeze(layers)
    assert all(parameter.requires_grad for parameter in layers.parameters())
    polyadic.freeze(layers[0])
    polyadic.freeze(layers)
    for i in order:
        polyadic.unfreeze(layers[i])
    assert all(parameter.requires_grad for parameter in layers.parameters())


def test_a_frozen_convolution_refuses_another_number_of_channels() -> None:
    layer = polyadic.freeze(CPConv2d(8, 8, 3, rank=60), size=8)
    assert isinstance(layer.frozen, FrozenKernel)
    assert layer(torch.randn(8, 8, 8)).shape == (8, 6, 6)
    with pytest.raises(RuntimeError, match="16 channels"):
        layer(torch.randn(2, 16, 8, 8))


def test_inference_mode_is_no_obstacle() -> None:
    layer, x = CPLinear(12, 8, rank=3), torch.randn(2, 12, requires_grad=True)
    before = layer(x)
    with torch.inference_mode():
        polyadic.freeze(layer)
        born_there = CPLinear(12, 8, rank=3)
        right = born_there(x)
        torch.testing.assert_close(polyadic.freeze(born_there)(x), right)
        polyadic.unfreeze(born_there)
    torch.testing.assert_close(layer(x), before)
    layer(x).sum().backward()
    assert x.grad is not None
