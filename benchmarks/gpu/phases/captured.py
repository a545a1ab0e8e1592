"""One layer's training step started by each of torch's ways: eager, graphed, compiled.

All are timed eagerly, as a loop calls them; what is captured or compiled has fewer things to start.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.contest import compete
from benchmarks.gpu.linears import Makers, cell

WAYS = {"graphed": "graphed", "compiled": "default", "reduce-overhead": "reduce-overhead"}


def run(bench: Bench) -> None:
    """A layer that is short of work, and one that is not."""
    sizes = [(2048, 4096, 4096, 64), (2048, 1024, 1024, 64)]
    if bench.dry:
        sizes = [(32, 48, 64, 8)]
    cells = {
        one.name: (one, size)
        for size in sizes
        for one in [cell(bench, *size, group="captured", modes=("training",))]
    }
    for name in bench.fresh(cells):
        one, size = cells[name]
        make = Makers(bench, *size)
        # No graph is captured around them: what a graphed or compiled step holds belongs to other
        # streams, on which a capture must not wait.
        plain = [replace(one, launches=("eager",)) for one in (make.ours(), make.dense())]
        contestants = [*plain, make.started(make.dense(), "graphed", "graphed")]
        contestants += [make.started(make.ours(), label, how) for label, how in WAYS.items()]
        with bench.guarded(name):
            compete(bench, one, contestants)
