"""Which machine description holds for a device and dtype: a calibrated one, else built-in.

A calibration is a small JSON file in the user's cache folder. One that is corrupt, or of another
processor or torch, is left alone with a warning, and the built-in numbers hold.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

from polyadic._cost import MAPPED, Machine, built_in

FORMAT_VERSION = 2


def machine_for(device_type: str, dtype: torch.dtype) -> Machine:
    """Return the description of this machine at the thread count now set."""
    return _machine(device_type, dtype, threads_of(device_type))


def threads_of(device_type: str) -> int:
    """Threads that count for a device: torch's on a CPU, else 1."""
    return torch.get_num_threads() if device_type == "cpu" else 1


@functools.lru_cache(maxsize=64)
def _machine(device_type: str, dtype: torch.dtype, threads: int) -> Machine:
    default = built_in(device_type, dtype, threads)
    path = calibration_file(device_type, dtype, threads)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return default
    try:
        return _parse(text, device_type, default)
    except (ValueError, TypeError, KeyError) as error:
        warnings.warn(
            f"ignoring the calibration in {path}: {error}; run polyadic.calibrate() to renew it",
            RuntimeWarning,
            stacklevel=2,
        )
        return default


def calibration_file(device_type: str, dtype: torch.dtype, threads: int) -> Path:
    """Return the path of a calibration in the user's cache folder, whether it exists or not."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = str(dtype).removeprefix("torch.")
    return root / "polyadic" / f"machine-{device_type}-{name}-{threads}.json"


def fingerprint(device_type: str) -> dict[str, str]:
    """Return what a calibration is bound to: the processor and torch's version."""
    if device_type == "cuda":
        processor = torch.cuda.get_device_name()
    else:
        processor = f"{platform.machine()} {_cpu_name()}".strip()
    return {"processor": processor, "torch": torch.__version__}


@functools.lru_cache(maxsize=1)
def _cpu_name() -> str:
    """Name, family, model and stepping of the processor where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "cpu family", "model", "stepping")
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return " ".join(found[key] for key in wanted if key in found)


def settle() -> None:
    """Bring the allocator to the state in which a process that has run for a while leaves it.

    glibc's gives freed memory back to the system, and gets it again page by page, above thresholds
    that rise with the largest block freed so far: what is measured would hang on which sizes
    came before it.
    """
    torch.ones(MAPPED - 2**20, dtype=torch.uint8)


def store(machine: Machine, device_type: str, dtype: torch.dtype, threads: int) -> Path:
    """Write a calibration, whole or not at all, and let it hold from now on."""
    path = calibration_file(device_type, dtype, threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint(device_type),
        "machine": dataclasses.asdict(machine),
    }
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(content, indent=2), encoding="utf-8")
    draft.replace(path)
    _machine.cache_clear()
    return path


def _parse(text: str, device_type: str, default: Machine) -> Machine:
    content: Any = json.loads(text)
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"it is not a calibration of format {FORMAT_VERSION}")
    if content.get("fingerprint") != fingerprint(device_type):
        raise ValueError("it was made on another processor or with another torch")
    stored = content.get("machine")
    names = {field.name for field in dataclasses.fields(Machine)}
    if not isinstance(stored, dict) or set(stored) != names:
        raise ValueError("its fields are not those of a machine description")
    for name, value in stored.items():
        if name == "source":
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if value == 0 and getattr(default, name) > 0:
            raise ValueError(f"{name} must be above 0, got {value!r}")
    return Machine(**stored)
