"""The tables that the tests hold our own kernels to, found beside this folder.

A table is a module ``tests/gpu/kernel_<name>.py`` whose ``check()`` yields the name of each row
that holds and raises at the first that does not. On a machine with a GPU it runs there.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "gpu"
PREFIX = "kernel_"


def names() -> list[str]:
    """All tables; none where the tests are not there."""
    return sorted(path.stem.removeprefix(PREFIX) for path in FOLDER.glob(f"{PREFIX}*.py"))


def load(name: str) -> Any:
    """Import a table; its neighbours are imported by their bare names."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module(PREFIX + name)


def dtypes(table: Any) -> Sequence[torch.dtype | None]:
    """The dtypes a table goes through, by which it can be divided; None for all at once."""
    return tuple(getattr(table, "DTYPES", ())) or (None,)


def rows(table: Any, dtype: torch.dtype | None) -> Generator[str, None, None]:
    """The rows of one dtype, checked one by one as they are asked for."""
    if dtype is None:
        yield from table.check()
        return
    every = table.DTYPES
    table.DTYPES = (dtype,)
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            yield from table.check()
    finally:
        table.DTYPES = every
