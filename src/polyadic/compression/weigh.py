"""The options of every target: its formats and ranks, with their errors, importance and costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from polyadic.compression.arguments import Callback
from polyadic.compression.budget import Budget
from polyadic.compression.calibration import Calibration, Evidence
from polyadic.compression.costs import Calls, Cost, cp_cost, dense_cost
from polyadic.compression.curves import (
    DAMPING,
    ROUNDING,
    Curve,
    approximation,
    curves,
    fitted,
)
from polyadic.compression.kept import curves_from_plain, curves_to_plain
from polyadic.compression.targets import Target
from polyadic.durable.pieces import Pieces
from polyadic.fitting.problem import inner, wide
from polyadic.formats import Rank

# Fraction of the parameters at which a layer's effect is measured where the budget names none.
PROBED = 1 / 4
# Said of a layer whose error changes no output, so that any error of it would seem to cost nothing.
WITHOUT_EFFECT = "changes none of the outputs that count"
# Ranks of one curve that are weighed; between neighbours parameters differ by a few percent.
MOST_RANKS = 96


@dataclass(frozen=True)
class Option:
    """A format at a rank, or the dense weight.

    Attributes:
        curve: the error curve of the format; None for the dense weight.
        rank: the rank; 0 for the dense weight.
        error: the relative error, as the curve has it.
        cost: what the layers then cost.
    """

    curve: Curve | None
    rank: int
    error: float
    cost: Cost


@dataclass(frozen=True)
class Options:
    """What a target could become.

    Attributes:
        target: the layers.
        curves: the error curves of its formats.
        importance: what a squared relative error of 1 would add to the squared error of the whole.
        dense: the option to keep the dense weight.
        converted: all other options that the budget admits.
        fixed: whether a rank was asked for, so that the dense weight is no option.
        reason_to_stay: why there are no other options, or empty.
        without_effect: whether no error of the target changed the outputs that count.
    """

    target: Target
    curves: tuple[Curve, ...]
    importance: float
    dense: Option
    converted: tuple[Option, ...]
    fixed: bool
    reason_to_stay: str
    without_effect: bool = False

    @property
    def allowed(self) -> list[Option]:
        """The options that may be chosen."""
        return list(self.converted) if self.fixed else [self.dense, *self.converted]

    def loss(self, option: Option) -> float:
        """What an option adds to the squared error of the whole."""
        return self.importance * option.error**2

    def ends_the_curve(self, option: Option) -> bool:
        """Whether a larger rank would save parameters too, but its error was not estimated."""
        if self.fixed or option.curve is None or not option.curve.fits:
            return False
        most = (self.target.dense_parameters - 1) // option.curve.candidate.per_rank
        return option.rank == option.curve.ranks[-1] < most


def weigh(
    targets: Sequence[Target],
    evidence: Evidence,
    budget: Budget,
    ranks: Mapping[str, Rank],
    seed: int,
    tell: Callback,
    pieces: Pieces,
) -> list[Options]:
    """Find the error curves, the importance and the options of every target.

    The importance s of a target weighs its squared relative error e² in the sum Σ s e², which
    stands for the squared relative error of the model. Without calibration it is the target's
    share of the squared Frobenius norm of all weights. With calibration it is measured: the weight
    is replaced by an approximation of error e₀, the squared relative change δ of the model's
    outputs is taken, and s = δ / e₀². A target with δ = 0 is reduced by no more than the budget
    asks of all targets together: nothing tells how large its error may be.

    Args:
        targets: what is converted.
        evidence: what is known of the layers' inputs and calls.
        budget: the budget, which says what options count and where errors matter.
        ranks: by the name of a layer, a rank that is asked for.
        seed: seed of the fits.
        tell: called after each target.
        pieces: where the curves of each target are kept.

    Returns:
        The options of each target, in the order of the targets.
    """
    found = []
    norms = [inner(wide(target.weight), wide(target.weight)) for target in targets]
    for i, (target, norm) in enumerate(zip(targets, norms, strict=True)):
        tell("curves", i, len(targets), target.name)
        asked = target.asked(ranks)
        metric = evidence.metrics.get(target.name)
        reason_to_stay = _unseen(metric, evidence.calibration is not None)
        share = norm / max(sum(norms), 1e-300)
        seen = not reason_to_stay
        measure = partial(_measured, target, metric, evidence, budget, seen, asked, share, seed)
        piece = pieces.get(f"curves-{i}", measure)
        known, importance = curves_from_plain(target, piece["curves"]), piece["importance"]
        fixed = asked is not None and bool(known)
        options = _options(target, known, importance, evidence.calls, budget, fixed, reason_to_stay)
        if options.converted and not fixed and evidence.calibration is not None and not importance:
            options = _without_effect(options, budget)
        found.append(options)
    tell("curves", len(targets), len(targets), "")
    return found


def _measured(
    target: Target,
    metric: Tensor | None,
    evidence: Evidence,
    budget: Budget,
    seen: bool,
    asked: Rank | None,
    share: float,
    seed: int,
) -> dict[str, Any]:
    """Find a target's curves, and its importance, which without calibration is ``share``."""
    known = curves(target, metric, budget.fraction, asked, seed) if seen else []
    importance = share if evidence.calibration is None else 0.0
    if evidence.calibration is not None and known and metric is not None:
        probed = budget.fraction or PROBED
        importance = _effect(target, known[0], metric, evidence.calibration, probed, seed)
    return {"curves": curves_to_plain(target, known), "importance": importance}


