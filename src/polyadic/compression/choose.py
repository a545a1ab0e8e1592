"""The plan of a compression: an option for every site, within the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polyadic.compression.allocate import UnreachableError, allocate
from polyadic.compression.budget import Budget
from polyadic.compression.costs import Calls, Cost, cp_cost, dense_cost
from polyadic.compression.curves import Curve
from polyadic.compression.targets import Site

# Ranks of one curve that are weighed; between neighbours parameters differ by a few percent.
MOST_RANKS = 96


@dataclass(frozen=True)
class Option:
    """A format at a rank, or the dense weight.

    Attributes:
        curve: of the format; None for dense.
        rank: 0 for dense.
        error: as the curve has it.
        cost: of it.
    """

    curve: Curve | None
    rank: int
    error: float
    cost: Cost


@dataclass(frozen=True)
class Weighed:
    """A site with what it could become.

    Attributes:
        site: the layers.
        curves: of its formats.
        importance: of its squared error.
        dense: the option to stay.
        options: all others that the budget admits.
        fixed: whether a rank was asked for, so that it cannot stay.
        obstacle: why there are no options, or empty.
    """

    site: Site
    curves: tuple[Curve, ...]
    importance: float
    dense: Option
    options: tuple[Option, ...]
    fixed: bool
    obstacle: str

    def loss(self, option: Option) -> float:
        """What an option adds to the squared error of the whole."""
        return self.importance * option.error**2


def weigh(
    site: Site,
    curves: Sequence[Curve],
    importance: float,
    calls: Calls,
    budget: Budget,
    fixed: bool,
    obstacle: str,
) -> Weighed:
    """List the options of a site.

    Args:
        site: the layers.
        curves: of its formats.
        importance: of its squared error.
        calls: of the layers.
        budget: says which options count.
        fixed: whether a rank was asked for.
        obstacle: why it has to stay, or empty.
    """
    stay = Option(None, 0, 0.0, dense_cost(site, calls))
    found: list[Option] = []
    refused: dict[str, None] = {}
    for curve in curves if not obstacle else ():
        for rank in curve.ranks if fixed else ranks_of(curve):
            cost = cp_cost(site, calls, curve.form, rank)
            reason = "" if fixed else _dearer(cost, stay.cost, budget)
            if reason:
                refused[reason] = None
            else:
                found.append(Option(curve, rank, curve.error(rank), cost))
    if not found and not obstacle:
        obstacle = "; ".join(refused) or _too_small(site)
    return Weighed(site, tuple(curves), importance, stay, tuple(found), fixed, obstacle)


def ranks_of(curve: Curve) -> list[int]:
    """The ranks of a curve that are weighed: all, or evenly spread in proportion."""
    last = curve.ranks[-1]
    if last <= MOST_RANKS:
        return list(range(1, last + 1))
    step = math.log(last) / MOST_RANKS
    return sorted({round(math.exp(step * i)) for i in range(MOST_RANKS + 1)})


def _dearer(cost: Cost, dense: Cost, budget: Budget) -> str:
    """What speaks against an option under a budget, or nothing."""
    if budget.kind == "flops_ratio" and not _less(cost.flops, dense.flops):
        return "has no fewer FLOPs in CP format at any rank weighed"
    if budget.never_slower:
        if dense.seconds is None or cost.seconds is None:
            return "is not predicted to be no slower, as its calls are not known"
        if cost.seconds > dense.seconds:
            return "is predicted to be slower in CP format at every rank weighed"
    return ""


def _less(value: int | None, than: int | None) -> bool:
    return value is not None and than is not None and value < than


def _too_small(site: Site) -> str:
    least = min(form.per_rank for form in site.forms)
    return f"has no fewer parameters in CP format: {least} at rank 1, {site.dense_parameters} dense"


def choose(weighed: Sequence[Weighed], budget: Budget, limit: float | None = None) -> list[Option]:
    """An option for every site.

    Args:
        weighed: the sites with their options.
        budget: to be met.
        limit: bound on the predicted error in place of the budget's own value.

    Raises:
        ValueError: the budget cannot be met; the message says what can.
    """
    every = [list(w.options) if w.fixed else [w.dense, *w.options] for w in weighed]
    if budget.kind == "speed":
        return [_most_faithful(w) for w in weighed]
    if budget.kind == "max_error":
        bound = (budget.value if limit is None else limit) ** 2
        pairs = [
            [(w.loss(o), float(o.cost.parameters)) for o in options]
            for w, options in zip(weighed, every, strict=True)
        ]
    else:
        pairs = [
            [(float(_amount(o.cost, budget)), w.loss(o)) for o in options]
            for w, options in zip(weighed, every, strict=True)
        ]
        dense = sum(_amount(w.dense.cost, budget) for w in weighed)
        bound = dense / budget.value
    try:
        chosen = allocate(pairs, bound).chosen
    except UnreachableError as error:
        raise ValueError(_unreachable(weighed, budget, error.least)) from None
    return [options[i] for options, i in zip(every, chosen, strict=True)]


def _amount(cost: Cost, budget: Budget) -> int:
    if budget.kind == "ratio":
        return cost.parameters
    assert cost.flops is not None
    return cost.flops


def _most_faithful(w: Weighed) -> Option:
    """The option with the least error, of several the smallest; dense where there is none."""
    return min(w.options, key=lambda o: (o.error, o.cost.parameters), default=w.dense)


def _unreachable(weighed: Sequence[Weighed], budget: Budget, least: float) -> str:
    stay = [w.site.name for w in weighed if not w.options]
    kept = f" ({', '.join(stay[:5])}{', ...' if len(stay) > 5 else ''} stay dense)" if stay else ""
    if budget.kind == "max_error":
        return (
            f"max_error={budget.value:g} cannot be met: the ranks asked for have a predicted "
            f"relative error of {math.sqrt(least):.4g}"
        )
    dense = sum(_amount(w.dense.cost, budget) for w in weighed)
    return (
        f"{budget.kind}={budget.value:g} cannot be met: the most that these layers and formats "
        f"reach is {dense / least:.4g}{kept}"
    )


def reason(w: Weighed, option: Option, budget: Budget) -> str:
    """Why a site gets an option, in words."""
    if option.curve is None:
        if w.obstacle:
            return w.obstacle
        cheapest = max(w.options, key=lambda o: o.error, default=None)
        assert cheapest is not None
        return (
            f"the budget is better spent so: its importance is {w.importance:.3g}, and fewer "
            f"parameters are saved elsewhere at less error"
        )
    chosen = (
        "plain low rank" if option.curve.form.is_low_rank else f"order {option.curve.form.order}"
    )
    if w.fixed:
        return f"{chosen}; the rank was asked for"
    if budget.never_slower:
        return chosen
    rivals = []
    by_flops = budget.kind == "flops_ratio"
    for curve in w.curves:
        if curve is option.curve:
            continue
        # A component has the same FLOPs in every format.
        equal = option.rank if by_flops else option.cost.parameters // curve.form.per_rank
        other = "plain low rank" if curve.form.is_low_rank else f"order {curve.form.order}"
        if curve.given_up:
            rivals.append(f"{other} has {curve.given_up}")
        elif 1 <= equal <= curve.ranks[-1]:
            rivals.append(f"{other} {curve.error(equal):.3g}")
    if not rivals:
        return chosen
    equally = "with as many FLOPs" if by_flops else "at equal size"
    return f"{chosen}: error {option.error:.3g}, {equally} {', '.join(rivals)}"


def predicted(weighed: Sequence[Weighed], chosen: Sequence[Option]) -> float:
    """√Σ importance · error²."""
    return math.sqrt(math.fsum(w.loss(o) for w, o in zip(weighed, chosen, strict=True)))


def as_fitted(weighed: Sequence[Weighed], errors: Mapping[str, float]) -> float:
    """The same with the errors of the fits, by the names of the sites; others stay dense."""
    return math.sqrt(math.fsum(w.importance * errors.get(w.site.name, 0.0) ** 2 for w in weighed))
