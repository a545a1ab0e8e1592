"""How the error of a weight falls with the rank, for each format it could have.

Of plain low rank all errors are known from one set of singular values. Of other formats a few
ranks are fitted with few sweeps, each fit going on from the one before; what more sweeps will gain
is extrapolated, and the squared error is interpolated over the logarithm of the rank.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyadic._torch import no_autocast
from polyadic.compression.targets import Form, Site
from polyadic.fitting import Decomposition, decompose
from polyadic.fitting.problem import Problem, make_problem
from polyadic.formats import (
    Rank,
)

SWEEPS = 8
# A doubling of the sweeps gains about this fraction of what the doubling before gained; fits end
# after some 64 sweeps.
GAIN = 2 / 3
IN_THE_END = 64
# Sweeps after which a hopeless fit is ended.
LOOK = 4
# A format that is worse than plain low rank by more than this, at equal parameters, is given up.
MARGIN = 1.02
# Fractions of the dense parameters that are fitted, unless the budget says where it matters.
FRACTIONS = (1 / 16, 1 / 4, 1 / 2)
# Times the fraction that the budget leaves on average.
AROUND = (0.5, 1.5)
# Multiply-adds of the normal equations of one sweep beyond which a rank is not fitted.
LARGEST_SYSTEMS = 4e9
DAMPING = 1e-4
ROUNDING = 1e-6


@dataclass(frozen=True)
class Curve:
    """Relative error by rank, in the metric of the fit.

    Attributes:
        form: the format.
        ranks: ascending.
        errors: at these ranks.
        fits: short fits at these ranks; none where the errors are exact.
        given_up: why there are no more ranks, or empty.
    """

    form: Form
    ranks: tuple[int, ...]
    errors: tuple[float, ...]
    fits: tuple[Decomposition, ...] = ()
    given_up: str = ""

    def error(self, rank: int) -> float:
        """At a rank up to the largest known one."""
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
        """The fit to go on from."""
        if not self.fits:
            return None
        at = min(range(len(self.ranks)), key=lambda i: abs(math.log(self.ranks[i] / rank)))
        return self.fits[at]


def problem_of(site: Site, form: Form, metric: Tensor | None, damping: float = DAMPING) -> Problem:
    """The least-squares problem that ``decompose`` solves for a site in a format."""
    probe = form.probe
    inside = None if metric is None else probe._fit_metric(metric)
    return make_problem(site.target(form), form.modes, inside, probe._metric_groups, damping)


def fitted(
    site: Site, form: Form, rank: int, metric: Tensor | None, **options: object
) -> Decomposition:
    """``decompose`` of a site's weight."""
    probe = form.probe
    where = (
        {}
        if metric is None
        else {
            "metric": probe._fit_metric(metric),
            "metric_groups": probe._metric_groups,
        }
    )
    return decompose(site.target(form), form.modes, rank, **where, **options)  # type: ignore[arg-type]


def approximation(site: Site, form: Form, fit: Decomposition) -> Tensor:
    """The dense weight a fit stands for, in torch's layout."""
    with no_autocast(site.weight):
        dense: Tensor = site.made(fit.cp)[site.name]._built_weight()  # type: ignore[operator]
        return dense.detach()


