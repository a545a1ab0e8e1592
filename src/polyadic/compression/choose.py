"""The choice of one option for every target, within the budget, and the reasons for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from polyadic.compression.allocate import UnreachableError, allocate
from polyadic.compression.budget import Budget
from polyadic.compression.costs import Cost
from polyadic.compression.weigh import WITHOUT_EFFECT, Option, Options


def choose(every: Sequence[Options], budget: Budget, limit: float | None = None) -> list[Option]:
    """Choose an option for every target.

    Args:
        every: the options of each target.
        budget: the budget that must be met.
        limit: bound on the predicted error in place of the budget's own value.

    Returns:
        The chosen option of each target, in the order of the targets.

    Raises:
        ValueError: the budget cannot be met; the message says what can.
    """
    if budget.kind == "speed":
        return [_most_faithful(options) for options in every]
    pairs: list[list[tuple[float, float]]]
    if budget.kind == "max_error":
        # The error is bounded and the parameters are what is made small.
        bound = (budget.value if limit is None else limit) ** 2
        pairs = [[(o.loss(x), float(x.cost.parameters)) for x in o.allowed] for o in every]
    else:
        dense = sum(_amount(options.dense.cost, budget) for options in every)
        bound = dense / budget.value
        pairs = [[(float(_amount(x.cost, budget)), o.loss(x)) for x in o.allowed] for o in every]
    try:
        chosen = allocate(pairs, bound).chosen
    except UnreachableError as error:
        raise ValueError(_unreachable(every, budget, error.least)) from None
    return [options.allowed[i] for options, i in zip(every, chosen, strict=True)]


def _amount(cost: Cost, budget: Budget) -> int:
    """What the budget counts of a cost."""
    if budget.kind == "ratio":
        return cost.parameters
    assert cost.flops is not None
    return cost.flops


def _most_faithful(options: Options) -> Option:
    """The option with the least error, and of equal ones the smallest; dense if there is none."""
    least = min(
        options.converted, key=lambda o: (o.error, o.cost.parameters), default=options.dense
    )
    return least


def _unreachable(every: Sequence[Options], budget: Budget, least: float) -> str:
    """The message for a budget that cannot be met."""
    stay = [options.target.name for options in every if not options.converted]
    kept = f" ({', '.join(stay[:5])}{', ...' if len(stay) > 5 else ''} stay dense)" if stay else ""
    if budget.kind == "max_error":
        return (
            f"max_error={budget.value:g} cannot be met: the ranks asked for have a predicted "
            f"relative error of {math.sqrt(least):.4g}"
        )
    dense = sum(_amount(options.dense.cost, budget) for options in every)
    return (
        f"{budget.kind}={budget.value:g} cannot be met: the most that these layers and formats "
        f"reach is {dense / least:.4g}{kept}"
    )


def reason(options: Options, option: Option, budget: Budget) -> str:
    """Say in words why a target gets an option."""
    said = [_compared(options, option, budget)]
    if options.without_effect and option.curve is not None:
        said.append(f"{WITHOUT_EFFECT}, and is reduced no more than the budget asks on average")
    if options.ends_the_curve(option):
        said.append("the largest rank whose error was estimated")
    return "; ".join(said)


def _compared(options: Options, option: Option, budget: Budget) -> str:
    """Name the option, beside what the other formats would have done."""
    if option.curve is None:
        return options.reason_to_stay or (
            f"the budget is better spent so: its importance is {options.importance:.3g}, and fewer "
            f"parameters are saved elsewhere at less error"
        )
    chosen = option.curve.candidate.in_words
    if options.fixed:
        return f"{chosen}; the rank was asked for"
    if budget.never_slower:
        return chosen
    rivals = []
    by_flops = budget.kind == "flops_ratio"
    for curve in options.curves:
        if curve is option.curve:
            continue
        # A component has equally many FLOPs in every format.
        equal = option.rank if by_flops else option.cost.parameters // curve.candidate.per_rank
        if curve.given_up:
            rivals.append(f"{curve.candidate.in_words} has {curve.given_up}")
        elif 1 <= equal <= curve.ranks[-1]:
            rivals.append(f"{curve.candidate.in_words} {curve.error(equal):.3g}")
    if not rivals:
        return chosen
    equally = "with as many FLOPs" if by_flops else "at equal size"
    return f"{chosen}: error {option.error:.3g}, {equally} {', '.join(rivals)}"


def predicted_error(every: Sequence[Options], chosen: Sequence[Option]) -> float:
    """√Σ importance · error², with the errors that the curves predict."""
    return math.sqrt(math.fsum(o.loss(x) for o, x in zip(every, chosen, strict=True)))


def fitted_error(every: Sequence[Options], errors: Mapping[str, float]) -> float:
    """√Σ importance · error², with the errors of the fits by target; others stay dense."""
    return math.sqrt(math.fsum(o.importance * errors.get(o.target.name, 0.0) ** 2 for o in every))
