"""Compile the kernels before anything hangs on them, in as many processes as there are cores."""

from __future__ import annotations

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.switch import has_kernels


def run(bench: Bench) -> None:
    """Nothing where the library has no kernels to compile."""
    if not (has_kernels() or bench.dry):
        return
    from benchmarks.gpu.warm import in_processes

    late = in_processes(bench.left(), bench.dry)
    if late:
        text = f"{late} process(es) were stopped before they had compiled their share"
        bench.writer.write("note", phase=bench.phase, of="warm", text=text)
