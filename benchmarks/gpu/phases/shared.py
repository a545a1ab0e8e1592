"""Three layers of one input (query, key, value): called together, and one after the other.

Their outputs are added up, which everybody pays alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import floors
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.contest import Contestant, compete
from benchmarks.gpu.linears import cell
from polyadic.nn import CPLinear, CPSharedInput

LAYERS = 3


class Added(nn.Module):
    """The sum of several layers' outputs.

    Args:
        layers: the layers.
        together: whether they are called together.
    """

    def __init__(self, layers: Any, together: bool) -> None:
        super().__init__()
        self.together = together
        self.layers: Any = CPSharedInput(layers) if together else nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """(T, M) → (T, N)."""
        ys = self.layers(x) if self.together else [layer(x) for layer in self.layers]
        total: Tensor = ys[0]
        for y in ys[1:]:
            total = total + y
        return total


def run(bench: Bench) -> None:
    """Siblings and layers of a joint weight, beside dense ones."""
    sizes = [(2048, 4096, 4096, 64), (8192, 4096, 4096, 64)]
    if bench.dry:
        sizes = [(32, 48, 64, 8)]
    where: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
    cells = {c.name: (c, s) for s in sizes for c in [cell(bench, *s, group="shared")]}
    for name in bench.fresh(cells):
        one, (T, M, N, R) = cells[name]
        parameters = LAYERS * one.facts["parameters"]
        work = floors.linear(T, M, N * LAYERS, R, parameters, bench.size)
        one = replace(one, floors=work, modes=("training",), title=f"{LAYERS} × {one.title}")
        siblings = partial(_siblings, M, N, R, where)
        joint = partial(CPLinear.joint, LAYERS, M, N, False, rank=R, **where)
        dense = partial(_dense, M, N, where)
        contestants = [
            _contestant("polyadic", "ours", siblings, True),
            _contestant("polyadic, separate", "ours", siblings, False),
            _contestant("polyadic, joint", "ours", joint, True),
            _contestant("polyadic, joint, separate", "ours", joint, False),
            _contestant("dense", "dense", dense, False),
        ]
        with bench.guarded(name):
            compete(bench, one, contestants)


def _contestant(name: str, family: str, make: Callable[[], Any], together: bool) -> Contestant:
    return Contestant(name, family, lambda: Added(make(), together), copies=2)


def _siblings(M: int, N: int, R: int, where: dict[str, Any]) -> list[nn.Module]:
    return [CPLinear(M, N, False, rank=R, **where) for _ in range(LAYERS)]


def _dense(M: int, N: int, where: dict[str, Any]) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(M, N, bias=False, **where) for _ in range(LAYERS)]
