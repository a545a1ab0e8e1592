"""Plans of a linear layer, the steps of each plan, and the cheapest plan for a request.

The steps mirror ``kernels.linear``. A factorized plan is made of four pieces, each side in each
direction, and any grouping of the modes of one piece fits any grouping of the others:

    forward    contract the in side    expand the out side
    backward   partials of the out side    partials of the in side

A piece of order D can be grouped in up to 2^(D-1) ways, so that all plans together would be too
many to price. But the FLOPs and bytes of a piece depend on its own grouping alone. So ``choose``
prices each piece once for each grouping, combines the prices of the two pieces of a direction, and
takes the cheapest pair. The winner then competes with the routes that have no grouping: rebuilding
W, and our own kernels on a device that they serve.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping

from polyadic.formats import LinearFormat, Shape
from polyadic.kernels.backend import serves
from polyadic.kernels.pairs import padded_rank
from polyadic.planner.calibrated import machine_for
from polyadic.planner.machine import Machine
from polyadic.planner.multilinear import (
    contract_steps,
    expand_steps,
    khatri_rao_backward_steps,
    khatri_rao_steps,
    partials_steps,
)
from polyadic.planner.request import Request
from polyadic.planner.steps import Step, gemm, stream
from polyadic.plans import Backend, Groups, Keep, LinearPlan, LinearRoute

Steps = tuple[list[Step], list[Step]]


def compositions(total: int) -> Iterator[Groups]:
    """Yield all ways to cut ``total`` modes into consecutive groups, the single group first."""
    for first in range(total, 0, -1):
        if first == total:
            yield (total,)
        else:
            for rest in compositions(total - first):
                yield (first, *rest)


def groupings(order: int) -> list[Groups]:
    """List the groupings that are priced: all up to order 5, else one, two and D groups."""
    if order <= 5:
        return list(compositions(order))
    two = [(left, order - left) for left in range(1, order)]
    return [(order,), *two, (1,) * order]


def _format(request: Request) -> LinearFormat:
    assert isinstance(request.format, LinearFormat)
    return request.format


def _keep(request: Request) -> Keep:
    """What a plan with a closed-form backward keeps under the request's bound of memory."""
    return "x" if request.memory == "least" else "x and z"


def candidates(request: Request) -> list[LinearPlan]:
    """List the plans that take one route in both directions."""
    fmt, keep = _format(request), _keep(request)
    m, n = len(fmt.in_shape), len(fmt.out_shape)
    routes = [LinearRoute(i, o) for i, o in itertools.product(groupings(m), groupings(n))]
    backends: list[Backend] = ["torch"]
    if serves("linear", request.device, request.dtype):
        routes.append(LinearRoute((m,), (n,), by="triton"))
        backends.append("triton")
    plans = [LinearPlan(route, route, keep) for route in routes]
    if request.rebuild:
        rebuilding = [LinearRoute((m,), (n,), "dense", by) for by in backends]
        plans += [LinearPlan(route, route, "x") for route in rebuilding]
    return plans


def simplest(request: Request) -> LinearPlan:
    """Return the plan for sizes that a compiler does not know; it is right for any sizes."""
    fmt = _format(request)
    route = LinearRoute((len(fmt.in_shape),), (len(fmt.out_shape),))
    return LinearPlan(route, route, _keep(request))


def choose(request: Request) -> LinearPlan:
    """Return the cheapest plan for the request as it is; ``choice.choose`` remembers it."""
    machine, fmt = machine_for(request), _format(request)
    m, n = (len(fmt.in_shape),), (len(fmt.out_shape),)

    # Routes without a grouping to choose: they compete with the best factorized route.
    rivals = [LinearRoute(m, n, "dense")] if request.rebuild else []
    if serves("linear", request.device, request.dtype):
        rivals += [dataclasses.replace(route, by="triton") for route in rivals]
        rivals.append(LinearRoute(m, n, by="triton"))

    def cheapest(first: LinearRoute, steps: Callable[[LinearRoute], list[Step]]) -> LinearRoute:
        return min((first, *rivals), key=lambda route: machine.total(steps(route)))

    forward = cheapest(_forward_route(request, machine), lambda r: forward_steps(request, r))
    keep: Keep = _keep(request) if forward.kind == "factorized" else "x"
    backward = cheapest(
        _backward_route(request, machine), lambda r: backward_steps(request, r, keep)
    )
    simple = forward.is_khatri_rao and forward.by == "torch"
    if request.memory == "fast" and simple and backward == forward:
        return LinearPlan(forward, backward, "autograd")
    # A backward that rebuilds W does not use Z, so that keeping it would waste memory.
    return LinearPlan(forward, backward, keep if backward.kind == "factorized" else "x")


# For each grouping of one side, the seconds of the processor and of the device.
Spent = Mapping[Groups, tuple[float, float]]


