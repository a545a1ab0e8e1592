"""The final fits of what was chosen, and the exchange of the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from polyadic import surgery
from polyadic.compression.arguments import Callback
from polyadic.compression.budget import Budget
from polyadic.compression.calibration import Evidence
from polyadic.compression.choose import choose, fitted_error
from polyadic.compression.curves import DAMPING, fitted, work_of_sweep
from polyadic.compression.kept import fit_from_plain, fit_to_plain
from polyadic.compression.targets import Candidate
from polyadic.compression.weigh import Option, Options
from polyadic.durable.pieces import Pieces
from polyadic.fitting import Decomposition
from polyadic.pretrained import attach

# Sweeps of a final fit, where no other number is given; more of them would gain little. A large
# fit makes fewer, but never fewer than the least, so that it takes at most so many multiply-adds,
# which is half a minute or less.
FIT_SWEEPS = 64
LEAST_FIT_SWEEPS = 16
MOST_WORK = 5e11
# Rounds in which a bound on the error is tightened until what is measured meets it.
ROUNDS = 8


@dataclass(frozen=True)
class Outcome:
    """What was chosen, and how it was fitted.

    Attributes:
        chosen: the option of each target.
        fits: the final fit by target, of those that are converted; empty in a dry run.
        output_error: relative change of the model's outputs, measured; None without calibration
            and in a dry run.
    """

    chosen: Sequence[Option]
    fits: Mapping[str, Decomposition]
    output_error: float | None


def fit_within(
    model: nn.Module,
    every: Sequence[Options],
    evidence: Evidence,
    budget: Budget,
    fit_options: Mapping[str, Any],
    seed: int,
    tell: Callback,
    chose: Callable[[Sequence[Option]], object],
    pieces: Pieces,
) -> Outcome:
    """Choose, fit and exchange layers, in place.

    Where the budget bounds the error, the fits may miss what their curves promised: the bound is
    then tightened in proportion and all is done again, until what came out meets the budget.

    Args:
        model: the model, whose layers are exchanged.
        every: the options of each target.
        evidence: what is known of the layers' inputs.
        budget: the budget that must be met.
        fit_options: options of ``polyadic.decompose``.
        seed: seed of the fits.
        tell: told before each fit.
        chose: told what was chosen, in each round.
        pieces: where fits are kept.

    Raises:
        ValueError: the budget cannot be met.
    """
    limit = budget.value
    originals = {
        name: layer
        for options in every
        for name, layer in zip(options.target.names, options.target.layers, strict=True)
    }
    fitter = _Fitter(every, evidence, fit_options, seed, tell, pieces)
    for _ in range(ROUNDS):
        chosen = choose(every, budget, limit)
        chose(chosen)
        fits = fitter.fit(chosen)
        converted: dict[str, nn.Module] = {}
        for options in every:
            if options.target.name in fits:
                converted |= options.target.converted(fits[options.target.name].cp)
        measured = None
        # Ctrl-C is put off by ``compress`` and comes where the model is run, so that the layers are
        # exchanged all or none.
        try:
            for name, layer in converted.items():
                surgery.replace(model, name, layer)
            if evidence.calibration is not None:
                measured = evidence.calibration.changed(model) ** 0.5
        except BaseException:
            _restore(model, converted, originals)
            raise
        error = fitted_error(every, {name: fit.error for name, fit in fits.items()})
        worst = max(error, measured or 0.0)
        if budget.kind != "max_error" or worst <= budget.value or not converted:
            attach(model)
            return Outcome(chosen, fits, measured)
        _restore(model, converted, originals)
        limit *= 0.98 * budget.value / worst
    raise ValueError(
        f"max_error={budget.value:g} could not be met in {ROUNDS} rounds: layers that "
        f"were predicted to stay within {limit:.3g} came to {worst:.3g}"
    )


def sweeps_of(candidate: Candidate, metric: Tensor | None, rank: int) -> int:
    """Return how many sweeps a final fit may make; a large fit may make fewer."""
    affordable = int(MOST_WORK / work_of_sweep(candidate, metric, rank))
    return min(FIT_SWEEPS, max(LEAST_FIT_SWEEPS, affordable))


def _restore(model: nn.Module, names: Iterable[str], originals: Mapping[str, nn.Module]) -> None:
    for name in names:
        surgery.replace(model, name, originals[name])


class _Fitter:
    """The final fits, each of which is made once however many rounds ask for it."""

    def __init__(
        self,
        every: Sequence[Options],
        evidence: Evidence,
        fit_options: Mapping[str, Any],
        seed: int,
        tell: Callback,
        pieces: Pieces,
    ) -> None:
        self.every, self.evidence, self.tell, self.pieces = every, evidence, tell, pieces
        self.fit_options = {"damping": DAMPING, "seed": seed, **fit_options}
        # By the index of the target, the index of its curve, and the rank.
        self._known: dict[tuple[int, int, int], Decomposition] = {}

    def fit(self, chosen: Sequence[Option]) -> dict[str, Decomposition]:
        """Fit every target whose option is not the dense weight, by name."""
        fits = {}
        for i, option in enumerate(chosen):
            if option.curve is not None:
                fits[self.every[i].target.name] = self._fit(i, option)
        self.tell("fits", len(self.every), len(self.every), "")
        return fits

    def _fit(self, i: int, option: Option) -> Decomposition:
        """The final fit of one target, which goes on from the nearest short fit of its curve."""
        assert option.curve is not None
        target, curve = self.every[i].target, option.curve
        key = (i, self.every[i].curves.index(curve), option.rank)
        if key not in self._known:
            self.tell("fits", i, len(self.every), target.name)
            fit_options = dict(self.fit_options)
            near = curve.nearest(option.rank)
            if near is not None:
                fit_options.setdefault("start", [near, "orthogonal"])
            metric = self.evidence.metrics.get(target.name)
            sweeps = sweeps_of(curve.candidate, metric, option.rank)
            fit_options.setdefault("iterations", sweeps)

            def make() -> dict[str, Any]:
                return fit_to_plain(
                    fitted(target, curve.candidate, option.rank, metric, **fit_options)
                )

            plain = self.pieces.get("fit-{}-{}-{}".format(*key), make)
            self._known[key] = fit_from_plain(plain, target.weight.device)
        return self._known[key]
