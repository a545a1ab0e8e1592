"""``compress``: look at the layers, plan within the budget, fit, and exchange them at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from polyadic import _surgery
from polyadic._format import Shape, mode_sizes, positive_int
from polyadic._machines import machine_for
from polyadic.compress import plan
from polyadic.compress.budget import Budget, budget
from polyadic.compress.calibration import Calibration, Forward, Weights
from polyadic.compress.costs import Call, Calls
from polyadic.compress.curves import (
    DAMPING,
    Curve,
    approximation,
    curves,
    fitted,
    output_error,
)
from polyadic.compress.layers import LayerReport, Points
from polyadic.compress.plan import Option, Weighed
from polyadic.compress.report import Report
from polyadic.compress.sites import Site, sites
from polyadic.decompose import Decomposition
from polyadic.nn._layer import Rank
from polyadic.pretrained import attach

Model = TypeVar("Model", bound=nn.Module)
Callback = Callable[[str, int, int, str], object]

# Fraction of the parameters at which a layer's effect is measured where the budget names none.
PROBED = 1 / 4
# Rows of a linear layer that costs are counted for without calibration.
ROWS = 32
# Rounds in which a bound on the error is tightened until what is measured meets it.
ROUNDS = 8
_NOT_OPTIONS = ("metric", "metric_groups", "callback", "seed")


def compress(
    model: Model,
    *,
    ratio: float | None = None,
    flops_ratio: float | None = None,
    max_error: float | None = None,
    speed: str | None = None,
    calibration: Iterable[Any] | None = None,
    forward: Forward | None = None,
    weights: Weights | None = None,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    rank_pattern: Mapping[str, Rank] | None = None,
    orders: Sequence[int] | None = None,
    shapes: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    inplace: bool = False,
    seed: int = 0,
    callback: Callback | None = None,
    **fit: Any,
) -> tuple[Model, Report]:
    """Convert the layers of a trained model to CP format within one budget.

    For every layer and format (plain low rank, CP of order 2 and 3) the relative error e(rank) is
    estimated, for every layer its importance s, and ranks are allotted so that Σ s e² is least
    within the budget; a layer stays dense where that is better. With calibration e is the error in
    the metric of the layer's inputs and s the change of the model's outputs that an error of this
    layer alone was measured to cause; without, e is the Frobenius error and s the layer's share of
    all squared weights. Errors of several layers are taken to add up in squares.

    One budget is given, and met: ``ratio``, ``flops_ratio`` and what they count are over the layers
    that are weighed, biases left out.

    Args:
        model: a trained model.
        ratio: how many times fewer parameters.
        flops_ratio: how many times fewer FLOPs, forward.
        max_error: bound on √Σ s e², with calibration also on the measured relative change of the
            outputs; parameters are made as few as possible.
        speed: ``"never-slower"``: no layer may be predicted to be slower than it was, for the batch
            of the first calibration batch (32 rows without); alone it converts every layer that
            can be, at the least error, or added to another budget.
        calibration: batches without labels, as ``model(batch)``, ``model(*batch)`` of a tuple or
            list, or ``model(**batch)`` of a mapping takes them.
        forward: ``forward(model, batch)`` in place of these, which returns the outputs that count;
            by default all floating-point outputs, alike.
        weights: of positions, such as an attention mask, as ``polyadic.second_moments`` takes
            them, for layers whose inputs have these leading dimensions.
        target_modules: a regular expression for whole names, or names or last parts of names; all
            layers by default.
        exclude_modules: likewise, what to leave alone.
        rank_pattern: ranks (ints, fractions of the dense parameters or ``"break-even"``) by regular
            expressions for names or their last parts; such layers are converted at this rank.
        orders: modes per side to be weighed, of which 1 is plain low rank; by default 1, 2 and 3,
            of convolutions 1 and 2.
        shapes: (in modes, out modes), or a list of such pairs, to be weighed instead, by patterns
            as in ``rank_pattern``.
        dry_run: return the plan alone; the model is left as it is.
        inplace: change the model given instead of a copy.
        seed: of the fits; the same seed gives the same result on one machine.
        callback: called as ``callback(stage, done, total, name)`` after each piece of work.
        fit: options of ``polyadic.decompose`` for the final fits, such as ``iterations``.

    Returns:
        The converted model and the report. In a dry run the model as it was given.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: no budget or several, one that cannot be met (the message says what can), a
            pattern that matches nothing, a model without layers to convert, or batches that do not
            fit it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wanted = budget(ratio, flops_ratio, max_error, speed)
    _check_options(orders, seed, callback, fit)
    batches = _batches(calibration, forward, weights)
    tell = callback or (lambda stage, done, total, name: None)
    found = _surgery.find(model, target_modules=target_modules, exclude_modules=exclude_modules)
    work = model if inplace else copy.deepcopy(model)
    modules = dict(work.named_modules())
    found = _surgery.Found(
        {name: modules[name] for name in found.layers}, found.aliases, found.ties, found.skipped
    )
    ranks = {} if rank_pattern is None else _surgery.by_pattern(
        rank_pattern, found.layers, "rank_pattern"
    )  # fmt: skip
    modes = {} if shapes is None else {
        name: _pairs(value)
        for name, value in _surgery.by_pattern(shapes, found.layers, "shapes").items()
    }  # fmt: skip
    every, refused = sites(found, orders, modes)
    if not every:
        why = "; ".join(f"{name} {reason}" for name, reason in list(refused.items())[:8])
        raise ValueError(f"{type(model).__name__} has no layer to convert: {why or 'none at all'}")
    job = _Job(work, every, wanted, batches, forward, weights, ranks, seed, tell, fit)
    weighed = job.weigh()
    if dry_run:
        chosen = plan.choose(weighed, wanted)
        return model, job.report(weighed, chosen, {}, refused, model, None)
    chosen, fits, measured = job.fit(weighed)
    return work, job.report(weighed, chosen, fits, refused, model, measured)


