"""A converted encoder recovered at several learning rates, and with other scales of its factors."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.study import minilm
from benchmarks.study.store import Store
from polyadic.fitting.problem import balanced

FILE = "study-rates.jsonl"
AS_FITTED, BALANCED = "as fitted", "balanced"


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        ratio: Weights of the linear layers of the dense encoder over numbers stored instead.
        rates: Adam's learning rates, each falling to zero by half a cosine.
        study: All else, as in the study of the methods.
    """

    ratio: float = 10.0
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    study: minilm.Options = field(default_factory=minilm.Options)

    @classmethod
    def quick(cls) -> Options:
        """Shorten everything to a few minutes; the numbers then mean little."""
        return cls(rates=(1e-3,), study=minilm.Options.quick())


def run(
    options: Options, out: Path, only: Sequence[str] | None = None, tell: minilm.Tell = print
) -> Path:
    """Recover every converted encoder at every learning rate; a record for each.

    What the file already holds is not done again, so that a run can be stopped at any time.

    Args:
        options: what to run.
        out: folder of the records.
        only: keys of methods; all by default.
        tell: told in a line what is being done.

    Returns:
        The file.

    Raises:
        ImportError: a package is missing.
        ValueError: the file holds records of other settings, or a method is unknown.
    """
    wanted = minilm.methods(only)
    store = Store(out / FILE, asdict(options))
    bench: minilm.Bench | None = None
    for method in wanted:
        scalings = (AS_FITTED, BALANCED) if method.key == "tltorch" else (AS_FITTED,)
        work = [
            (scaling, lr)
            for scaling in scalings
            for lr in options.rates
            if not store.has(method=method.key, scaling=scaling, lr=lr)
        ]
        if not work:
            continue
        bench = bench or minilm.Bench(options.study)
        converted = method.convert(copy.deepcopy(bench.model), minilm.task(bench, options.ratio))
        for scaling, lr in work:
            tell(f"{method.key}, {scaling}, learning rate {lr:g}")
            layers = copy.deepcopy(converted)
            if scaling == BALANCED:
                for layer in layers.values():
                    balance(layer.cp.factors)
            record = _one(bench, layers, lr, tell)
            label = method.label + (", factors balanced" if scaling == BALANCED else "")
            store.add(
                {
                    "kind": "rate",
                    "method": method.key,
                    "label": label,
                    "scaling": scaling,
                    "ratio": options.ratio,
                    "lr": lr,
                    **record,
                }
            )
    return out / FILE


def _one(
    bench: minilm.Bench, layers: dict[str, Any], lr: float, tell: minilm.Tell
) -> dict[str, Any]:
    """Put layers in, recover, measure."""
    sizes = [[_rms(factor) for factor in layer.cp.factors] for layer in layers.values()]
    student = copy.deepcopy(bench.model)
    before, recovery, after = minilm.recover(bench, student, layers, lr, tell)
    return {
        "smallest_rms": min(map(min, sizes)),
        "largest_rms": max(map(max, sizes)),
        "before": asdict(before),
        "after": asdict(after),
        "validations": recovery.validations,
        "seconds": recovery.seconds,
    }


def _rms(factor: Tensor) -> float:
    """Root mean square of a factor's entries."""
    return float(factor.detach().square().mean().sqrt())


@torch.no_grad()
def balance(factors: Iterable[Tensor]) -> None:
    """Spread the norm of every component evenly over its factors (n_d, R), in place."""
    every = list(factors)
    for factor, even in zip(every, balanced(every), strict=True):
        factor.copy_(even)


def best(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The record a user would keep: of the least loss on the validation sentences."""
    return min(records, key=lambda r: min((v for _, v in r["validations"]), default=math.inf))
