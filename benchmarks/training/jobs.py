"""Which runs the study consists of, and which of them can be made next."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

SEEDS = (0, 1, 2)
# Peak learning rates that contestants choose from, and those with param_groups.
DENSE_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
FACTOR_RATES = (2e-3, 5e-3, 1e-2, 2e-2, 4e-2)
RECIPE_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        task: ``"language"`` or ``"digits"``.
        layer: the contestant, as ``layers.maker`` reads it.
        width: of the model.
        blocks: of the language model.
        lr: the peak learning rate.
        groups: whether factors get the rates of ``polyadic.param_groups``.
        seed: of the weights and the batches.
        steps: of the optimizer.
    """

    task: str
    layer: str
    width: int
    blocks: int
    lr: float
    groups: bool
    seed: int
    steps: int

    @property
    def contestant(self) -> tuple[Any, ...]:
        """What one curve stands for: all but the rate and the seed."""
        return self.task, self.layer, self.width, self.blocks, self.groups, self.steps


@dataclass(frozen=True)
class Entry:
    """A contestant and the rates it chooses from."""

    layer: str
    width: int
    blocks: int
    rates: Sequence[float]
    groups: bool = False


def language_entries(width: int, blocks: int) -> list[Entry]:
    """The contestants of the language model, the most telling first."""
    wide = width * 3 // 2
    return [
        Entry("dense", width, blocks, DENSE_RATES),
        Entry("cp:o3:r64", width, blocks, FACTOR_RATES),
        Entry("cp:o3:r64", width, blocks, RECIPE_RATES, groups=True),
        Entry("lowrank:r64", width, blocks, (1e-3, 2e-3, 4e-3, 8e-3)),
        Entry("cp:o3:r256", width, blocks, FACTOR_RATES),
        Entry("cp:o2:r64", width, blocks, FACTOR_RATES),
        Entry("cp:o2:r64", width, blocks, RECIPE_RATES, groups=True),
        Entry("cp:o1:r64", width, blocks, RECIPE_RATES, groups=True),
        Entry("cp:o3:r256", width, blocks, RECIPE_RATES, groups=True),
        Entry("dense", width // 4, blocks, (1e-3, 2e-3, 4e-3, 8e-3)),
        Entry("dense", width // 2, blocks, DENSE_RATES),
        Entry("lowrank:r4", width, blocks, (2e-3, 4e-3, 8e-3, 1.6e-2)),
        Entry("lowrank:r16", width, blocks, (2e-3, 4e-3, 8e-3, 1.6e-2)),
        Entry("cp:o3:r16", width, blocks, FACTOR_RATES),
        Entry("cp:o3:r128", width, blocks, FACTOR_RATES),
        Entry("cp:o3:r128", wide, blocks, FACTOR_RATES),
        Entry("cp:o3:r128", width, 2 * blocks, FACTOR_RATES),
        Entry("cp:o2:r128", width, blocks, FACTOR_RATES),
        Entry("cp:o2:r256", width, blocks, FACTOR_RATES),
        Entry("paired:o2:r1", width, blocks, FACTOR_RATES),
        Entry("paired:o2:r4", width, blocks, FACTOR_RATES),
        Entry("paired:o3:r8", width, blocks, FACTOR_RATES),
        Entry("dense", wide, blocks, DENSE_RATES),
        Entry("tltorch-cp:o3:r64", width, blocks, (1e-3, 3e-3, 1e-2, 3e-2)),
        Entry("tltorch-btt:o3:f22", width, blocks, (1e-3, 3e-3, 1e-2, 3e-2)),
        Entry("tltorch-tucker:o3:f22", width, blocks, (1e-3, 3e-3, 1e-2, 3e-2)),
    ]


def digits_entries(width: int) -> list[Entry]:
    """The contestants of the convolutional network."""
    return [
        Entry("dense", width, 4, DENSE_RATES),
        Entry("cp:o2:r64", width, 4, FACTOR_RATES),
        Entry("cp:o2:r64", width, 4, RECIPE_RATES, groups=True),
        Entry("cp:o2:r16", width, 4, FACTOR_RATES),
        Entry("cp:o2:r16", width, 4, RECIPE_RATES, groups=True),
        Entry("lowrank:r16", width, 4, (1e-3, 2e-3, 4e-3, 8e-3)),
        Entry("dense", width // 4, 4, DENSE_RATES),
    ]


def sweep(task: str, entries: Iterable[Entry], steps: int) -> list[Job]:
    """Every contestant at each of its rates, with the first seed."""
    return [
        Job(task, e.layer, e.width, e.blocks, rate, e.groups, SEEDS[0], steps)
        for e in entries
        for rate in e.rates
    ]


def repeats(swept: Sequence[Job], losses: dict[Job, float]) -> list[Job]:
    """Runs with the other seeds at the best rate of each contestant whose sweep is complete.

    With param_groups every rate is repeated: the question there is which rate holds, not the best.
    """
    found: list[Job] = []
    by_contestant: dict[tuple[Any, ...], list[Job]] = {}
    for job in swept:
        by_contestant.setdefault(job.contestant, []).append(job)
    for jobs in by_contestant.values():
        if not all(job in losses for job in jobs):
            continue
        chosen = jobs if jobs[0].groups else [min(jobs, key=lambda job: losses[job])]
        found += [dataclasses.replace(job, seed=seed) for job in chosen for seed in SEEDS[1:]]
    return found
