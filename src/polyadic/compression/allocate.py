"""Allocation: one option for every layer, so that a budget is met at the least loss.

Every layer ℓ has options i, each with a cost c_ℓi, whose sum the budget b bounds, and a loss l_ℓi,
whose sum is made small. This is the multiple-choice knapsack problem (Kellerer, Pferschy &
Pisinger, Knapsack Problems, 2004, chapter 11). It is solved in three steps.

1. Relaxation. If a layer may mix its options, only those on the lower convex hull of its points
   (c, l) matter. Start from the cheapest option of every layer. Each segment of a hull, from one
   option to the next dearer one, has the marginal gain −Δl/Δc, the loss saved per cost; along a
   hull these gains fall. So the relaxation is solved exactly by taking the segments of all layers
   in the order of falling gain until the budget is spent. The gain of the last segment is the
   Lagrange multiplier of the budget, and only that segment is taken in part: what it saves up to
   the budget completes a lower bound on the loss of any choice.
2. Rounding. The partial segment, and every one after it, is left out. What results is within the
   budget, as each layer has one option.
3. Exchange. Options off the hulls are reached by improving single layers and pairs of layers, each
   exactly, until no exchange of two helps.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

Option = tuple[float, float]
# Most rounds of exchanges over all pairs. Every round improves the choice; a few are enough.
ROUNDS = 50


class UnreachableError(ValueError):
    """No choice costs so little; ``least`` is the smallest cost there is."""

    def __init__(self, least: float) -> None:
        super().__init__(f"the least that can be reached is {least}")
        self.least = least


@dataclass(frozen=True)
class Allocation:
    """A choice of one option per layer.

    Attributes:
        chosen: for each layer, the index of the option.
        cost: sum of the costs.
        loss: sum of the losses.
        bound: no choice within the budget loses less than this, by the linear relaxation.
    """

    chosen: tuple[int, ...]
    cost: float
    loss: float
    bound: float


def allocate(options: Sequence[Sequence[Option]], budget: float) -> Allocation:
    """Choose an option (cost, loss) for every layer.

    Args:
        options: at least one for each layer; costs and losses are not negative.
        budget: bound on the sum of the costs.

    Returns:
        A choice within the budget that no exchange of two layers' options improves. For one and two
        layers it is optimal; for more, ``loss - bound`` says how far from the optimum it can be.

    Raises:
        UnreachableError: even the cheapest options cost more than the budget.
    """
    frontiers = [_frontier(each) for each in options]
    least = sum(each[frontier[0]][0] for each, frontier in zip(options, frontiers, strict=True))
    if least > budget:
        raise UnreachableError(least)
    at, bound = _relaxed(options, frontiers, budget)
    _exchange(options, frontiers, at, budget)
    chosen = tuple(frontier[i] for frontier, i in zip(frontiers, at, strict=True))
    cost = sum(each[i][0] for each, i in zip(options, chosen, strict=True))
    loss = sum(each[i][1] for each, i in zip(options, chosen, strict=True))
    return Allocation(chosen, cost, loss, min(bound, loss))


def _frontier(options: Sequence[Option]) -> list[int]:
    """Indices of the options that no other beats in cost and loss; cost rises and loss falls."""
    frontier: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: options[i]):
        if not frontier or options[i][1] < options[frontier[-1]][1]:
            frontier.append(i)
    return frontier


def _hull(points: Sequence[Option]) -> list[int]:
    """Indices of the points of a frontier that lie on its lower convex hull."""
    hull: list[int] = []
    for i, (cost, loss) in enumerate(points):
        while len(hull) > 1:
            (c0, l0), (c1, l1) = points[hull[-2]], points[hull[-1]]
            # The last point stays if the gain before it, (l0 - l1) / (c1 - c0), is larger than the
            # gain after it, (l1 - loss) / (cost - c1).
            if (l0 - l1) * (cost - c1) > (l1 - loss) * (c1 - c0):
                break
            hull.pop()
        hull.append(i)
    return hull


def _relaxed(
    options: Sequence[Sequence[Option]], frontiers: Sequence[Sequence[int]], budget: float
) -> tuple[list[int], float]:
    """Solve the relaxation and round it down.

    Returns:
        The place on each layer's frontier, and the loss of the relaxation before it was rounded.
    """
    segments = []
    spent = loss = 0.0
    for layer, (each, frontier) in enumerate(zip(options, frontiers, strict=True)):
        points = [each[i] for i in frontier]
        spent, loss = spent + points[0][0], loss + points[0][1]
        hull = _hull(points)
        for before, after in itertools.pairwise(hull):
            more = points[after][0] - points[before][0]
            less = points[before][1] - points[after][1]
            segments.append((-less / more, layer, after, more, less))  # sorted by falling gain
    at, bound, full = [0] * len(options), loss, False
    for _, layer, after, more, less in sorted(segments):
        if not full and spent + more <= budget:
            spent, bound = spent + more, bound - less
            at[layer] = after
        elif not full:
            bound -= less * max(0.0, budget - spent) / more  # the segment that is taken in part
            full = True
    return at, bound


def _exchange(
    options: Sequence[Sequence[Option]],
    frontiers: Sequence[Sequence[int]],
    at: list[int],
    budget: float,
) -> None:
    """Improve the options of one or two layers, in place, until no such exchange helps."""
    points = [
        [each[i] for i in frontier] for each, frontier in zip(options, frontiers, strict=True)
    ]
    for _ in range(ROUNDS):
        improved = False
        for first in range(len(at)):
            for second in range(first, len(at)):
                rest = sum(
                    points[layer][i][0]
                    for layer, i in enumerate(at)
                    if layer not in (first, second)
                )
                better = (
                    _best_single(points[first], at[first], budget - rest)
                    if first == second
                    else _best_pair(
                        points[first], points[second], (at[first], at[second]), budget - rest
                    )
                )
                if better is not None:
                    at[first], at[second] = better
                    improved = True
        if not improved:
            return


def _best_single(points: Sequence[Option], now: int, room: float) -> tuple[int, int] | None:
    """The best place that the room has space for, twice, if it is better than the present one."""
    last = bisect.bisect_right(points, (room, float("inf"))) - 1
    return (last, last) if last > now else None


def _best_pair(
    first: Sequence[Option], second: Sequence[Option], now: tuple[int, int], room: float
) -> tuple[int, int] | None:
    """The best places of two layers that their room has space for, if better than the present.

    As the first layer's cost rises, the dearest affordable option of the second only becomes
    cheaper, so that one walk through both frontiers finds the best pair.
    """
    best, loss = None, first[now[0]][1] + second[now[1]][1]
    j = len(second) - 1
    for i, (cost, own) in enumerate(first):
        while j >= 0 and cost + second[j][0] > room:
            j -= 1
        if j < 0:
            break
        if own + second[j][1] < loss * (1 - 1e-12):
            best, loss = (i, j), own + second[j][1]
    return best
