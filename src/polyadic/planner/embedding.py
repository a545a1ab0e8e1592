"""Plans of an embedding: which in factors are joined, and how the out factors are grouped.

The steps mirror ``kernels.embedding``. An embedding follows a ``LinearPlan``: its in groups say
which in factors are joined to one table before rows are looked up, its out groups how the out side
is expanded.
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
from polyadic.planner.linear import Steps, groupings, obeyed
from polyadic.planner.multilinear import (
    expand_steps,
    grouped,
    khatri_rao_backward_steps,
    khatri_rao_steps,
    partials_steps,
)
from polyadic.planner.request import Request
from polyadic.planner.steps import Step, casts, gemm, stream
from polyadic.plans import Groups, Keep, LinearPlan, LinearRoute

# Most indices are int64.
INDEX_BYTES = 8


def _format(request: Request) -> EmbeddingFormat:
    assert isinstance(request.format, EmbeddingFormat)
    return request.format


def _is_served(request: Request) -> bool:
    """Whether Triton kernels can compute this embedding."""
    scattered = max(_format(request).in_shape) <= MOST_SCATTERED_ROWS
    return scattered and serves("embedding", request.device, request.dtype)


def _keep(request: Request) -> Keep:
    """What a plan keeps under the request's bound of memory."""
    return "x and z" if request.memory == "fast" else "x"


def candidates(request: Request) -> list[LinearPlan]:
    """List the plans that take one route in both directions; all join in factors as chosen."""
    ins = joined_groups(request)
    outs = groupings(len(_format(request).out_shape))
    routes = [LinearRoute(ins, out) for out in outs]
    if _is_served(request):
        routes.append(LinearRoute(ins, (len(_format(request).out_shape),), by="triton"))
    return [LinearPlan(route, route, _keep(request)) for route in routes]


def simplest(request: Request) -> LinearPlan:
    """Return the plan for sizes that a compiler does not know; it is right for any sizes."""
    fmt = _format(request)
    route = LinearRoute((1,) * len(fmt.in_shape), (len(fmt.out_shape),))
    return LinearPlan(route, route, _keep(request))


def choose(request: Request) -> LinearPlan:
    """Return the cheapest plan for the request as it is; ``choice.choose`` remembers it."""
    machine, ins = machine_for(request), joined_groups(request)
    outs, keep = groupings(len(_format(request).out_shape)), _keep(request)
    if request.is_half:
        # A lookup rounds less often than a GEMM. A split of the out modes rounds once more, and
        # would exceed our limit of twice torch's error.
        outs = outs[:1]
    routes = [LinearRoute(ins, out) for out in outs]
    if _is_served(request):
        routes.append(LinearRoute(ins, (len(_format(request).out_shape),), by="triton"))
    forward = min(routes, key=lambda route: machine.total(forward_steps(request, route)))
    backward = min(routes, key=lambda r: machine.total(backward_steps(request, r, keep)))
    return LinearPlan(forward, backward, keep)


def joined_groups(request: Request) -> Groups:
    """Return the lengths of groups of adjacent in modes that are joined before the lookup.

    Joining saves one gather and one product for each index, and costs the Khatri-Rao product of
    the factors. It is worth it if that product has at most half as many rows as there are indices.
    We join only on a CPU: elsewhere a matrix product sums the gradients by row, and its cost grows
    with the number of rows.
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
    """Return the plan with the in factors joined for the request's number of indices."""
    ins = joined_groups(request)
    forward, backward = (
        dataclasses.replace(route, in_groups=ins) for route in (plan.forward, plan.backward)
    )
    return LinearPlan(forward, backward, plan.keep)


def steps(request: Request, plan: LinearPlan) -> Steps:
    """List the steps of a plan, forward and backward."""
    request, plan = obeyed(request, plan)
    return (
        forward_steps(request, plan.forward),
        backward_steps(request, plan.backward, plan.keep),
    )


def _maps(request: Request, name: str, passes: int, launches: int) -> Step:
    """Price elementwise work that reads or writes ``passes`` maps (b, R)."""
    elements = request.batch * request.format.rank
    nbytes = passes * max(request.item, 4) * elements
    return stream(name, nbytes, elements, launches=launches)


def _pick_steps(request: Request, joined: Sequence[Shape]) -> list[Step]:
    """List the steps that make the digits of the indices and gather their rows in float32."""
    n, rank, rows = len(joined), request.format.rank, request.batch
    steps: list[Step] = []
    for modes in joined:
        if len(modes) > 1:
            # The product stays in float32, so that the last step, a cast, does not happen.
            made = khatri_rao_steps(request, "joined in factors", modes, rank)
            steps += made[:-1] if request.is_half else made
    if n > 1:
        nbytes = 4 * (n - 1) * INDEX_BYTES * rows
        steps.append(stream("digits", nbytes, rows, launches=2 * (n - 1)))
    steps.append(_maps(request, "rows of the in factors", 2 * n, n))
    single = sum(len(modes) == 1 for modes in joined)
    return steps + casts(request, "rows", single, single * rows * rank)


