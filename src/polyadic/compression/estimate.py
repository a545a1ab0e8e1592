"""How long a compression will take, said before its first fit and while it goes on.

The multiply-adds of all fits are counted (``polyadic.fitting.work``) and divided by the machine's
rate; running the model is timed by the calibration. The meter corrects both by how long the pieces
that are done took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polyadic.compression.budget import Budget
from polyadic.compression.calibration import EFFECT_BATCHES, Evidence
from polyadic.compression.curves import (
    LARGEST_SWEEP,
    SWEEPS,
    SWEEPS_BEFORE_GIVING_UP,
    fixed_rank,
    ranks_to_fit,
    work_of_sweep,
)
from polyadic.compression.fits import sweeps_of
from polyadic.compression.targets import Candidate, Target
from polyadic.compression.weigh import PROBED, Option
from polyadic.durable.pieces import Pieces
from polyadic.formats import Rank
from polyadic.planner.calibrated import machine_at
from polyadic.planner.request import place_now
from polyadic.progress import LONG, Meter, clock

# Fits reach about this share of the rate that a machine has for large products (AMD EPYC, one
# thread, 2026-11-27: 17e9 to 27e9 of 75e9 multiply-adds a second).
SHARE_OF_GEMM = 0.3


class Estimate:
    """Predicted seconds of the stages of a compression.

    Args:
        targets: what is converted.
        evidence: what is known of the layers' inputs.
        budget: the budget, which says at which ranks errors matter.
        pieces: what is kept of an earlier run, which takes no time.
    """

    def __init__(
        self, targets: Sequence[Target], evidence: Evidence, budget: Budget, pieces: Pieces
    ) -> None:
        self._targets, self._evidence, self._budget = targets, evidence, budget
        self._pieces = pieces
        weight = targets[0].weight
        machine = machine_at(place_now(weight.device.type, weight.dtype))
        self._rate = SHARE_OF_GEMM * machine.gemm / 2

    def announce(self, meter: Meter, ranks: Mapping[str, Rank], dry_run: bool) -> None:
        """Plan the curves' stage of a meter, and say how long all will take if that is long.

        The fits are planned when it is chosen which there are (``of_fits``).

        Args:
            meter: the meter.
            ranks: by the name of a layer, a rank that is asked for.
            dry_run: whether there are no final fits.
        """
        curves, fits = self.of_curves(ranks), [] if dry_run else self.most_of_fits()
        meter.plan("curves", curves)
        if sum(curves) + sum(fits) >= LONG:
            more = f", the fits after them {clock(sum(fits))} at most" if sum(fits) >= 1 else ""
            meter.announce(f"the error curves will take about {clock(sum(curves))}" + more)

    def of_curves(self, ranks: Mapping[str, Rank]) -> list[float]:
        """Predict the seconds of each target's error curves and of its importance."""
        found = []
        for i, target in enumerate(self._targets):
            if f"curves-{i}" in self._pieces:
                found.append(0.0)
                continue
            metric = self._evidence.metrics.get(target.name)
            work = 0.0
            fitted = [each for each in target.candidates if not each.is_low_rank]
            for candidate in fitted:
                fixed = fixed_rank(target, candidate, target.asked(ranks))
                weighed = ranks_to_fit(target, candidate, metric, self._budget.fraction, fixed)
                sweeps = SWEEPS
                if candidate is not fitted[0] and fixed is None:
                    # Usually the lower order is better, and then a higher one is given up early.
                    weighed, sweeps = weighed[:1], SWEEPS_BEFORE_GIVING_UP
                work += sweeps * sum(work_of_sweep(candidate, metric, rank) for rank in weighed)
            seconds = work / self._rate
            if self._evidence.calibration is not None:
                seconds += self._evidence.calibration.seconds_of(EFFECT_BATCHES)
            found.append(seconds)
        return found

    def most_of_fits(self) -> list[float]:
        """Predict the seconds of each target's final fit if the dearest of its formats wins."""
        found = []
        for target in self._targets:
            size = (self._budget.fraction or PROBED) * target.dense_parameters
            found.append(
                max(
                    self._of_fit(target, candidate, max(1, round(size / candidate.per_rank)))
                    for candidate in target.candidates
                )
            )
        return found

    def of_fits(self, chosen: Sequence[Option]) -> list[float]:
        """Predict the seconds of each target's final fit, from what was chosen."""
        return [
            0.0
            if option.curve is None
            else self._of_fit(target, option.curve.candidate, option.rank)
            for target, option in zip(self._targets, chosen, strict=True)
        ]

    def _of_fit(self, target: Target, candidate: Candidate, rank: int) -> float:
        """Predict the seconds of a fit; a fit of plain low rank takes next to none."""
        if candidate.is_low_rank:
            return 0.0
        metric = self._evidence.metrics.get(target.name)
        work = min(work_of_sweep(candidate, metric, rank), LARGEST_SWEEP)
        return sweeps_of(candidate, metric, rank) * work / self._rate
