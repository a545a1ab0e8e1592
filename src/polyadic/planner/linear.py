"""Choice of a plan for a linear layer, batch and machine: the cheapest by predicted time.

A linear layer's four pieces (each side, forward and backward) are independent of each other, so
each takes its own cheapest grouping; rebuilding W competes with the factorized whole. Choices are
cached by format and batch bucket (the next power of two), so that the hot path only looks up.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from polyadic._torch import UNKNOWN_BATCH, Memo, known, not_traced
from polyadic.formats import LinearFormat, Shape
from polyadic.planner.calibrated import machine_for, threads_of
from polyadic.planner.machine import Step
from polyadic.planner.steps import (
    backward_steps,
    contract_steps,
    expand_steps,
    forward_steps,
    partials_steps,
    plan_steps,
)
from polyadic.plans import Groups, LinearPlan, LinearRoute, Memory

# Calls a function has checked and found a plan for; the function says by what key.
settled = Memo()


def bucket(rows: int) -> int:
    """The next power of two, at least 1."""
    return 1 << (max(rows, 1) - 1).bit_length()


def compositions(total: int) -> Iterator[Groups]:
    """All ways to cut ``total`` modes into consecutive groups, the single group first."""
    for first in range(total, 0, -1):
        if first == total:
            yield (total,)
        else:
            for rest in compositions(total - first):
                yield (first, *rest)


def groupings(order: int) -> list[Groups]:
    """The groupings weighed: all for small orders, else one or two groups and per factor."""
    if order <= 5:
        return list(compositions(order))
    two = [(left, order - left) for left in range(1, order)]
    return [(order,), *two, (1,) * order]


def linear_plans(fmt: LinearFormat, memory: Memory = "balanced") -> list[LinearPlan]:
    """Every plan with the same route forward and backward: each grouping, and rebuilding W."""
    keep = int(memory != "least")
    m, n = len(fmt.in_shape), len(fmt.out_shape)
    routes = [LinearRoute(i, o) for i, o in itertools.product(groupings(m), groupings(n))]
    rebuild = LinearRoute((m,), (n,), "dense")
    return [*(LinearPlan(route, route, keep) for route in routes), LinearPlan(rebuild, rebuild, 0)]


def plan_linear(fmt: LinearFormat, x: Tensor, memory: Memory, rebuild: bool = True) -> LinearPlan:
    """The plan for x (..., M)."""
    return plan_rows(fmt, tuple(x.shape[:-1]), x.dtype, x.device.type, memory, rebuild)


def plan_rows(
    fmt: LinearFormat,
    shape: Shape,
    dtype: torch.dtype,
    device_type: str,
    memory: Memory,
    rebuild: bool = True,
) -> LinearPlan:
    """The plan for rows of a leading ``shape``; one for all where it is symbolic.

    With ``rebuild`` W may be built where that is cheapest.
    """
    if not torch.compiler.is_compiling():
        return choose_linear(fmt, bucket(math.prod(shape)), dtype, device_type, memory, rebuild)
    modes = (*fmt.in_shape, *fmt.out_shape, fmt.rank)
    if not known(*modes):
        route = LinearRoute((len(fmt.in_shape),), (len(fmt.out_shape),))
        return LinearPlan(route, route, int(memory != "least"))
    rows = UNKNOWN_BATCH
    if known(*shape):
        rows = bucket(math.prod(shape))
    return _constant_linear(
        fmt.in_shape, fmt.out_shape, fmt.rank, rows, dtype, device_type, memory, rebuild
    )


@not_traced
def _constant_linear(
    in_shape: Shape,
    out_shape: Shape,
    rank: int,
    rows: int,
    dtype: torch.dtype,
    device_type: str,
    memory: Memory,
    rebuild: bool,
) -> LinearPlan:
    fmt = LinearFormat(in_shape, out_shape, rank)
    return choose_linear(fmt, rows, dtype, device_type, memory, rebuild)


def choose_linear(
    fmt: LinearFormat,
    rows: int,
    dtype: torch.dtype,
    device_type: str,
    memory: Memory,
    rebuild: bool = True,
) -> LinearPlan:
    """The cheapest plan for ``rows`` rows of ``dtype`` on this machine; cached."""
    threads = threads_of(device_type)
    return _cheapest_linear(fmt, rows, dtype, device_type, threads, memory, rebuild)


def forget() -> None:
    """Forget all choices, as a machine description has changed."""
    _cheapest_linear.cache_clear()
    settled.clear()


@functools.lru_cache(maxsize=4096)
def _cheapest_linear(
    fmt: LinearFormat,
    rows: int,
    dtype: torch.dtype,
    device_type: str,
    threads: int,
    memory: Memory,
    rebuild: bool,
) -> LinearPlan:
    # The key names the machine, for a description's own hash takes longer than the look-up.
    machine, item = machine_for(device_type, dtype), dtype.itemsize
    keep = memory != "least"
    ins, outs = groupings(len(fmt.in_shape)), groupings(len(fmt.out_shape))
    m, n, r = fmt.in_shape, fmt.out_shape, fmt.rank

    def best(candidates: list[Groups], steps: dict[Groups, list[Step]]) -> Groups:
        return min(candidates, key=lambda groups: machine.total(steps[groups]))

    forward = LinearRoute(
        best(ins, {g: contract_steps(rows, m, r, g, item) for g in ins}),
        best(outs, {g: expand_steps(rows, n, r, g, item) for g in outs}),
    )

    def in_gradients(groups: Groups) -> list[Step]:
        again = [] if keep else contract_steps(rows, m, r, groups, item)
        return again + partials_steps(rows, m, r, groups, item, wrt_x=True, wrt_z=False)

    backward = LinearRoute(
        best(ins, {g: in_gradients(g) for g in ins}),
        best(
            outs,
            {g: partials_steps(rows, n, r, g, item, wrt_x=False, wrt_z=True) for g in outs},
        ),
    )
    dense = [LinearRoute((len(m),), (len(n),), "dense")] if rebuild else []
    forward = min(
        (forward, *dense), key=lambda route: machine.total(forward_steps(fmt, rows, route, item))
    )
    kept = int(keep and forward.kind == "factorized")
    backward = min(
        (backward, *dense),
        key=lambda route: machine.total(backward_steps(fmt, rows, route, item, kept=kept)),
    )
    if memory == "fast" and forward.is_khatri_rao and backward == forward:
        return LinearPlan(forward, backward, keep=2)
    # Z is of no use to a backward that rebuilds W.
    return LinearPlan(forward, backward, keep=kept if backward.kind == "factorized" else 0)


def predict_linear(
    plan: LinearPlan,
    fmt: LinearFormat,
    rows: int,
    dtype: torch.dtype = torch.float32,
    device_type: str = "cpu",
    *,
    training: bool = True,
) -> float:
    """Predicted seconds of forward (and backward) by a plan, without per-call overhead."""
    forward, backward = plan_steps(fmt, rows, plan, dtype.itemsize, training=training)
    machine = machine_for(device_type, dtype)
    return machine.total(forward) + machine.total(backward)
