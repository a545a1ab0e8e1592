"""The most memory that a call of a layer needs at a time, counted without carrying it out."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from polyadic._torch import FakeTensorMode
from polyadic.live_bytes import LiveBytes


def peak_bytes(layer: nn.Module, x: Tensor, training: bool) -> int:
    """Return the most bytes that are alive at once in a call, besides the parameters.

    Counted are the input, the output and its gradient, gradients and all that is made on the way.
    The call is made on tensors that have sizes and a device but no values, so that it allocates
    nothing and takes milliseconds.

    Args:
        layer: a layer, on the meta device or on that of ``x``; it is left as it is.
        x: an input of the shape, dtype and device in question, of which the values do not matter.
        training: count forward and backward, or the forward pass alone.
    """
    with FakeTensorMode():
        blank = {
            id(value): nn.Parameter(_like(value, x), requires_grad=value.requires_grad)
            for value in layer.parameters()
        }
        twin = copy.deepcopy(layer, blank)
        own = list(twin.parameters())
        given = _like(x, x)
        if training and given.is_floating_point():
            given.requires_grad_()
        with torch.set_grad_enabled(training), LiveBytes([given, *own]) as live:
            y = twin.forward(given)  # without hooks, which a caller may have set
            if training:
                wanted = [value for value in (given, *own) if value.requires_grad]
                torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)
        peak: int = live.peak - sum(value.nbytes for value in own)
    return peak


def _like(value: Tensor, x: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device=x.device)
