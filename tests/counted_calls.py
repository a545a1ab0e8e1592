"""How many calls of Python functions something makes: what a call costs beside its arithmetic."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polyadic

PACKAGE = str(Path(polyadic.__file__).parent)


def python_calls(run: Callable[[], Any]) -> int:
    """Calls of Python functions; of what C calls into Python, too.

    Without a garbage collection in between, of which others (hypothesis) ask to be told.
    """
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    collecting = gc.isenabled()
    gc.disable()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        if collecting:
            gc.enable()
    return count


def own_calls(run: Callable[[], Any]) -> tuple[int, int]:
    """Calls of the package's own Python functions, and the files these stand in."""
    files: list[str] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            files.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return len(files), len(set(files))
