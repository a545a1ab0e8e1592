"""Accelerated alternating least squares: sweeps from extrapolated points, restarted on a rise.

Each sweep begins at A + β (A − A_before) in place of A, A and A_before being what the last two
sweeps ended with; where the objective rises, the point is given up and A is swept plainly (in the
manner of Mitchell, Ye & De Sterck, Numerical Linear Algebra with Applications 2020, and of Ang,
Cohen, Gillis & Hien 2021). The objective never rises, which is true of plain sweeps too, and it
falls faster.

The penalty τ follows the error, τ = ρ · max(ε², 1e-6) with ε the relative error: it is large while
the fit is rough, which keeps components from growing against each other, and small in the end, so
that the CP of a weight that has an exact one is found to many digits. τ is renewed when it is off
by a quarter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polyadic.fitting.problem import Problem
from polyadic.fitting.sweep import Sweeper

MOMENTUM = 0.9
LEAST_SQUARED_ERROR = 1e-6
# ρ is relaxed when the growth is below this fraction of its bound.
SLACK = 0.9
# What of a fit under way a checkpoint holds.
_STATE = ("factors", "_before", "_objective", "_rho", "tau", "steady", "errors", "ended")


class Descent:
    """A fit under way.

    Args:
        problem: the weight that is fitted.
        factors: the factors to start from, (n_d, R) per fitted mode.
        regularization: ρ.
        max_growth: bound on √(Σ ‖w_r‖²) / ‖W‖; ρ is raised as long as it is exceeded.

    Attributes:
        factors: the present factors.
        tau: the present weight τ of the penalty.
        errors: the relative error after each step.
        steady: number of steps since the bound on the growth last changed ρ.
        ended: whether the fit converged and why it ended, once it has; the caller decides.
    """

    def __init__(
        self,
        problem: Problem,
        factors: list[Tensor],
        regularization: float,
        max_growth: float | None = None,
    ) -> None:
        self.errors: list[float] = []
        self.tau, self.steady = regularization, 0
        self.ended: tuple[bool, str] | None = None
        self._rho = self._least_rho = regularization
        self._max_growth = max_growth
        # A layout of another order in memory would round otherwise, and no state holds it.
        self._sweeper = Sweeper(problem, [factor.contiguous() for factor in factors])
        self._norm = math.sqrt(problem.frobenius_power())
        self.factors = self._sweeper.factors
        self._before: list[Tensor] | None = None
        self._objective = math.inf

    def step(self) -> float:
        """Sweep from an extrapolated point, and from the present one if the objective rose.

        Returns:
            The relative error after the step.
        """
        sweeper, present = self._sweeper, self.factors
        if self._before is not None:
            ahead = zip(present, self._before, strict=True)
            sweeper.factors = [now + MOMENTUM * (now - then) for now, then in ahead]
        objective = sweeper.sweep(self.tau)
        failed = self._before is not None and not objective <= self._objective
        if failed:
            sweeper.factors = list(present)
            objective = sweeper.sweep(self.tau)
        self._objective, self._before = objective, None if failed else present
        self.factors = sweeper.factors
        squared = sweeper.squared_error()
        self.errors.append(math.sqrt(squared))
        self._renew_penalty(squared)
        return self.errors[-1]

    def state(self) -> dict[str, Any]:
        """Return what the fit needs to go on after a step."""
        return {name: getattr(self, name) for name in _STATE}

    def restored(self, state: Mapping[str, Any]) -> Descent:
        """Go on from a state, and return the fit."""
        for name in _STATE:
            setattr(self, name, state[name])
        device = self._sweeper.problem.matrix.device
        self.factors = [factor.to(device) for factor in self.factors]
        if self._before is not None:
            self._before = [factor.to(device) for factor in self._before]
        self._sweeper.factors = list(self.factors)
        return self

    def growth(self) -> float:
        """Return √(Σ ‖w_r‖²) / ‖W‖."""
        return math.sqrt(self._sweeper.component_power()) / self._norm

    def too_large(self) -> bool:
        """Return whether the growth exceeds its bound."""
        return self._max_growth is not None and self.growth() > self._max_growth

    def _renew_penalty(self, squared: float) -> None:
        """Adapt ρ to the bound on the growth, and τ to the squared error."""
        self.steady += 1
        rho = self._rho
        if self._max_growth is not None:
            growth = self.growth()
            if growth > self._max_growth:
                rho = max(1.5 * rho, 1e-4)
            elif growth < SLACK * self._max_growth:
                rho = max(rho / 1.2, self._least_rho)
        if rho != self._rho:
            self._rho, self.steady = rho, 0
        wanted = rho * max(squared, LEAST_SQUARED_ERROR)
        if not 0.8 * wanted <= self.tau <= 1.25 * wanted:
            self.tau = wanted
            self._objective = self._sweeper.objective(wanted)
