"""Memos: of small pure functions, which torch.compile can trace through, and of calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
MOST = 4096


class Memo(dict[Any, Any]):
    """A dict that starts anew when it has grown large."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self) >= MOST:
            self.clear()
        super().__setitem__(key, value)


def memoized(function: Callable[P, T]) -> Callable[P, T]:
    """Remember results by argument; under torch.compile, which cannot see a memo, just call."""
    remembered = functools.lru_cache(maxsize=MOST, typed=True)(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return remembered(*args, **kwargs)  # type: ignore[arg-type]

    return call
