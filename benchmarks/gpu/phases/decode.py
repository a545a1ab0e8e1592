"""Few rows, as in decoding: one token, and sixteen."""

from __future__ import annotations

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.contest import compete
from benchmarks.gpu.linears import Makers, cell
from benchmarks.gpu.phases.layers import SIZES


def run(bench: Bench) -> None:
    """Every size at R = 64, then other ranks at one size."""
    wanted = [(T, *size, 64) for T in (1, 16) for size in SIZES.values()]
    wanted += [(T, *SIZES["4096"], R) for R in (16, 256) for T in (1, 16)]
    if bench.dry:
        wanted = [(1, 48, 64, 8)]
    cells = {}
    for size in wanted:
        one = cell(bench, *size, group="decode", modes=("forward",))
        cells[one.name] = (one, size)
    for name in bench.fresh(cells):
        one, size = cells[name]
        make = Makers(bench, *size)
        contestants = [make.ours(), make.frozen(), make.dense(), make.pair(), *make.aten()]
        with bench.guarded(name):
            compete(bench, one, contestants)
