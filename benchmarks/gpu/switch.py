"""Our own kernels switched off, so that torch's operations are measured beside them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def _backend() -> Any:
    """The module of the library that chooses between kernels and torch's operations, if any."""
    try:
        return importlib.import_module("polyadic.kernels.backend")
    except ModuleNotFoundError:
        return None


def has_kernels() -> bool:
    """Whether the library has kernels that this GPU could run."""
    return _backend() is not None


@contextmanager
def without_kernels() -> Iterator[None]:
    """Torch's operations alone."""
    yield


def launcher(kernel: Any) -> Any:
    """The library's way to start a kernel, None where it has none."""
    try:
        from polyadic.kernels.triton.launch import Launcher
    except ImportError:
        return None
    return Launcher(kernel)
