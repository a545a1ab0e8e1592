"""Output and every gradient against torch's layer and its autograd to 1e-10.

In float64, and of every case in complex128 too.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import CASES, every_case, few_cases, over
from cases.protocol import Case, gradients, truth
from compare import assert_all_close, assert_close
from polyadic.nn.kinds import KINDS


def test_every_kind_of_layer_has_cases() -> None:
    assert len({case.id for case in CASES}) == len(CASES)
    of_torch = {kind.cp for kind in KINDS if kind.dense is not None}
    assert {case.cls for case in CASES} == of_torch


def test_the_comparison_can_fail() -> None:
    want = torch.ones(3, dtype=torch.float64)
    for got in (want + 2e-10, want * float("nan"), want.float(), want[:2]):
        with pytest.raises(AssertionError):
            assert_close(got, want, "y")


@every_case
@pytest.mark.parametrize("memory", ["fast", "balanced", "least"])
def test_layer(case: Case, memory: str) -> None:
    check_layer(case, memory)


def check_layer(case: Case, memory: str) -> None:
    layer, leaves = case.make(memory=memory), case.leaves()
    if case.differentiable:
        leaves.x.requires_grad_()
    y = layer(leaves.x)
    y.backward(case.grad_y())
    got = {name: parameter.grad for name, parameter in case.parameters(layer).items()}
    if case.differentiable:
        got["x"] = leaves.x.grad
    want, want_grads = truth(case)
    assert_close(y, want, "y")
    assert_all_close(got, want_grads)


@every_case
def test_complex_layer(case: Case) -> None:
    """Of complex numbers too, all by the layer and each by itself through the function."""
    complex_case = case.in_complex()
    check_layer(complex_case, "balanced")
    check_function(complex_case, "least")
    if complex_case.explicit:
        check_explicit_pair(complex_case)


@over(lambda case: case.exact.is_complex)
def test_conjugates_that_are_not_written_out(case: Case) -> None:
    """torch marks conj() of a tensor by a bit; input, parameters and gradient may have it."""

    def lazily(t: Tensor) -> Tensor:
        return t.conj().resolve_conj().conj()

    leaves = case.leaves().map(Tensor.requires_grad_)
    want, want_grads = truth(case)
    y = case.cp(leaves.map(lazily))
    assert_close(y, want, "y")
    assert_all_close(gradients(y, leaves, lazily(case.grad_y())), want_grads)
    layer = case.filled(case.build(dtype=case.exact), case.leaves().map(lazily))
    assert not any(p.is_conj() for p in layer.parameters())
    assert_close(layer(case.leaves().x), want, "y of the layer")


@every_case
def test_weight(case: Case) -> None:
    """``layer.weight`` is the dense one in torch's layout, which computes what the layer does."""
    layer, leaves = case.make(), case.leaves()
    assert_close(layer.weight, case.weight(leaves), "weight")
    y = case.apply(leaves.x, layer.weight, getattr(layer, "bias", None))
    assert_close(y, layer(leaves.x), "y")


@every_case
@pytest.mark.parametrize("memory", ["fast", "balanced", "least"])
def test_functional(case: Case, memory: str) -> None:
    check_function(case, memory)


def check_function(case: Case, memory: str) -> None:
    leaves = case.leaves().map(Tensor.requires_grad_)
    y = case.cp(leaves, memory=memory)
    want, want_grads = truth(case)
    assert_close(y, want, "y")
    assert_all_close(gradients(y, leaves, case.grad_y()), want_grads)


@over(lambda case: case.explicit)
def test_explicit_pair(case: Case) -> None:
    check_explicit_pair(case)


def check_explicit_pair(case: Case) -> None:
    leaves = case.leaves()
    y, saved = case.cp_forward(leaves)
    grads = case.cp_backward(case.grad_y(), saved)
    want, want_grads = truth(case)
    bias = 0.0 if leaves.bias is None else leaves.bias.view(-1, *[1] * len(case.size))
    assert_close(y + bias, want, "y")
    assert_all_close(grads, {name: g for name, g in want_grads.items() if name != "bias"})
    assert not y.requires_grad
    assert not any(g.requires_grad for g in grads.values())


