"""Check every GPU kernel's numbers: on the GPU if there is one, else under Triton's interpreter.

    python tests/gpu/check.py [NAME …]

Needs torch, Triton and this project alone. Prints a line for each table and fails with the first
row that does not hold. A table is a module ``kernel_<name>.py`` in this folder with ``check()``,
which yields the name of each row that holds, and ``forms()``, which ``test_compiled.py`` compiles.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path

import torch

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """All tables."""
    return sorted(path.stem.removeprefix("kernel_") for path in FOLDER.glob("kernel_*.py"))


def check(name: str) -> int:
    """Go through a table, and return how many rows it has.

    Raises:
        AssertionError: a row does not hold.
    """
    torch.manual_seed(0)
    table = importlib.import_module(f"kernel_{name}")
    from pretend import forms_are_told_apart

    with torch.no_grad(), forms_are_told_apart():
        return sum(1 for _ in table.check())


def check_all(wanted: list[str] | None = None) -> None:
    """Check the tables of some or of all kernels."""
    for name in wanted or names():
        start = time.perf_counter()
        rows = check(name)
        print(f"{name}: {rows} rows hold, {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        # Read where a kernel is defined, so before any is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    check_all(sys.argv[1:])
