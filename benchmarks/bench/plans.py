"""The plans a contestant follows, under short names, and what the cost model expects of them."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.bench.cases import Case, ConvCase, LinearCase, Mode
from polyadic.kernels.depthwise import Geometry
from polyadic.planner import choice
from polyadic.planner.ask import plan_conv, plan_linear
from polyadic.planner.calibrated import machine_at
from polyadic.planner.request import Request, place_now, request
from polyadic.plans import ConvPlan, ConvRoute, LinearPlan, LinearRoute, Memory


def _route_name(route: LinearRoute | ConvRoute) -> str:
    if route.kind == "dense":
        return "rebuild" if isinstance(route, LinearRoute) else f"rebuild {route.layout}"
    if isinstance(route, ConvRoute):
        return f"{route.depthwise} {route.layout}"
    ins, outs = ("+".join(map(str, groups)) for groups in (route.in_groups, route.out_groups))
    return f"{ins} → {outs}"


def plan_name(plan: LinearPlan | ConvPlan) -> str:
    """Both routes where they differ; of a linear plan the lengths of its groups of modes."""
    forward, backward = _route_name(plan.forward), _route_name(plan.backward)
    return forward if forward == backward else f"{forward}; backward {backward}"


def forced_plans(case: Case) -> dict[str, LinearPlan | ConvPlan]:
    """Plans with the same route forward and backward, by name."""
    asked = _request(case)
    plans = choice.kind_of(asked).candidates(asked)
    return {f"plan {plan_name(plan)}": plan for plan in plans}


def _request(case: Case, **options: Any) -> Request:
    if isinstance(case, LinearCase):
        return request(case.format, case.batch, **options)
    options |= {"geometry": _geometry(case), "size": (case.size, case.size)}
    return request(case.format, case.batch, **options)


def chosen_plan(case: Case, x: torch.Tensor, memory: Memory) -> LinearPlan | ConvPlan:
    """Ask the planner, as the layer does."""
    if isinstance(case, LinearCase):
        return plan_linear(case.format, x, memory)
    return plan_conv(case.format, _geometry(case), x, memory)


def _geometry(case: ConvCase) -> Geometry:
    pad = (case.padding, case.padding)
    return Geometry((case.kernel,) * 2, (case.stride,) * 2, (pad, pad), (1, 1))


def predicted(case: Case, plan: LinearPlan | ConvPlan, mode: Mode, x: torch.Tensor) -> float:
    """Seconds the cost model expects of a plan, on this machine with the threads set now."""
    options: dict[str, Any] = {"dtype": x.dtype, "device": x.device.type}
    if isinstance(case, ConvCase):
        options["channels_last"] = x.stride(1) == 1
    return choice.predict(_request(case, **options), plan, training=mode == "training")


def rates_source(x_device: str, dtype: torch.dtype) -> str:
    """Tell whether predictions rest on ``"built-in"`` or ``"calibrated"`` rates."""
    return machine_at(place_now(x_device, dtype)).source


def short_name(contestant: str) -> str:
    """Name of a forced plan's contestant without the word plan."""
    return contestant.removeprefix("plan ")
