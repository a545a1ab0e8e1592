"""Whether autocast is on, and off for what must not be rounded."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from polyadic._tracing import not_traced


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device."""
    return _exists(device_type) and torch.is_autocast_enabled(device_type)


def no_autocast(like: Tensor) -> contextlib.AbstractContextManager[None]:
    """Autocast off for the device of a tensor, where it is on."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if autocasts(kind) else contextlib.nullcontext()


@not_traced
def _exists(device_type: str) -> bool:
    # The compiler of torch 2.11 cannot look into this.
    return torch.amp.is_autocast_available(device_type)
