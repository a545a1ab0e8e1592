"""The steps of an embedding's plan, with costs: a mirror of ``kernels.embedding`` on sizes."""

from __future__ import annotations

import math

from polyadic.formats import EmbeddingFormat, Shape
from polyadic.planner.machine import Step
from polyadic.planner.steps import (
    expand_steps,
    gemm,
    grouped,
    khatri_rao_backward_steps,
    khatri_rao_steps,
    partials_steps,
)
from polyadic.plans import LinearPlan

# Bytes of an index.
INDEX = 8


def _passes(name: str, passes: int, rows: int, rank: int, item: int) -> Step:
    """Elementwise work on maps (rows, rank); ``passes`` of them are read or written."""
    elements = rows * rank
    return Step(name, "stream", 0, passes * item * elements, max(1, passes // 3), elements=elements)


def _pick_steps(joined: list[Shape], rows: int, rank: int, item: int) -> list[Step]:
    steps: list[Step] = []
    for modes in joined:
        steps += khatri_rao_steps("joined in factors", modes, rank, item)
    digits = Step("digits", "stream", 0, 2 * len(joined) * INDEX * rows, 2 * len(joined))
    return [*steps, digits, _passes("rows of the in factors", 2 * len(joined), rows, rank, item)]


def _product_steps(joined: list[Shape], rows: int, rank: int, item: int) -> list[Step]:
    others = len(joined) - 1
    return [_passes("Z, their product", 3 * others, rows, rank, item)] if others else []


def embedding_forward_steps(
    fmt: EmbeddingFormat, rows: int, plan: LinearPlan, item: int
) -> list[Step]:
    """Rows of the table for so many indices."""
    joined = grouped(fmt.in_shape, plan.forward.in_groups)
    return [
        *_pick_steps(joined, rows, fmt.rank, item),
        *_product_steps(joined, rows, fmt.rank, item),
        *expand_steps(rows, fmt.out_shape, fmt.rank, plan.forward.out_groups, item),
    ]


def embedding_backward_steps(
    fmt: EmbeddingFormat, rows: int, plan: LinearPlan, item: int, *, by_product: bool = False
) -> list[Step]:
    """Gradients of all factors; ``by_product``: rows are summed by a matrix product."""
    joined, r = grouped(fmt.in_shape, plan.backward.in_groups), fmt.rank
    steps = _pick_steps(joined, rows, r, item)
    if not plan.keep:
        steps += _product_steps(joined, rows, r, item)
    steps += partials_steps(
        rows, fmt.out_shape, r, plan.backward.out_groups, item, wrt_x=False, wrt_z=True
    )
    # From both ends of the modes, and each of them with what is left of it and right of it.
    products = 3 * len(joined) - 4 if len(joined) > 1 else 0
    if products:
        steps.append(_passes("G times the other rows", 3 * products, rows, r, item))
    for modes in joined:
        size = math.prod(modes)
        if by_product:
            steps.append(gemm("sum of rows by digit", size, rows, r, item))
        else:
            steps.append(_passes("sum of rows by digit", 3, rows, r, item))
        steps += khatri_rao_backward_steps("MTTKRP in", modes, r, item)
    return steps


def dense_embedding_steps(
    fmt: EmbeddingFormat, rows: int, item: int, *, training: bool
) -> tuple[list[Step], list[Step]]:
    """What torch's does: copy rows, and backward fill a gradient as large as the table."""
    looked_up = rows * fmt.out_features
    forward = Step("Y", "stream", 0, 2 * item * looked_up, 1, elements=looked_up)
    moved = item * (fmt.dense_parameters + 3 * looked_up)
    backward = Step("dW", "stream", 0, moved, 2, elements=fmt.dense_parameters)
    return [forward], [backward] if training else []
