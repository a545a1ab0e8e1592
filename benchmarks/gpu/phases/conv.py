"""The 3×3 convolutions of a ResNet-50 at a third of their FLOPs, beside cuDNN's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import polyadic
from benchmarks.gpu import floors
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.contest import Cell, Contestant, compete, cudnn_by_trial
from benchmarks.gpu.switch import has_kernels, without_kernels
from polyadic import functional
from polyadic.nn import CPConv2d

STAGES = {128: 28, 256: 14, 64: 56, 512: 7}
BATCHES = (32, 256)
LAST: dict[str, Any] = {"memory_format": torch.channels_last}
TAPS, FEWER_FLOPS = 9, 3.0


def rank(channels: int) -> int:
    """The multiple of 8 nearest to a third of the dense layer's FLOPs."""
    exact = TAPS * channels**2 / FEWER_FLOPS / (2 * channels + TAPS)
    return max(8, 8 * round(exact / 8))


def run(bench: Bench) -> None:
    """Every stage with both batches, cuDNN choosing its kernels by trial."""
    sizes = [(2, 16, 6)] if bench.dry else [(B, C, S) for B in BATCHES for C, S in STAGES.items()]
    cells = {c.name: c for size in sizes for c in [_cell(bench, *size)]}
    with cudnn_by_trial(True):
        for name in bench.fresh(cells):
            with bench.guarded(name):
                compete(bench, cells[name], _contestants(bench, cells[name]))


def _cell(bench: Bench, B: int, C: int, S: int) -> Cell:
    R = rank(C)
    layer = CPConv2d(C, C, 3, padding=1, bias=False, rank=R, device="meta")
    parameters = sum(p.numel() for p in layer.parameters())

    return Cell(
        name=f"conv_{C}_{S}_R{R}_B{B}",
        title=f"{C}→{C} 3×3 {S}² R={R} B={B}",
        layer="conv",
        group="conv",
        x_shape=(B, C, S, S),
        y_shape=(B, C, S, S),
        rank=R,
        inputs=lambda: image(bench, B, C, S, S).requires_grad_(),
        grad=partial(image, bench, B, C, S, S),
        floors=floors.conv(B, C, C, S * S, TAPS, R, parameters, bench.size),
        x_bytes=2 * bench.size * B * C * S * S,
        facts={
            "in": C,
            "out": C,
            "batch": B,
            "spatial": S,
            "parameters": parameters,
            "dense_parameters": TAPS * C * C,
        },
    )


def image(bench: Bench, *shape: int) -> Tensor:
    """Random numbers in channels_last."""
    return bench.randn(*shape).contiguous(**LAST)


class Forced(nn.Module):
    """A CP convolution that obeys a plan."""

    def __init__(self, layer: CPConv2d, plan: polyadic.ConvPlan) -> None:
        super().__init__()
        self.layer, self.plan = layer, plan

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        outs, ins, kernels = self.layer.cp.factor_groups()
        return functional.cp_conv(x, outs, ins, kernels, padding=1, plan=self.plan)


def _contestants(bench: Bench, cell: Cell) -> list[Contestant]:
    B, C, S, _ = cell.x_shape
    where: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
    build = partial(CPConv2d, C, C, 3, padding=1, bias=False, rank=cell.rank, **where)

    def dense() -> nn.Module:
        return nn.Conv2d(C, C, 3, padding=1, bias=False, **where).to(**LAST)

    def explained(module: Any, training: bool) -> tuple[str, float]:
        chosen = polyadic.explain(module, batch=B, size=S, training=training).chosen
        return str(chosen.plan), chosen.seconds

    def forced(plan: polyadic.ConvPlan) -> nn.Module:
        return Forced(build(), plan)

    contestants = [
        Contestant("polyadic", "ours", build, explained=explained),
        Contestant("dense", "dense", dense),
    ]
    if has_kernels():
        contestants.append(Contestant("polyadic, no kernels", "aten", build, without_kernels))
    if BATCHES[0] == B or bench.dry:
        for depthwise in ("merged", "separable"):
            route = polyadic.ConvRoute("channels_last", depthwise)
            plan = polyadic.ConvPlan(route, route, 1)
            contestants.append(Contestant(f"plan {depthwise}", "plan", partial(forced, plan)))
    return contestants