def _cheapest(machine: Machine, ins: Spent, outs: Spent) -> LinearRoute:
    """Return the groupings of both sides that are cheapest together.

    A CPU takes the sum of all seconds, so that the cheapest grouping of each side would do. A GPU
    takes max(launching, working), each summed over both sides: a side with many launches and
    little work can hide behind a side with few launches and much work.
    """

    def time(pair: tuple[Groups, Groups]) -> float:
        (host, work), (more_host, more_work) = ins[pair[0]], outs[pair[1]]
        return machine.time(host + more_host, work + more_work)

    return LinearRoute(*min(itertools.product(ins, outs), key=time))


def _forward_route(request: Request, machine: Machine) -> LinearRoute:
    """Return the factorized forward that is cheapest: contract the in side, expand the out side."""
    fmt, rows = _format(request), request.batch
    ins = {
        g: machine.spent(contract_steps(request, rows, fmt.in_shape, fmt.rank, g))
        for g in groupings(len(fmt.in_shape))
    }
    outs = {
        g: machine.spent(expand_steps(request, rows, fmt.out_shape, fmt.rank, g))
        for g in groupings(len(fmt.out_shape))
    }
    return _cheapest(machine, ins, outs)


def _backward_route(request: Request, machine: Machine) -> LinearRoute:
    """Return the factorized backward that is cheapest: the partials of both sides.

    The out side makes G = dY KC, the in side takes G. If Z is not kept, the in side is contracted
    again, by the same groups, which is added to its price.
    """
    fmt, rows = _format(request), request.batch

    def in_steps(g: Groups) -> list[Step]:
        keeps_z = request.memory != "least"
        again = [] if keeps_z else contract_steps(request, rows, fmt.in_shape, fmt.rank, g)
        side = (request, rows, fmt.in_shape, fmt.rank, g)
        return again + partials_steps(*side, wrt_x=True, wrt_z=False)

    def out_steps(g: Groups) -> list[Step]:
        side = (request, rows, fmt.out_shape, fmt.rank, g)
        return partials_steps(*side, wrt_x=False, wrt_z=True)

    ins = {g: machine.spent(in_steps(g)) for g in groupings(len(fmt.in_shape))}
    outs = {g: machine.spent(out_steps(g)) for g in groupings(len(fmt.out_shape))}
    return _cheapest(machine, ins, outs)


def obeyed(request: Request, plan: LinearPlan) -> tuple[Request, LinearPlan]:
    """Return what runs: weights λ become one more in factor, with a mode of size 1, in front."""
    if not request.weights:
        return request, plan
    fmt = dataclasses.replace(request.format, in_shape=(1, *request.format.in_shape))
    return dataclasses.replace(request, format=fmt, weights=False), plan.with_weights()


def steps(request: Request, plan: LinearPlan) -> Steps:
    """List the steps of a plan, forward and backward."""
    request, plan = obeyed(request, plan)
    keep = plan.keep if plan.keeps_z else "x"
    return forward_steps(request, plan.forward), backward_steps(request, plan.backward, keep)


def forward_steps(request: Request, route: LinearRoute) -> list[Step]:
    """List the steps that make Y = X W by one route."""
    fmt, rows = _format(request), request.batch
    m, n, r = fmt.in_features, fmt.out_features, fmt.rank
    if route.is_khatri_rao and request.device == "cuda":
        r = padded_rank(r)
        return [
            *_both_matrices(request, fmt, r, route),
            gemm(request, "Z = X KA", rows, m, r),
            gemm(request, "Y = Z KC^T", rows, r, n, views=1),
        ]
    if route.kind == "dense":
        r = padded_rank(r) if request.device == "cuda" else r
        return [
            *_both_matrices(request, fmt, r, route),
            gemm(request, "W^T = KC KA^T", n, r, m, views=1),
            gemm(request, "Y = X W", rows, m, n, views=1),
        ]
    contract = contract_steps(request, rows, fmt.in_shape, r, route.in_groups)
    expand = expand_steps(request, rows, fmt.out_shape, r, route.out_groups)
    return [*_side("in", contract), *_side("out", expand)]


def _side(side: str, steps: Iterable[Step]) -> list[Step]:
    """Put the side that the steps work on in front of their names."""
    return [dataclasses.replace(step, name=f"{side}: {step.name}") for step in steps]


