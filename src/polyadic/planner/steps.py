"""The steps of a linear plan, with their costs: a mirror of ``kernels.linear`` on sizes alone.

``tests/planner/test_cost.py`` holds the mirror against the kernels: FLOPs equal what torch counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from polyadic.formats import LinearFormat, Shape
from polyadic.kernels.multilinear import PIECE, WHOLE
from polyadic.kernels.products import VECTOR, better_flipped, left_to_blas
from polyadic.planner.machine import Step
from polyadic.plans import Groups, LinearPlan, LinearRoute

# A product and its sum; a sum takes as long to call as two other operations.
SUMMED = 3


def grouped(sizes: Sequence[int], groups: Groups) -> list[Shape]:
    """The mode sizes of each group."""
    pieces, start = [], 0
    for length in groups:
        pieces.append(tuple(sizes[start : start + length]))
        start += length
    return pieces


def gemm(name: str, m: int, k: int, n: int, item: int, *, launches: int = 1) -> Step:
    """(m, k) @ (k, n), ``launches`` with the views before and after it."""
    padded_flops = 2 * m * k * -(-n // VECTOR) * VECTOR
    if left_to_blas(m, k, n, item):
        # Measured 1.07 to 1.38 times as long as a product that goes to oneDNN.
        padded_flops += padded_flops // 4
    return Step(
        name, "gemm", 2 * m * k * n, item * (m * k + k * n + m * n), launches,
        elements=m * n, padded_flops=padded_flops,
        new=item * m * n,
    )  # fmt: skip


def transpose(name: str, elements: int, item: int, *, launches: int = 1) -> Step:
    """A copy that reads or writes with a stride: about half the bandwidth of a plain one."""
    return Step(name, "layout", 0, 4 * item * elements, launches, elements=elements)


def tall_steps(
    name: str, width: int, terms: int, rank: int, item: int, *, views: int, piece: int | None = None
) -> list[Step]:
    """X^T Z (width, rank) with so many views before and after it; flipped and turned where better.

    ``piece``: rows of one piece, where it is made in several.
    """
    if not better_flipped(terms, piece or width, rank):
        return [gemm(name, width, terms, rank, item, launches=1 + views)]
    return [
        gemm(name, rank, terms, width, item, launches=1 + views),
        transpose(f"{name}, turned", width * rank, item, launches=2),
    ]


def khatri_rao_steps(name: str, sizes: Sequence[int], rank: int, item: int) -> list[Step]:
    """The products that build (Π sizes, R); none for one factor."""
    steps, rows = [], sizes[0]
    for mode, size in enumerate(sizes[1:], 2):
        elements = rows * size * rank
        # The product is written once; its two small operands come from the cache.
        steps.append(
            Step(
                name, "stream", 0, item * elements, 2 + (mode == len(sizes)),
                rows=_short(rows, size * rank), elements=elements, new=item * elements,
            )
        )  # fmt: skip
        rows *= size
    return steps


def _short(rows: int, inner: int) -> int:
    """Outer iterations that cost something of their own: those over a short inner loop."""
    return rows if inner < 2048 else 0


def khatri_rao_backward_steps(name: str, sizes: Sequence[int], rank: int, item: int) -> list[Step]:
    """MTTKRPs, mode by mode from the right; a large dK in pieces."""
    steps: list[Step] = []
    for mode in range(len(sizes) - 1, 0, -1):
        left = math.prod(sizes[:mode])
        elements = left * sizes[mode] * rank
        pieces = -(-elements // PIECE) if elements > WHOLE else 1
        view = mode == len(sizes) - 1
        steps += [
            Step(
                f"{name} mode {mode + 1}, {half}", "stream", 0, 4 * item * elements,
                SUMMED * pieces + (view and half == "factor"), rows=left,
                elements=elements // pieces, pieces=pieces, new=item * elements,
            )
            for half in ("factor", "rest")
        ]  # fmt: skip
    return steps


def _group_matrices(pieces: Sequence[Shape], rank: int, item: int) -> list[Step]:
    """The Khatri-Rao matrix of each group."""
    steps: list[Step] = []
    for piece in pieces:
        modes = "x".join(map(str, piece))
        steps += khatri_rao_steps(f"Khatri-Rao of modes {modes}", piece, rank, item)
    return steps


def contract_steps(rows: int, sizes: Shape, rank: int, groups: Groups, item: int) -> list[Step]:
    """Z = X K."""
    pieces = grouped(sizes, groups)
    steps = _group_matrices(pieces, rank, item)
    return steps + _sum_right(rows, pieces, rank, item)


def _sum_right(rows: int, pieces: Sequence[Shape], rank: int, item: int) -> list[Step]:
    outer, last = math.prod(map(math.prod, pieces[:-1])), math.prod(pieces[-1])
    views = 0 if len(pieces) == 1 else 2
    steps = [gemm("contract the last group", rows * outer, last, rank, item, launches=1 + views)]
    for piece in reversed(pieces[:-1]):
        group = math.prod(piece)
        elements = rows * outer * rank
        outer //= group
        steps.append(
            Step("weighted sum over a group", "stream", 0, 4 * item * elements, SUMMED,
                 rows=rows * outer, elements=elements, new=item * elements)
        )  # fmt: skip
    return steps


def spread_steps(rows: int, pieces: Sequence[Shape], rank: int, item: int) -> list[Step]:
    """Q: Z multiplied by all groups but the last."""
    steps: list[Step] = []
    outer = 1
    for piece in pieces[:-1]:
        before, outer = outer, outer * math.prod(piece)
        elements = rows * outer * rank
        steps.append(
            Step("spread over a group", "stream", 0, 2 * item * elements, 2,
                 rows=rows * before, elements=elements, new=item * elements)
        )  # fmt: skip
    return steps


def expand_steps(rows: int, sizes: Shape, rank: int, groups: Groups, item: int) -> list[Step]:
    """X = Z Kᵀ."""
    pieces = grouped(sizes, groups)
    steps = _group_matrices(pieces, rank, item)
    steps += spread_steps(rows, pieces, rank, item)
    return [*steps, _expand_last(rows, pieces, rank, item)]


def _expand_last(rows: int, pieces: Sequence[Shape], rank: int, item: int) -> Step:
    outer, last = math.prod(map(math.prod, pieces[:-1])), math.prod(pieces[-1])
    views = 1 if len(pieces) == 1 else 3
    return gemm(
        "expand the last group", rows * outer, rank, last, item,
        launches=1 + views,
    )  # fmt: skip


def partials_steps(
    rows: int,
    sizes: Shape,
    rank: int,
    groups: Groups,
    item: int,
    *,
    wrt_x: bool,
    wrt_z: bool,
    matrices_kept: bool = False,
) -> list[Step]:
    """Gradients of one side: of its factors and of X or Z."""
    pieces = grouped(sizes, groups)
    outer, last = math.prod(map(math.prod, pieces[:-1])), math.prod(pieces[-1])
    steps = [] if matrices_kept else _group_matrices(pieces, rank, item)
    steps += spread_steps(rows, pieces, rank, item)
    if wrt_x:
        steps.append(_expand_last(rows, pieces, rank, item))
    if wrt_z or len(groups) > 1:
        steps += _sum_right(rows, pieces, rank, item)
    before = 1
    for piece in pieces[:-1]:
        elements = rows * before * math.prod(piece) * rank
        steps.append(
            Step("dK of a group", "stream", 0, 4 * item * elements, 1 + SUMMED,
                 rows=rows * before, elements=elements, new=item * elements)
        )  # fmt: skip
        steps += khatri_rao_backward_steps("MTTKRP", piece, rank, item)
        before *= math.prod(piece)
    # Its rows of Z are those that give dX.
    views = 1 if len(groups) == 1 or wrt_x else 2
    # A large dK is made in pieces.
    size, at_once = pieces[-1][-1], None
    if last * rank > WHOLE:
        at_once = size * max(1, PIECE // (size * rank))
    dk = tall_steps(
        "dK of the last group", last, rows * outer, rank, item, views=views, piece=at_once
    )
    steps += dk if at_once is None else [dataclasses.replace(s, new=item * PIECE) for s in dk]
    return steps + khatri_rao_backward_steps("MTTKRP", pieces[-1], rank, item)


def forward_steps(fmt: LinearFormat, rows: int, route: LinearRoute, item: int) -> list[Step]:
    """Y = X W by one route."""
    if route.kind == "dense":
        return [
            *_both_khatri_rao(fmt, item),
            gemm(
                "W^T = KC KA^T",
                fmt.out_features,
                fmt.rank,
                fmt.in_features,
                item,
                launches=2,
            ),
            gemm(
                "Y = X W",
                rows,
                fmt.in_features,
                fmt.out_features,
                item,
                launches=2,
            ),
        ]
    return [
        *_side("in", contract_steps(rows, fmt.in_shape, fmt.rank, route.in_groups, item)),
        *_side("out", expand_steps(rows, fmt.out_shape, fmt.rank, route.out_groups, item)),
    ]


def _side(side: str, steps: Iterable[Step]) -> list[Step]:
    """The same steps, named by the side they work on."""
    return [dataclasses.replace(step, name=f"{side}: {step.name}") for step in steps]


def backward_steps(
    fmt: LinearFormat, rows: int, route: LinearRoute, item: int, *, kept: int
) -> list[Step]:
    """All gradients by one route, with what ``LinearPlan.keep`` says kept."""
    m, n, r = fmt.in_features, fmt.out_features, fmt.rank
    if route.kind == "dense":
        return [
            *_both_khatri_rao(fmt, item),
            gemm("W^T = KC KA^T", n, r, m, item, launches=2),
            gemm("dX = dY W^T", rows, n, m, item),
            *tall_steps("dW^T = dY^T X", n, rows, m, item, views=1),
            *tall_steps("dKA = dW KC", m, n, r, item, views=1 + _prefixes(fmt.in_shape)),
            *tall_steps("dKC = dW^T KA", n, m, r, item, views=2 + _prefixes(fmt.out_shape)),
            *khatri_rao_backward_steps("MTTKRP in", fmt.in_shape, r, item),
            *khatri_rao_backward_steps("MTTKRP out", fmt.out_shape, r, item),
        ]
    again = [] if kept else contract_steps(rows, fmt.in_shape, r, route.in_groups, item)
    outs = partials_steps(
        rows, fmt.out_shape, r, route.out_groups, item,
        wrt_x=False, wrt_z=True, matrices_kept=kept == 2,
    )  # fmt: skip
    ins = partials_steps(
        rows, fmt.in_shape, r, route.in_groups, item,
        wrt_x=True, wrt_z=False, matrices_kept=kept == 2,
    )  # fmt: skip
    return [*_side("again in", again), *_side("out", outs), *_side("in", ins)]


def _prefixes(sizes: Shape) -> int:
    """Operations for the products of the first factors, without the last."""
    return 2 * len(sizes) - 3 if len(sizes) > 1 else 0


def _both_khatri_rao(fmt: LinearFormat, item: int) -> Iterable[Step]:
    yield from khatri_rao_steps("KA", fmt.in_shape, fmt.rank, item)
    yield from khatri_rao_steps("KC", fmt.out_shape, fmt.rank, item)


def plan_steps(
    fmt: LinearFormat, rows: int, plan: LinearPlan, item: int, *, training: bool
) -> tuple[list[Step], list[Step]]:
    """Forward and (if training) backward steps of a plan."""
    forward = forward_steps(fmt, rows, plan.forward, item)
    kept = plan.keep if plan.forward.kind == "factorized" else 0
    return forward, backward_steps(fmt, rows, plan.backward, item, kept=kept) if training else []


def dense_steps(fmt: LinearFormat, rows: int, item: int, *, training: bool) -> list[Step]:
    """What a dense linear layer does: one GEMM forward, two backward."""
    m, n = fmt.in_features, fmt.out_features
    steps = [gemm("Y = X W", rows, m, n, item)]
    if training:
        steps += [gemm("dX = dY W^T", rows, n, m, item), gemm("dW = X^T dY", m, rows, n, item)]
    return steps
