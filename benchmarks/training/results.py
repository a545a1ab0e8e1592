"""The contestants of a task as stored records tell of them: their losses and what they cost."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from benchmarks.records import Record
from benchmarks.training.layers import parsed

LEAST_RATES = 4
KINDS = {
    "dense": "dense",
    "lowrank": "low rank",
    "cp": "CP",
    "paired": "paired modes",
    "monarch": "Monarch",
    "tltorch-cp": "CP, tltorch",
    "tltorch-tucker": "Tucker, tltorch",
    "tltorch-btt": "block TT, tltorch",
}


@dataclass(frozen=True)
class Contestant:
    """A layer in a model of some size.

    Attributes:
        layer: as ``layers.maker`` reads it.
        width: of the model.
        blocks: of the model.
        runs: loss by seed, by learning rate; infinite where a run diverged.
        grouped: the same of the runs with the groups of ``polyadic.param_groups``.
        block_parameters: of the layers that are compared.
        step: the record of what a step costs; None where it was not measured.
    """

    layer: str
    width: int
    blocks: int
    runs: dict[float, dict[int, float]]
    grouped: dict[float, dict[int, float]]
    block_parameters: int
    step: Record | None

    @property
    def kind(self) -> str:
        """The kind of layer, without its order and rank."""
        return parsed(self.layer)[0]

    @property
    def scores(self) -> list[Score]:
        """At every rate of its complete sweeps, with groups and without."""
        return [
            Score(rate, grouped, tuple(by_seed.values()))
            for grouped, sweep in ((False, self.runs), (True, self.grouped))
            if len(sweep) >= LEAST_RATES
            for rate, by_seed in sweep.items()
        ]

    @property
    def best(self) -> Score:
        """The least mean among those of the most seeds: a sweep's best gets more than one."""
        most = max(len(score.losses) for score in self.scores)
        return min((s for s in self.scores if len(s.losses) == most), key=lambda s: s.mean)

    def recipe(self, lr: float) -> Score | None:
        """With param_groups at a rate, the dense model's best; None where it was not run."""
        losses = self.grouped.get(lr)
        return None if losses is None else Score(lr, True, tuple(losses.values()))


@dataclass(frozen=True)
class Score:
    """Losses at one learning rate, by seed, the first seed first."""

    lr: float
    grouped: bool
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.losses)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for one."""
        return stdev(self.losses) if len(self.losses) > 1 else 0.0


def contestants(runs: Iterable[Record], steps: Iterable[Record] = ()) -> list[Contestant]:
    """Gather the records of one task, in the order in which its contestants first come.

    One whose sweep has fewer than four rates is left out: its best is not known.
    """
    costs = {(r["layer"], r["width"], r["blocks"]): r for r in steps}
    by_name: dict[tuple[str, int, int], list[Record]] = {}
    for record in sorted(runs, key=lambda r: r["seed"]):
        by_name.setdefault((record["layer"], record["width"], record["blocks"]), []).append(record)
    found = [
        Contestant(
            *name,
            _losses(records, False),
            _losses(records, True),
            records[0]["block_parameters"],
            costs.get(name),
        )
        for name, records in by_name.items()
    ]
    return [contestant for contestant in found if contestant.scores]


def resting(runs: Iterable[Record]) -> list[Record]:
    """The runs at the rate of the rest that suits the dense model best, the first one's.

    What no contestant makes learns at that rate in all of them. Records of before it had one of its
    own are of a single rate for all parameters.
    """
    made = list(runs)
    model = operator.itemgetter("layer", "width", "blocks", "seed")
    own = [r for r in made if model(r) == model(made[0]) and r["loss"] is not None]
    rest = min(own, key=lambda r: r["loss"]).get("rest") if own else None
    return [record for record in made if record.get("rest") == rest]


def _losses(records: Sequence[Record], grouped: bool) -> dict[float, dict[int, float]]:
    found: dict[float, dict[int, float]] = {}
    for record in records:
        if record["groups"] == grouped:
            loss = math.inf if record["loss"] is None else record["loss"]
            found.setdefault(record["lr"], {})[record["seed"]] = loss
    return dict(sorted(found.items()))


def title(layer: str, width: int, blocks: int, usual: tuple[int, int]) -> str:
    """Name of a contestant; ``usual`` are the width and blocks that go without saying."""
    kind, options = parsed(layer)
    words = [KINDS[kind]]
    if "o" in options:
        words.append(f"order {options['o']}")
    if "r" in options:
        words.append(f"R={options['r']}")
    if "b" in options:
        words.append(f"{options['b']} blocks a layer")
    if width != usual[0]:
        words.append(f"width {width}")
    if blocks != usual[1]:
        words.append(f"{blocks} blocks")
    return ", ".join(words)
