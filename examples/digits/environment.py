"""Where a run took place, so that its times can be read."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def environment() -> dict[str, str]:
    """Describe this machine and the versions in use.

    Returns:
        Names and values, in the order in which to show them.
    """
    return {
        "polyadic": _version("polyadic"),
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
        "scikit-learn": _version("scikit-learn"),
        "CPU": _cpu(),
        "logical cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "operating system": f"{platform.system()} {platform.machine()}",
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed as a package"


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
