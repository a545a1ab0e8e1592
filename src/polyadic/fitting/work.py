"""What a sweep of alternating least squares costs, in multiply-adds, before it is run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from polyadic.fitting.metric import CG_STEPS, DIRECT_UNKNOWNS
from polyadic.formats import Shape
from polyadic.kernels.multilinear import best_cut

# Normal equations are formed and solved in float64, in which a processor is half as fast.
IN_FLOAT64 = 2


def sweep_work(
    groups: Sequence[Shape], rank: int, metric_dims: int | None, metric_groups: Sequence[int]
) -> float:
    """Return the multiply-adds of one sweep, those in float64 counted twice.

    The terms are those of ``polyadic.fitting.sweep`` and, on the side of the metric, of
    ``polyadic.fitting.metric``; products with few columns are left out.

    Args:
        groups: the tensorized shape.
        rank: R.
        metric_dims: dimensions of the metric: 2, 1 for its diagonal, or None without a metric.
        metric_groups: the groups of the input side.
    """
    own = [[mode for mode in group if mode > 1] for group in groups]
    if metric_dims is None:
        modes = [mode for group in own for mode in group]
        cut = best_cut(modes) if len(modes) > 1 else len(modes)
        left, right = modes[:cut], modes[cut:]
    else:
        left = [mode for g, group in enumerate(own) if g in metric_groups for mode in group]
        right = [mode for g, group in enumerate(own) if g not in metric_groups for mode in group]
    rows, columns = math.prod(left), math.prod(right)
    work = 2.0 * rows * columns * rank  # the weight times either Khatri-Rao matrix
    work += rank * (rows * len(left) + columns * len(right))  # what is left of it, by mode
    for mode in right if metric_dims is not None else left + right:
        work += IN_FLOAT64 * (rank**3 / 3 + 3 * mode * rank**2)
    if metric_dims is not None:
        by_metric = rows * rank * (rows if metric_dims == 2 else 1)
        work += by_metric + IN_FLOAT64 * rows * rank**2  # the Gram matrix KᵀΣK
        for mode in left:
            if metric_dims == 1:
                work += rows * rank**2 + IN_FLOAT64 * mode * rank**3 / 3
            elif mode * rank <= DIRECT_UNKNOWNS:
                work += rows**2 * rank + rows * mode * rank**2
                work += IN_FLOAT64 * (mode * rank) ** 3 / 3
            else:
                work += (CG_STEPS + 1) * (by_metric + rows * rank**2)
                work += IN_FLOAT64 * (rank**3 / 3 + 2 * CG_STEPS * mode * rank**2)
    return work
