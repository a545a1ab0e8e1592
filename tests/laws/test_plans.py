"""The law of plans: every plan computes the same map, and the same gradients of it."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_derivatives import as_function, assert_trees_close, second_derivatives
from torch import Tensor, nn
from torch.func import jvp, vmap

from cases import BY_ID, Case, Leaves, gradients, params, truth
from compare import assert_all_close, assert_close
from polyadic import ConvPlan, ConvRoute, LinearPlan, LinearRoute
from polyadic.functional.boundary import known_calls
from polyadic.nn import CPConv2d, CPConvTranspose2d, CPLinear

Groups = tuple[int, ...]
Plan = LinearPlan | ConvPlan
GROUPED = {
    1: [(1,)],
    2: [(2,), (1, 1)],
    3: [(3,), (1, 2), (2, 1), (1, 1, 1)],
    4: [(4,), (1, 3), (3, 1), (2, 2), (1, 1, 2), (1, 2, 1), (2, 1, 1), (1, 1, 1, 1)],
}
CONV_ROUTES = [
    ConvRoute(layout, depthwise, kind)
    for layout in ("channels_last", "channels_first")
    for depthwise in ("merged", "separable")
    for kind in ("factorized", "dense")
]
CONV_PLANS = [
    ConvPlan(forward, backward, keep)
    for forward, backward, keep in itertools.product(CONV_ROUTES, CONV_ROUTES, (0, 1, 2))
]


def linear_routes(case: Case) -> list[LinearRoute]:
    ins, outs = (GROUPED[len(group)] for group in case.tensorized_shape)
    routes = [LinearRoute(i, o) for i, o in itertools.product(ins, outs)]
    return [*routes, LinearRoute(ins[0], outs[0], "dense")]


def every_plan(case: Case) -> Iterator[Plan]:
    """Every route forward and backward, together with itself and with another one."""
    if not case.linear:
        yield from (
            ConvPlan(forward, backward, keep)
            for forward, backward in paired(CONV_ROUTES)
            for keep in (0, 1, 2)
        )
        return
    for forward, backward in paired(linear_routes(case)):
        yield LinearPlan(forward, backward, True)
        yield LinearPlan(forward, backward, False)


def paired(routes: list[Any]) -> list[tuple[Any, Any]]:
    return [*zip(routes, routes, strict=True), *zip(routes, reversed(routes), strict=True)]


def plans_one_route(case: Case) -> Iterator[Plan]:
    """Plans that go back as they went forward: fewer, but every route is there."""
    return (plan for plan in every_plan(case) if plan.forward == plan.backward)


def check_plan(case: Case, plan: Plan) -> None:
    """Output and every gradient, through autograd and through the explicit pair."""
    want, want_grads = truth(case)
    leaves = case.leaves().map(Tensor.requires_grad_)
    y = case.cp(leaves, plan=plan)
    assert_close(y, want, f"y by {plan}")
    assert_all_close(gradients(y, leaves, case.grad_y()), want_grads)

    y, saved = case.cp_forward(case.leaves(), plan=plan)
    grads = case.cp_backward(case.grad_y(), saved)
    bias = 0.0 if leaves.bias is None else leaves.bias.detach().view(-1, *[1] * len(case.size))
    assert_close(y + bias, want, f"y by {plan}")
    assert_all_close(grads, {name: g for name, g in want_grads.items() if name != "bias"})
    assert len(saved.kept) <= int(plan.keep)


EXHAUSTIVE = [
    BY_ID[name]
    for name in (
        "linear-order1-no-bias-lambda",
        "linear-order2-lead-with-0",
        "linear-order3-primes-lambda",
        "linear-unequal-4-2",
        "linear-order3-size1-middle",
        "conv-1d-k4-same",
        "conv-1x1-stride",
        "conv-1x1-pad-stride",
        "conv-1x3-stride-on-both",
        "conv-3x3-batch0",
        "conv-3x3-channels-last-lambda",
        "conv-4x2-same-mixed",
        "conv-3d-1x3x1-stride",
        "conv-3d-2x3x2-same",
    )
]
FEW = [
    BY_ID[name]
    for name in (
        "linear-order3-primes-lambda",
        "linear-unequal-4-2",
        "conv-1d-k4-same",
        "conv-1x1-rank-above-m",
        "conv-3x3-unbatched-lambda",
        "conv-3d-1x3x1-stride",
    )
]


@pytest.mark.parametrize("case", params(EXHAUSTIVE))
def test_every_plan_of_a_case(case: Case) -> None:
    for plan in every_plan(case):
        check_plan(case, plan)


def test_every_conv_plan() -> None:
    """What one route keeps, any other can use."""
    for plan in CONV_PLANS:
        check_plan(BY_ID["conv-3x3-all-options"], plan)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", params(FEW))
def test_one_gradient_at_a_time(case: Case) -> None:
    """What a plan leaves out because nobody asks for it is never read."""
    want = truth(case)[1]
    for plan, name in itertools.product(plans_one_route(case), want):
        leaves = case.leaves()
        leaf = leaves.named()[name].requires_grad_()
        (got,) = torch.autograd.grad(case.cp(leaves, plan=plan), [leaf], case.grad_y())
        assert_close(got, want[name], f"gradient of {name} alone by {plan}")


@pytest.mark.parametrize("case", params(FEW))
def test_double_backward(case: Case) -> None:
    want = second_derivatives(case, case.expected)
    for plan in plans_one_route(case):
        got = second_derivatives(case, lambda leaves, plan=plan: case.cp(leaves, plan=plan))
        assert_trees_close(got, want, f"second derivative by {plan}")


@pytest.mark.parametrize("case", params(FEW))
def test_forward_mode_and_vmap(case: Case) -> None:
    dense, tensors = as_function(case, case.expected)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    stacked = [torch.stack([t, 2 * t + 1]) for t in tensors]
    want = jvp(dense, tuple(tensors), tangents)
    want_stacked = vmap(dense)(*stacked)
    grads_y = torch.stack([case.grad_y(), case.grad_y(seed=5)])
    leaves = [t.clone().requires_grad_() for t in tensors]
    want_grads = torch.autograd.grad(dense(*leaves), leaves, grads_y, is_grads_batched=True)
    for plan in plans_one_route(case):
        cp, _ = as_function(case, lambda leaves, plan=plan: case.cp(leaves, plan=plan))
        assert_trees_close(jvp(cp, tuple(tensors), tangents), want, f"jvp by {plan}")
        assert_close(vmap(cp)(*stacked), want_stacked, f"vmap by {plan}")
        grads = torch.autograd.grad(cp(*leaves), leaves, grads_y, is_grads_batched=True)
        assert_trees_close(grads, want_grads, f"batched gradients by {plan}")


@pytest.mark.parametrize("case", params(FEW))
def test_linear_in_each_factor(case: Case) -> None:
    """y(… A + s·B …) = y(… A …) + s·y(… B …), without bias; and likewise in x and λ."""
    leaves = case.leaves()
    without_bias = Leaves(leaves.x, leaves.factors, None, leaves.weights)
    for plan in plans_one_route(case):
        for name, tensor in without_bias.named().items():
            other = torch.randn_like(tensor)
            a, b, both = (
                case.cp(
                    without_bias.map(lambda t, v=v, old=tensor: v if t is old else t), plan=plan
                )
                for v in (tensor, other, tensor - 1.5 * other)
            )
            scale = max(a.abs().max().item(), b.abs().max().item())
            error = (a - 1.5 * b - both).abs().max().item()
            assert error <= 1e-12 * scale, f"not linear in {name} by {plan}"


@st.composite
def linear_cases(draw: st.DrawFn) -> tuple[Case, LinearPlan]:
    shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
    in_shape, out_shape = draw(shapes), draw(shapes)
    lead = draw(st.sampled_from([(), (0,), (1,), (3,), (2, 2), (7,)]))
    case = Case(
        "random",
        (in_shape, out_shape),
        draw(st.integers(1, 9)),
        lead,
        bias=draw(st.booleans()),
        weights=draw(st.booleans()),
        strides=draw(st.sampled_from(["contiguous", "sliced"])),
    )

    def route() -> LinearRoute:
        kind = draw(st.sampled_from(["factorized", "factorized", "dense"]))
        return LinearRoute(
            draw(st.sampled_from(GROUPED[len(in_shape)])),
            draw(st.sampled_from(GROUPED[len(out_shape)])),
            kind,
        )

    return case, LinearPlan(route(), route(), draw(st.booleans()))


@st.composite
def conv_cases(draw: st.DrawFn) -> tuple[Case, ConvPlan]:
    dims = draw(st.sampled_from([1, 2, 2, 3]))

    def each(low: int, high: int) -> Groups:
        return tuple(draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims)))

    shapes = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)
    kernel, dilation = each(1, 4 if dims < 3 else 3), each(1, 2)
    padding: Any = draw(st.sampled_from(["same", "valid", None]))
    if padding is None:
        padding = each(0, 2)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    covered = padding if isinstance(padding, tuple) else (0,) * dims
    size = tuple(
        max(1, r - 2 * p) + extra for r, p, extra in zip(reach, covered, each(0, 3), strict=True)
    )
    options = {
        "stride": (1,) * dims if padding == "same" else each(1, 3),
        "padding": padding,
        "dilation": dilation,
    }
    case = Case(
        "random",
        (draw(shapes), draw(shapes), kernel),
        draw(st.integers(1, 6)),
        draw(st.sampled_from([(), (0,), (1,), (2,)])),
        size,
        bias=draw(st.booleans()),
        weights=draw(st.booleans()),
        strides="channels_last" if dims > 1 and draw(st.booleans()) else "contiguous",
        options=options,
    )
    if case.strides == "channels_last" and not case.lead:
        case = Case(**{**vars(case), "strides": "sliced"})
    return case, draw(st.sampled_from(CONV_PLANS))


@given(linear_cases())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_random_linear_plans(drawn: tuple[Case, LinearPlan]) -> None:
    check_plan(*drawn)


@given(conv_cases())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_random_conv_plans(drawn: tuple[Case, ConvPlan]) -> None:
    check_plan(*drawn)


def test_the_law_can_fail() -> None:
    """Factors joined in another order are noticed."""
    case = BY_ID["linear-order2"]
    leaves = case.leaves()
    turned = Leaves(leaves.x, (*leaves.factors[1::-1], *leaves.factors[2:]), leaves.bias, None)
    other = Case("turned", ((3, 2), case.tensorized_shape[1]), case.rank, case.lead)
    for plan in every_plan(case):
        with pytest.raises(AssertionError, match="off by"):
            assert_close(other.cp(turned, plan=plan), truth(case)[0], "y")


@pytest.mark.parametrize(
    ("in_groups", "out_groups", "message"),
    [
        ((2,), (2,), "in_groups"),
        ((1, 1, 1, 1), (2,), "in_groups"),
        ((3,), (3,), "out_groups"),
        ((1, 2), (1,), "out_groups"),
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_a_plan_for_other_modes_is_refused(
    in_groups: Groups, out_groups: Groups, message: str, backward: bool
) -> None:
    case = Case("format", ((2, 3, 2), (5, 2)), 3, (4,))
    right, wrong = LinearRoute((1, 2), (1, 1)), LinearRoute(in_groups, out_groups)
    plan = LinearPlan(right, wrong) if backward else LinearPlan(wrong, right)
    for call in (case.cp, case.cp_forward):
        with pytest.raises(ValueError, match=rf"plan's {message} .* cover .* modes"):
            call(case.leaves(), plan=plan)


def test_a_plan_of_the_other_type_is_refused() -> None:
    linear, conv = BY_ID["linear-order3"], BY_ID["conv-3x3"]
    linear_plan = LinearPlan(LinearRoute((3,), (3,)), LinearRoute((3,), (3,)))
    conv_plan = ConvPlan(ConvRoute(), ConvRoute())
    for case, plan, wanted in ((linear, conv_plan, "LinearPlan"), (conv, linear_plan, "ConvPlan")):
        for call in (case.cp, case.cp_forward):
            with pytest.raises(TypeError, match=f"plan must be a polyadic.{wanted}"):
                call(case.leaves(), plan=plan)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearRoute((3,), (3,), "fast"), "kind must be one of"),
        (lambda: LinearRoute([3], (3,)), "in_groups must be a tuple of positive ints"),
        (lambda: LinearRoute((3,), (0, 3)), "out_groups must be a tuple of positive ints"),
        (lambda: LinearRoute((3,), (1.0,)), "out_groups must be a tuple of positive ints"),
        (lambda: ConvRoute(layout="last"), "layout must be one of"),
        (lambda: ConvRoute(depthwise="split"), "depthwise must be one of"),
        (lambda: ConvRoute(kind="rebuild"), "kind must be one of"),
        (lambda: ConvPlan(ConvRoute(), ConvRoute(), keep=3), "keep must be one of"),
        (
            lambda: LinearPlan(LinearRoute((2,), (2,)), LinearRoute((2,), (2,)), keep=3),
            "keep must be one of",
        ),
        (
            lambda: LinearPlan(LinearRoute((1, 1), (2,)), LinearRoute((1, 1), (2,)), keep=2),
            "keep=2 leaves the backward to autograd",
        ),
    ],
)
def test_malformed_plans_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LinearPlan("KR", "KR"), TypeError, "forward must be a LinearRoute, got str"),
        (lambda: ConvPlan(None, None), TypeError, "forward must be a ConvRoute, got NoneType"),
        (
            lambda: ConvPlan(ConvRoute(), LinearRoute((1,), (1,))),
            TypeError,
            "backward must be a ConvRoute, got LinearRoute",
        ),
        (
            lambda: LinearPlan(ConvRoute(), ConvRoute()),
            TypeError,
            "forward must be a LinearRoute, got ConvRoute",
        ),
        (lambda: ConvPlan(ConvRoute(), ConvRoute(), 1.0), ValueError, "keep must be one of"),
        (
            lambda: ConvPlan(ConvRoute(), ConvRoute(), torch.tensor([1, 2])),
            ValueError,
            "keep must be one of",
        ),
    ],
)
def test_a_plan_of_other_things_is_refused(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_plans_are_frozen_hashable_and_say_what_they_do() -> None:
    route = LinearRoute((1, 2), (2,))
    plan = LinearPlan(route, LinearRoute((3,), (2,), "dense"), keep=0)
    assert hash(plan) == hash(LinearPlan(LinearRoute((1, 2), (2,)), plan.backward, keep=0))
    with pytest.raises(AttributeError):
        plan.keep = True  # type: ignore[misc]
    assert "split 1|2" in str(plan)
    assert "rebuild" in str(plan)
    for conv_plan in CONV_PLANS:
        assert conv_plan.forward.layout in str(conv_plan)


@pytest.mark.parametrize(
    ("module", "planner", "layer", "x"),
    [
        ("linear", "plan_linear", CPLinear(12, 10, rank=3), torch.randn(5, 12)),
        ("conv", "plan_conv", CPConv2d(4, 6, 3, rank=3), torch.randn(2, 4, 8, 8)),
        (
            "conv",
            "plan_conv",
            CPConvTranspose2d(4, 6, 3, rank=3),
            torch.randn(2, 4, 5, 5),
        ),
    ],
)
def test_autocast_plans_for_the_dtype_computed_in(
    module: str, planner: str, layer: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    functions = importlib.import_module(f"polyadic.functional.{module}")
    plan = getattr(functions, planner)

    def recorded(*args: Any) -> Any:
        asked.extend(arg.dtype for arg in args if isinstance(arg, Tensor))
        return plan(*args)

    monkeypatch.setattr(functions, planner, recorded)
    known_calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert asked == [torch.bfloat16]
