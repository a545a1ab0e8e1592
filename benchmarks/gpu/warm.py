"""Compiles the kernels' forms in several processes at once; compiled code is kept on disk.

Each process runs its share of the layers that the phases will meet once, with few rows. What goes
wrong here is said by the phase that meets it again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu import tables
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.contest import train
from benchmarks.gpu.gpt import Size
from benchmarks.gpu.phases import conv, correctness
from benchmarks.gpu.phases.layers import RANKS, SIZES
from benchmarks.gpu.phases.network import RANK
from benchmarks.gpu.records import Writer
from benchmarks.gpu.subjects import step, subjects
from polyadic.nn import CPConv2d, CPEmbedding, CPLinear

Job = Callable[[], Any]
MOST_PROCESSES = 14


def jobs(bench: Bench) -> list[Job]:
    """One call for each form the phases will meet."""
    found: list[Job] = []
    for dtype in correctness.DTYPES[:3]:
        for seed, subject in enumerate(subjects(bench.dry)):
            found.append(partial(_subject, bench, subject, dtype, seed))
    if bench.dry:
        return found[:2]
    for name in tables.names():
        found += [partial(_table, name, i) for i in range(len(tables.dtypes(tables.load(name))))]
    width = Size().width
    linears = {(M, N, R) for M, N in SIZES.values() for R in RANKS}
    linears |= {(width, n * width, RANK) for n in (1, 3, 4)} | {(4 * width, width, RANK)}
    for M, N, R in sorted(linears):
        found.append(partial(_linear, bench, M, N, R))
    where: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
    for C, S in conv.STAGES.items():
        layer = partial(CPConv2d, C, C, 3, padding=1, bias=False, rank=conv.rank(C), **where)
        shape = (32, C, S, S)
        found.append(partial(_layer, layer, partial(conv.image, bench, *shape)))
    table = partial(CPEmbedding, 50257, 768, rank=64, **where)
    found.append(partial(_layer, table, lambda: torch.randint(50257, (512,), device=bench.device)))
    return found


def _subject(bench: Bench, subject: Any, dtype: torch.dtype, seed: int) -> None:
    leaves, grad = correctness.placed(bench, subject, dtype, seed, integers=False)
    step(subject.ours, leaves, grad)


def _table(name: str, i: int) -> None:
    table = tables.load(name)
    for _ in tables.rows(table, tables.dtypes(table)[i]):
        pass


def _linear(bench: Bench, M: int, N: int, R: int) -> None:
    layer = CPLinear(M, N, bias=False, rank=R, device=bench.device, dtype=bench.dtype)
    for T in (1, 16, 2048):
        x = bench.randn(T, M).requires_grad_()
        with torch.no_grad():
            layer(x)
        train(layer, x, bench.randn(T, N))


def _layer(build: Callable[[], nn.Module], inputs: Callable[[], torch.Tensor]) -> None:
    layer, x = build(), inputs()
    with torch.no_grad():
        y = layer(x)
    train(layer, x, torch.randn_like(y))


def in_processes(seconds: float, dry: bool) -> int:
    """Start the processes and wait for them; returns how many did not end by themselves."""
    count = 1 if dry else max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 1))
    command = [sys.executable, "-m", "benchmarks.gpu.warm", str(count)]
    running = [
        subprocess.Popen([*command, str(i), *["--dry"] * dry], stderr=subprocess.DEVNULL)
        for i in range(count)
    ]
    end = time.monotonic() + seconds
    return sum(_ended_late(process, end) for process in running)


def _ended_late(process: subprocess.Popen[bytes], end: float) -> bool:
    """Wait for a process until a moment, and kill it then."""
    try:
        process.wait(timeout=max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        return True
    return False


def main(arguments: list[str]) -> None:
    """One process's share: every count-th job."""
    count, index, dry = int(arguments[0]), int(arguments[1]), "--dry" in arguments
    device = torch.device("cpu" if dry else "cuda")
    bench = Bench(device, torch.bfloat16, Writer(Path(os.devnull)), dry)
    for job in jobs(bench)[index::count]:
        with suppress(Exception):
            job()


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)