def _product_steps(request: Request, joined: Sequence[Shape]) -> list[Step]:
    """List the steps that multiply the gathered rows to Z."""
    others = len(joined) - 1
    steps = [_maps(request, "Z, their product", 3 * others, others)] if others else []
    return steps + casts(request, "Z", 1, request.batch * request.format.rank)


def forward_steps(request: Request, route: LinearRoute) -> list[Step]:
    """List the steps that look up rows of the table."""
    fmt = _format(request)
    if route.by == "triton":
        return [_lookup(request)]
    joined = grouped(fmt.in_shape, route.in_groups)
    return [
        *_pick_steps(request, joined),
        *_product_steps(request, joined),
        *expand_steps(request, request.batch, fmt.out_shape, fmt.rank, route.out_groups),
    ]


def backward_steps(request: Request, route: LinearRoute, keep: Keep | int) -> list[Step]:
    """List the steps that make the gradients of all factors."""
    fmt, rows = _format(request), request.batch
    if route.by == "triton":
        return _fused_backward(request, keep != "x")
    joined, rank = grouped(fmt.in_shape, route.in_groups), fmt.rank
    steps = _pick_steps(request, joined)
    if keep == "x":
        steps += _product_steps(request, joined)
    steps += partials_steps(
        request, rows, fmt.out_shape, rank, route.out_groups, wrt_x=False, wrt_z=True
    )
    steps += casts(request, "G", 1, rows * rank)
    if len(joined) > 1:
        # Each mode's term is the product of all rows before it and all rows behind it: D-1 prefix
        # products, D-2 suffix products, and D-1 products of the two.
        products = 3 * len(joined) - 4
        steps.append(_maps(request, "G times the other rows", 3 * products, products))
    for modes in joined:
        steps += _sum_by_digit(request, math.prod(modes))
        steps += khatri_rao_backward_steps(request, "MTTKRP in", modes, rank, wide=True)
    return steps


def _lookup(request: Request) -> Step:
    """Price the launch that does it all: digits, rows, their product, and the product with KC."""
    fmt, rows = _format(request), request.batch
    columns, n = padded_rank(fmt.rank), fmt.out_features
    moved = rows * (INDEX_BYTES + request.item * n) + request.item * n * columns
    return Step("Y, looked up", "fused", 2 * rows * columns * n, moved, elements=rows * n)


def _fused_backward(request: Request, z_is_kept: bool) -> list[Step]:
    """List the steps of the backward by Triton; Z is made again unless it was kept."""
    fmt, rows, item = _format(request), request.batch, request.item
    columns, n = padded_rank(fmt.rank), fmt.out_features
    maps = 0 if z_is_kept else rows * columns
    scattered = len(fmt.in_shape) * rows * columns
    return [
        Step(
            "KC" if z_is_kept else "KC and Z",
            "fused",
            0,
            item * (n * columns + maps),
            elements=maps,
        ),
        gemm(request, "G = dY KC", rows, n, columns),
        Step("sum of rows by digit", "fused", 0, item * scattered, elements=fmt.parameters),
        Step("parts of the sum", "fused", 0, 8 * fmt.parameters, elements=fmt.parameters),
        gemm(request, "dKC = dY^T Z", n, rows, columns, views=1),
        Step("MTTKRP out", "fused", 0, 4 * len(fmt.out_shape) * n * columns),
    ]


def _sum_by_digit(request: Request, size: int) -> list[Step]:
    """List the steps that sum rows (b, R) by their digit, to (size, R)."""
    rows, rank = request.batch, request.format.rank
    if request.on_cpu:
        return [_maps(request, "sum of rows by digit", 3, 2)]
    elements = size * rows
    # It is a product with a matrix (size, b) in float32 that has a one where the digit is.
    chosen = stream("one-hot digits", (2 + 4) * elements, elements, launches=3, views=1)
    product = gemm(request, "sum of rows by digit", size, rows, rank)
    return [chosen, dataclasses.replace(product, nbytes=4 * (elements + (size + rows) * rank))]


def kept_elements(request: Request, plan: LinearPlan) -> int:
    """Count the elements that stay for the backward besides parameters and indices: Z or none."""
    return request.batch * request.format.rank if plan.keeps_z else 0


def kept_bytes_of_indices(request: Request) -> int:
    """Count the bytes of the indices, which stay for the backward."""
    return INDEX_BYTES * request.batch


def dense_steps(request: Request) -> Steps:
    """List the steps of torch's: copy rows; then fill a gradient as large as the table."""
    fmt = _format(request)
    looked_up = request.batch * fmt.out_features
    moved = request.item * (fmt.dense_parameters + 3 * looked_up)
    forward = [stream("Y", 2 * request.item * looked_up, looked_up)]
    return forward, [stream("dW", moved, fmt.dense_parameters, launches=2)]


def dense_kept(request: Request) -> int:
    """Count the elements that torch's keeps besides its parameters and the indices: none."""
    return 0


def describe(request: Request) -> str:
    """Say format and batch in words."""
    fmt = _format(request)
    return (
        f"embedding {fmt.num_embeddings} -> {fmt.out_features}, modes {fmt.in_shape} -> "
        f"{fmt.out_shape}, rank {fmt.rank}, {request.batch} indices, {request.dtype}"
    )