@every_case
def test_without_gradients(case: Case) -> None:
    layer, leaves = case.make(), case.leaves()
    with torch.no_grad():
        assert_close(layer(leaves.x), truth(case)[0], "y")
    with torch.inference_mode():
        assert_close(case.make()(case.leaves().x).clone(), truth(case)[0], "y")


@every_case
def test_one_gradient_at_a_time(case: Case) -> None:
    """The backward leaves out what nobody asks for; what is asked for stays the same."""
    want = truth(case)[1]
    for name in want:
        leaves = case.leaves()
        leaf = leaves.named()[name].requires_grad_()
        y = case.cp(leaves)
        (got,) = torch.autograd.grad(y, [leaf], case.grad_y())
        assert_close(got, want[name], f"gradient of {name} alone")


@every_case
def test_gradient_of_other_strides(case: Case) -> None:
    """An incoming gradient need not be contiguous; that of ``sum()`` is expanded."""
    want = truth(case)[1]
    grad_y = case.grad_y()
    grad_y = grad_y.transpose(0, -1).contiguous().transpose(0, -1)
    leaves = case.leaves().map(Tensor.requires_grad_)
    assert_all_close(gradients(case.cp(leaves), leaves, grad_y), want)

    named = leaves.named()
    got = torch.autograd.grad(case.cp(leaves).sum().real, list(named.values()))
    ones = torch.autograd.grad(case.dense(leaves).sum().real, list(named.values()))
    assert_all_close(dict(zip(named, got, strict=True)), dict(zip(named, ones, strict=True)))


@pytest.mark.usefixtures("poison")
@every_case
def test_poisoned_memory(case: Case) -> None:
    assert torch.empty(3).isnan().all()
    want, want_grads = truth(case)
    for wanted in want_grads:
        leaves = case.leaves()
        leaf = leaves.named()[wanted].requires_grad_()
        y = case.cp(leaves, memory="least")
        assert_close(y, want, "y")
        (got,) = torch.autograd.grad(y, [leaf], case.grad_y())
        assert_close(got, want_grads[wanted], f"gradient of {wanted} alone")


@over(lambda case: bool(case.dtypes))
def test_runs_are_bitwise_equal(case: Case) -> None:
    runs = []
    for _ in range(2):
        leaves = case.leaves(torch.float32).map(Tensor.requires_grad_)
        y = case.cp(leaves)
        grads = gradients(y, leaves, case.grad_y(torch.float32))
        runs.append([y, *grads.values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@few_cases
def test_two_backwards_of_one_graph(case: Case) -> None:
    """A retained graph gives the same gradients again: nothing kept is overwritten."""
    leaves = case.leaves().map(Tensor.requires_grad_)
    y = case.cp(leaves)
    named = leaves.named()
    first = torch.autograd.grad(y, list(named.values()), case.grad_y(), retain_graph=True)
    second = torch.autograd.grad(y, list(named.values()), case.grad_y())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@few_cases
def test_overwritten_leaves_are_noticed(case: Case) -> None:
    """Of every leaf whose value the backward needs; of a padded x it has a copy of its own."""
    copied = {"x"} if case.options.get("padding_mode", "zeros") != "zeros" else set()
    for name in case.leaves().named().keys() - {"bias"} - copied:
        leaves = case.leaves().map(Tensor.requires_grad_)
        y = case.cp(leaves)
        with torch.no_grad():
            leaves.named()[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(case.grad_y())


@few_cases
def test_a_call_seen_before_sees_new_values_layouts_and_gradients(case: Case) -> None:
    """What is remembered of a call is how to compute it, never what it computed."""
    layer, x = case.make(), case.leaves().x
    for _ in range(2):
        y = layer(x)
        with torch.no_grad():
            assert_close(layer(x), y, "y without gradients")
            if x.dim() == 4:
                assert_close(layer(x.contiguous(memory_format=torch.channels_last)), y, "y of rows")
            leaves = case.leaves().of({**case.parameters(layer), "x": x})
            assert_close(y, case.dense(leaves), "y")
            for parameter in layer.parameters():
                parameter.mul_(1.5)
        assert y.requires_grad
