"""Layers to adapt, with inputs; small models; and what an adapter must equal, by torch alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from polyadic.adapters import CPConfig


@dataclass(frozen=True)
class Case:
    """A layer to adapt.

    Attributes:
        make: of the layer.
        shape: of its input; indices below 11 for a table.
        options: of the adapter.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    options: dict[str, Any]

    def input(self) -> Tensor:
        if isinstance(self.make(), nn.Embedding):
            return torch.randint(0, 11, self.shape)
        return torch.randn(self.shape, dtype=torch.float64)

    def model(self, *, share: str = "none", zero: bool = False, alpha: float = 10) -> PeftModel:
        """The layer ``layer`` of a model, frozen, with an adapter."""
        base = nn.Sequential()
        base.add_module("layer", self.make().double())
        given = {"r": 5, "alpha": alpha, "share": share, "init_weights": zero, **self.options}
        config = CPConfig(target_modules=["layer"], **given)
        return get_peft_model(base, config).eval().double()


CASES = {
    "linear": Case(lambda: nn.Linear(12, 18), (4, 12), {}),
    "linear, order 1": Case(lambda: nn.Linear(12, 18), (2, 3, 12), {"order": 1}),
    "linear, order 3": Case(lambda: nn.Linear(24, 8, bias=False), (24,), {"order": 3}),
    "linear, primes": Case(lambda: nn.Linear(7, 11), (3, 7), {}),
    "linear, one feature": Case(lambda: nn.Linear(1, 6), (3, 1), {"r": 1}),
    "linear, no rows": Case(lambda: nn.Linear(12, 18), (0, 12), {}),
    "linear, given modes": Case(
        lambda: nn.Linear(12, 18), (4, 12),
        {"in_shape_pattern": {"layer": (2, 2, 3)}, "out_shape_pattern": {"layer": (18,)}},
    ),
    "Conv1D": Case(lambda: Conv1D(18, 12), (2, 3, 12), {}),
    "conv1d": Case(lambda: nn.Conv1d(6, 4, 3, stride=2, padding=1), (2, 6, 9), {}),
    "conv2d": Case(lambda: nn.Conv2d(6, 4, (3, 1), padding="same"), (2, 6, 5, 4), {}),
    "conv2d, pointwise": Case(lambda: nn.Conv2d(6, 4, 1, bias=False), (6, 5, 4), {}),
    "conv2d, groups": Case(lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 4), {}),
    "conv2d, dilated": Case(lambda: nn.Conv2d(5, 4, 2, dilation=2), (1, 5, 6, 6), {}),
    "conv2d, circular": Case(
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 5), {}
    ),
    "conv3d": Case(lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 4, 3), {"order": 1}),
    "embedding": Case(lambda: nn.Embedding(11, 6), (3, 5), {}),
    "embedding, padding": Case(lambda: nn.Embedding(11, 6, padding_idx=2), (3, 5), {}),
    "embedding, given modes": Case(
        lambda: nn.Embedding(11, 6), (40,), {"in_shape_pattern": {"layer": (2, 3, 2)}}
    ),
}  # fmt: skip


def layer_of(model: nn.Module) -> Any:
    """The adapted layer of a case's model."""
    return model.get_submodule("base_model.model.layer")


def parts(layer: Any, name: str = "default") -> list[Tensor]:
    """All that trains in an adapter of a layer."""
    rows = [layer.polyadic_rows[name]] if name in layer.polyadic_rows else []
    return [*layer.polyadic_cp[name].factors, *rows]


def change(layer: Any, name: str = "default") -> Tensor:
    """ΔW of an adapter by a plain sum over components, differentiable; as the weight is stored."""
    cp, base = layer.polyadic_cp[name], layer.get_base_layer()
    rows = layer.polyadic_rows[name] if name in layer.polyadic_rows else torch.ones(cp.rank)
    modes = [mode for group in cp.tensorized_shape for mode in group]
    total: Tensor = torch.zeros((), dtype=cp.factors[0].dtype)
    for r in range(cp.rank):
        term = rows[r].to(total.dtype)
        for d, factor in enumerate(cp.factors):
            shape = [1] * d + [-1] + [1] * (len(modes) - d - 1)
            term = term * factor[:, r].view(shape)
        total = total + term
    scale = layer.alpha[name] / layer.r[name]
    found = scale * total.reshape([*cp.shape])
    if isinstance(base, nn.Linear):
        return found.t()
    if isinstance(base, nn.Embedding):
        found = found[: base.num_embeddings]
        keep = torch.ones(len(found), 1, dtype=found.dtype)
        if base.padding_idx is not None:
            keep[base.padding_idx] = 0
        return found * keep
    return found.reshape(base.weight.shape)


def by_weight(layer: Any, x: Tensor, delta: Tensor) -> Tensor:
    """What the base layer answers with W + ΔW as its weight."""
    base = copy.deepcopy(layer.get_base_layer())
    found: Tensor = functional_call(base, {"weight": base.weight.detach() + delta}, (x,))
    return found


class Words(nn.Module):
    """A small model of all kinds of layers: indices (B, T) in, scores (B, T, 5) out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 12, padding_idx=3)
        self.first = nn.Linear(12, 12)
        self.second = nn.Linear(12, 12)
        self.conv = nn.Conv1d(12, 8, 3, padding=1)
        self.last = nn.Linear(8, 5)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.table(indices)
        x = torch.relu(self.second(torch.relu(self.first(x))))
        scores: Tensor = self.last(self.conv(x.transpose(1, 2)).transpose(1, 2))
        return scores


ALL = ["table", "first", "second", "conv", "last"]


def words(**options: Any) -> tuple[Words, PeftModel]:
    """The small model, and a copy with an adapter on all layers that changes what it answers."""
    base = Words().requires_grad_(False).eval()
    given = {"r": 4, "alpha": 6, "target_modules": ALL, "init_weights": False, **options}
    return base, get_peft_model(copy.deepcopy(base), CPConfig(**given)).eval()


def indices() -> Tensor:
    return torch.randint(0, 30, (6, 7))