def backward_steps(request: Request, route: LinearRoute, keep: Keep | int) -> list[Step]:
    """List the steps that make all gradients by one route; ``keep`` is ``LinearPlan.keep``."""
    fmt, rows = _format(request), request.batch
    m, n, r = fmt.in_features, fmt.out_features, fmt.rank
    if route.is_khatri_rao and request.device == "cuda" and keep != "autograd":
        r = padded_rank(r)
        again = [gemm(request, "Z = X KA again", rows, m, r)] if keep == "x" else []
        return [
            *_both_matrices(request, fmt, r, route),
            *again,
            gemm(request, "G = dY KC", rows, n, r),
            gemm(request, "dKC = dY^T Z", n, rows, r, views=1),
            gemm(request, "dX = G KA^T", rows, r, m, views=1),
            gemm(request, "dKA = X^T G", m, rows, r, views=1),
            *_all_mttkrps(request, fmt, r, route),
        ]
    if route.kind == "dense":
        on_gpu = request.device == "cuda"
        r = padded_rank(r) if on_gpu else r
        steps = [
            *_both_matrices(request, fmt, r, route),
            gemm(request, "W^T = KC KA^T", n, r, m, views=1),
            gemm(request, "dX = dY W^T", rows, n, m),
            gemm(request, "dW^T = dY^T X", n, rows, m, views=1),
            gemm(request, "dKA = dW KC", m, n, r, views=1),
            gemm(request, "dKC = dW^T KA", n, m, r, views=2),
        ]
        if on_gpu:
            return steps + _all_mttkrps(request, fmt, r, route)
        for name, shape in (("in", fmt.in_shape), ("out", fmt.out_shape)):
            steps += khatri_rao_backward_steps(request, f"MTTKRP {name}", shape, r)
        return steps
    contracted: list[Step] = []
    if keep == "x":
        contracted = contract_steps(request, rows, fmt.in_shape, r, route.in_groups)
    options = {"matrices_kept": keep == "autograd"}
    outs = partials_steps(
        request, rows, fmt.out_shape, r, route.out_groups, wrt_x=False, wrt_z=True, **options
    )
    ins = partials_steps(
        request, rows, fmt.in_shape, r, route.in_groups, wrt_x=True, wrt_z=False, **options
    )
    return [*_side("again in", contracted), *_side("out", outs), *_side("in", ins)]


def _both_khatri_rao(request: Request, fmt: LinearFormat) -> list[Step]:
    """List the steps that make KA and KC with torch's operations."""
    return [
        *khatri_rao_steps(request, "KA", fmt.in_shape, fmt.rank),
        *khatri_rao_steps(request, "KC", fmt.out_shape, fmt.rank),
    ]


def _both_matrices(
    request: Request, fmt: LinearFormat, columns: int, route: LinearRoute
) -> list[Step]:
    """List the steps that make KA and KC with so many columns; by Triton it is one launch."""
    sides = fmt.in_features, fmt.out_features
    if route.by == "triton":
        # We count the matrices that are written; the small factors stay in the cache.
        nbytes = request.item * sum(sides) * columns
        return [Step("KA and KC", "fused", 0, nbytes, elements=max(sides) * columns)]
    steps = _both_khatri_rao(request, fmt)
    if columns > fmt.rank:
        steps += [
            stream("columns of zeros", 2 * request.item * rows * columns, rows * columns)
            for rows in sides
        ]
    return steps


def _all_mttkrps(
    request: Request, fmt: LinearFormat, columns: int, route: LinearRoute
) -> list[Step]:
    """List the steps that make all factors' gradients from dK in float32, on a GPU."""
    if route.by == "triton":
        # One launch does it all, and reads dK once for each factor.
        read = len(fmt.in_shape) * fmt.in_features + len(fmt.out_shape) * fmt.out_features
        written = max(*fmt.in_shape, *fmt.out_shape) * fmt.rank
        return [Step("MTTKRPs", "fused", 0, 4 * read * columns, elements=written)]
    steps: list[Step] = []
    for name, shape in (("in", fmt.in_shape), ("out", fmt.out_shape)):
        if columns > fmt.rank:
            elements = math.prod(shape) * fmt.rank
            moved = 2 * max(request.item, 4) * elements
            steps.append(stream("columns of zeros off", moved, elements, views=2))
        steps += khatri_rao_backward_steps(request, f"MTTKRP {name}", shape, fmt.rank, wide=True)
    return steps


def kept_elements(request: Request, plan: LinearPlan) -> int:
    """Count the elements that stay for the backward besides parameters: X and what is kept."""
    fmt = _format(request)
    kept = request.batch * fmt.in_features + request.kept_beside
    if not plan.keeps_z:
        return kept
    kept += request.batch * fmt.rank
    if plan.keep != "autograd":
        return kept
    ins = (1, *fmt.in_shape) if request.weights else fmt.in_shape
    return kept + fmt.rank * (_products(ins) + _products(fmt.out_shape))


def _products(modes: Shape) -> int:
    """Count the rows of all partial Khatri-Rao products on the way to the whole one."""
    rows: int = sum(itertools.accumulate(modes, operator.mul))
    return rows - modes[0]


def dense_steps(request: Request) -> Steps:
    """List the steps of a dense linear layer: one GEMM forward, two backward."""
    fmt, rows = _format(request), request.batch
    m, n = fmt.in_features, fmt.out_features
    forward = [gemm(request, "Y = X W", rows, m, n)]
    return forward, [
        gemm(request, "dX = dY W^T", rows, n, m),
        gemm(request, "dW = X^T dY", m, rows, n),
    ]


def dense_kept(request: Request) -> int:
    """Count the elements that a dense layer keeps for the backward besides parameters: X."""
    return request.batch * _format(request).in_features + request.kept_beside


def describe(request: Request) -> str:
    """Say format and batch in words."""
    fmt = _format(request)
    return (
        f"linear {fmt.in_features} -> {fmt.out_features}, modes {fmt.in_shape} -> "
        f"{fmt.out_shape}, rank {fmt.rank}, {request.batch} rows of {request.dtype}"
    )
