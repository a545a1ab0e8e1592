"""Few rows, as in decoding: one token, and sixteen."""

from __future__ import annotations

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.contest import compete
from benchmarks.gpu.linears import Makers, cell
from benchmarks.gpu.phases.layers import SIZES


def run(bench: Bench) -> None:
    """Every size at R = 64, then the other ranks."""
    sizes = {"dry": (48, 64)} if bench.dry else SIZES
    ranks, rows = ((8,), (1,)) if bench.dry else ((64, 16, 256), (1, 16))
    cells = {}
    for R in ranks:
        for T in rows:
            for M, N in sizes.values():
                one = cell(bench, T, M, N, R, group="decode", modes=("forward",))
                cells[one.name] = (one, (T, M, N, R))
    for name in bench.fresh(cells):
        one, size = cells[name]
        make = Makers(bench, *size)
        contestants = [make.ours(), make.frozen(), make.dense(), make.pair(), *make.aten()]
        with bench.guarded(name):
            compete(bench, one, contestants)
