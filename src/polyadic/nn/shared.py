"""CP linear layers called together on one input."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from polyadic import functional
from polyadic.functional.shared import better_apart
from polyadic.nn.linear import CPLinear
from polyadic.tensor import CPTensor


class CPSharedInput(nn.Module):
    """CP linear layers of one input, such as query, key and value or gate and up.

    It calls ``polyadic.functional.cp_linear_shared``, which reads the input once and makes its
    gradient once. The layers stay what they are, with parameters and biases of their own, or with
    those of a joint weight (``CPLinear.joint``), whose shared in factors are then contracted once
    for all. Each layer may also be called by itself. When they are called together, hooks on them
    do not run. Each layer is called by itself if one is frozen for inference or may keep the input
    alone (``memory="least"``), and where that is faster (see ``cp_linear_shared``).

    Args:
        layers: ``CPLinear`` layers with the same ``in_features``, dtype and device.

    Attributes:
        layers: the layers, an ``nn.ModuleList``.

    Shape:
        (..., M) → a tuple of (..., N_l), in the order of the layers.

    Raises:
        TypeError: something is no CPLinear.
        ValueError: there are no layers, or their ``in_features`` differ.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        if not isinstance(layers, Iterable):
            raise TypeError(f"layers must be CPLinear layers, got {type(layers).__name__}")
        given: list[Any] = list(layers)
        for i, layer in enumerate(given):
            if not isinstance(layer, CPLinear):
                raise TypeError(f"layers[{i}] must be a CPLinear, got {type(layer).__name__}")
        sizes = [layer.in_features for layer in given]
        if len(set(sizes)) != 1:
            raise ValueError(
                f"layers of one input must be at least one and have the same in_features, got "
                f"{sizes}"
            )
        self.layers = nn.ModuleList(given)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(..., M) → (..., N_l) for each layer."""
        layers: list[Any] = list(self.layers)
        apart = any(layer.frozen is not None or layer.memory == "least" for layer in layers)
        if apart or getattr(x, "is_nested", False):
            return tuple(layer(x) for layer in layers)
        if (
            isinstance(x, Tensor)
            and all(type(layer.cp) is CPTensor for layer in layers)
            and better_apart(x)
        ):
            return tuple([layer.forward(x) for layer in layers])
        parts = [layer.cp.parts() for layer in layers]
        return functional.cp_linear_shared(
            x,
            [groups[0] for groups, _ in parts],
            [groups[1] for groups, _ in parts],
            [layer.bias for layer in layers],
            weights=[scale for _, scale in parts],
        )
