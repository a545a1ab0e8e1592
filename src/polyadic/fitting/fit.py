"""``decompose``: check the arguments, scale the weight, fit it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from os import PathLike

import torch
from torch import Tensor

from polyadic.durable.identity import in_words
from polyadic.durable.keeper import path_of
from polyadic.fitting import arguments
from polyadic.fitting.arguments import Start
from polyadic.fitting.kept import Kept
from polyadic.fitting.problem import make_problem
from polyadic.fitting.result import DecomposeInterrupted, Decomposition
from polyadic.fitting.search import Callback, Fit, Options
from polyadic.formats import Shape, positive_int


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
    checkpoint: str | PathLike[str] | None = None,
    checkpoint_every: int = 10,
    resume: bool = False,
    callback: Callback | None = None,
) -> Decomposition:
    """Fit a CP tensor to a weight by alternating least squares.

    Minimises ‖Σ^½(W − Ŵ)‖² + τ Σ_r ‖w_r‖² over Ŵ = Σ_r w_r of rank one each, by accelerated
    sweeps that never raise it. The second term keeps components from growing against each other:
    of all fits with no larger error, a minimiser has the smallest components, which is what the
    error-preserving correction of Phan et al. (ECCV 2020) asks for. Where two modes are left after
    those of size 1 (plain low rank), the result is the optimum, by an SVD of Σ^½W. From rank
    Π n / max n on, and below where the orthogonal start is exact, an exact expansion is returned.

    With ``checkpoint`` a fit that was stopped, by a kill at any moment, by Ctrl-C or by the
    callback, goes on from that file, and its result is bit for bit that of an uninterrupted one.
    Ctrl-C is put off to the end of the sweep, whose state is written; a second one is not.

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
        checkpoint: a file to write after every ``checkpoint_every`` sweeps and at the end; a result
            in closed form writes none. It is written whole or not at all, and the one before it
            stays beside it as ``<checkpoint>.previous``.
        checkpoint_every: sweeps between writes of the checkpoint.
        resume: go on from ``checkpoint`` if that file exists, which must be of the same weight,
            metric and options; without ``resume`` an existing file is an error.
        callback: called as ``callback(iteration, error)`` after each sweep, in a race after those
            of the first start and then of the winner; in further fits with the number of all
            sweeps and the least error. If it returns True, the fit ends with the best so far.

    Returns:
        A ``Decomposition`` with the CP tensor, its errors and its fragility.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, shape or value does not fit; the weight is not finite; the metric is
            not symmetric (Hermitian) positive semidefinite; the checkpoint is damaged or of another
            fit.
        OSError: the checkpoint cannot be written, for a full disk for instance; the last one stays.
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
    every = positive_int(checkpoint_every, "checkpoint_every")
    options = Options(iterations, tolerance, regularization, max_growth, seed, callback)
    kept = None
    if (path := path_of(checkpoint, resume)) is not None:
        identity = {
            "weight": in_words(weight),
            "tensorized_shape": in_words(groups),
            "rank": rank,
            "metric": in_words(metric),
            "metric_groups": in_words(inside),
            "damping": damping,
            "start": in_words([start if start == "auto" else [*map(_in_words, starts)]]),
            **options.record(),
        }
        kept = Kept(path, resume, identity, every)
    # A caller's autocast would round every product of the fit.
    with torch.autocast(weight.device.type, enabled=False):
        power = _power_of_two(weight, sum(map(len, groups)))
        problem = make_problem(_scaled(weight, -power, groups), groups, metric, inside, damping)
        fit = Fit(problem, groups, rank, weight, power, options, began)
        known = fit.closed_form(expand="orthogonal" in starts)
        if known is not None:
            return known
        try:
            with nullcontext() if kept is None else kept.ready():
                ended = fit.search(starts, start == "auto", kept)
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


def _in_words(start: Start) -> str:
    """Say which start it is; factors by their digest."""
    if isinstance(start, str):
        return start
    cp = start.cp if isinstance(start, Decomposition) else start
    return in_words([cp.weights, *cp.factors])
