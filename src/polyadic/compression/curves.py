"""How the error of a weight falls with the rank, for each format it could have.

For plain low rank, one set of singular values gives the errors of all ranks. For other formats a
few ranks are fitted with few sweeps, and each fit goes on from the one before. Two steps then lead
from these short fits to a curve:

What more sweeps will gain is extrapolated. Let e(s) be the error after s sweeps. If every doubling
of the sweeps gains a fraction g = ``GAIN`` of what the doubling before gained, then d further
doublings gain (g + g² + … + g^d) (e(s/2) − e(s)) = g (1 − g^d) / (1 − g) (e(s/2) − e(s)).

Between the ranks that were fitted, the squared error is interpolated linearly in log(1 + R), from
e = 1 at R = 0.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyadic._torch import no_autocast
from polyadic.compression.targets import Candidate, Target
from polyadic.durable import interrupts
from polyadic.fitting import Decomposition, decompose
from polyadic.fitting.problem import Problem, make_problem, wide
from polyadic.fitting.work import sweep_work
from polyadic.formats import (
    Rank,
)

# Sweeps of a short fit, whose error is extrapolated.
SWEEPS = 8
# A doubling of the sweeps gains about this fraction of what the doubling before gained; fits end
# after some 64 sweeps.
GAIN = 2 / 3
SWEEPS_OF_A_WHOLE_FIT = 64
# Sweeps after which a short fit is ended if its extrapolated error is too large.
SWEEPS_BEFORE_GIVING_UP = 4
# A format that is worse than plain low rank by more than this, at equal parameters, is given up.
MARGIN = 1.02
# Fractions of the dense parameters that are fitted, unless the budget says where it matters.
FRACTIONS = (1 / 16, 1 / 4, 1 / 2)
# Where the budget leaves a fraction on average, these multiples of it are fitted.
AROUND = (0.5, 1.5)
# Multiply-adds of one sweep beyond which a rank is not fitted: about a second.
LARGEST_SWEEP = 2e10
DAMPING = 1e-4
ROUNDING = 1e-6


@dataclass(frozen=True)
class Curve:
    """Relative error by rank, in the metric of the fit.

    Attributes:
        candidate: the format.
        ranks: the ranks at which the error is known, ascending.
        errors: the errors at these ranks.
        fits: short fits at these ranks; empty where the errors are exact.
        given_up: why there are no more ranks, or empty.
    """

    candidate: Candidate
    ranks: tuple[int, ...]
    errors: tuple[float, ...]
    fits: tuple[Decomposition, ...] = ()
    given_up: str = ""

    def error(self, rank: int) -> float:
        """Return the error at any rank up to the largest known one, by interpolation."""
        at = bisect.bisect_left(self.ranks, rank)
        if at < len(self.ranks) and self.ranks[at] == rank:
            return self.errors[at]
        if at == len(self.ranks):
            return self.errors[-1]
        low = 0 if at == 0 else self.ranks[at - 1]
        before = 1.0 if at == 0 else self.errors[at - 1] ** 2
        high, after = self.ranks[at], self.errors[at] ** 2
        share = (math.log1p(rank) - math.log1p(low)) / (math.log1p(high) - math.log1p(low))
        return math.sqrt(before + share * (after - before))

    def nearest(self, rank: int) -> Decomposition | None:
        """Return the fit whose rank is nearest, to go on from; None where there are no fits."""
        if not self.fits:
            return None
        at = min(range(len(self.ranks)), key=lambda i: abs(math.log(self.ranks[i] / rank)))
        return self.fits[at]


def problem_of(
    target: Target, candidate: Candidate, metric: Tensor | None, damping: float = DAMPING
) -> Problem:
    """Return the least-squares problem that ``decompose`` solves for a target in a format."""
    probe = candidate.probe
    inside = None if metric is None else probe._fit_metric(metric)
    return make_problem(
        target.weight_to_fit(candidate), candidate.modes, inside, probe._metric_groups, damping
    )


def fitted(
    target: Target, candidate: Candidate, rank: int, metric: Tensor | None, **options: Any
) -> Decomposition:
    """Fit a target's weight by ``decompose``."""
    probe, weight = candidate.probe, target.weight_to_fit(candidate)
    in_metric: dict[str, Any] = {}
    if metric is not None:
        in_metric = {"metric": probe._fit_metric(metric), "metric_groups": probe._metric_groups}
    asked = options.pop("callback", None)

    def after_sweep(iteration: int, error: float) -> bool:
        interrupts.check()
        return asked is not None and asked(iteration, error)

    return decompose(weight, candidate.modes, rank, **in_metric, **options, callback=after_sweep)


