"""The phases in the order of their importance, each with its share of the time."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Phase:
    """One part of a run.

    Args:
        name: as ``--phases`` knows it.
        seconds: its share; what one phase leaves, the others get.
        module: file of this folder, imported by the worker alone.
        function: what to call with the worker's means.
        arguments: behind them.
        renews: whether what comes behind it needs a process of its own.
    """

    name: str
    seconds: float
    module: str
    function: str = "run"
    arguments: tuple[str, ...] = ()
    renews: bool = False

    def load(self) -> Callable[[Any], None]:
        """Import what runs it."""
        function = getattr(
            importlib.import_module(f"benchmarks.gpu.phases.{self.module}"), self.function
        )
        return lambda bench: function(bench, *self.arguments)


PHASES = {
    phase.name: phase
    for phase in (
        Phase("environment", 3, "environment"),
        Phase("ceilings", 8, "ceilings"),
        Phase("warm", 30, "warm"),
        Phase("correctness", 30, "correctness"),
        Phase("kernels", 20, "kernels"),
        Phase("overhead", 8, "overhead"),
        Phase("layers-4096", 25, "layers", "grid", ("4096",)),
        Phase("shared", 10, "shared"),
        Phase("tune", 12, "tune"),
        Phase("conv", 20, "conv"),
        Phase("embedding", 8, "embedding"),
        Phase("compile", 25, "correctness", "compiled"),
        Phase("captured", 25, "captured"),
        Phase("decode", 20, "decode"),
        Phase("outside", 15, "correctness", "outside"),
        Phase("layers-8192", 25, "layers", "grid", ("8192",)),
        Phase("network", 20, "network"),
        Phase("products", 14, "products"),
        Phase("profile", 8, "profile", renews=True),
        Phase("layers-1024", 15, "layers", "grid", ("1024",)),
        Phase("layers-11008", 20, "layers", "grid", ("11008",)),
        Phase("variants", 8, "layers", "variants"),
        Phase("float32", 6, "layers", "float32"),
        Phase("compiled", 100, "network", "compiled"),
    )
}
