"""Linear layers beside what they replace: forward and training step, in graphs and eagerly."""

from __future__ import annotations

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.contest import compete
from benchmarks.gpu.linears import Makers, cell

# Sizes by importance.
SIZES = {"4096": (4096, 4096), "8192": (8192, 8192), "1024": (1024, 1024), "11008": (4096, 11008)}
RANKS = (64, 16, 256)
ROWS = (2048, 8192, 16)


def grid(bench: Bench, size: str) -> None:
    """All ranks and numbers of rows of one size."""
    M, N = (48, 64) if bench.dry else SIZES[size]
    ranks, rows = ((8,), (32,)) if bench.dry else (RANKS, ROWS)
    _run(bench, [(T, M, N, R) for R in ranks for T in rows], "linear", with_tltorch=True)


def _run(
    bench: Bench, sizes: list[tuple[int, int, int, int]], group: str, with_tltorch: bool = False
) -> None:
    cells = {c.name: (c, size) for size in sizes for c in [cell(bench, *size, group=group)]}
    for name in bench.fresh(cells):
        one, size = cells[name]
        make = Makers(bench, *size)
        contestants = [make.ours(), make.dense(), make.pair(), *make.aten()]
        if with_tltorch:
            contestants.append(make.tltorch())
        with bench.guarded(name):
            compete(bench, one, contestants)


def float32(bench: Bench) -> None:
    """A few cells in float32 without TF32."""
    sizes = [(32, 48, 64, 8)] if bench.dry else [(2048, 4096, 4096, 64), (8192, 4096, 4096, 64)]
    before = bench.dtype
    bench.dtype = torch.float32
    bench.load_rates()
    try:
        _run(bench, sizes, "linear_float32")
    finally:
        bench.dtype = before
        bench.load_rates()


def variants(bench: Bench) -> None:
    """Forced plans, a bias, and two modes a side, in few cells."""
    sizes = [(2048, 4096, 4096, 64), (8192, 4096, 4096, 256), (2048, 4096, 4096, 256)]
    if bench.dry:
        sizes = [(32, 48, 64, 8)]
    cells = {c.name: (c, s) for s in sizes for c in [cell(bench, *s, group="plans")]}
    for name in bench.fresh(cells):
        one, size = cells[name]
        make = Makers(bench, *size)
        rebuild = [] if size[0] > 4096 else ["rebuild"]
        plans = make.plans(["Khatri-Rao", "split", *rebuild])
        with bench.guarded(name):
            compete(bench, one, [make.ours(), *plans, *make.biased()])
    cells = {c.name: (c, s) for s in sizes[:1] for c in [cell(bench, *s, group="order", order=2)]}
    for name in bench.fresh(cells):
        one, size = cells[name]
        make = Makers(bench, *size, order=2)
        with bench.guarded(name):
            compete(bench, one, [make.ours(), *make.aten()])
