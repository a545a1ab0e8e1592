"""The library's own kernels by the tables that its tests hold them to, on the GPU itself.

Small shapes in every dtype between guards of NaN, into memory full of NaN: exact on small integers,
within twice torch's error elsewhere, the same bits at every run.
"""

from __future__ import annotations

import importlib.util
from contextlib import closing

import torch

from benchmarks.gpu import tables
from benchmarks.gpu.bench import Bench, said
from benchmarks.gpu.switch import has_kernels


def run(bench: Bench) -> None:
    """Every table, one record for each of its dtypes."""
    found = tables.names()
    if not found:
        _note(bench, "this tree has no tables of kernels")
    elif importlib.util.find_spec("triton") is None:
        _note(bench, "Triton is not installed")
    elif not (bench.dry or has_kernels()):
        _note(bench, "the library's kernels do not serve on this machine")
    else:
        for name in found:
            with bench.guarded(name):
                _table(bench, name)


def _note(bench: Bench, text: str) -> None:
    bench.writer.write("note", phase=bench.phase, of="kernels", text=text)


def _table(bench: Bench, name: str) -> None:
    table = tables.load(name)
    for dtype in tables.dtypes(table)[:1] if bench.dry else tables.dtypes(table):
        if bench.left() < 1:
            raise TimeoutError(f"stopped before {name} in {dtype}")
        _rows(bench, name, dtype)


def _rows(bench: Bench, name: str, dtype: torch.dtype | None) -> None:
    """The rows of one dtype until one does not hold; where only the code is tried, the first."""
    held, wrong = 0, ""
    try:
        with closing(tables.rows(tables.load(name), dtype)) as rows:
            for _ in rows:
                held += 1
                if bench.dry or bench.left() < 0:
                    break
        bench.timer.synchronize()
    except Exception as error:
        wrong = f"after {held} rows: {said(error)}"
        bench.recover()
    bench.writer.write(
        "check",
        phase=bench.phase,
        subject=name,
        check="kernel",
        rows=held,
        reason=wrong,
        dtype="all" if dtype is None else bench.dtype_name(dtype),
        status="failed" if wrong else "passed",
    )
