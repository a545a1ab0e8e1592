"""How many bytes a step of training says, by formula: for numbers of processes that nobody counts.

A model is a list of blocks, a block a list of layers, and a layer the shapes (rows, columns) of its
parameters, a bias among them as (rows, 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from polyadic import tensorize

WORD = 4  # bytes of a float32
Shape = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """A linear layer M → N, dense or in CP format.

    Args:
        m: in features.
        n: out features.
        rank: R, or None for a dense layer.
        order: modes per side.
    """

    m: int
    n: int
    rank: int | None = None
    order: int = 2

    def shapes(self, ranks: int = 1) -> list[Shape]:
        """Shapes of the parameters in one of some processes that share the rank evenly."""
        bias = (self.n, 1)
        if self.rank is None:
            return [(self.n, self.m), bias]
        sides = tensorize(self.m, self.n, self.order)
        return [*((mode, self.rank // ranks) for side in sides for mode in side), bias]


def block(width: int, rank: int | None = None) -> list[Layer]:
    """The linear layers of a block of a transformer."""
    sizes = (width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)
    return [Layer(m, n, rank) for m, n in sizes]


def parameters(layers: Iterable[Layer], ranks: int = 1) -> int:
    """How many parameters one process holds before it shards rows."""
    return sum(rows * columns for layer in layers for rows, columns in layer.shapes(ranks))


def padded(layers: Iterable[Layer], processes: int, ranks: int = 1) -> int:
    """How many there are when rows are filled up to a multiple of the processes, as FSDP2 does."""
    return sum(
        math.ceil(rows / processes) * processes * columns
        for layer in layers
        for rows, columns in layer.shapes(ranks)
    )


def data_parallel(blocks: Sequence[Sequence[Layer]], processes: int) -> dict[str, int]:
    """DistributedDataParallel: the gradients are summed once."""
    return {f"all_reduce of {processes}": WORD * sum(map(parameters, blocks))}


def fully_sharded(
    blocks: Sequence[Sequence[Layer]], shards: int, replicas: int = 1
) -> dict[str, int]:
    """fully_shard of each block: parameters are gathered twice and gradients scattered once.

    With replicas (HSDP) those of a shard are summed besides.
    """
    size = WORD * sum(padded(layers, shards) for layers in blocks)
    found = {f"all_gather of {shards}": 2 * size, f"reduce_scatter of {shards}": size}
    if replicas > 1:
        found[f"all_reduce of {replicas}"] = size // shards
    return found


def rank_parallel(
    blocks: Sequence[Sequence[Layer]], ranks: int, shards: int, rows: int
) -> dict[str, int]:
    """RankParallel × fully_shard: outputs and inputs' gradients of some rows are summed, too."""
    size = WORD * sum(padded(layers, shards, ranks) for layers in blocks)
    said = WORD * rows * sum(layer.m + layer.n for layers in blocks for layer in layers)
    found = {f"all_reduce of {ranks}": said}
    if shards > 1:
        found |= {f"all_gather of {shards}": 2 * size, f"reduce_scatter of {shards}": size}
    return found


def sent(said: dict[str, int]) -> float:
    """Bytes that a process sends in rings, for the bytes of whole tensors by collective."""
    total = 0.0
    for name, nbytes in said.items():
        collective, _, processes = name.rpartition(" of ")
        size = int(processes)
        total += (2 if collective == "all_reduce" else 1) * (size - 1) / size * nbytes
    return total
