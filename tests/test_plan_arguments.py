"""Plans as values: what they are made of, what they say, and which are refused."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import BY_ID
from cases.conv import ROUTES
from cases.linear import linear
from polyadic import ConvPlan, ConvRoute, LinearPlan, LinearRoute
from polyadic.functional.boundary import known_calls
from polyadic.nn import CPConv2d, CPConvTranspose2d, CPLinear

Groups = tuple[int, ...]


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
    case = linear("format", (2, 3, 2), (5, 2), 3, (4,))
    right, wrong = LinearRoute((1, 2), (1, 1)), LinearRoute(in_groups, out_groups)
    plan = LinearPlan(right, wrong) if backward else LinearPlan(wrong, right)
    for call in (case.cp, case.cp_forward):
        with pytest.raises(ValueError, match=rf"plan's {message} .* cover .* modes"):
            call(case.leaves(), plan=plan)


def test_a_plan_of_the_other_type_is_refused() -> None:
    linear_case, conv_case = BY_ID["linear-order3"], BY_ID["conv-3x3"]
    linear_plan = LinearPlan(LinearRoute((3,), (3,)), LinearRoute((3,), (3,)))
    conv_plan = ConvPlan(ConvRoute(), ConvRoute())
    for case, plan, wanted in (
        (linear_case, conv_plan, "LinearPlan"),
        (conv_case, linear_plan, "ConvPlan"),
    ):
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
            lambda: LinearPlan(LinearRoute((1, 1), (2,)), LinearRoute((1, 1), (2,)), "autograd"),
            "keep='autograd' leaves the backward to autograd",
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
    plan = LinearPlan(route, LinearRoute((3,), (2,), "dense"), keep="x")
    assert hash(plan) == hash(LinearPlan(LinearRoute((1, 2), (2,)), plan.backward, keep="x"))
    with pytest.raises(AttributeError):
        plan.keep = True
    for number, name in ((False, "x"), (1, "x and z"), (2, "autograd")):
        named = LinearPlan(LinearRoute((3,), (2,)), LinearRoute((3,), (2,)), name)
        assert dataclasses.replace(named, keep=number) == named
    assert "split 1|2" in str(plan)
    assert "rebuild" in str(plan)
    for route in ROUTES:
        assert route.layout in str(ConvPlan(route, route))


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