class _Job:
    """One compression on its way."""

    def __init__(
        self, model: nn.Module, every: list[Site], wanted: Budget, batches: list[Any] | None,
        forward: Forward | None, weights: Weights | None, ranks: Mapping[str, Rank], seed: int,
        tell: Callback, fit_options: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.sites, self.budget = model, every, wanted
        self.ranks, self.seed, self.tell, self.options = ranks, seed, tell, fit_options
        self.size = sum(p.numel() for p in model.parameters())
        self.calibration: Calibration | None = None
        self.metrics: dict[str, Tensor] = {}
        self.calls: Calls
        names = {n: layer for s in every for n, layer in zip(s.names, s.layers, strict=True)}
        if batches is None:
            linear = (nn.Linear, nn.Embedding)
            self.calls = {
                n: [Call(ROWS)] for n, layer in names.items() if isinstance(layer, linear)
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
            elif metric is not None and float(metric.sum() if metric.dim() == 1
                                              else metric.diagonal().sum()) <= 0:  # fmt: skip
                obstacle = "has only zeros for input with the calibration batches"
            own: list[Curve] = []
            if not obstacle:
                own = curves(site, metric, self.budget.fraction, wanted, self.seed)
            if self.calibration is None:
                importance = norm / max(sum(norms), 1e-300)
            else:
                importance = self._effect(site, own)
            found.append(plan.weigh(site, own, importance, self.calls, self.budget,
                                    wanted is not None and bool(own), obstacle))  # fmt: skip
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
            chosen = plan.choose(weighed, self.budget, limit)
            now = {
                w.site.name: self._fitted(w, option, fits)
                for w, option in zip(weighed, chosen, strict=True)
                if option.curve is not None
            }
            self.tell("fits", len(weighed), len(weighed), "")
            made = {
                name: layer
                for w in weighed if w.site.name in now
                for name, layer in w.site.made(now[w.site.name].cp).items()
            }  # fmt: skip
            reached = plan.as_fitted(weighed, {n: f.error for n, f in now.items()})
            measured = None
            for name, layer in made.items():
                _surgery.replace(self.model, name, layer)
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
            _surgery.replace(self.model, name, originals[name])

    def _fitted(
        self, w: Weighed, option: Option, known: dict[tuple[str, int, int], Decomposition]
    ) -> Decomposition:
        """The final fit of a site, going on from the nearest short one."""
        assert option.curve is not None
        curve, place = option.curve, w.curves.index(option.curve)
        key = (w.site.name, place, option.rank)
        if key not in known:
            self.tell("fits", self.sites.index(w.site), len(self.sites), w.site.name)
            options: dict[str, Any] = {"damping": DAMPING, **self.options}
            near = curve.nearest(option.rank)
            if near is not None:
                options.setdefault("start", [near, "orthogonal"])
            known[key] = fitted(w.site, curve.form, option.rank, self.metrics.get(w.site.name),
                                seed=self.seed, **options)  # fmt: skip
        return known[key]

    def report(
        self, weighed: Sequence[Weighed], chosen: Sequence[Option],
        fits: Mapping[str, Decomposition], refused: Mapping[str, str], model: nn.Module,
        measured: float | None,
    ) -> Report:  # fmt: skip
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
            dry_run=not fits and measured is None and any(o.curve for o in chosen),
            calibrated=self.calibration is not None,
            seed=self.seed,
            model_parameters=self.size,
            predicted_error=plan.predicted(weighed, chosen),
            error=plan.as_fitted(weighed, {n: f.error for n, f in fits.items()}) if fits else None,
            output_error=measured,
            machine=machine_for(first.device.type, first.dtype).source,
        )

    def _layer(self, w: Weighed, option: Option, fit: Decomposition | None) -> LayerReport:
        site, curve, dense, cost = w.site, option.curve, w.dense.cost, option.cost
        shared: dict[str, Any] = {
            "names": site.names,
            "kind": " = ".join(type(layer).__name__ for layer in site.layers),
            "weight_shape": tuple(site.weight.shape),
            "reason": plan.reason(w, option, self.budget),
            "dense_parameters": dense.parameters, "parameters": cost.parameters,
            "dense_flops": dense.flops, "flops": cost.flops,
            "dense_seconds": dense.seconds, "seconds": cost.seconds,
            "importance": w.importance,
            "curves": tuple(_points(c) for c in w.curves),
        }  # fmt: skip
        if curve is None:
            return LayerReport(decision="dense", **shared)
        through = None
        if fit is not None:
            through = output_error(site, curve.form, fit, self.metrics.get(site.name))
        return LayerReport(
            decision="converted", order=curve.form.order, modes=curve.form.modes,
            rank=option.rank, predicted_error=option.error,
            weight_error=None if fit is None else fit.frobenius_error, output_error=through,
            **shared,
        )  # fmt: skip


def _points(curve: Curve) -> Points:
    """A curve for the report, at most at as many ranks as are weighed."""
    ranks = (
        [r for r in plan._ranks(curve) if r >= curve.ranks[0]] if not curve.fits else curve.ranks
    )
    return Points(
        curve.form.order, curve.form.modes, tuple(ranks),
        tuple(rank * curve.form.per_rank for rank in ranks),
        tuple(curve.error(rank) for rank in ranks), not curve.fits, curve.given_up,
    )  # fmt: skip


def _skipped(name: str, layer: nn.Module, why: str) -> LayerReport:
    weights = [p for n, p in layer._parameters.items() if p is not None and "weight" in n]
    count = sum(p.numel() for p in weights)
    return LayerReport(
        names=(name,), kind=type(layer).__name__,
        weight_shape=tuple(weights[0].shape) if weights else (), decision="skipped", reason=why,
        dense_parameters=count, parameters=count,
    )  # fmt: skip


def _batches(calibration: Any, forward: Any, weights: Any) -> list[Any] | None:
    """The batches in a list, since they are run several times."""
    for name, value in (("forward", forward), ("weights", weights)):
        if value is not None and calibration is None:
            raise ValueError(f"{name} says how to run calibration batches; give calibration= too")
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be callable, got {type(value).__name__}")
    if calibration is None:
        return None
    if isinstance(calibration, (Tensor, Mapping, str)) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"calibration must be an iterable of batches such as a list or a DataLoader, got "
            f"{type(calibration).__name__}; for one batch give a list of one"
        )
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration must have at least one batch, got none")
    return batches


