"""Every layer there and back: torch's layer made a CP layer and the other way, and nothing lost.

The weight of torch's layer is made of a case's factors, and the CP tensor of these factors given as
``cp=``, so that nothing is fitted and all has to be equal.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cases import FEW, every_case, few_cases, over, params
from cases.protocol import Case, truth
from compare import assert_close
from polyadic import CPTensor


def single(case: Case) -> bool:
    """Whether torch's layer can become this one: no head, which its embedding makes, nor joint."""
    return case.kind.from_dense is not None and len(case.leaves().factors) == len(case.modes)


def dense_layer(case: Case, dtype: torch.dtype | None = None) -> Any:
    """Torch's layer with the weight and bias of a case."""
    dtype = case.of_its_numbers(dtype)
    leaves, layer = case.leaves(dtype), case.torch_layer(dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(case.weight(leaves))
        if leaves.bias is not None:
            layer.bias.copy_(leaves.bias)
    return layer


def converted(case: Case, layer: nn.Module) -> Any:
    """The CP layer made of torch's, with the case's factors."""
    leaves = case.leaves(layer.weight.dtype)
    cp = CPTensor.from_factors(case.tensorized_shape, leaves.factors, leaves.weights)
    return case.kind.make(layer, cp=cp)


def options_of(layer: nn.Module) -> dict[str, Any]:
    """What a layer says of itself, parameters and state left out."""
    return {
        key: value
        for key, value in vars(layer).items()
        if not key.startswith("_") and key not in ("training", "cp", "memory", "frozen")
    }


def storages(module: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in module.parameters()}


@over(single)
def test_the_fitted_tensor_takes_the_weights_place(case: Case) -> None:
    layer, x = dense_layer(case), case.leaves().x
    ours = converted(case, layer)
    assert type(ours) is case.cls
    x.requires_grad_(case.differentiable)
    got, (want, want_grads) = ours(x), truth(case)
    assert_close(got, want, "y")
    if case.differentiable:
        assert_close(torch.autograd.grad(got, x, case.grad_y())[0], want_grads["x"], "x")
    assert storages(ours).isdisjoint(storages(layer))


@over(single)
def test_there_and_back(case: Case) -> None:
    """Every option of the torch layer, parameter and flag comes back."""
    layer = dense_layer(case)
    again = case.kind.unmake(converted(case, layer))
    assert type(again) is type(layer)
    assert options_of(again) == options_of(layer)
    assert repr(again) == repr(layer)
    assert list(again.state_dict()) == list(layer.state_dict())
    for (key, got), want in zip(again.named_parameters(), layer.parameters(), strict=True):
        assert got.shape == want.shape
        assert got.is_contiguous()
        assert_close(got, want, key)


@every_case
def test_to_torch(case: Case) -> None:
    """Torch's layer made of a CP layer, a head and one of several in a joint tensor too."""
    layer = case.make()
    dense = case.kind.unmake(layer)
    assert type(dense) is case.kind.dense
    assert options_of(dense) == options_of(case.torch_layer())
    want = truth(case)[0]
    with torch.no_grad():  # torch differentiates no lookup of complex rows
        assert_close(dense(case.leaves().x), want, "y")
    assert storages(dense).isdisjoint(storages(layer))
    case.parameters(layer)["factor 0"].requires_grad_(False)
    assert case.kind.unmake(layer).weight.requires_grad


@few_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_stays(case: Case, dtype: torch.dtype) -> None:
    """Rounded once, from a product in float32."""
    ours = case.make(dtype)
    if single(case):
        ours = converted(case, dense_layer(case, dtype))
    assert {p.dtype for p in ours.parameters()} == {dtype}
    again = case.kind.unmake(ours)
    assert {p.dtype for p in again.parameters()} == {dtype}
    exact = case.weight(case.leaves(dtype).to(torch.float64))
    close = torch.finfo(torch.float32).eps * 16 * exact.abs().max()
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + torch.finfo(dtype).smallest_normal
    assert ((again.weight.double() - exact).abs() <= rounding + close).all()


@pytest.mark.parametrize("case", params([case for case in FEW if single(case)]))
@pytest.mark.parametrize("trained", [True, False])
def test_flags_stay(case: Case, trained: bool) -> None:
    layer = dense_layer(case)
    layer.weight.requires_grad_(trained)
    layer.train(trained)
    if case.bias:
        layer.bias.requires_grad_(not trained)
    ours = converted(case, layer)
    assert {p.requires_grad for p in ours.cp.parameters()} == {trained}
    assert all(module.training is trained for module in ours.modules())
    again = case.kind.unmake(ours)
    assert again.training is trained
    flags = {key: p.requires_grad for key, p in again.named_parameters()}
    assert flags == {key: p.requires_grad for key, p in layer.named_parameters()}


@pytest.mark.parametrize("case", params([case for case in FEW if single(case)]))
def test_the_generator_is_not_used_up(case: Case) -> None:
    """Nothing is drawn in either direction."""
    layer = dense_layer(case)
    state = torch.get_rng_state()
    ours = converted(case, layer)
    case.kind.unmake(ours)
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.device.type for p in ours.parameters()} == {"cpu"}
