"""The report of a compression, put together from what was weighed, chosen and fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from polyadic import surgery
from polyadic.compression.budget import Budget
from polyadic.compression.calibration import Evidence
from polyadic.compression.choose import fitted_error, predicted_error, reason
from polyadic.compression.curves import Curve, output_error
from polyadic.compression.fits import Outcome
from polyadic.compression.layer_report import CurvePoints, LayerReport
from polyadic.compression.report import Report
from polyadic.compression.weigh import Option, Options, ranks_of
from polyadic.fitting import Decomposition
from polyadic.nn.kinds import family_of
from polyadic.planner.calibrated import machine_at
from polyadic.planner.request import place_now


def report_of(
    model: nn.Module,
    every: Sequence[Options],
    refused: Mapping[str, str],
    outcome: Outcome,
    evidence: Evidence,
    budget: Budget,
    *,
    size: int,
    seed: int,
    dry_run: bool,
) -> Report:
    """Put the report together.

    Args:
        model: the model as it was given.
        every: the options of each target.
        refused: by the name of a layer, why it could not be a target.
        outcome: what was chosen and fitted.
        evidence: what is known of the layers' inputs.
        budget: the budget.
        size: number of parameters of the model before.
        seed: seed of the fits.
        dry_run: whether the model was left as it was.
    """
    layers: dict[str, LayerReport] = {}
    for options, option in zip(every, outcome.chosen, strict=True):
        name = options.target.name
        layers[name] = _layer(options, option, outcome.fits.get(name), evidence, budget)
    modules = dict(model.named_modules())
    for name, why in refused.items():
        layers[name] = _skipped(name, modules[name], why)
    order = {name: i for i, name in enumerate(modules)}
    errors = {name: fit.error for name, fit in outcome.fits.items()}
    first = every[0].target.weight
    return Report(
        budget=str(budget),
        layers=tuple(layers[name] for name in sorted(layers, key=lambda n: order[n])),
        dry_run=dry_run,
        notes=(*_few_rows(every, evidence), *_ends(every, outcome.chosen)),
        calibrated=evidence.calibration is not None,
        seed=seed,
        model_parameters=size,
        predicted_error=predicted_error(every, outcome.chosen),
        error=fitted_error(every, errors) if errors else None,
        output_error=outcome.output_error,
        machine=machine_at(place_now(first.device.type, first.dtype)).source,
    )


def _layer(
    options: Options,
    option: Option,
    fit: Decomposition | None,
    evidence: Evidence,
    budget: Budget,
) -> LayerReport:
    target, curve, dense, cost = options.target, option.curve, options.dense.cost, option.cost
    shared: dict[str, Any] = {
        "names": target.names,
        "kind": " = ".join(type(layer).__name__ for layer in target.layers),
        "weight_shape": tuple(target.weight.shape),
        "reason": reason(options, option, budget),
        "dense_parameters": dense.parameters,
        "parameters": cost.parameters,
        "dense_flops": dense.flops,
        "flops": cost.flops,
        "dense_seconds": dense.seconds,
        "seconds": cost.seconds,
        "importance": options.importance,
        "curves": tuple(_points(c) for c in options.curves),
    }
    if curve is None:
        return LayerReport(decision="dense", **shared)
    measured = None
    if fit is not None:
        metric = evidence.metrics.get(target.name)
        measured = output_error(target, curve.candidate, fit, metric)
    return LayerReport(
        decision="converted",
        order=curve.candidate.order,
        modes=curve.candidate.modes,
        rank=option.rank,
        predicted_error=option.error,
        weight_error=None if fit is None else fit.frobenius_error,
        output_error=measured,
        **shared,
    )


def _points(curve: Curve) -> CurvePoints:
    """A curve for the report; an exact one at those ranks alone that are weighed."""
    ranks: Sequence[int] = curve.ranks
    if not curve.fits:
        ranks = [r for r in ranks_of(curve) if r >= curve.ranks[0]]
    return CurvePoints(
        order=curve.candidate.order,
        modes=curve.candidate.modes,
        ranks=tuple(ranks),
        parameters=tuple(rank * curve.candidate.per_rank for rank in ranks),
        errors=tuple(curve.error(rank) for rank in ranks),
        exact=not curve.fits,
        given_up=curve.given_up,
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


def _few_rows(every: Sequence[Options], evidence: Evidence) -> tuple[str, ...]:
    """A warning of layers with more features than calibration has rows.

    Fewer rows than features leave directions of the input unseen, in which a fit may err freely.
    """
    if evidence.calibration is None:
        return ()
    batches, short = len(evidence.calibration.batches), []
    for target in [options.target for options in every]:
        if family_of(target.layer) == "linear" and target.name in evidence.calls:
            rows = batches * sum(call.batch for call in evidence.calls[target.name])
            if rows < target.layer.in_features:
                short.append((rows, target.layer.in_features, target.name))
    if not short:
        return ()
    rows, features, name = min(short)
    layers = "1 layer has" if len(short) == 1 else f"{len(short)} layers have"
    return (
        f"{layers} more features than the calibration batches have rows, such "
        f"as {name} with {features} features and about {rows} rows: errors on other inputs "
        f"will be larger than these, give more batches",
    )


def _ends(every: Sequence[Options], chosen: Sequence[Option]) -> tuple[str, ...]:
    """A note of layers whose rank may be too small, as their curves were not followed further."""
    ends = [o for o, x in zip(every, chosen, strict=True) if o.ends_the_curve(x)]
    if not ends:
        return ()
    layers = "1 layer has" if len(ends) == 1 else f"{len(ends)} layers have"
    return (
        f"{layers} the largest rank whose error was estimated, such as {ends[0].target.name}: more "
        f"of the budget may be better spent there, try a larger rank by rank_pattern",
    )
