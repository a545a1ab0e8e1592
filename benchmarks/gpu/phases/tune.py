"""``polyadic.tune`` on this GPU: each layer's step before and after, and the best forced plan.

Tuning times eager calls, as a model that is called layer by layer makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import polyadic
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.contest import train
from benchmarks.gpu.phases import conv
from polyadic.nn import CPConv2d, CPLinear


def run(bench: Bench) -> None:
    """A layer short of work, one that is not, and a convolution."""
    where: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
    layers: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {}
    for T, d, R in ((16, 48, 5),) if bench.dry else ((2048, 4096, 64), (16, 1024, 64)):
        layers[f"{d}→{d} R={R} T={T}"] = (
            partial(CPLinear, d, d, False, rank=R, **where),
            partial(bench.randn, T, d),
        )
    C, S, R = (8, 6, 5) if bench.dry else (256, 14, conv.rank(256))
    layers[f"{C}→{C} 3×3 {S}² R={R}"] = (
        partial(CPConv2d, C, C, 3, padding=1, bias=False, rank=R, **where),
        partial(conv.image, bench, 2 if bench.dry else 32, C, S, S),
    )
    for title, (build, inputs) in layers.items():
        with bench.guarded(f"tune {title}"):
            _tuned(bench, title, build(), inputs())


def _tuned(bench: Bench, title: str, layer: nn.Module, x: Tensor) -> None:
    """Record a step before and after tuning, and whether the values stay the same."""
    with torch.no_grad():
        expected = layer(x)
    x.requires_grad_()
    grad = torch.randn_like(expected)
    step = partial(train, layer, x, grad)
    polyadic.untune(stored=False)
    try:
        before = _seconds(bench, step)
        report = polyadic.tune(layer, x.detach(), training=True)
        after = _seconds(bench, step)
        with torch.no_grad():
            error = float((layer(x) - expected).float().norm() / expected.float().norm())
    finally:
        polyadic.untune(stored=False)
    for when, seconds in (("before", before), ("after", after)):
        bench.writer.write("rate", name=f"tune: {title}, {when}", value=seconds, unit="s")
    limit = 4 * torch.finfo(bench.dtype).eps
    bench.writer.write(
        "check",
        phase=bench.phase,
        subject=title,
        dtype=bench.dtype_name(),
        check="tune",
        status="passed" if error <= limit else "failed",
        reason="" if error <= limit else f"y is {error:.1e} from before, more than {limit:.1e}",
        report=str(report),
    )


def _seconds(bench: Bench, step: Callable[[], Any]) -> float:
    for _ in range(3):
        step()
    return bench.timer.eager([step] * (2 if bench.dry else 20)).median
