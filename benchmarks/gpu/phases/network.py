"""A whole training step of a 12-block GPT of width 1024, its blocks dense and CP.

Eager, the whole step in one CUDA graph, and last, as it takes long, under ``torch.compile``.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.bench import Bench, said
from benchmarks.gpu.gpt import Make, Size, Training
from benchmarks.gpu.switch import has_kernels, without_kernels
from polyadic.nn import CPLinear

DRY = Size(blocks=1, width=16, heads=2, vocabulary=40, context=8, batch=2)
RANK = 64
SECONDS_TO_COMPILE = 45


def run(bench: Bench) -> None:
    """Eager steps and steps in a graph."""
    _networks(bench, ("eager", "graph"), "gpt")


def compiled(bench: Bench) -> None:
    """Compiled steps, each also in a graph."""
    _networks(bench, ("compiled",), "gpt_compiled")


def _networks(bench: Bench, launches: Iterable[str], group: str) -> None:
    size = DRY if bench.dry else Size()
    rank = 4 if bench.dry else RANK
    where: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
    dense: Make = partial(nn.Linear, **where)
    cp: Make = partial(_cp, rank=rank, where=where)
    contestants: dict[str, tuple[Make, Any]] = {
        "polyadic": (cp, nullcontext),
        "dense": (dense, nullcontext),
    }
    if has_kernels():
        contestants["polyadic, no kernels"] = (cp, without_kernels)
    name = f"{group}_{size.blocks}x{size.width}_R{rank}_T{size.tokens}"
    for cell in bench.fresh([name]):
        _cell(bench, cell, size, rank, group)
        for contestant, (make, inside) in contestants.items():
            for launch in launches:
                _one(bench, cell, contestant, make, inside(), size, launch)
                bench.clean()


def _cp(m: int, n: int, rank: int, where: dict[str, Any]) -> nn.Module:
    return CPLinear(m, n, rank=rank, **where)


def _cell(bench: Bench, cell: str, size: Size, rank: int, group: str) -> None:
    shape = (size.batch, size.context)
    bench.writer.write(
        "cell",
        cell=cell,
        title=f"GPT {size.blocks}×{size.width} R={rank} T={size.tokens}",
        layer="network",
        group=group,
        phase=bench.phase,
        x_shape=shape,
        y_shape=(*shape, size.vocabulary),
        rank=rank,
        r_elements=size.tokens * rank,
        floors=[],
        dtype=bench.dtype_name(),
        batch=size.batch,
        optimizer="AdamW, fused",
    )


def _one(
    bench: Bench,
    cell: str,
    name: str,
    make: Make,
    inside: AbstractContextManager[Any],
    size: Size,
    launch: str,
) -> None:
    """Time one contestant in one way."""
    torch.manual_seed(0)
    fields = {
        "cell": cell,
        "contestant": name,
        "family": "dense" if name == "dense" else "ours",
        "layout": "given",
        "compiled": launch == "compiled",
        "dtype": bench.dtype_name(),
        "threads": torch.get_num_threads(),
        "launch": launch,
        "mode": "training",
    }
    if launch == "compiled" and bench.left() < SECONDS_TO_COMPILE and not bench.dry:
        reason = f"less than {SECONDS_TO_COMPILE} s were left"
        bench.writer.write("measurement", **fields, status="skipped", reason=reason)
        return
    try:
        with inside:
            where: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
            compiler = bench.compiler if launch == "compiled" else None
            training = Training(size, make, where, compiler)
            found = _measured(bench, training, launch)
    except Exception as error:
        bench.writer.write("measurement", **fields, status="failed", reason=said(error))
        bench.recover()
        return
    parameters = sum(p.numel() * p.element_size() for p in training.model.parameters())
    bench.writer.write(
        "measurement",
        **fields,
        status="timed",
        **found,
        error=None,
        error_of=None,
        predicted=None,
        plan=None,
        parameter_bytes=parameters,
        tokens_per_second=size.tokens / found["median"],
    )


def _measured(bench: Bench, training: Training, launch: str) -> dict[str, Any]:
    """Seconds, peak memory of a step, and that the loss is a number."""
    start = time.perf_counter()
    losses = [training.step() for _ in range(3)]
    bench.timer.synchronize()
    found: dict[str, Any] = {"warm_seconds": time.perf_counter() - start}
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        training.step()
        torch.cuda.synchronize()
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    if launch == "graph":
        training.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        timing = bench.timer.graph([training.step])
    else:
        timing = bench.timer.eager([training.step])
    loss = float(losses[-1])
    if not math.isfinite(loss):
        raise ArithmeticError(f"the loss of the third step is {loss}")
    return {**timing.record(), **found, "loss": loss}
