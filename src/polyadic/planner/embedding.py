"""Plans of an embedding: which in factors are joined, and how the out factors act.

The steps mirror ``kernels.embedding``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from polyadic.formats import EmbeddingFormat, Shape
from polyadic.kernels.backend import serves
from polyadic.kernels.embedding import MOST_SCATTERED_ROWS
from polyadic.kernels.pairs import padded_rank
from polyadic.planner.calibrated import machine_for
from polyadic.planner.linear import Steps, groupings
from polyadic.planner.multilinear import (
    expand_steps,
    grouped,
    khatri_rao_backward_steps,
    khatri_rao_steps,
    partials_steps,
)
from polyadic.planner.request import Request
from polyadic.planner.steps import Step, casts, gemm, stream
from polyadic.plans import Groups, LinearPlan, LinearRoute

# Bytes of an index.
INDEX = 8


def _format(request: Request) -> EmbeddingFormat:
    assert isinstance(request.format, EmbeddingFormat)
    return request.format


def _is_served(request: Request) -> bool:
    """Whether a route by Triton can be followed."""
    scattered = max(_format(request).in_shape) <= MOST_SCATTERED_ROWS
    return scattered and serves("embedding", request.device, request.dtype)


def candidates(request: Request) -> list[LinearPlan]:
    """Every plan with the same route forward and backward, the in factors joined as chosen."""
    ins = joined_groups(request)
    outs = groupings(len(_format(request).out_shape))
    routes = [LinearRoute(ins, out) for out in outs]
    if _is_served(request):
        routes.append(LinearRoute(ins, (len(_format(request).out_shape),), by="triton"))
    return [LinearPlan(route, route, int(request.memory == "fast")) for route in routes]


def simplest(request: Request) -> LinearPlan:
    """The plan that is right for any sizes, where a compiler does not know them."""
    fmt = _format(request)
    route = LinearRoute((1,) * len(fmt.in_shape), (len(fmt.out_shape),))
    return LinearPlan(route, route, int(request.memory == "fast"))


def choose(request: Request) -> LinearPlan:
    """The cheapest plan for the request as it is; ``choice.choose`` remembers what this finds."""
    machine, ins = machine_for(request), joined_groups(request)
    outs, keep = groupings(len(_format(request).out_shape)), int(request.memory == "fast")
    if request.is_half:
        # A lookup rounds less than a GEMM: splitting would round once more than torch, twice over.
        outs = outs[:1]
    routes = [LinearRoute(ins, out) for out in outs]
    if _is_served(request):
        routes.append(LinearRoute(ins, (len(_format(request).out_shape),), by="triton"))
    forward = min(routes, key=lambda route: machine.total(forward_steps(request, route)))
    backward = min(routes, key=lambda r: machine.total(backward_steps(request, r, kept=keep)))
    return LinearPlan(forward, backward, keep)


def joined_groups(request: Request) -> Groups:
    """Lengths of groups of adjacent in modes whose Khatri-Rao product is worth forming.

    That is where it has at most half as many rows as there are indices to look up. Elsewhere than
    on a CPU rows are summed by a matrix product, for which the modes had better stay small.
    """
    modes = _format(request).in_shape
    if not request.on_cpu:
        return (1,) * len(modes)
    groups, sizes = [1], [modes[-1]]
    for mode in reversed(modes[:-1]):
        if 2 * mode * sizes[0] <= request.batch:
            groups[0], sizes[0] = groups[0] + 1, mode * sizes[0]
        else:
            groups.insert(0, 1)
            sizes.insert(0, mode)
    return tuple(groups)


def rejoined(request: Request, plan: LinearPlan) -> LinearPlan:
    """The plan with the in factors joined for the number of indices of the request."""
    ins = joined_groups(request)
    forward, backward = (
        dataclasses.replace(route, in_groups=ins) for route in (plan.forward, plan.backward)
    )
    return LinearPlan(forward, backward, plan.keep)


def _obeyed(request: Request, plan: LinearPlan) -> tuple[Request, LinearPlan]:
    """What runs: weights λ come as one more in factor, of mode size 1, in front."""
    if not request.weights:
        return request, plan
    fmt = _format(request)
    fmt = dataclasses.replace(fmt, in_shape=(1, *fmt.in_shape))
    return dataclasses.replace(request, format=fmt, weights=False), plan.with_weights()


def steps(request: Request, plan: LinearPlan) -> Steps:
    """Steps of a plan, forward and backward."""
    request, plan = _obeyed(request, plan)
    return (
        forward_steps(request, plan.forward),
        backward_steps(request, plan.backward, kept=plan.keep),
    )


def _maps(request: Request, name: str, passes: int, launches: int) -> Step:
    """Elementwise work on maps (b, R), so many of which are read or written."""
    elements = request.batch * request.format.rank
    nbytes = passes * max(request.item, 4) * elements
    return stream(name, nbytes, elements, launches=launches)


def _pick_steps(request: Request, joined: Sequence[Shape]) -> list[Step]:
    """Digits of the indices and the rows they point at, wide."""
    n, rank, rows = len(joined), request.format.rank, request.batch
    steps: list[Step] = []
    for modes in joined:
        if len(modes) > 1:
            # It stays wide, and is not cast back.
            made = khatri_rao_steps(request, "joined in factors", modes, rank)
            steps += made[:-1] if request.is_half else made
    if n > 1:
        nbytes = 4 * (n - 1) * INDEX * rows
        steps.append(stream("digits", nbytes, rows, launches=2 * (n - 1)))
    steps.append(_maps(request, "rows of the in factors", 2 * n, n))
    single = sum(len(modes) == 1 for modes in joined)
    return steps + casts(request, "rows", single, single * rows * rank)


def _product_steps(request: Request, joined: Sequence[Shape]) -> list[Step]:
    others = len(joined) - 1
    steps = [_maps(request, "Z, their product", 3 * others, others)] if others else []
    return steps + casts(request, "Z", 1, request.batch * request.format.rank)


def forward_steps(request: Request, route: LinearRoute) -> list[Step]:
    """Rows of the table for so many indices."""
    fmt = _format(request)
    if route.by == "triton":
        return [_lookup(request)]
    joined = grouped(fmt.in_shape, route.in_groups)
    return [
        *_pick_steps(request, joined),
        *_product_steps(request, joined),
        *expand_steps(request, request.batch, fmt.out_shape, fmt.rank, route.out_groups),
    ]


def backward_steps(request: Request, route: LinearRoute, *, kept: int) -> list[Step]:
    """Gradients of all factors."""
    fmt, rows = _format(request), request.batch
    if route.by == "triton":
        return _fused_backward(request, kept)
    joined, rank = grouped(fmt.in_shape, route.in_groups), fmt.rank
    steps = _pick_steps(request, joined)
    if not kept:
        steps += _product_steps(request, joined)
    steps += partials_steps(
        request, rows, fmt.out_shape, rank, route.out_groups, wrt_x=False, wrt_z=True
    )
    steps += casts(request, "G", 1, rows * rank)
    if len(joined) > 1:
        # Prefix products, suffix products, and their combination for each mode.
        products = 3 * len(joined) - 4
        steps.append(_maps(request, "G times the other rows", 3 * products, products))
    for modes in joined:
        steps += _sum_by_digit(request, math.prod(modes))
        steps += khatri_rao_backward_steps(request, "MTTKRP in", modes, rank, wide=True)
    return steps


def _lookup(request: Request) -> Step:
    """Digits, rows, their product and its product with KC in one launch."""
    fmt, rows = _format(request), request.batch
    columns, n = padded_rank(fmt.rank), fmt.out_features
    moved = rows * (INDEX + request.item * n) + request.item * n * columns
    return Step("Y, looked up", "fused", 2 * rows * columns * n, moved, elements=rows * n)


def _fused_backward(request: Request, kept: int) -> list[Step]:
    """Z again with KC, or KC alone; G; the sum of rows by digit; dKC; factors' gradients."""
    fmt, rows, item = _format(request), request.batch, request.item
    columns, n = padded_rank(fmt.rank), fmt.out_features
    maps = 0 if kept else rows * columns
    scattered = len(fmt.in_shape) * rows * columns
    return [
        Step("KC" if kept else "KC and Z", "fused", 0, item * (n * columns + maps), elements=maps),
        gemm(request, "G = dY KC", rows, n, columns),
        Step("sum of rows by digit", "fused", 0, item * scattered, elements=fmt.parameters),
        Step("parts of the sum", "fused", 0, 8 * fmt.parameters, elements=fmt.parameters),
        gemm(request, "dKC = dY^T Z", n, rows, columns, views=1),
        Step("MTTKRP out", "fused", 0, 4 * len(fmt.out_shape) * n * columns),
    ]


