"""``compress``, from the arguments to the report.

Layers are found and arranged into targets (``targets``); calibration batches are run and recorded
(``calibration``); how long it will take is said (``estimate``); each target's options are listed
with their errors and costs (``weigh``, by ``curves`` and ``costs``); one option each is chosen
within the budget (``choose``, by ``allocate``); what was chosen is fitted and exchanged
(``fits``); the report is put together (``assemble``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from polyadic import surgery
from polyadic._torch import run_of_group
from polyadic.batches import Forward
from polyadic.checks import check_flag
from polyadic.compression.arguments import Callback, batches_of, check_options, pairs_of
from polyadic.compression.assemble import report_of
from polyadic.compression.budget import Budget, budget
from polyadic.compression.calibration import Weights, gather
from polyadic.compression.choose import choose
from polyadic.compression.costs import Calls
from polyadic.compression.estimate import Estimate
from polyadic.compression.fits import Outcome, fit_within
from polyadic.compression.report import Report
from polyadic.compression.targets import Target, find_targets
from polyadic.compression.weigh import Option, weigh
from polyadic.durable import interrupts
from polyadic.durable.identity import in_words, named, of_batches, of_module
from polyadic.durable.keeper import path_of
from polyadic.durable.pieces import Pieces
from polyadic.formats import Rank
from polyadic.nn.wrapped import check_unwrapped
from polyadic.progress import Meter

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from polyadic.fitting.arguments import SweepOptions

Model = TypeVar("Model", bound=nn.Module)


def compress(
    model: Model,
    *,
    ratio: float | None = None,
    flops_ratio: float | None = None,
    max_error: float | None = None,
    speed: Literal["never-slower"] | None = None,
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
    checkpoint: str | PathLike[str] | None = None,
    resume: bool = False,
    callback: Callback | None = None,
    **fit: Unpack[SweepOptions],
) -> tuple[Model, Report]:
    """Convert the layers of a trained model to CP format within one budget.

    For every layer and format (plain low rank, CP of order 2 and 3) the relative error e(rank) is
    estimated, for every layer its importance s, and ranks are allotted so that Σ s e² is least
    within the budget; a layer stays dense where that is better. With calibration e is the error in
    the metric of the layer's inputs and s the change of the model's outputs that an error of this
    layer alone was measured to cause; without, e is the Frobenius error and s the layer's share of
    all squared weights. Errors of several layers are taken to add up in squares.

    With ``checkpoint`` every curve and fit is written down when it is made. A compression that was
    stopped, by a kill at any moment or by Ctrl-C, and is called again with ``resume=True`` makes
    the rest alone, and its result is bit for bit that of an uninterrupted one. Ctrl-C is put off to
    the end of a sweep or a batch; the model is then as it was, or converted whole.

    One budget is given, and met: ``ratio``, ``flops_ratio`` and what they count are over the layers
    that are weighed, biases left out.

    Args:
        model: a trained model.
        ratio: how many times fewer parameters.
        flops_ratio: how many times fewer FLOPs, forward.
        max_error: bound on √Σ s e², with calibration also on the measured relative change of the
            outputs; parameters are then made as few as possible.
        speed: ``"never-slower"``: no layer may be predicted to be slower than it was, for the batch
            of the first calibration batch (32 rows without); alone it converts every layer that
            can be, at the least error, or added to another budget.
        calibration: batches without labels, as ``model(batch)``, ``model(*batch)`` of a tuple or
            list, or ``model(**batch)`` of a mapping takes them.
        forward: ``forward(model, batch)``, called in place of the model; it returns the outputs
            that count. By default all floating-point outputs count equally.
        weights: how much each position counts, such as an attention mask, in the form that
            ``polyadic.second_moments`` takes; for layers whose inputs have these leading
            dimensions.
        target_modules: a regular expression for whole names, or names or last parts of names; all
            layers by default.
        exclude_modules: layers to leave alone, in the form of ``target_modules``.
        rank_pattern: ranks (ints, fractions of the dense parameters or ``"break-even"``) by regular
            expressions for names or their last parts; such layers are converted at this rank.
        orders: modes per side to be weighed, of which 1 is plain low rank; by default 1, 2 and 3,
            for convolutions 1 and 2.
        shapes: (in modes, out modes), or a list of such pairs, to be weighed instead, by patterns
            as in ``rank_pattern``.
        dry_run: only plan; the model is left as it is.
        inplace: change the model given instead of a copy.
        seed: seed of the fits; equal seeds give equal results on one machine.
        checkpoint: a folder for the finished pieces, made if it is missing; remove it when done.
        resume: use the pieces in ``checkpoint``, which must be of the same model, batches, budget
            and options; without ``resume`` a folder with pieces is an error.
        callback: called as ``callback(stage, done, total, name)`` after each piece of work, in
            place of the bar that a terminal shows, or of the lines that go to the logger.
        fit: options of ``polyadic.decompose`` for the final fits, such as ``iterations``.

    Returns:
        The converted model and the report; in a dry run the model is the one given, unchanged.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: no budget or several, one that cannot be met (the message says what can), a
            pattern that matches nothing, a model without layers to convert, one that is wrapped
            (DistributedDataParallel, DataParallel, FSDP) or sharded, batches that do not fit it, or
            a checkpoint of another compression.
        OSError: the checkpoint cannot be written.
    """
    check_unwrapped(model, "compress")
    wanted = budget(ratio, flops_ratio, max_error, speed)
    check_options(orders, seed, callback, fit)
    batches = batches_of(calibration, forward, weights)
    folder = path_of(checkpoint, resume, "folder")
    dry_run, inplace = check_flag(dry_run, "dry_run"), check_flag(inplace, "inplace")

    meter = Meter("compress")

    def tell(stage: str, done: int, total: int, name: str) -> None:
        interrupts.check()
        if callback is None:
            meter.tell(stage, done, total, name)
        else:
            callback(stage, done, total, name)

    found = surgery.find(model, target_modules=target_modules, exclude_modules=exclude_modules)
    ranks = surgery.by_pattern(rank_pattern, found.layers, "rank_pattern")
    given = surgery.by_pattern(shapes, found.layers, "shapes")
    modes = {name: pairs_of(each) for name, each in given.items()}
    work = model if inplace else copy.deepcopy(model)
    targets, refused = find_targets(found.within(work), orders, modes)
    if not targets:
        why = "; ".join(f"{name} {reason}" for name, reason in list(refused.items())[:8])
        raise ValueError(f"{type(model).__name__} has no layer to convert: {why or 'none at all'}")
    size = sum(p.numel() for p in work.parameters() if not is_lazy(p))
    identity: dict[str, Any] = {}
    if folder is not None:
        identity = {
            "model": of_module(model),
            "calibration": None if batches is None else of_batches(batches),
            "forward": named(forward),
            "weights": named(weights),
            "budget": str(wanted),
            "layers": [list(target.names) for target in targets],
            "formats": in_words([[c.modes for c in target.candidates] for target in targets]),
            "ranks": in_words(ranks),
            "seed": seed,
            "options of the fits": in_words(fit),
        }
    run = None if folder is None else run_of_group(str(folder.absolute()))
    pieces = Pieces(folder, "polyadic.compress", identity, resume, run)

    with interrupts.deferred(), meter:
        evidence = gather(work, targets, batches, forward, weights, tell)
        _check_calls_known(targets, evidence.calls, wanted)
        estimate = Estimate(targets, evidence, wanted, pieces)
        if callback is None:
            estimate.announce(meter, ranks, dry_run)
        every = weigh(targets, evidence, wanted, ranks, seed, tell, pieces)
        if dry_run:
            outcome = Outcome(choose(every, wanted), {}, None)
        else:

            def chose(chosen: Sequence[Option]) -> None:
                meter.plan("fits", estimate.of_fits(chosen))

            outcome = fit_within(work, every, evidence, wanted, fit, seed, tell, chose, pieces)
    report = report_of(
        model, every, refused, outcome, evidence, wanted, size=size, seed=seed, dry_run=dry_run
    )
    return (model if dry_run else work), report


def _check_calls_known(targets: Sequence[Target], calls: Calls, wanted: Budget) -> None:
    """Refuse a budget of FLOPs or time where a layer's input sizes are not known."""
    unknown = [name for target in targets for name in target.names if name not in calls]
    needed = wanted.never_slower or wanted.kind == "flops_ratio"
    if unknown and needed:
        raise ValueError(
            f"{wanted} needs the sizes of convolutions' inputs ({unknown[0]}, ...); give "
            f"calibration="
        )
