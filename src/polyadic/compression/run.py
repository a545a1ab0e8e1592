"""``compress``: look at the layers, plan within the budget, fit, and exchange them at the end."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from polyadic import checks, surgery
from polyadic.batches import Forward
from polyadic.compression import choose
from polyadic.compression.arguments import batches_of, check_options, pairs_of
from polyadic.compression.budget import budget
from polyadic.compression.calibration import Weights
from polyadic.compression.job import Callback, Job
from polyadic.compression.report import Report
from polyadic.compression.targets import sites
from polyadic.formats import Rank

Model = TypeVar("Model", bound=nn.Module)


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
            pattern that matches nothing, a model without layers to convert, one that is wrapped
            (DistributedDataParallel, DataParallel, FSDP) or sharded, or batches that do not fit it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    checks.check_unwrapped(model, "compress")
    wanted = budget(ratio, flops_ratio, max_error, speed)
    check_options(orders, seed, callback, fit)
    batches = batches_of(calibration, forward, weights)
    tell = callback or (lambda stage, done, total, name: None)
    found = surgery.find(model, target_modules=target_modules, exclude_modules=exclude_modules)
    work = model if inplace else copy.deepcopy(model)
    modules = dict(work.named_modules())
    found = surgery.Found(
        {name: modules[name] for name in found.layers}, found.aliases, found.ties, found.skipped
    )
    ranks = (
        {}
        if rank_pattern is None
        else surgery.by_pattern(rank_pattern, found.layers, "rank_pattern")
    )
    modes = (
        {}
        if shapes is None
        else {
            name: pairs_of(value)
            for name, value in surgery.by_pattern(shapes, found.layers, "shapes").items()
        }
    )
    every, refused = sites(found, orders, modes)
    if not every:
        why = "; ".join(f"{name} {reason}" for name, reason in list(refused.items())[:8])
        raise ValueError(f"{type(model).__name__} has no layer to convert: {why or 'none at all'}")
    job = Job(work, every, wanted, batches, forward, weights, ranks, seed, tell, fit)
    weighed = job.weigh()
    if dry_run:
        chosen = choose.choose(weighed, wanted)
        return model, job.report(weighed, chosen, {}, refused, model, None, True)
    chosen, fits, measured = job.fit(weighed)
    return work, job.report(weighed, chosen, fits, refused, model, measured, False)