def _sum_by_digit(request: Request, size: int) -> list[Step]:
    """Rows (b, R) summed by their digit: (size, R)."""
    rows, rank = request.batch, request.format.rank
    if request.on_cpu:
        return [_maps(request, "sum of rows by digit", 3, 2)]
    elements = size * rows
    # As a product with the matrix of ones where a digit is, in float32.
    chosen = stream("one-hot digits", (2 + 4) * elements, elements, launches=3, views=1)
    product = gemm(request, "sum of rows by digit", size, rows, rank)
    return [chosen, dataclasses.replace(product, nbytes=4 * (elements + (size + rows) * rank))]


def kept_elements(request: Request, plan: LinearPlan) -> int:
    """Elements that stay for the backward beside the parameters and the indices: Z or nothing."""
    return request.batch * request.format.rank if plan.keep else 0


def kept_bytes_of_indices(request: Request) -> int:
    """Bytes of the indices, which stay for the backward."""
    return INDEX * request.batch


def dense_steps(request: Request) -> Steps:
    """What torch's does: copy rows, and backward fill a gradient as large as the table."""
    fmt = _format(request)
    looked_up = request.batch * fmt.out_features
    moved = request.item * (fmt.dense_parameters + 3 * looked_up)
    forward = [stream("Y", 2 * request.item * looked_up, looked_up)]
    return forward, [stream("dW", moved, fmt.dense_parameters, launches=2)]


def dense_kept(request: Request) -> int:
    """Elements an embedding keeps beside its parameters and the indices: none."""
    return 0


def describe(request: Request) -> str:
    """The format and the batch in words."""
    fmt = _format(request)
    return (
        f"embedding {fmt.num_embeddings} -> {fmt.out_features}, modes {fmt.in_shape} -> "
        f"{fmt.out_shape}, rank {fmt.rank}, {request.batch} indices, {request.dtype}"
    )
