"""What the machine can do: copies, products, and the cost of starting anything at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.bench import Bench, said
from benchmarks.gpu.switch import launcher
from benchmarks.gpu.timer import Call

TINY_CALLS = 200
MANY_ARGUMENTS = 12


def run(bench: Bench) -> None:
    """Rates first, since all floors rest on them."""
    _copies(bench)
    _products(bench)
    bench.load_rates()
    run = bench.rates
    bench.writer.write(
        "machine",
        threads=torch.get_num_threads(),
        flops=run.gemm,
        bandwidth=[[2**20 if bench.dry else 2**30, run.copy]],
        cost_model=_cost_model(bench),
    )
    _starts(bench)
    with bench.guarded("Triton launches"):
        _triton(bench)
    if bench.device.type == "cuda":
        bench.writer.write("note", phase=bench.phase, of="clocks under load", text=str(_clocks()))


def _clocks() -> dict[str, str] | None:
    from benchmarks.gpu.environment import clocks

    return clocks()


def _cost_model(bench: Bench) -> str:
    import polyadic

    fmt = polyadic.LinearFormat((4, 4), (4, 4), 2)
    try:
        found = polyadic.explain(fmt, batch=8, device=bench.device.type, dtype=bench.dtype)
    except Exception as error:
        return said(error)
    return found.machine.source


def _rate(bench: Bench, name: str, value: float, unit: str) -> None:
    bench.writer.write("rate", name=name, value=value, unit=unit)


def _copies(bench: Bench) -> None:
    """Bytes read and written by a copy, by the fastest way there is; and within the L2 cache.

    In a graph ``copy_`` is the driver's own copy, which may be slower than a kernel.
    """
    size = 2**20 if bench.dry else 2**31
    ways: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        source = bench.randn(size // dtype.itemsize, dtype=dtype)
        target = torch.empty_like(source)
        kernel = [partial(torch.mul, source, 1.0, out=target)] * 3
        ways[f"a kernel in {bench.dtype_name(dtype)}"] = bench.timer.graph(kernel).median
        if dtype == torch.float32:
            copies = [partial(target.copy_, source)] * 3
            ways["copy_ in a graph"] = bench.timer.graph(copies).median
            ways["copy_, eager"] = bench.timer.eager(copies).median
        del source, target
    for way, seconds in ways.items():
        _rate(bench, f"copy by {way}", 2 * size / seconds, "B/s")
    _rate(bench, "copy", 2 * size / min(ways.values()), "B/s")
    small = 2**16 if bench.dry else 2**23
    source = bench.randn(small // 4, dtype=torch.float32)
    kernel = [partial(torch.mul, source, 1.0, out=torch.empty_like(source))] * 50
    _rate(bench, "copy in L2", 2 * small / bench.timer.graph(kernel).median, "B/s")
    bench.clean()


def _products(bench: Bench) -> None:
    """Square products of random numbers; zeros would run faster than real data."""
    kinds = {torch.bfloat16: 8192, torch.float32: 4096, torch.float64: 4096}
    for dtype in dict.fromkeys((bench.dtype, *kinds)):
        n = 64 if bench.dry else kinds.get(dtype, 8192)
        a, b = bench.randn(n, n, dtype=dtype), bench.randn(n, n, dtype=dtype)
        seconds = bench.timer.graph([partial(torch.mm, a, b)] * 3).median
        _rate(bench, f"gemm {bench.dtype_name(dtype)}", 2 * n**3 / seconds, "FLOP/s")
        del a, b
    bench.clean()


def _starts(bench: Bench) -> None:
    """Seconds of the smallest operations, one after the other in a graph, and eagerly."""
    tiny, wide = bench.randn(64, 64), bench.randn(2048, 64)
    leaf = bench.randn(64, 64).requires_grad_()
    calls: dict[str, Call] = {
        "multiplication": partial(torch.mul, tiny, tiny),
        "product 64×64×64": partial(torch.mm, tiny, tiny),
        "product 2048×64×64": partial(F.linear, wide, tiny),
        "cast to float32": partial(tiny.to, torch.float32, copy=True),
    }
    for name, call in calls.items():
        _started(bench, name, call)
    only_eager: dict[str, Callable[[], Any]] = {
        "view": partial(tiny.view, -1),
        "empty": partial(torch.empty_like, tiny),
        "autograd of one multiplication": lambda: torch.autograd.grad(leaf * leaf, leaf, tiny),
    }
    for name, call in only_eager.items():
        _rate(bench, f"{name}, eager", _eager(bench, call), "s")


def _eager(bench: Bench, call: Call) -> float:
    return bench.timer.eager([call] * (2 if bench.dry else TINY_CALLS)).median


def _started(bench: Bench, name: str, call: Call) -> None:
    calls = [call] * (2 if bench.dry else TINY_CALLS)
    _rate(bench, f"{name}, in a graph", bench.timer.graph(calls).median, "s")
    _rate(bench, f"{name}, eager", _eager(bench, call), "s")


def _triton(bench: Bench) -> None:
    """A Triton kernel started by Triton's own way, and through the library's launcher."""
    if bench.device.type != "cuda":
        return
    from benchmarks.gpu.tiny_kernel import double_kernel, sum_kernel

    x = torch.randn(64, device=bench.device)
    y = torch.empty_like(x)
    inputs = tuple(torch.randn(64, device=bench.device) for _ in range(MANY_ARGUMENTS))
    for name, kernel, arguments, tensors in (
        ("Triton kernel, 3 arguments", double_kernel, (x, y, 64), [x, y]),
        (
            f"Triton kernel, {MANY_ARGUMENTS + 2} arguments",
            sum_kernel,
            (inputs, y, 64),
            [*inputs, y],
        ),
    ):
        _started(bench, f"{name}, Triton's launch", partial(kernel[1, 1, 1], *arguments))
        made = launcher(kernel)
        if made is not None:
            ours = partial(made, name, (1, 1, 1), tensors, (), partial(tuple, arguments))
            _started(bench, f"{name}, our launch", ours)
