"""The law of plans: each computes the same map and the same gradients, linear in every leaf."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap

from cases import BY_ID, FEW, every_case, few_cases, params
from cases.functions import as_function, second_derivatives
from cases.protocol import Case, Forced, Leaves, gradients, truth
from compare import assert_all_close, assert_close, assert_trees_close
from polyadic import LinearPlan

EXHAUSTIVE = [
    *FEW,
    *(
        BY_ID[name]
        for name in (
            "linear-order1-no-bias-lambda",
            "linear-order2-lead-with-0",
            "linear-order3-size1-middle",
            "conv-1x1-stride",
            "conv-1x1-pad-stride",
            "conv-1x3-stride-on-both",
            "conv-3x3-batch0",
            "conv-3x3-channels-last-lambda",
            "conv-4x2-same-mixed",
            "conv-3d-1x3x1-stride",
            "conv-groups-1x1",
            "conv-depthwise-multiplier",
            "conv-transpose-2d-1x1-stride-out",
            "conv-transpose-depthwise",
            "embedding-order2-lead-with-0",
            "head-order3-no-bias",
        )
    ),
]


def there_and_back(case: Case) -> Iterator[Forced]:
    """Plans that go back as they went forward: fewer, but every route is there."""
    for forced in case.plans():
        plan = forced.get("plan")
        if plan is None or plan.forward == plan.backward:
            yield forced


def check_plan(case: Case, forced: Forced) -> None:
    """Output and every gradient, through autograd and through the explicit pair."""
    want, want_grads = truth(case)
    leaves = case.leaves().map(Tensor.requires_grad_)
    y = case.cp(leaves, **forced)
    assert_close(y, want, f"y by {forced}")
    assert_all_close(gradients(y, leaves, case.grad_y()), want_grads)
    if not case.explicit:
        return
    y, saved = case.cp_forward(case.leaves(), **forced)
    grads = case.cp_backward(case.grad_y(), saved)
    bias = 0.0 if leaves.bias is None else leaves.bias.detach().view(-1, *[1] * len(case.size))
    assert_close(y + bias, want, f"y by {forced}")
    assert_all_close(grads, {name: g for name, g in want_grads.items() if name != "bias"})
    plan = forced["plan"]
    most = int(plan.keeps_z) if isinstance(plan, LinearPlan) else plan.keep
    assert len(saved.kept) <= most


@every_case
def test_every_route(case: Case) -> None:
    """Of all cases, with all that may be kept; a route's own backward, and another one's."""
    every = list(case.plans())
    for forced in every[:: max(1, len(every) // 24)]:
        check_plan(case, forced)


@pytest.mark.parametrize("case", params(EXHAUSTIVE))
def test_every_plan(case: Case) -> None:
    for forced in case.plans():
        check_plan(case, forced)


def test_every_pair_of_conv_routes() -> None:
    """What one route keeps, any other can use."""
    case = BY_ID["conv-3x3-all-options"]
    plans = [forced["plan"] for forced in case.plans()]
    routes = dict.fromkeys(plan.forward for plan in plans)
    for forward, backward, keep in itertools.product(routes, routes, (0, 1, 2)):
        check_plan(
            case,
            {"plan": dataclasses.replace(plans[0], forward=forward, backward=backward, keep=keep)},
        )


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", params(EXHAUSTIVE))
def test_one_gradient_at_a_time(case: Case) -> None:
    """What a plan leaves out because nobody asks for it is never read."""
    want = truth(case)[1]
    for forced, name in itertools.product(there_and_back(case), want):
        leaves = case.leaves()
        leaf = leaves.named()[name].requires_grad_()
        (got,) = torch.autograd.grad(case.cp(leaves, **forced), [leaf], case.grad_y())
        assert_close(got, want[name], f"gradient of {name} alone by {forced}")


@few_cases
def test_double_backward(case: Case) -> None:
    want = second_derivatives(case, case.dense)
    for forced in there_and_back(case):
        got = second_derivatives(case, lambda leaves, forced=forced: case.cp(leaves, **forced))
        assert_trees_close(got, want, f"second derivative by {forced}")


@few_cases
def test_forward_mode_and_vmap(case: Case) -> None:
    dense, tensors = as_function(case, case.dense)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    stacked = [torch.stack([t, 2 * t + 1]) for t in tensors]
    want = jvp(dense, tuple(tensors), tangents)
    want_stacked = vmap(dense)(*stacked)
    grads_y = torch.stack([case.grad_y(), case.grad_y(seed=5)])
    leaves = [t.clone().requires_grad_() for t in tensors]
    want_grads = torch.autograd.grad(dense(*leaves), leaves, grads_y, is_grads_batched=True)
    for forced in there_and_back(case):
        cp, _ = as_function(case, lambda leaves, forced=forced: case.cp(leaves, **forced))
        assert_trees_close(jvp(cp, tuple(tensors), tangents), want, f"jvp by {forced}")
        assert_close(vmap(cp)(*stacked), want_stacked, f"vmap by {forced}")
        grads = torch.autograd.grad(cp(*leaves), leaves, grads_y, is_grads_batched=True)
        assert_trees_close(grads, want_grads, f"batched gradients by {forced}")


@few_cases
def test_linear_in_each_leaf(case: Case) -> None:
    """y(… A + s·B …) = y(… A …) + s·y(… B …) without bias, in x, every factor and λ."""
    leaves = dataclasses.replace(case.leaves(), bias=None)
    for forced in there_and_back(case):
        for name, tensor in leaves.named().items():
            other = torch.randn_like(tensor)
            a, b, both = (
                case.cp(leaves.of({**leaves.named(), name: value}), **forced)
                for value in (tensor, other, tensor - 1.5 * other)
            )
            scale = max(a.abs().max().item(), b.abs().max().item())
            error = (a - 1.5 * b - both).abs().max().item()
            assert error <= 1e-12 * scale, f"not linear in {name} by {forced}"


def test_the_law_can_fail() -> None:
    """Factors joined in another order are noticed."""
    case = BY_ID["linear-order2"]
    leaves = case.leaves()
    turned = Leaves(leaves.x, (*leaves.factors[1::-1], *leaves.factors[2:]), leaves.bias, None)
    other = dataclasses.replace(case, tensorized_shape=((3, 2), case.tensorized_shape[1]))
    for forced in case.plans():
        with pytest.raises(AssertionError, match="off by"):
            assert_close(other.cp(turned, **forced), truth(case)[0], "y")
