"""Choice of a plan for a layer, batch and machine; cached, so that the hot path only looks up."""

from __future__ import annotations

import functools

from polyadic._format import ConvFormat, LinearFormat
from polyadic._plan import ConvPlan, ConvRoute, LinearPlan, LinearRoute, Memory


@functools.lru_cache(maxsize=4096)
def plan_linear(fmt: LinearFormat, batch: int | None, memory: Memory) -> LinearPlan:
    """Return the plan for a linear layer; ``batch`` is the number of rows, None if unknown."""
    route = LinearRoute((len(fmt.in_shape),), (len(fmt.out_shape),))
    return LinearPlan(route, route, keep=memory != "least")


@functools.lru_cache(maxsize=4096)
def plan_conv(fmt: ConvFormat, positions: int | None, memory: Memory) -> ConvPlan:
    """Return the plan for a convolution; ``positions`` is batch times output positions."""
    return ConvPlan(ConvRoute(), ConvRoute(), keep={"fast": 2, "balanced": 1, "least": 0}[memory])
