"""The search for the best fit: starts are raced, swept to their end, and followed by further ones.

The whole state of a search can be written between two sweeps, and read again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polyadic.fitting.arguments import Start
from polyadic.fitting.descent import Descent
from polyadic.fitting.kept import Kept
from polyadic.fitting.problem import Problem, wide
from polyadic.fitting.result import Decomposition, fragility
from polyadic.fitting.starts import exact_rank, low_rank, orthogonal_terms, random_factors
from polyadic.formats import Shape
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

# What of a fit a checkpoint holds as it is.
_STATE = ("start", "raced", "further", "sweeps", "least")

Callback = Callable[[int, float], object]


def name(start: Start) -> str:
    """Return the name under which a start is reported."""
    return start if isinstance(start, str) else "the given factors"


@dataclass(frozen=True)
class Options:
    """What a fit is told; ``decompose`` says what each is."""

    iterations: int
    tolerance: float
    regularization: float
    max_growth: float | None
    seed: int
    callback: Callback | None

    def record(self) -> dict[str, Any]:
        """Return what must be equal for a fit to go on."""
        return {name: value for name, value in vars(self).items() if name != "callback"}


class _Stopped(Exception):  # noqa: N818 - it is no error: it ends the sweeps
    """The callback has ended the fit."""


class Fit:
    """The state of one fit."""

    def __init__(
        self,
        problem: Problem,
        groups: tuple[Shape, ...],
        rank: int,
        weight: Tensor,
        power: int,
        options: Options,
        began: float,
    ) -> None:
        self.problem, self.groups, self.rank, self.weight = problem, groups, rank, weight
        self.options, self.began = options, began
        # The weight's factors are those of the problem times this.
        self.unit = 2.0**power
        self.norm = math.sqrt(problem.frobenius_power())
        self.generator = torch.Generator(device="cpu").manual_seed(options.seed)
        self.raced: tuple[tuple[str, float], ...] = ()
        self.further: tuple[float, ...] = ()
        self.start = ""
        self.terms: list[Tensor] = []
        # The best so far, and another one that is under way beside it.
        self.descent: Descent | None = None
        self.other: Descent | None = None
        # Of the fits that are done, where there are further ones: all sweeps and the least error.
        self.sweeps, self.least = 0, math.inf
        self.kept: Kept | None = None

    def closed_form(self, expand: bool) -> Decomposition | None:
        """Return the optimum if it is known: for two modes, exact expansions, a weight of zeros.

        Args:
            expand: look for an exact expansion even if the rank does not promise one.
        """
        problem, rank, generator = self.problem, self.rank, self.generator
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

    def begin(self, start: Start) -> list[Tensor]:
        """Make the factors of the fitted modes for a start."""
        if start == "orthogonal":
            return self.terms
        if start == "random":
            return random_factors(self.problem, self.rank, self.generator)
        cp = start.cp if isinstance(start, Decomposition) else start
        assert isinstance(cp, CPTensor)
        every = [factor / self.unit for factor in cp.factors]
        if cp.weights is not None:
            every[0] = every[0] * cp.weights
        return self._of_rank(self.problem.to_fitted_modes(every))

    def _of_rank(self, factors: list[Tensor]) -> list[Tensor]:
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
                replace(self.problem, matrix=rest), self.rank - present, self.generator
            )
            return [torch.cat(pair, 1) for pair in zip(factors, more, strict=True)]
        return factors

    def search(self, starts: Sequence[Start], more: bool, kept: Kept | None) -> tuple[bool, str]:
        """Race the starts, sweep on from the best, and make more fits where they are cheap.

        Args:
            starts: the starts.
            more: whether more fits may be made.
            kept: where the state is kept, from which the fit goes on if there is one.

        Returns:
            Whether the fit converged, and why it ended.
        """
        self.kept = kept
        if kept is not None and kept.state is not None:
            self._restore(kept.state)
        try:
            self._race(starts)
            assert self.descent is not None
            self._to_end(self.descent)
            if more:
                self._again()
        except _Stopped:
            assert self.descent is not None
            if self.other is not None and self.other is not self.descent:
                self.further += (self.other.errors[-1],)
                self._keep_better("random", self.other)
            while self.descent.too_large():
                self.descent.step()
            return STOPPED
        if self.kept is not None:
            self.kept.save(self._state)
        assert self.descent.ended is not None
        return self.descent.ended

    def _race(self, starts: Sequence[Start]) -> None:
        """Make a few sweeps from every start and keep the best; the callback sees the first's."""
        if len(starts) == 1:
            if self.descent is None:
                self.start, self.descent = name(starts[0]), self._begun(starts[0])
            return
        for start in starts[len(self.raced) :]:
            other = self.other = self.other or self._begun(start)
            is_first = not self.raced
            if is_first:
                self.start, self.descent = name(start), other
            while len(other.errors) < min(RACE_SWEEPS, self.options.iterations):
                self._step(other, is_told=is_first)
            self.raced += ((name(start), other.errors[-1]),)
            self._keep_better(name(start), other)

    def _keep_better(self, start: str, other: Descent) -> None:
        assert self.descent is not None
        if other.errors[-1] < self.descent.errors[-1]:
            self.start, self.descent = start, other
        self.other = None

    def _begun(self, start: Start) -> Descent:
        return self._descent(self.begin(start))

    def _descent(self, factors: list[Tensor]) -> Descent:
        options = self.options
        return Descent(self.problem, factors, options.regularization, options.max_growth)

    def _again(self) -> None:
        """Make whole fits from more random starts, as many as are cheap, and keep the best."""
        assert self.descent is not None
        if not self.sweeps:
            self.sweeps, self.least = len(self.descent.errors), self.descent.errors[-1]
        while self.other is not None or self._one_more_is_cheap():
            if self.other is None:
                factors = random_factors(self.problem, self.rank, self.generator)
                self.other = self._descent(factors)
            other = self.other
            self._to_end(other)
            self.sweeps += len(other.errors)
            self.further += (other.errors[-1],)
            self._keep_better("random", other)

    def _one_more_is_cheap(self) -> bool:
        fits = 1 + len(self.further)
        size = self.problem.matrix.numel() * self.rank + SWEEP
        exact = EXACT * torch.finfo(self.problem.matrix.dtype).eps
        is_cheap = size * self.sweeps * (fits + 1) <= CHEAP * fits
        return fits < MOST_FITS and is_cheap and self.least > exact

    def _to_end(self, descent: Descent) -> None:
        """Sweep until an end is reached, and then until the growth is within its bound."""
        while descent.ended is None:
            descent.ended = self._reason_to_end(descent)
            if descent.ended is None:
                self._step(descent)
        while descent.too_large():
            self._step(descent, is_told=False)

    def _reason_to_end(self, descent: Descent) -> tuple[bool, str] | None:
        errors, tolerance = descent.errors, self.options.tolerance
        if tolerance > 0 and descent.steady > WINDOW:
            before = errors[-1 - WINDOW]
            if before - errors[-1] <= tolerance * before:
                return True, f"the error fell by less than {tolerance:g} in {WINDOW} sweeps"
        if len(errors) >= self.options.iterations:
            return False, f"reached the limit of {self.options.iterations} sweeps"
        return None

    def _step(self, descent: Descent, is_told: bool = True) -> None:
        """Sweep once; the state is written where that is due, and the callback asked."""
        error = descent.step()
        if self.kept is not None:
            self.kept.swept(self._state)
        callback, is_stopped = self.options.callback, False
        if is_told:
            self.least = min(self.least, error) if self.sweeps else error
            if callback is not None:
                is_stopped = callback(self.sweeps + len(descent.errors), self.least) is True
        if self.kept is not None:
            self.kept.check(self._state, is_stopped)
        if is_stopped:
            raise _Stopped

    def _state(self) -> dict[str, Any]:
        """Return what the fit needs to go on, as a checkpoint holds it."""
        best = None if self.descent is None or self.descent is self.other else self.descent
        return {
            **{each: getattr(self, each) for each in _STATE},
            "generator": self.generator.get_state(),
            "best": None if best is None else best.state(),
            "other": None if self.other is None else self.other.state(),
            "seconds": time.perf_counter() - self.began,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        try:
            for each in _STATE:
                setattr(self, each, state[each])
            self.generator.set_state(state["generator"])
            self.descent, self.other = (
                None if each is None else self._descent(each["factors"]).restored(each)
                for each in (state["best"], state["other"])
            )
            self.began -= state["seconds"]
        except (LookupError, TypeError, RuntimeError, AttributeError) as error:
            raise ValueError(
                f"the checkpoint is damaged: {error}; remove it to begin anew"
            ) from error
        self.descent = self.descent or self.other

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
