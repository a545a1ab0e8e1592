"""Where numbers were measured, so that a reader can judge them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def environment(packages: Sequence[str] = ("polyadic",)) -> dict[str, Any]:
    """Describe this machine and the versions in use; no host, user or path is named.

    Args:
        packages: names of installed packages whose versions are of interest.

    Returns:
        Plain data: ``torch``, ``python``, ``system``, ``machine`` and ``cpu`` as text, ``cores``
        (logical ones) and ``threads`` (those torch uses now) as ints, and ``versions``, a version
        for each of ``packages``, None where it is not installed.

    Raises:
        TypeError: ``packages`` is no sequence of names.
    """
    if isinstance(packages, str) or not isinstance(packages, Sequence):
        raise TypeError(f"packages must be a sequence of names, got {packages!r}")
    if wrong := [name for name in packages if not isinstance(name, str)]:
        raise TypeError(f"packages must hold names, got {wrong[0]!r}")
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in packages},
    }


def _cpu_name() -> str:
    """The processor's name where Linux tells it, else what Python knows of it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "polyadic":
            return None
        # It is imported from a source tree that was never installed.
        import polyadic

        return polyadic.__version__