def _check_options(orders: Any, seed: Any, callback: Any, fit: Mapping[str, Any]) -> None:
    if orders is not None:
        if isinstance(orders, (str, bytes)) or not isinstance(orders, Sequence) or not orders:
            raise TypeError(f"orders must be a sequence of ints such as (1, 2), got {orders!r}")
        for order in orders:
            positive_int(order, "each of orders")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {seed!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable or None, got {type(callback).__name__}")
    wrong = [name for name in fit if name in _NOT_OPTIONS or name not in _options()]
    if wrong:
        raise TypeError(
            f"compress has no option {wrong[0]!r}; those of polyadic.decompose that may be given "
            f"are {', '.join(sorted(_options() - set(_NOT_OPTIONS)))}"
        )


def _options() -> set[str]:
    from inspect import Parameter, signature

    from polyadic.decompose import decompose

    parameters = signature(decompose).parameters
    return {n for n, p in parameters.items() if p.kind is Parameter.KEYWORD_ONLY}


def _pairs(value: Any) -> list[tuple[Shape, Shape]]:
    """(in modes, out modes), or several."""
    pairs = list(value) if isinstance(value, list) else [value]
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                f"shapes must be (in modes, out modes) such as ((8, 8), (4, 16)), or a list of "
                f"such pairs, got {value!r}"
            )
    return [(mode_sizes(i, "in modes"), mode_sizes(o, "out modes")) for i, o in pairs]
