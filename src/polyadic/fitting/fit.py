"""``decompose``: check the arguments, race the starts, sweep until nothing more is gained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from polyadic.fitting import arguments
from polyadic.fitting.arguments import Start
from polyadic.fitting.descent import Descent
from polyadic.fitting.problem import Problem, make_problem, wide
from polyadic.fitting.result import DecomposeInterrupted, Decomposition, fragility
from polyadic.fitting.starts import exact_rank, low_rank, orthogonal_terms, random_factors
from polyadic.formats import Shape, positive_int
from polyadic.kernels.multilinear import khatri_rao
from polyadic.tensor import CPTensor

# Sweeps of each start in a race.
RACE_SWEEPS = 5
# Sweeps over which the fall of the error is compared with the tolerance.
WINDOW = 5
# All fits of start="auto" together may cost so many multiplications, a second or two.
CHEAP = 6 * 10**9
# What a small sweep costs in calls of operations, counted in multiplications.
SWEEP = 5 * 10**6
# Most fits of start="auto".
MOST_FITS = 10
STOPPED = (False, "stopped by the callback")
# An expansion or a fit counts as exact if its error is within so many roundings of the norm.
EXACT = 100

Callback = Callable[[int, float], object]


@torch.no_grad()
def decompose(
    weight: Tensor,
    tensorized_shape: Sequence[Sequence[int]],
    rank: int,
    *,
    metric: Tensor | None = None,
    metric_groups: Sequence[int] = (0,),
    damping: float = 1e-3,
    start: Start | Sequence[Start] = "auto",
    iterations: int = 200,
    tolerance: float = 1e-4,
    regularization: float = 1e-2,
    max_growth: float | None = None,
    seed: int = 0,
    callback: Callback | None = None,
) -> Decomposition:
    """Fit a CP tensor to a weight by alternating least squares.

    Minimises ‖Σ^½(W − Ŵ)‖² + τ Σ_r ‖w_r‖² over Ŵ = Σ_r w_r of rank one each, by accelerated
    sweeps that never raise it. The second term keeps components from growing against each other:
    of all fits with no larger error, a minimiser has the smallest components, which is what the
    error-preserving correction of Phan et al. (ECCV 2020) asks for. Where two modes are left after
    those of size 1 (plain low rank), the result is the optimum, by an SVD of Σ^½W. From rank
    Π n / max n on, and below where the orthogonal start is exact, an exact expansion is returned.

    Args:
        weight: W, whose dimensions are the modes of the tensorized shape in order, or products
            of adjacent ones: (M, N) for a linear layer, which is ``linear.weight.t()``; (Cout,
            Cin, *kernel) for a convolution. Computed in float32, or float64 if it is; a complex
            weight in its own dtype, with complex factors.
        tensorized_shape: groups of mode sizes, as ``CPTensor`` takes them.
        rank: R.
        metric: second moment Σ of the layer's input over the input side, (P, P), or its diagonal
            (P,) such as token frequencies; None for the Frobenius norm. Only its shape matters,
            not its scale. ``polyadic.second_moments`` gathers it. Of complex inputs X it is XᴴX.
        metric_groups: the groups of ``tensorized_shape`` that make up the input side, in the
            order of the metric: (0,) for a linear layer, an embedding or a transposed convolution,
            (1, 2) for a convolution.
        damping: what is added to the diagonal of Σ, relative to its mean, to make Σ definite.
        start: ``"orthogonal"`` (largest terms of an orthogonal rank-one expansion), ``"random"``,
            a ``CPTensor`` or ``Decomposition`` to go on from, or a sequence of these, which are
            raced; ``"auto"`` races one of each name, and where fits are cheap makes more fits from
            random starts and returns the best. Given factors of another rank are cut to their
            largest components, or filled up with the largest terms of an expansion of their
            residual.
        iterations: most sweeps over all factors in each fit.
        tolerance: stop when the error falls by less than this fraction in five sweeps; with 0,
            only ``iterations`` and the callback end the fit.
        regularization: τ relative to the squared error, which it follows: a larger one gives
            smaller components, less fragile under training and rounding.
        max_growth: bound on the growth of the result (see ``Decomposition``), at least 1; the
            regularization is raised until it holds. None for no bound beyond what it sets.
        seed: seed of all that is drawn; equal seeds give equal results on one machine.
        callback: called as ``callback(iteration, error)`` after each sweep, in a race after those
            of the first start and then of the winner; in further fits with the number of all
            sweeps and the least error. If it returns True, the fit ends with the best so far.

    Returns:
        A ``Decomposition`` with the CP tensor, its errors and its fragility.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, shape or value does not fit; the weight is not finite; the metric is
            not symmetric (Hermitian) positive semidefinite.
        DecomposeInterrupted: on Ctrl-C; a KeyboardInterrupt with the result so far.
    """
    began = time.perf_counter()
    groups = arguments.groups(tensorized_shape)
    arguments.weight(weight, groups)
    rank = positive_int(rank, "rank")
    is_complex = weight.is_complex()
    inside = arguments.metric(metric, metric_groups, groups, is_complex=is_complex)
    arguments.options(damping, iterations, tolerance, regularization, max_growth, seed, callback)
    starts = arguments.starts(start, groups, is_complex=is_complex)
    # A caller's autocast would round every product of the fit.
    with torch.autocast(weight.device.type, enabled=False):
        power = _power_of_two(weight, sum(map(len, groups)))
        problem = make_problem(_scaled(weight, -power, groups), groups, metric, inside, damping)
        fit = _Fit(problem, groups, rank, weight, power, regularization, max_growth, began)
        generator = torch.Generator(device="cpu").manual_seed(seed)
        known = fit.closed_form(generator, expand="orthogonal" in starts)
        if known is not None:
            return known
        try:
            stopped = fit.race(starts, generator, iterations, callback)
            ended = stopped or fit.run(iterations, tolerance, callback)
            if start == "auto" and ended is not STOPPED:
                ended = fit.again(generator, iterations, tolerance, callback, ended)
        except KeyboardInterrupt:
            if fit.descent is None:
                raise
            raise DecomposeInterrupted(fit.result(False, "interrupted")) from None
        return fit.result(*ended)


# Squares and sums of entries between 2^-20 and 2^20 are far from the ends of float32.
ORDINARY_EXPONENT = 20


def _power_of_two(weight: Tensor, order: int) -> int:
    """Return p such that the entries of W / 2^(p·order) are near 1.

    Fits square the entries, which must neither overflow nor vanish. As a factor times 2^p is
    exact, the scaling rounds nothing: a weight times 2^order has the fit of the weight, with every
    factor doubled. Weights of ordinary size are left as they are, which spares a copy of them.
    """
    largest = float(weight.detach().abs().max())
    exponent = math.log2(largest) if largest > 0 else 0.0
    return 0 if abs(exponent) <= ORDINARY_EXPONENT else round(exponent / order)


def _scaled(weight: Tensor, power: int, groups: Sequence[Shape]) -> Tensor:
    """Return W · 2^(power·order), in float32 at least; W itself if ``power`` is 0."""
    if power == 0:
        return weight
    scaled = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    for _ in range(sum(map(len, groups))):
        # 2^(power·order) can be beyond the dtype, so that its factors are applied one by one.
        scaled = scaled * 2.0**power
    return scaled


def name(start: Start) -> str:
    """Return the name under which a start is reported."""
    return start if isinstance(start, str) else "the given factors"


class _Fit:
    """The state of one fit."""

    def __init__(
        self,
        problem: Problem,
        groups: tuple[Shape, ...],
        rank: int,
        weight: Tensor,
        power: int,
        tau: float,
        max_growth: float | None,
        began: float,
    ) -> None:
        self.problem, self.groups, self.rank, self.weight = problem, groups, rank, weight
        self.tau, self.max_growth, self.began = tau, max_growth, began
        # The weight's factors are those of the problem times this.
        self.unit = 2.0**power
        self.norm = math.sqrt(problem.frobenius_power())
        self.raced: tuple[tuple[str, float], ...] = ()
        self.further: tuple[float, ...] = ()
        self.start = ""
        self.terms: list[Tensor] = []
        self.descent: Descent | None = None

    def closed_form(self, generator: torch.Generator, expand: bool) -> Decomposition | None:
        """Return the optimum if it is known: for two modes, exact expansions, a weight of zeros.

        Args:
            generator: draws for randomized range finding.
            expand: look for an exact expansion even if the rank does not promise one.
        """
        problem, rank = self.problem, self.rank
        if self.norm == 0:
            factors = random_factors(problem, rank, generator)
            return self._finished([*factors[:-1], factors[-1] * 0], "zeros", "the weight is zero")
        if len(problem.sizes) == 2:
            reason = "the optimum in closed form"
            return self._finished(low_rank(problem, rank), "the SVD", reason)
        if not expand and rank < exact_rank(problem.sizes):
            return None
        self.terms = orthogonal_terms(problem, rank, generator)
        left_out = problem.residual(self.terms)[1]
        if left_out <= (self.norm * EXACT * torch.finfo(problem.matrix.dtype).eps) ** 2:
            reason = "an exact expansion at this rank"
            return self._finished(self.terms, "an orthogonal expansion", reason)
        return None

    def _finished(self, factors: list[Tensor], start: str, reason: str) -> Decomposition:
        self.start, self.descent = start, self._descent(factors)
        return self.result(True, reason)

    def begin(self, start: Start, generator: torch.Generator) -> list[Tensor]:
        """Make the factors of the fitted modes for a start."""
        if start == "orthogonal":
            return self.terms
        if start == "random":
            return random_factors(self.problem, self.rank, generator)
        cp = start.cp if isinstance(start, Decomposition) else start
        assert isinstance(cp, CPTensor)
        every = [factor / self.unit for factor in cp.factors]
        if cp.weights is not None:
            every[0] = every[0] * cp.weights
        return self._of_rank(self.problem.to_fitted_modes(every), generator)

    def _of_rank(self, factors: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        """Cut factors to their largest components, or fill them up from their residual."""
        present = factors[0].shape[1]
        if present > self.rank:
            norms = torch.stack([wide(factor).norm(dim=0) for factor in factors]).prod(0)
            keep = norms.argsort(descending=True, stable=True)[: self.rank].sort()[0]
            return [factor[:, keep] for factor in factors]
        if present < self.rank:
            left, right = self.problem.split(factors)
            rest = self.problem.matrix - khatri_rao(left) @ khatri_rao(right).t()
            more = orthogonal_terms(
                replace(self.problem, matrix=rest), self.rank - present, generator
            )
            return [torch.cat(pair, 1) for pair in zip(factors, more, strict=True)]
        return factors

    def race(
        self,
        starts: Sequence[Start],
        generator: torch.Generator,
        iterations: int,
        callback: Callback | None,
    ) -> tuple[bool, str] | None:
        """Make a few sweeps from every start and keep the best.

        Returns:
            How the fit ended if the callback ended it, which sees the sweeps of the first start;
            else None.
        """
        for start in starts:
            descent = self._descent(self.begin(start, generator))
            first = self.descent is None
            best = self.descent or descent
            if first:
                self.start, self.descent = name(start), descent
            if len(starts) == 1:
                return None
            for _ in range(min(RACE_SWEEPS, iterations)):
                error = descent.step()
                if first and callback is not None and callback(len(descent.errors), error) is True:
                    return STOPPED
            self.raced += ((name(start), descent.errors[-1]),)
            if descent.errors[-1] < best.errors[-1]:
                self.start, self.descent = name(start), descent
        return None

    def _descent(self, factors: list[Tensor]) -> Descent:
        return Descent(self.problem, factors, self.tau, self.max_growth)

    def run(self, iterations: int, tolerance: float, callback: Callback | None) -> tuple[bool, str]:
        """Sweep on from the best start; return whether the fit converged, and why it ended."""
        assert self.descent is not None
        return self._to_end(self.descent, iterations, tolerance, callback)

    def again(
        self,
        generator: torch.Generator,
        iterations: int,
        tolerance: float,
        callback: Callback | None,
        ended: tuple[bool, str],
    ) -> tuple[bool, str]:
        """Make whole fits from more random starts, as many as are cheap, and keep the best.

        Args:
            generator: draws the starts.
            iterations: most sweeps of each fit.
            tolerance: fall of the error at which each fit ends.
            callback: told the number of all sweeps and the least error.
            ended: how the first fit ended, which is returned if that fit stays the best.
        """
        assert self.descent is not None
        size = self.problem.matrix.numel() * self.rank + SWEEP
        sweeps, fits = len(self.descent.errors), 1
        least = self.descent.errors[-1]

        def follow(iteration: int, error: float) -> object:
            nonlocal least
            least = min(least, error)
            return None if callback is None else callback(sweeps + iteration, least)

        exact = EXACT * torch.finfo(self.problem.matrix.dtype).eps
        while fits < MOST_FITS and size * sweeps * (fits + 1) <= CHEAP * fits and least > exact:
            other = self._descent(random_factors(self.problem, self.rank, generator))
            how = self._to_end(other, iterations, tolerance, follow)
            self.further += (other.errors[-1],)
            if other.errors[-1] < self.descent.errors[-1]:
                self.start, self.descent, ended = "random", other, how
            if how is STOPPED:
                return STOPPED
            fits, sweeps = fits + 1, sweeps + len(other.errors)
        return ended

    def _to_end(
        self, descent: Descent, iterations: int, tolerance: float, callback: Callback | None
    ) -> tuple[bool, str]:
        """Sweep until an end is reached, and then until the growth is within its bound."""
        ended = self._sweep(descent, iterations, tolerance, callback)
        while descent.too_large():
            descent.step()
        return ended

    def _sweep(
        self, descent: Descent, iterations: int, tolerance: float, callback: Callback | None
    ) -> tuple[bool, str]:
        errors = descent.errors
        while len(errors) < iterations:
            error = descent.step()
            if callback is not None and callback(len(errors), error) is True:
                return STOPPED
            if tolerance > 0 and descent.steady > WINDOW:
                before = errors[-1 - WINDOW]
                if before - error <= tolerance * before:
                    return True, f"the error fell by less than {tolerance:g} in {WINDOW} sweeps"
        return False, f"reached the limit of {iterations} sweeps"

    def result(self, converged: bool, reason: str) -> Decomposition:
        """Measure the present factors and return them with their numbers."""
        assert self.descent is not None
        problem, factors = self.problem, self.descent.factors
        full = problem.to_all_modes(factors)
        found = fragility(full, self.norm)
        scaled = [(f * self.unit).to(self.weight.dtype) for f in full]
        cp = CPTensor.from_factors(self.groups, scaled)
        # The errors are those of the factors returned, which are rounded to the weight's dtype.
        exact = [wide(factor) / self.unit for factor in cp.factors]
        returned = problem.to_fitted_modes(exact, exact[0].dtype)
        in_metric, frobenius = problem.residual(returned)
        return Decomposition(
            cp=cp,
            error=_relative(in_metric, problem.power()),
            frobenius_error=_relative(frobenius, self.norm**2),
            growth=found.growth,
            sensitivity=found.sensitivity,
            congruence=found.congruence,
            mean_congruence=found.mean_congruence,
            start=self.start,
            raced=self.raced,
            further=self.further,
            regularization=self.descent.tau,
            iterations=len(self.descent.errors),
            history=tuple(self.descent.errors),
            seconds=time.perf_counter() - self.began,
            converged=converged,
            reason=reason,
        )


def _relative(squared: float, power: float) -> float:
    """Return √(squared / power); for a zero weight 0 if the fit is exact, else infinity."""
    if power == 0:
        return 0.0 if squared == 0 else math.inf
    return math.sqrt(max(squared, 0.0) / power)
