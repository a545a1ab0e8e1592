"""What a reader needs to judge the numbers; names no host, user or path."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

PEERS = ("polyadic", "triton", "tensorly-torch", "tensorly", "opt_einsum", "numpy")
# Relative L2 error against float64 that rounding can explain.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw,power.limit,driver_version"


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The environment record."""
    record: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "commit": _commit(),
        "versions": {name: _version(name) for name in PEERS},
        "tolerance": TOLERANCE[dtype],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "gpu": properties.name,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "as_found": clocks(),
            "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
            "bf16_reduced_precision_reduction": (
                torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
            ),
        }
    return record


def clocks() -> dict[str, str] | None:
    """Clocks, temperature and power as they are; None without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in out.stdout.splitlines()[0].split(",")]
    return dict(zip(CLOCKS.split(","), values, strict=False))


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        module = {"polyadic": "polyadic"}.get(name)
        if module is None:
            return None
        import polyadic

        return polyadic.__version__


def _commit() -> str | None:
    """The commit of the checkout we lie in, + where files differ from it.

    A copy of the tree without its history can say so by POLYADIC_COMMIT.
    """
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("POLYADIC_COMMIT")
