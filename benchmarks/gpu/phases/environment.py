"""Versions and the machine as it is found."""

from __future__ import annotations

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.environment import describe


def run(bench: Bench) -> None:
    """One record."""
    bench.writer.write("environment", **describe(bench.device, bench.dtype), dry=bench.dry)
