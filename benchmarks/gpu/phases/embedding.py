"""A lookup in a table of a language model's size, beside ``torch.nn.Embedding``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import floors
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.contest import Cell, Contestant, compete
from benchmarks.gpu.linears import explained
from benchmarks.gpu.switch import has_kernels, without_kernels
from polyadic.nn import CPEmbedding


def run(bench: Bench) -> None:
    """Three numbers of tokens; indices are drawn evenly."""
    V, E, R = (300, 32, 8) if bench.dry else (50257, 768, 64)
    cells = {}
    for T in (16,) if bench.dry else (8192, 65536, 512):
        one = _cell(bench, T, V, E, R)
        cells[one.name] = one
    where: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
    build = partial(CPEmbedding, V, E, rank=R, **where)
    for name in bench.fresh(cells):
        T = cells[name].x_shape[0]
        dense = partial(nn.Embedding, V, E, **where)
        contestants = [
            Contestant("polyadic", "ours", build, explained=explained(T)),
            Contestant("dense", "dense", dense, copies=bench.rotations(bench.size * V * E, 4)),
        ]
        if has_kernels():
            contestants.append(Contestant("polyadic, no kernels", "aten", build, without_kernels))
        with bench.guarded(name):
            compete(bench, cells[name], contestants)


def _cell(bench: Bench, T: int, V: int, E: int, R: int) -> Cell:
    layer = CPEmbedding(V, E, rank=R, device="meta")
    parameters = sum(p.numel() for p in layer.parameters())

    def inputs() -> Tensor:
        return torch.randint(V, (T,), device=bench.device)

    return Cell(
        name=f"embedding_{V}x{E}_R{R}_T{T}",
        title=f"{V}×{E} R={R} T={T}",
        layer="embedding",
        group="embedding",
        x_shape=(T,),
        y_shape=(T, E),
        rank=R,
        inputs=inputs,
        grad=partial(bench.randn, T, E),
        floors=floors.embedding(T, V, E, R, parameters, bench.size),
        x_bytes=bench.size * T * E,
        facts={
            "T": T,
            "in": 1,
            "out": E,
            "batch": T,
            "parameters": parameters,
            "dense_parameters": V * E,
        },
    )