@torch.no_grad()
def low_rank_errors(problem: Problem) -> Tensor:
    """Relative errors (min(P, Q) + 1,) of the best matrices of rank 0, 1, ..., in the metric.

    By the eigenvalues of the smaller Gram matrix of Σ^½ W, in float64.
    """
    wide, sigma = problem.matrix.double(), problem.metric
    if wide.shape[0] <= wide.shape[1] and sigma is not None:
        if sigma.dim() == 1:
            wide = sigma.double().sqrt().unsqueeze(1) * wide
        else:
            wide = torch.linalg.cholesky(sigma.double()).t() @ wide
        gram = wide @ wide.t()
    elif sigma is not None:
        scaled = sigma.double()
        gram = wide.t() @ (scaled.unsqueeze(1) * wide if scaled.dim() == 1 else scaled @ wide)
    else:
        gram = wide @ wide.t() if wide.shape[0] <= wide.shape[1] else wide.t() @ wide
    powers = torch.linalg.eigvalsh((gram + gram.t()) / 2).clamp_min(0)
    left = torch.cat([powers.new_zeros(1), powers.cumsum(0)]).flip(0)
    errors = (left / left[0].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    # What is left of a weight of this very rank is rounding of its float32 entries.
    return errors.masked_fill(errors < ROUNDING, 0.0)


def curves(
    site: Site, metric: Tensor | None, fraction: float | None, wanted: Rank | None, seed: int
) -> list[Curve]:
    """The curves of a site's formats.

    Args:
        site: the layers.
        metric: second moment of the input, or None.
        fraction: of the dense parameters, where the budget is expected to lie.
        wanted: the rank that is asked for, as layers take it; None for all.
        seed: of the fits.

    Returns:
        One for each format that has fewer parameters than the weight at some rank; plain low rank
        in front.
    """
    found: list[Curve] = []
    # Where two modes per side are no match for plain low rank, three are not either.
    for form in sorted(site.forms, key=lambda form: (not form.is_low_rank, form.order)):
        fixed = None if wanted is None else form.probe._resolved(wanted, "meta", site.weight.dtype)
        most = (site.dense_parameters - 1) // form.per_rank if fixed is None else fixed
        if most < 1:
            continue
        if form.is_low_rank:
            with no_autocast(site.weight):
                errors = low_rank_errors(problem_of(site, form, metric)).tolist()
            known = range(1, min(most, len(errors) - 1) + 1)
            ranks = list(known) if fixed is None else [fixed]
            values = tuple(errors[min(r, len(errors) - 1)] for r in ranks)
            found.append(Curve(form, tuple(ranks), values))
        else:
            ranks = [fixed] if fixed is not None else _ranks(site, form, most, fraction)
            found.append(_fit(site, form, metric, ranks, found, fixed, seed))
            if found[-1].given_up and form.order > 1:
                break
    return [curve for curve in found if curve.ranks]


def _ranks(site: Site, form: Form, most: int, fraction: float | None) -> list[int]:
    """Ranks to be fitted, around the budget's own fraction where it has one."""
    fractions: Sequence[float] = FRACTIONS
    if fraction is not None:
        fractions = [AROUND[0] * fraction, AROUND[1] * fraction]
    wanted = {
        min(most, max(1, round(f * site.dense_parameters / form.per_rank))) for f in fractions
    }
    modes = sum(mode > 1 for group in form.modes for mode in group)
    largest = int((LARGEST_SYSTEMS / modes) ** (1 / 3))
    return sorted({min(rank, largest) for rank in wanted})


def _fit(
    site: Site,
    form: Form,
    metric: Tensor | None,
    ranks: Sequence[int],
    others: Sequence[Curve],
    fixed: int | None,
    seed: int,
) -> Curve:
    """Fit some ranks, ascending, until the format is seen to be no match for plain low rank."""
    rivals = [c for c in others if c.form.is_low_rank] if fixed is None else []
    done: list[Decomposition] = []
    for rank in ranks:
        start: object = done[-1] if done else "orthogonal"
        equal = [rank * form.per_rank // rival.form.per_rank for rival in rivals]
        best = min([r.error(e) for r, e in zip(rivals, equal, strict=True) if e > 0], default=1.0)
        fit = fitted(
            site,
            form,
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
                f"{promised(fit):.3g} at rank {rank}, where plain low rank of as many parameters "
                f"has {best:.3g}"
            )
            return _curve(form, done, reason)
    return _curve(form, done, "")


def _hopeless(limit: float) -> Callable[[int, float], bool]:
    """A callback that ends a fit which will stay above a limit."""
    history: list[float] = []

    def look(iteration: int, error: float) -> bool:
        history.append(error)
        return iteration == LOOK and _extrapolated(history) > limit

    return look


def promised(fit: Decomposition) -> float:
    """The error a short fit will come to in the end."""
    return fit.error if fit.converged else _extrapolated(fit.history)


def _extrapolated(history: Sequence[float]) -> float:
    """From the errors after each sweep, the last after an even number of them."""
    sweeps, last = len(history), history[-1]
    doublings = math.log2(IN_THE_END / sweeps)
    gained = max(0.0, history[sweeps // 2 - 1] - last)
    more = GAIN * (1 - math.pow(GAIN, doublings)) / (1 - GAIN)
    return max(0.5 * last, last - more * gained)


def _curve(form: Form, fits: Sequence[Decomposition], given_up: str) -> Curve:
    """With errors that never rise: a larger rank can do what a smaller one does."""
    errors = itertools.accumulate(map(promised, fits), min)
    ranks = tuple(fit.cp.rank for fit in fits)
    return Curve(form, ranks, tuple(errors), tuple(fits), given_up)


def output_error(site: Site, form: Form, fit: Decomposition, metric: Tensor | None) -> float | None:
    """‖Σ^½ (W − Ŵ)‖ / ‖Σ^½ W‖ with the metric as it was measured, without damping."""
    if metric is None:
        return None
    with no_autocast(site.weight):
        problem = problem_of(site, form, metric, damping=0.0)
        factors = problem.taken(list(fit.cp.factors), torch.float64)
        power = problem.power()
        lost = problem.residual(factors)[0]
    return math.sqrt(lost / power) if power > 0 else 0.0
