"""Which kernels one step starts and how long each runs, for a few layers.

The profiler slows launches down for the rest of its process, so that another worker goes on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.contest import train
from benchmarks.gpu.phases import conv
from benchmarks.gpu.switch import has_kernels, without_kernels
from benchmarks.gpu.timer import Call
from polyadic.nn import CPConv2d, CPEmbedding, CPLinear

STEPS = 5
MOST_KERNELS = 25


def run(bench: Bench) -> None:
    """Our layers with and without our kernels, dense ones beside them."""
    contexts: dict[str, Any] = {"polyadic": nullcontext}
    if has_kernels():
        contexts["polyadic, no kernels"] = without_kernels
    for name, layer, dense, x in _layers(bench):
        with bench.guarded(f"profile of {name}"):
            for who, inside in contexts.items():
                _one(bench, f"{name}, {who}", layer, x, inside())
            _one(bench, f"{name}, dense", dense, x, nullcontext())
        bench.clean()


def _layers(bench: Bench) -> Iterator[tuple[str, nn.Module, nn.Module, Tensor]]:
    """A layer of each kind, the dense layer it stands for, and its input."""
    where: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
    d, R, T, B, C, S, V, E = 4096, 64, 2048, 32, 128, 28, 50257, 768
    if bench.dry:
        d, R, T, B, C, S, V, E = 48, 5, 16, 2, 16, 6, 300, 32
    yield (
        f"linear {d}² R={R} T={T}",
        CPLinear(d, d, rank=R, **where),
        nn.Linear(d, d, **where),
        bench.randn(T, d).requires_grad_(),
    )
    yield (
        f"conv {C} 3×3 {S}² B={B}",
        CPConv2d(C, C, 3, padding=1, rank=conv.rank(C), **where),
        nn.Conv2d(C, C, 3, padding=1, **where).to(**conv.LAST),
        conv.image(bench, B, C, S, S).requires_grad_(),
    )
    yield (
        f"embedding {V}×{E} R={R} T={4 * T}",
        CPEmbedding(V, E, rank=R, **where),
        nn.Embedding(V, E, **where),
        torch.randint(V, (4 * T,), device=bench.device),
    )


def _one(
    bench: Bench, name: str, layer: nn.Module, x: Tensor, inside: AbstractContextManager[Any]
) -> None:
    """Profile forward and step apart."""
    with inside:
        with torch.no_grad():
            grad = torch.randn_like(layer(x))
            _profiled(bench, f"{name}, forward", partial(layer, x))
        _profiled(bench, f"{name}, step", partial(train, layer, x, grad))


def _profiled(bench: Bench, name: str, call: Call) -> None:
    """Kernels by name: how many a call, and microseconds a call."""
    on_gpu = bench.device.type == "cuda"
    for _ in range(3):
        call()
    bench.timer.synchronize()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(STEPS):
            call()
        bench.timer.synchronize()
    counts: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.is_user_annotation:
            continue  # a range around kernels, not a kernel
        if not on_gpu or event.device_type == DeviceType.CUDA:
            counts[event.name] += 1
            times[event.name] += event.time_range.elapsed_us()
    kernels = sorted(times, key=lambda kernel: -times[kernel])[:MOST_KERNELS]
    bench.writer.write(
        "profile",
        phase=bench.phase,
        of=name,
        launches=sum(counts.values()) / STEPS,
        microseconds=sum(times.values()) / STEPS,
        kernels=[[k[:90], counts[k] / STEPS, times[k] / STEPS] for k in kernels],
    )
