"""What a reader needs to judge numbers from a GPU, beside what every benchmark records."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

from benchmarks import records
from benchmarks.records import TOLERANCE

CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw,power.limit,driver_version"


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The environment record, without its kind."""
    record = records.environment(device, dtype) | {"tolerance": TOLERANCE[dtype]}
    del record["kind"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
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
