"""Output and every gradient against dense torch and its autograd, in float64, to 1e-10."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import CASES, Case, every_case, gradients, params, truth
from compare import assert_all_close, assert_close


def test_the_table_is_large_and_irregular() -> None:
    assert len({case.id for case in CASES}) == len(CASES) >= 60
    orders = {len(group) for case in CASES for group in case.tensorized_shape[:2]}
    assert orders == {1, 2, 3, 4}
    kernels = {case.tensorized_shape[2] for case in CASES if not case.linear}
    assert kernels >= {(1, 1), (1, 3), (3, 3), (5, 3), (4, 4), (2, 3, 2)}
    assert {case.lead for case in CASES} >= {(), (0,), (1,), (2, 1, 3)}


def test_the_comparison_can_fail() -> None:
    want = torch.ones(3, dtype=torch.float64)
    for got in (want + 2e-10, want * float("nan"), want.float(), want[:2]):
        with pytest.raises(AssertionError):
            assert_close(got, want, "y")


@every_case
def test_layer(case: Case) -> None:
    layer, leaves = case.make(), case.leaves()
    x = leaves.x.requires_grad_()
    y = layer(x)
    y.backward(case.grad_y())
    got = {"x": x.grad, **{f"factor {i}": f.grad for i, f in enumerate(layer.cp.factors)}}
    if case.bias:
        got["bias"] = layer.bias.grad
    if case.weights:
        got["weights"] = layer.cp.weights.grad
    want, want_grads = truth(case)
    assert_close(y, want, "y")
    assert_all_close(got, want_grads)


@every_case
@pytest.mark.parametrize("memory", ["fast", "balanced", "least"])
def test_functional(case: Case, memory: str) -> None:
    leaves = case.leaves().map(Tensor.requires_grad_)
    y = case.cp(leaves, memory=memory)
    want, want_grads = truth(case)
    assert_close(y, want, "y")
    assert_all_close(gradients(y, leaves, case.grad_y()), want_grads)


@every_case
def test_explicit_pair(case: Case) -> None:
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
    got = torch.autograd.grad(case.cp(leaves).sum(), list(named.values()))
    ones = torch.autograd.grad(case.expected(leaves).sum(), list(named.values()))
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


@pytest.mark.parametrize("case", params([c for c in CASES if c.dtypes]))
def test_runs_are_bitwise_equal(case: Case) -> None:
    runs = []
    for _ in range(2):
        leaves = case.leaves(torch.float32).map(Tensor.requires_grad_)
        y = case.cp(leaves)
        grads = gradients(y, leaves, case.grad_y(torch.float32))
        runs.append([y, *grads.values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_two_backwards_of_one_graph() -> None:
    """A retained graph gives the same gradients again: nothing kept is overwritten."""
    case = next(c for c in CASES if c.id == "conv-3x3-all-options")
    leaves = case.leaves().map(Tensor.requires_grad_)
    y = case.cp(leaves)
    named = leaves.named()
    first = torch.autograd.grad(y, list(named.values()), case.grad_y(), retain_graph=True)
    second = torch.autograd.grad(y, list(named.values()), case.grad_y())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["x", "factor 0", "factor 2", "weights"])
@pytest.mark.parametrize("case_id", ["linear-order3-primes-lambda", "conv-3x3-all-options"])
def test_overwritten_leaves_are_noticed(case_id: str, name: str) -> None:
    case = next(c for c in CASES if c.id == case_id)
    leaves = case.leaves().map(Tensor.requires_grad_)
    y = case.cp(leaves)
    with torch.no_grad():
        leaves.named()[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(case.grad_y())