def approximation(target: Target, candidate: Candidate, fit: Decomposition) -> Tensor:
    """Return the dense weight that a fit stands for, in torch's layout."""
    with no_autocast(target.weight):
        layer: Any = target.converted(fit.cp)[target.name]
        dense: Tensor = layer._built_weight()
        return dense.detach()


@torch.no_grad()
def low_rank_errors(problem: Problem) -> Tensor:
    """Relative errors (min(P, Q) + 1,) of the best matrices of rank 0, 1, ..., in the metric.

    The best matrix of rank R leaves the squared singular values of Σ^½ W from the (R + 1)-th on
    (Eckart & Young, Psychometrika 1936). They are the eigenvalues of the smaller Gram matrix of
    Σ^½ W (P, Q), computed in float64: Wᴴ Σ W (Q, Q) needs no root of Σ; (P, P) is formed from
    Lᴴ W with Σ = L Lᴴ.
    """
    matrix, sigma = wide(problem.matrix), problem.metric
    if matrix.shape[0] <= matrix.shape[1] and sigma is not None:
        if sigma.dim() == 1:
            matrix = wide(sigma).sqrt().unsqueeze(1) * matrix
        else:
            matrix = torch.linalg.cholesky(wide(sigma)).mH @ matrix
        gram = matrix @ matrix.mH
    elif sigma is not None:
        scaled = wide(sigma)
        weighted = scaled.unsqueeze(1) * matrix if scaled.dim() == 1 else scaled @ matrix
        gram = matrix.mH @ weighted
    else:
        upright = matrix.shape[0] > matrix.shape[1]
        gram = matrix.mH @ matrix if upright else matrix @ matrix.mH
    powers = torch.linalg.eigvalsh((gram + gram.mH) / 2).clamp_min(0)
    # Eigenvalues ascend: their cumulative sums, from the end, are the powers left at rank 0, 1, ...
    left = torch.cat([powers.new_zeros(1), powers.cumsum(0)]).flip(0)
    errors = (left / left[0].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    # If a weight has exactly this rank, what is left of it is rounding of its float32 entries.
    return errors.masked_fill(errors < ROUNDING, 0.0)


def curves(
    target: Target, metric: Tensor | None, fraction: float | None, wanted: Rank | None, seed: int
) -> list[Curve]:
    """Find the error curves of a target's formats.

    Args:
        target: the layers.
        metric: second moment of the input, or None.
        fraction: fraction of the dense parameters near which the budget is expected to end.
        wanted: the rank that is asked for, in the form that layers take; None for all ranks.
        seed: seed of the fits.

    Returns:
        A curve for each format that has fewer parameters than the weight at some rank; plain low
        rank comes first.
    """
    found: list[Curve] = []
    # Where two modes per side are worse than plain low rank, three are not tried.
    for candidate in sorted(
        target.candidates, key=lambda candidate: (not candidate.is_low_rank, candidate.order)
    ):
        fixed = fixed_rank(target, candidate, wanted)
        most = (target.dense_parameters - 1) // candidate.per_rank if fixed is None else fixed
        if most < 1:
            continue
        if candidate.is_low_rank:
            with no_autocast(target.weight):
                errors = low_rank_errors(problem_of(target, candidate, metric)).tolist()
            known = range(1, min(most, len(errors) - 1) + 1)
            ranks = list(known) if fixed is None else [fixed]
            values = tuple(errors[min(r, len(errors) - 1)] for r in ranks)
            found.append(Curve(candidate, tuple(ranks), values))
        else:
            ranks = ranks_to_fit(target, candidate, metric, fraction, fixed)
            found.append(_fit(target, candidate, metric, ranks, found, fixed, seed))
            if found[-1].given_up and candidate.order > 1:
                break
    return [curve for curve in found if curve.ranks]


def fixed_rank(target: Target, candidate: Candidate, wanted: Rank | None) -> int | None:
    """Return the rank that is asked for, as a number; None if any rank may be chosen."""
    if wanted is None:
        return None
    return candidate.probe._resolved(wanted, "meta", target.weight.dtype)


def ranks_to_fit(
    target: Target,
    candidate: Candidate,
    metric: Tensor | None,
    fraction: float | None,
    fixed: int | None,
) -> list[int]:
    """Return the ranks that are fitted: the one asked for, or some near the budget's fraction.

    A rank whose sweeps would take more than ``LARGEST_SWEEP`` is replaced by the largest that stays
    below. How much a sweep takes depends on the metric: with the diagonal metric of an embedding a
    system of R unknowns is solved for each row of a factor.
    """
    if fixed is not None:
        return [fixed]
    most = (target.dense_parameters - 1) // candidate.per_rank
    if most < 1:
        return []
    fractions: Sequence[float] = FRACTIONS
    if fraction is not None:
        fractions = [AROUND[0] * fraction, AROUND[1] * fraction]
    wanted = {
        min(most, max(1, round(f * target.dense_parameters / candidate.per_rank)))
        for f in fractions
    }

    def too_large(rank: int) -> bool:
        return work_of_sweep(candidate, metric, rank) > LARGEST_SWEEP

    largest = max(1, bisect.bisect_left(range(1, most + 1), True, key=too_large))
    return sorted({min(rank, largest) for rank in wanted})


def work_of_sweep(candidate: Candidate, metric: Tensor | None, rank: int) -> float:
    """Return the multiply-adds of one sweep of a fit."""
    inside = None if metric is None else candidate.probe._fit_metric(metric)
    dims = None if inside is None else inside.dim()
    return sweep_work(candidate.modes, rank, dims, candidate.probe._metric_groups)


def _fit(
    target: Target,
    candidate: Candidate,
    metric: Tensor | None,
    ranks: Sequence[int],
    others: Sequence[Curve],
    fixed: int | None,
    seed: int,
) -> Curve:
    """Fit ascending ranks, and stop where the format proves worse than those before it."""
    rivals = [curve for curve in others if curve.ranks] if fixed is None else []
    done: list[Decomposition] = []
    for rank in ranks:
        start: object = done[-1] if done else "orthogonal"
        best, rival = _best_of_size(rivals, rank * candidate.per_rank)
        fit = fitted(
            target,
            candidate,
            rank,
            metric,
            start=start,
            iterations=SWEEPS,
            seed=seed,
            damping=DAMPING,
            callback=_hopeless(MARGIN * best) if rivals else None,
        )
        done.append(fit)
        if rivals and promised(fit) > MARGIN * best:
            reason = (
                f"{promised(fit):.3g} at rank {rank}, where {rival} of as many parameters has "
                f"{best:.3g}"
            )
            return _curve(candidate, done, reason)
    return _curve(candidate, done, "")


def _best_of_size(curves: Sequence[Curve], parameters: int) -> tuple[float, str]:
    """Return the least error of the curves with so many parameters, and the format in words."""
    found = [
        (curve.error(parameters // curve.candidate.per_rank), curve.candidate.in_words)
        for curve in curves
        if parameters >= curve.candidate.per_rank
    ]
    return min(found, default=(1.0, "nothing"))


def _hopeless(limit: float) -> Callable[[int, float], bool]:
    """Make a callback that ends a fit whose extrapolated error stays above a limit."""
    history: list[float] = []

    def look(iteration: int, error: float) -> bool:
        history.append(error)
        return iteration == SWEEPS_BEFORE_GIVING_UP and _extrapolated(history) > limit

    return look


def promised(fit: Decomposition) -> float:
    """Return the error that a short fit would reach with all sweeps."""
    return fit.error if fit.converged else _extrapolated(fit.history)


def _extrapolated(history: Sequence[float]) -> float:
    """Extrapolate from the errors after each sweep, whose number is even."""
    sweeps, last = len(history), history[-1]
    doublings = math.log2(SWEEPS_OF_A_WHOLE_FIT / sweeps)
    gained = max(0.0, history[sweeps // 2 - 1] - last)
    more = GAIN * (1 - math.pow(GAIN, doublings)) / (1 - GAIN)  # g + g² + … + g^d
    return max(0.5 * last, last - more * gained)


def _curve(candidate: Candidate, fits: Sequence[Decomposition], given_up: str) -> Curve:
    """Make a curve whose errors never rise, since a larger rank can do what a smaller one does."""
    errors = itertools.accumulate(map(promised, fits), min)
    ranks = tuple(fit.cp.rank for fit in fits)
    return Curve(candidate, ranks, tuple(errors), tuple(fits), given_up)


def output_error(
    target: Target, candidate: Candidate, fit: Decomposition, metric: Tensor | None
) -> float | None:
    """Return ‖Σ^½ (W − Ŵ)‖ / ‖Σ^½ W‖ in the metric that was measured, without damping.

    Returns None without a metric.
    """
    if metric is None:
        return None
    with no_autocast(target.weight):
        problem = problem_of(target, candidate, metric, damping=0.0)
        exact = [wide(factor) for factor in fit.cp.factors]
        factors = problem.to_fitted_modes(exact, exact[0].dtype)
        power = problem.power()
        lost = problem.residual(factors)[0]
    return math.sqrt(lost / power) if power > 0 else 0.0
