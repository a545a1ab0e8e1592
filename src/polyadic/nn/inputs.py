"""Inputs of a layer that are no plain tensor: a proxy of torch.fx, a jagged nested tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy


def call_recorded(layer: nn.Module, x: Any, *args: Any) -> Any:
    """Record a call of the layer in the graph that torch.fx traces; None where x is no proxy.

    A CP layer is a leaf of such a graph, as torch's own layers are: its forward looks at sizes to
    choose a plan, which a proxy does not have.

    Raises:
        TypeError: the layer itself is what is traced, so that nothing could call it.
    """
    if not isinstance(x, Proxy):
        return None
    tracer: Any = x.tracer
    path = tracer.path_of_module(layer)
    if not path:
        name = type(layer).__name__
        raise TypeError(
            f"torch.fx cannot trace a {name} by itself, which is a leaf of a graph; trace a module "
            f"that holds it, such as torch.nn.Sequential(layer)"
        )
    return tracer.create_proxy("call_module", path, (x, *args), {})


def by_rows(function: Callable[[Tensor], Tensor], x: Any) -> Tensor:
    """Apply a function to the rows of a jagged nested tensor (B, j, …), one behind the other.

    Raises:
        TypeError: x has another layout.
        ValueError: another dimension than the second is ragged.
    """
    if x.layout != torch.jagged:
        raise TypeError(
            f"a nested input must have layout torch.jagged, got {x.layout}; make it with "
            f"torch.nested.nested_tensor(rows, layout=torch.jagged)"
        )
    if x._ragged_idx != 1:
        raise ValueError(
            f"a nested input must be ragged in its second dimension, got dimension {x._ragged_idx}"
        )
    y = function(x.values())
    nested: Tensor = torch.nested.nested_tensor_from_jagged(y, x.offsets(), x.lengths())
    return nested
