"""Which kinds of layer the library's own kernels serve, on which devices."""

from __future__ import annotations

import functools
import importlib.util

import torch

from polyadic._torch import not_traced

# Kinds of maps that obey a route by "triton".
BY_TRITON: frozenset[str] = frozenset()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@not_traced
def serves(kind: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether a route by "triton" of a kind of map can be obeyed on a device."""
    return (
        kind in BY_TRITON and device_type == "cuda" and dtype in DTYPES and _has_triton_and_a_gpu()
    )


@functools.cache
def _has_triton_and_a_gpu() -> bool:
    return (
        importlib.util.find_spec("triton") is not None
        and torch.version.hip is None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (8, 0)
    )
