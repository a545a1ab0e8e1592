"""Contestants whose training step starts as few things as torch can make of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.contest import in_double


class Started(nn.Module):
    """A module called through something that captures or compiles it at its first call.

    Args:
        layer: the module.
        how: ``"graphed"`` for ``torch.cuda.make_graphed_callables``, else a mode of
            ``torch.compile``.
        backend: the compiler.
    """

    def __init__(self, layer: nn.Module, how: str, backend: str) -> None:
        super().__init__()
        self.layer, self.how, self.backend = layer, how, backend
        # In a list, as the compiled form is no module beside the layer itself.
        self._made: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        """What the layer returns."""
        if not self._made:
            self._made.append(self._make(x))
        y: Tensor = self._made[0](x)
        if self.how == "reduce-overhead":
            # The next call writes into the same memory.
            y = y.clone()
        return y

    def _make(self, x: Tensor) -> Any:
        if self.how == "graphed":
            if x.device.type != "cuda":
                return self.layer
            sample = x.detach().clone().requires_grad_(x.requires_grad)
            return torch.cuda.make_graphed_callables(self.layer, (sample,))
        mode = self.how if self.backend == "inductor" else None
        return torch.compile(self.layer, mode=mode, backend=self.backend, fullgraph=True)


def uncaptured_in_double(module: nn.Module) -> nn.Module:
    """The layer itself in float64."""
    assert isinstance(module, Started)
    return in_double(module.layer)
