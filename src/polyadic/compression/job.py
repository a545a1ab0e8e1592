"""One compression: error curves and importance of every site, fits, exchange, and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from polyadic import surgery
from polyadic.batches import Forward
from polyadic.compression import choose
from polyadic.compression.budget import Budget
from polyadic.compression.calibration import Calibration, Weights
from polyadic.compression.choose import Option, Weighed
from polyadic.compression.costs import Call, Calls
from polyadic.compression.curves import (
    DAMPING,
    Curve,
    approximation,
    curves,
    fitted,
    output_error,
)
from polyadic.compression.layer_report import LayerReport, Points
from polyadic.compression.report import Report
from polyadic.compression.targets import Site
from polyadic.fitting import Decomposition
from polyadic.formats import Rank
from polyadic.nn.kinds import family_of
from polyadic.planner.calibrated import machine_at
from polyadic.planner.request import place_now
from polyadic.pretrained import attach

Callback = Callable[[str, int, int, str], object]

# Fraction of the parameters at which a layer's effect is measured where the budget names none.
PROBED = 1 / 4
# Most sweeps of a final fit, where no other number is given; what more would gain is little.
FIT_SWEEPS = 64
# Rows of a linear layer that costs are counted for without calibration.
ROWS = 32
# Rounds in which a bound on the error is tightened until what is measured meets it.
ROUNDS = 8


class Job:
    """One compression on its way."""

    def __init__(
        self,
        model: nn.Module,
        every: list[Site],
        wanted: Budget,
        batches: list[Any] | None,
        forward: Forward | None,
        weights: Weights | None,
        ranks: Mapping[str, Rank],
        seed: int,
        tell: Callback,
        fit_options: Mapping[str, Any],
    ) -> None:
        self.model, self.sites, self.budget = model, every, wanted
        self.ranks, self.seed, self.tell, self.options = ranks, seed, tell, fit_options
        self.size = sum(p.numel() for p in model.parameters())
        self.calibration: Calibration | None = None
        self.metrics: dict[str, Tensor] = {}
        self.calls: Calls
        names = {n: layer for s in every for n, layer in zip(s.names, s.layers, strict=True)}
        if batches is None:
            self.calls = {
                n: [Call(ROWS)]
                for n, layer in names.items()
                if family_of(layer) in ("linear", "embedding")
            }
            unknown = [n for n in names if n not in self.calls]
            if unknown and (wanted.never_slower or wanted.kind == "flops_ratio"):
                raise ValueError(
                    f"{wanted} needs the sizes of convolutions' inputs ({unknown[0]}, ...); give "
                    f"calibration="
                )
            return
        self.calibration = Calibration(model, batches, forward, weights)
        tell("calibration", 0, 2, "outputs")
        self.calibration.watch(names)
        tell("calibration", 1, 2, "second moments")
        self.calls = self.calibration.calls
        self.metrics = self.calibration.moments([site.name for site in every])
        tell("calibration", 2, 2, "")

    def weigh(self) -> list[Weighed]:
        """Curves, importance and options of every site."""
        found = []
        norms = [float(site.weight.double().square().sum()) for site in self.sites]
        for i, (site, norm) in enumerate(zip(self.sites, norms, strict=True)):
            self.tell("curves", i, len(self.sites), site.name)
            wanted = next((self.ranks[n] for n in site.names if n in self.ranks), None)
            metric, obstacle = self.metrics.get(site.name), ""
            if self.calibration is not None and metric is None:
                obstacle = "was not called with the calibration batches"
            elif (
                metric is not None
                and float(metric.sum() if metric.dim() == 1 else metric.diagonal().sum()) <= 0
            ):
                obstacle = "has only zeros for input with the calibration batches"
            own: list[Curve] = []
            if not obstacle:
                own = curves(site, metric, self.budget.fraction, wanted, self.seed)
            if self.calibration is None:
                importance = norm / max(sum(norms), 1e-300)
            else:
                importance = self._effect(site, own)
            found.append(
                choose.weigh(
                    site,
                    own,
                    importance,
                    self.calls,
                    self.budget,
                    wanted is not None and bool(own),
                    obstacle,
                )
            )
        self.tell("curves", len(self.sites), len(self.sites), "")
        return found

    def _effect(self, site: Site, own: Sequence[Curve]) -> float:
        """The squared change of the outputs by an error of this site alone, over the error's."""
        assert self.calibration is not None
        if not own:
            return 0.0
        curve = own[0]
        size = (self.budget.fraction or PROBED) * site.dense_parameters
        rank = min(max(1, round(size / curve.form.per_rank)), curve.ranks[-1])
        rank = max(rank, curve.ranks[0])
        metric = self.metrics[site.name]
        fit = curve.nearest(rank)
        if fit is None:
            fit = fitted(site, curve.form, rank, metric, seed=self.seed, damping=DAMPING)
        changed = self.calibration.effect(site.layer, approximation(site, curve.form, fit))
        return changed / max(fit.error, 1e-6) ** 2

    def fit(
        self, weighed: Sequence[Weighed]
    ) -> tuple[list[Option], dict[str, Decomposition], float | None]:
        """Fit and exchange; a bound on the error is tightened until it is met by what came out."""
        limit = self.budget.value
        originals = {
            n: layer for s in self.sites for n, layer in zip(s.names, s.layers, strict=True)
        }
        fits: dict[tuple[str, int, int], Decomposition] = {}
        for _ in range(ROUNDS):
            chosen = choose.choose(weighed, self.budget, limit)
            now = {
                w.site.name: self._fitted(w, option, fits)
                for w, option in zip(weighed, chosen, strict=True)
                if option.curve is not None
            }
            self.tell("fits", len(weighed), len(weighed), "")
            made = {
                name: layer
                for w in weighed
                if w.site.name in now
                for name, layer in w.site.made(now[w.site.name].cp).items()
            }
            reached = choose.as_fitted(weighed, {n: f.error for n, f in now.items()})
            measured = None
            for name, layer in made.items():
                surgery.replace(self.model, name, layer)
            try:
                if self.calibration is not None:
                    measured = self.calibration.changed(self.model) ** 0.5
            except BaseException:
                self._restore(made, originals)
                raise
            worst = max(reached, measured or 0.0)
            if self.budget.kind != "max_error" or worst <= self.budget.value or not made:
                attach(self.model)
                return chosen, now, measured
            self._restore(made, originals)
            limit *= 0.98 * self.budget.value / worst
        raise ValueError(
            f"max_error={self.budget.value:g} could not be met in {ROUNDS} rounds: layers that "
            f"were predicted to stay within {limit:.3g} came to {worst:.3g}"
        )

    def _restore(self, made: Iterable[str], originals: Mapping[str, nn.Module]) -> None:
        for name in made:
            surgery.replace(self.model, name, originals[name])

    def _fitted(
        self, w: Weighed, option: Option, known: dict[tuple[str, int, int], Decomposition]
    ) -> Decomposition:
        """The final fit of a site, going on from the nearest short one."""
        assert option.curve is not None
        curve, place = option.curve, w.curves.index(option.curve)
        key = (w.site.name, place, option.rank)
        if key not in known:
            self.tell("fits", self.sites.index(w.site), len(self.sites), w.site.name)
            options: dict[str, Any] = {
                "damping": DAMPING,
                "iterations": FIT_SWEEPS,
                **self.options,
            }
            near = curve.nearest(option.rank)
            if near is not None:
                options.setdefault("start", [near, "orthogonal"])
            known[key] = fitted(
                w.site,
                curve.form,
                option.rank,
                self.metrics.get(w.site.name),
                seed=self.seed,
                **options,
            )
        return known[key]

    def _notes(self) -> tuple[str, ...]:
        """Layers with more features than calibration has rows for, which it cannot tell apart."""
        if self.calibration is None:
            return ()
        batches, short = len(self.calibration.batches), []
        for site in self.sites:
            if family_of(site.layer) == "linear" and site.name in self.calls:
                rows = batches * sum(call.batch for call in self.calls[site.name])
                if rows < site.layer.in_features:
                    short.append((rows, site.layer.in_features, site.name))
        if not short:
            return ()
        rows, features, name = min(short)
        return (
            f"{len(short)} layers have more features than the calibration batches have rows, such "
            f"as {name} with {features} features and about {rows} rows: errors on other inputs "
            f"will be larger than these, give more batches",
        )

    def report(
        self,
        weighed: Sequence[Weighed],
        chosen: Sequence[Option],
        fits: Mapping[str, Decomposition],
        refused: Mapping[str, str],
        model: nn.Module,
        measured: float | None,
        dry_run: bool,
    ) -> Report:
        """Put together what was found."""
        layers = {
            w.site.name: self._layer(w, option, fits.get(w.site.name))
            for w, option in zip(weighed, chosen, strict=True)
        }
        modules = dict(model.named_modules())
        for name, why in refused.items():
            layers[name] = _skipped(name, modules[name], why)
        order = {name: i for i, name in enumerate(modules)}
        first = self.sites[0].weight
        return Report(
            budget=str(self.budget),
            layers=tuple(layers[name] for name in sorted(layers, key=lambda n: order[n])),
            dry_run=dry_run,
            notes=self._notes(),
            calibrated=self.calibration is not None,
            seed=self.seed,
            model_parameters=self.size,
            predicted_error=choose.predicted(weighed, chosen),
            error=choose.as_fitted(weighed, {n: f.error for n, f in fits.items()})
            if fits
            else None,
            output_error=measured,
            machine=machine_at(place_now(first.device.type, first.dtype)).source,
        )

    def _layer(self, w: Weighed, option: Option, fit: Decomposition | None) -> LayerReport:
        site, curve, dense, cost = w.site, option.curve, w.dense.cost, option.cost
        shared: dict[str, Any] = {
            "names": site.names,
            "kind": " = ".join(type(layer).__name__ for layer in site.layers),
            "weight_shape": tuple(site.weight.shape),
            "reason": choose.reason(w, option, self.budget),
            "dense_parameters": dense.parameters,
            "parameters": cost.parameters,
            "dense_flops": dense.flops,
            "flops": cost.flops,
            "dense_seconds": dense.seconds,
            "seconds": cost.seconds,
            "importance": w.importance,
            "curves": tuple(_points(c) for c in w.curves),
        }
        if curve is None:
            return LayerReport(decision="dense", **shared)
        through = None
        if fit is not None:
            through = output_error(site, curve.form, fit, self.metrics.get(site.name))
        return LayerReport(
            decision="converted",
            order=curve.form.order,
            modes=curve.form.modes,
            rank=option.rank,
            predicted_error=option.error,
            weight_error=None if fit is None else fit.frobenius_error,
            output_error=through,
            **shared,
        )


def _points(curve: Curve) -> Points:
    """A curve for the report, at most at as many ranks as are weighed."""
    ranks = (
        [r for r in choose.ranks_of(curve) if r >= curve.ranks[0]]
        if not curve.fits
        else curve.ranks
    )
    return Points(
        curve.form.order,
        curve.form.modes,
        tuple(ranks),
        tuple(rank * curve.form.per_rank for rank in ranks),
        tuple(curve.error(rank) for rank in ranks),
        not curve.fits,
        curve.given_up,
    )


def _skipped(name: str, layer: nn.Module, why: str) -> LayerReport:
    weights = list(surgery.matrices(layer).values())
    count = sum(p.numel() for p in weights)
    return LayerReport(
        names=(name,),
        kind=type(layer).__name__,
        weight_shape=tuple(weights[0].shape) if weights else (),
        decision="skipped",
        reason=why,
        dense_parameters=count,
        parameters=count,
    )