def _unseen(metric: Tensor | None, calibrated: bool) -> str:
    """Return why calibration says nothing of a target's error, or an empty text."""
    if metric is None:
        return "was not called with the calibration batches" if calibrated else ""
    power = metric.sum() if metric.dim() == 1 else metric.diagonal().sum()
    if float(power) <= 0:
        return "has only zeros for input with the calibration batches"
    return ""


def _effect(
    target: Target,
    curve: Curve,
    metric: Tensor,
    calibration: Calibration,
    fraction: float,
    seed: int,
) -> float:
    """Return δ / e₀²: the squared change δ of the outputs by an error e₀ of this target alone.

    The error is that of the curve's format with about ``fraction`` of the dense parameters.
    """
    size = fraction * target.dense_parameters
    rank = min(max(1, round(size / curve.candidate.per_rank)), curve.ranks[-1])
    rank = max(rank, curve.ranks[0])
    fit = curve.nearest(rank)
    if fit is None:
        fit = fitted(target, curve.candidate, rank, metric, seed=seed, damping=DAMPING)
    changed = calibration.effect(target.layer, approximation(target, curve.candidate, fit))
    importance = changed / max(fit.error, ROUNDING) ** 2
    return 0.0 if importance < ROUNDING**2 else importance


def _options(
    target: Target,
    curves: Sequence[Curve],
    importance: float,
    calls: Calls,
    budget: Budget,
    fixed: bool,
    reason_to_stay: str,
) -> Options:
    """List the options of a target that the budget admits."""
    dense = Option(None, 0, 0.0, dense_cost(target, calls))
    found: list[Option] = []
    refused: dict[str, None] = {}
    for curve in curves if not reason_to_stay else ():
        for rank in curve.ranks if fixed else ranks_of(curve):
            cost = cp_cost(target, calls, curve.candidate, rank)
            reason = "" if fixed else _why_not(cost, dense.cost, budget)
            if reason:
                refused[reason] = None
            else:
                found.append(Option(curve, rank, curve.error(rank), cost))
    if not found and not reason_to_stay:
        reason_to_stay = "; ".join(refused) or _too_small(target)
    return Options(target, tuple(curves), importance, dense, tuple(found), fixed, reason_to_stay)


def _without_effect(options: Options, budget: Budget) -> Options:
    """Leave what asks no more of a target than the budget asks of all targets together."""
    dense = options.dense.cost

    def modest(option: Option) -> bool:
        if budget.kind == "ratio":
            return option.cost.parameters * budget.value >= dense.parameters
        if budget.kind == "flops_ratio":
            assert option.cost.flops is not None
            assert dense.flops is not None
            return option.cost.flops * budget.value >= dense.flops
        return budget.kind == "speed" or option.error <= budget.value

    left = tuple(option for option in options.converted if modest(option))
    if left and budget.kind in ("ratio", "flops_ratio"):
        # The best of the smallest of each format; ranks ascend, and all these losses are 0.
        smallest = {id(option.curve): option for option in reversed(left)}
        left = (min(smallest.values(), key=lambda option: option.error),)
    reason = "" if left else f"{WITHOUT_EFFECT}, and at every rank its own error exceeds the budget"
    return replace(options, converted=left, reason_to_stay=reason, without_effect=True)


def ranks_of(curve: Curve) -> list[int]:
    """Return the ranks of a curve to weigh: all, or ``MOST_RANKS`` in geometric progression."""
    last = curve.ranks[-1]
    if last <= MOST_RANKS:
        return list(range(1, last + 1))
    step = math.log(last) / MOST_RANKS
    return sorted({round(math.exp(step * i)) for i in range(MOST_RANKS + 1)})


def _why_not(cost: Cost, dense: Cost, budget: Budget) -> str:
    """Return why a budget does not admit an option, or an empty text."""
    fewer = cost.flops is not None and dense.flops is not None and cost.flops < dense.flops
    if budget.kind == "flops_ratio" and not fewer:
        return "has no fewer FLOPs in CP format at any rank weighed"
    if budget.never_slower:
        if dense.seconds is None or cost.seconds is None:
            return "is not predicted to be no slower, as its calls are not known"
        if cost.seconds > dense.seconds:
            return "is predicted to be slower in CP format at every rank weighed"
    return ""


def _too_small(target: Target) -> str:
    least = min(candidate.per_rank for candidate in target.candidates)
    return (
        f"has no fewer parameters in CP format: {least} at rank 1, {target.dense_parameters} dense"
    )
