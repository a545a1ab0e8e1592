"""Our own kernels switched off, so that torch's operations are measured beside them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from polyadic.planner import choice


def _backend() -> Any:
    """The module of the library that says whether its kernels serve, None where it has none."""
    try:
        return importlib.import_module("polyadic.kernels.backend")
    except ModuleNotFoundError:
        return None


def has_kernels() -> bool:
    """Whether the library has kernels, and this machine can run them."""
    backend = _backend()
    return backend is not None and bool(backend.triton_serves(0))


@contextmanager
def without_kernels() -> Iterator[None]:
    """Torch's operations alone; entered around many calls, as the answer is asked for anew."""
    backend = _backend()
    before = os.environ.get(backend.SWITCH)
    os.environ[backend.SWITCH] = "0"
    _ask_again(backend)
    try:
        yield
    finally:
        if before is None:
            del os.environ[backend.SWITCH]
        else:
            os.environ[backend.SWITCH] = before
        _ask_again(backend)


def _ask_again(backend: Any) -> None:
    """Forget the remembered answer and remember the new one; plans that rest on it too."""
    backend._serves.cache_clear()
    backend.triton_serves(0)
    choice.forget()


def launcher(kernel: Any) -> Any:
    """The library's way to start a kernel, None where it has none."""
    try:
        from polyadic.kernels.triton.launch import Launcher
    except ImportError:
        return None
    return Launcher(kernel)
