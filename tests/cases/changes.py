"""Changes of a layer's output in place, as torch's own layers allow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def zeroed(y: Tensor) -> Tensor:
    y[..., :1] = 0
    return y


def _dropped(y: Tensor) -> Tensor:
    torch.manual_seed(7)
    return F.dropout(y, 0.4, inplace=True)


# Changes that torch has for real numbers alone.
OF_REAL_NUMBERS = ("relu", "hardswish", "dropout", "view")
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": partial(F.relu, inplace=True),
    "hardswish": partial(F.hardswish, inplace=True),
    "+=": lambda y: y.add_(y.detach().abs()),
    "*=": lambda y: y.mul_(3),
    "y[...] = 0": zeroed,
    "dropout": _dropped,
    "view": lambda y: y.flatten().clamp_(-0.5, 0.5),
}
