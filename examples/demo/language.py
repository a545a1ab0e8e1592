"""The language model of the study of training (``benchmarks.training``), with one seed.

Model, batches and training are the study's, in a smaller size; each contestant has the best of four
learning rates or more that were tried at this size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.training.costs import measure
from benchmarks.training.jobs import Entry, Job, common
from benchmarks.training.run import run
from polyadic.durable.pieces import Pieces

# Steps of so many windows of so many bytes.
STEPS, SEQUENCES, LENGTH = 500, 12, 64
WIDTH, BLOCKS = 128, 2
ROUNDS = 15


@dataclass(frozen=True)
class Contestant:
    """A model of the comparison.

    Attributes:
        label: its name in tables.
        layer: what its linear layers are, as ``benchmarks.training.layers`` reads it.
        width: of the model.
        rate: its learning rate.
    """

    label: str
    layer: str
    width: int
    rate: float


DENSE = Contestant("dense", "dense", WIDTH, 2e-3)
CP = Contestant("CP, rank 64", "cp:o3:r64", WIDTH, 1e-2)
NARROW = Contestant("dense, narrow", "dense", WIDTH // 4, 8e-3)
LOW_RANK = Contestant("low rank, rank 5", "lowrank:r5", WIDTH, 4e-3)
# Narrow and low rank have about as many parameters in their blocks as CP.
CONTESTANTS = (DENSE, CP, NARROW, LOW_RANK)


@dataclass(frozen=True)
class Trained:
    """What was measured of a contestant.

    Attributes:
        contestant: which.
        parameters: of the blocks, which hold what differs.
        loss: on held-out text after the last step, nats a byte.
        curve: [step, held-out loss] pairs.
        seconds: processor time of a training step.
    """

    contestant: Contestant
    parameters: int
    loss: float
    curve: Sequence[Sequence[float]]
    seconds: float


def compare(seed: int, quick: bool, tell: Callable[[str], None], pieces: Pieces) -> list[Trained]:
    """Train and time all contestants.

    Args:
        seed: of weights and batches.
        quick: make a few steps, after which losses mean little.
        tell: told of each training that begins.
        pieces: keeps those that are done.
    """
    shared = common("language", 8 if quick else STEPS, LENGTH, SEQUENCES)
    jobs = [_job(contestant, shared, seed) for contestant in CONTESTANTS]
    found = []
    for contestant, job in zip(CONTESTANTS, jobs, strict=True):
        tell(f"training language model {contestant.label}")
        make = partial(_trained, job, pieces.folder)
        found.append(pieces.get(f"language-{contestant.label}", make))
    entries = [Entry(job.layer, job.width, job.blocks, ()) for job in jobs]
    steps = measure(entries, shared, 2 if quick else ROUNDS)
    return [
        Trained(contestant, seconds=step["seconds"], **record)
        for contestant, record, step in zip(CONTESTANTS, found, steps, strict=True)
    ]


def _job(contestant: Contestant, shared: Job, seed: int) -> Job:
    return dataclasses.replace(
        shared,
        layer=contestant.layer,
        width=contestant.width,
        blocks=BLOCKS,
        lr=contestant.rate,
        seed=seed,
    )


def _trained(job: Job, folder: Path | None) -> dict[str, Any]:
    """A training, as it is kept; until it is done, its state stands in the folder."""
    record = run(job, "cpu", folder)
    return {
        "parameters": record["block_parameters"],
        "loss": record["loss"],
        "curve": record["curve"],
    }


def size(one: Trained, other: Trained) -> str:
    """Say how many parameters a model has, by those of another."""
    times = one.parameters / other.parameters
    return "about as many" if 1 / 1.1 <= times <= 1.1 else f"{times:.2g} times as many"


def verdict(trained: Sequence[Trained]) -> str:
    """Say in a sentence whether CP wins, and at what."""
    by = {one.contestant: one for one in trained}
    dense, cp, others = by[DENSE], by[CP], [by[NARROW], by[LOW_RANK]]
    wins = "CP wins" if all(cp.loss < one.loss for one in others) else "CP does not win"
    beside = " and ".join(
        f"{one.contestant.label} ({size(one, cp)}) at {one.loss:.2f}" for one in others
    )
    ahead = dense.loss - cp.loss
    return (
        f"On text {wins} against a narrow and a low-rank language model: with {cp.parameters:,} "
        f"parameters in the blocks it ends at {cp.loss:.2f} nats a byte, {beside}. The full dense "
        f"model ({size(dense, cp)}) ends at {dense.loss:.2f}, {abs(ahead):.2f} nats "
        f"{'behind' if ahead > 0 else 'ahead of'} CP, whose step takes "
        f"{cp.seconds / dense.seconds:.2f} times as long."
    )
