"""Which runs the study consists of, and which of them can be made next."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polyadic import tensorize

SEEDS = (0, 1, 2)
# Peak learning rates that contestants choose from. A best one at the end of its list is no best:
# the list is then continued by factors of two, so often at most.
DENSE_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
# Of the best of them: rates of what no contestant makes.
REST_FACTORS = (2, 4, 8)
LOW_RANK_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
FACTOR_RATES = (5e-3, 1e-2, 2e-2, 4e-2)
CONTINUED = 4


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        task: ``"language"``, ``"digits"`` or ``"mnist"``.
        layer: the contestant, as ``layers.maker`` reads it.
        width: of the model.
        blocks: of the language model.
        lr: the peak learning rate.
        groups: whether factors get the rates of ``polyadic.param_groups``.
        seed: of the weights and the batches.
        steps: of the optimizer.
        length: bytes of a sequence.
        sequences: of a step.
        rest: the peak learning rate of what no contestant makes, which is all outside
            ``model.blocks``; ``lr`` where it is None.
    """

    task: str
    layer: str
    width: int
    blocks: int
    lr: float
    groups: bool
    seed: int
    steps: int
    length: int = 128
    sequences: int = 16
    rest: float | None = None

    @property
    def contestant(self) -> tuple[str, int, int, bool]:
        """What one point of a figure stands for: all but the rate and the seed."""
        return self.layer, self.width, self.blocks, self.groups


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
    wide, deep = width * 5 // 4, blocks * 3 // 2
    # Low rank, and a narrower dense model, of about the parameters of CP with order 3 and R=64.
    thin, narrow = matched(width, order=3, rank=64)
    return [
        Entry("dense", width, blocks, DENSE_RATES),
        Entry("cp:o3:r64", width, blocks, DENSE_RATES, groups=True),
        Entry("cp:o3:r64", width, blocks, FACTOR_RATES),
        Entry("lowrank:r64", width, blocks, LOW_RANK_RATES),
        Entry(f"lowrank:r{thin}", width, blocks, LOW_RANK_RATES),
        Entry("dense", narrow, blocks, LOW_RANK_RATES),
        # Of about the step time of CP with R=64.
        Entry("dense", width * 5 // 8, blocks, LOW_RANK_RATES),
        Entry("cp:o2:r64", width, blocks, DENSE_RATES, groups=True),
        Entry("cp:o2:r64", width, blocks, FACTOR_RATES),
        # Other formats of about as many parameters, and CP as tltorch makes it.
        Entry("paired:o2:r4", width, blocks, FACTOR_RATES),
        Entry("monarch:b128", width, blocks, FACTOR_RATES),
        Entry("tltorch-cp:o3:r64", width, blocks, FACTOR_RATES),
        # Other ranks and orders; R=256 has about the dense model's step time.
        Entry("cp:o3:r256", width, blocks, DENSE_RATES, groups=True),
        Entry("cp:o1:r64", width, blocks, DENSE_RATES, groups=True),
        Entry("cp:o3:r16", width, blocks, DENSE_RATES, groups=True),
        Entry("cp:o3:r128", width, blocks, DENSE_RATES, groups=True),
        # Wider and deeper; twice as wide is slower than the dense model.
        Entry("cp:o3:r64", wide, blocks, DENSE_RATES, groups=True),
        Entry("cp:o3:r32", width, deep, DENSE_RATES, groups=True),
        Entry("tltorch-btt:o3:f20", width, blocks, FACTOR_RATES),
        Entry("tltorch-tucker:o3:f20", width, blocks, FACTOR_RATES),
        Entry("cp:o2:r256", width, blocks, DENSE_RATES, groups=True),
        Entry("cp:o3:r64", 2 * width, blocks, DENSE_RATES, groups=True),
        Entry("cp:o2:r16", width, blocks, DENSE_RATES, groups=True),
        Entry("lowrank:r16", width, blocks, LOW_RANK_RATES),
    ]


def matched(width: int, order: int, rank: int) -> tuple[int, int]:
    """A low rank, and a dense model's width, of about as many parameters as CP layers have.

    Counted are the four linear layers of a block. The width is a multiple of 4, as four heads ask
    for.
    """
    shapes = [(1, 3), (1, 1), (1, 4), (4, 1)]
    modes = [tensorize(m * width, n * width, order) for m, n in shapes]
    count = rank * sum(sum(ins) + sum(outs) for ins, outs in modes)
    thin = round(count / (width * sum(m + n for m, n in shapes)))
    narrow = 4 * math.ceil(math.sqrt(count / sum(m * n for m, n in shapes)) / 4)
    return max(1, thin), narrow


def images_entries(width: int) -> list[Entry]:
    """The contestants of the convolutional network."""
    return [
        Entry("dense", width, 4, DENSE_RATES),
        Entry("cp:o2:r64", width, 4, DENSE_RATES, groups=True),
        Entry("cp:o2:r64", width, 4, FACTOR_RATES),
        Entry("lowrank:r4", width, 4, LOW_RANK_RATES),
        Entry("dense", width // 4, 4, LOW_RANK_RATES),
        Entry("cp:o3:r64", width, 4, DENSE_RATES, groups=True),
        Entry("cp:o2:r16", width, 4, DENSE_RATES, groups=True),
        Entry("lowrank:r16", width, 4, LOW_RANK_RATES),
    ]


def common(task: str, steps: int, length: int, sequences: int) -> Job:
    """What all runs of a task share, as a run whose contestant, rate and seed are yet to be set."""
    return Job(task, "dense", 0, 0, 0.0, False, SEEDS[0], steps, length, sequences)


def due(entries: Sequence[Entry], shared: Job, losses: Mapping[Job, float]) -> list[Job]:
    """The runs that are to be made now, the most telling first, among them those made already.

    The dense model alone chooses the rate of what no contestant makes, such as the embedding: at
    its best rate for all it tries higher ones. Then each contestant, dense too, runs at each of
    its rates with the first seed, on while the best is the last of them. After all sweeps come
    the other seeds, each contestant's at its best rate. With param_groups it also runs with every
    seed at the best rate of the first entry, the dense model: does its recipe hold?

    Args:
        entries: the contestants, dense first.
        shared: as ``common`` makes it.
        losses: of the runs made.
    """
    found = _rests(entries[0], shared, losses)
    if not all(job in losses for job in found):
        return found
    shared = dataclasses.replace(shared, rest=min(found, key=lambda job: losses[job]).rest)
    dense: Job | None = None
    seeds: list[Job] = []
    for entry in entries:
        own = _of(entry, shared)
        swept = _swept([dataclasses.replace(own, lr=lr) for lr in entry.rates], losses)
        found += swept
        chosen = {}
        if all(job in losses for job in swept):
            best = min(swept, key=lambda job: losses[job])
            chosen[best.lr] = best
            dense = dense or best
        if entry.groups and dense is not None:
            chosen[dense.lr] = dataclasses.replace(own, lr=dense.lr)
        seeds += [
            dataclasses.replace(job, seed=seed)
            for job in chosen.values()
            if math.isfinite(losses.get(job, 0.0))
            for seed in SEEDS
        ]
    return list(dict.fromkeys(found + seeds))


def _of(entry: Entry, shared: Job) -> Job:
    """A contestant's run whose rate is yet to be set, with the first seed."""
    return dataclasses.replace(
        shared,
        layer=entry.layer,
        width=entry.width,
        blocks=entry.blocks,
        groups=entry.groups,
        seed=SEEDS[0],
    )


def _rests(dense: Entry, shared: Job, losses: Mapping[Job, float]) -> list[Job]:
    """The dense model at one rate for all, and at the best with higher ones for the rest."""
    swept = _swept([dataclasses.replace(_of(dense, shared), lr=lr) for lr in dense.rates], losses)
    if not all(job in losses for job in swept):
        return swept
    best = min(swept, key=lambda job: losses[job])
    rests = [dataclasses.replace(best, rest=best.lr * factor) for factor in REST_FACTORS]
    return swept + rests


def _swept(jobs: list[Job], losses: Mapping[Job, float]) -> list[Job]:
    """The sweep, continued on the side of its best where that is the last there."""
    for _ in range(CONTINUED):
        if not all(job in losses for job in jobs):
            break
        best = min(jobs, key=lambda job: losses[job])
        if best is jobs[-1]:
            jobs = [*jobs, dataclasses.replace(best, lr=best.lr * 2)]
        elif best is jobs[0]:
            jobs = [dataclasses.replace(best, lr=best.lr / 2), *jobs]
    return jobs
