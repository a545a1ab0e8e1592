"""A memo for small pure functions that torch.compile can trace through."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def memoized(function: Callable[P, T]) -> Callable[P, T]:
    """Remember results by argument; under torch.compile, which cannot see a memo, just call."""
    remembered = functools.lru_cache(maxsize=4096, typed=True)(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return remembered(*args, **kwargs)  # type: ignore[arg-type]

    return call
