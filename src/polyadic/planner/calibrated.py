"""Which machine description holds for a device and dtype: a calibrated one, else built-in.

A calibration is a small JSON file in the user's cache folder. One that is corrupt, or of another
processor or torch, is left alone with a warning, and the built-in numbers hold. Where none can be
written it holds for the process that made it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import platform
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from polyadic.planner.machine import MAPPED, Machine, built_in

FORMAT_VERSION = 3
# Calibrations of this process that could not be written.
_unwritten: dict[tuple[str, torch.dtype, int], Machine] = {}


def machine_for(device_type: str, dtype: torch.dtype) -> Machine:
    """Return the description of this machine at the thread count now set."""
    return _machine(device_type, dtype, threads_of(device_type))


def device_type(device: Any) -> str:
    """Return the type of a device, such as ``"cpu"``.

    Raises:
        TypeError: ``device`` is neither a device nor text.
        ValueError: it names no device.
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be text such as 'cpu', got {device!r}")
    try:
        return torch.device(device).type
    except RuntimeError:
        raise ValueError(f"device must be one torch knows, such as 'cpu', got {device!r}") from None


def computed_dtype(dtype: Any) -> torch.dtype:
    """Return a dtype if layers compute in it.

    Raises:
        TypeError: it is no floating-point dtype of two bytes or more.
    """
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2:
        return dtype
    raise TypeError(
        f"dtype must be floating point of two bytes or more, such as torch.float32, got {dtype!r}"
    )


def threads_of(device_type: str) -> int:
    """Threads that count for a device: torch's on a CPU, else 1."""
    return torch.get_num_threads() if device_type == "cpu" else 1


@functools.lru_cache(maxsize=64)
def _machine(device_type: str, dtype: torch.dtype, threads: int) -> Machine:
    default = built_in(device_type, dtype, threads)
    if (device_type, dtype, threads) in _unwritten:
        return _unwritten[device_type, dtype, threads]
    try:
        path = calibration_file(device_type, dtype, threads)
        content = path.read_bytes()
    except OSError:
        return default
    try:
        return _parse(content, device_type, default)
    except (ValueError, OverflowError, RecursionError) as error:
        warnings.warn(
            f"ignoring the calibration in {path}: {error}; run polyadic.calibrate() to renew it",
            RuntimeWarning,
            stacklevel=2,
        )
        return default


def calibration_file(device_type: str, dtype: torch.dtype, threads: int) -> Path:
    """Return the path of a calibration in the user's cache folder, whether it exists or not.

    Raises:
        OSError: the user has no home folder, and no other is named.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # A relative one is to be ignored, says the specification that it stems from.
    if not root.is_absolute():
        try:
            root = Path.home() / ".cache"
        except RuntimeError as error:
            raise OSError(f"{error} Set XDG_CACHE_HOME") from error
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
    torch.ones(MAPPED - 2**20, dtype=torch.uint8, device="cpu")


def store(machine: Machine, device_type: str, dtype: torch.dtype, threads: int) -> Path | None:
    """Write a calibration, whole or not at all, and let it hold from now on.

    Returns:
        The file; None, after a warning, where none could be written.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint(device_type),
        "machine": dataclasses.asdict(machine),
    }
    _unwritten.pop((device_type, dtype, threads), None)
    _machine.cache_clear()
    try:
        path = calibration_file(device_type, dtype, threads)
        _write(path, json.dumps(content, indent=2))
    except OSError as error:
        _unwritten[device_type, dtype, threads] = machine
        warnings.warn(
            f"the calibration holds for this process alone, as it could not be written: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    return path


def _write(path: Path, text: str) -> None:
    """Write a file by way of a draft whose name no other process or thread has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(".tmp", path.stem, path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(draft, path)
    except OSError:
        os.unlink(draft)
        raise


def _parse(content: bytes, device_type: str, default: Machine) -> Machine:
    """Read what ``store`` has written.

    Raises:
        ValueError: it is anything else, or of another machine.
        OverflowError: a number is too large to be a float.
        RecursionError: it is nested too deeply to be read.
    """
    found: Any = json.loads(content.decode("utf-8"))
    if not isinstance(found, dict) or found.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"it is not a calibration of format {FORMAT_VERSION}")
    if found.get("fingerprint") != fingerprint(device_type):
        raise ValueError("it was made on another processor or with another torch")
    stored = found.get("machine")
    names = {field.name for field in dataclasses.fields(Machine)}
    if not isinstance(stored, dict) or set(stored) != names:
        raise ValueError("its fields are not those of a machine description")
    for name, value in stored.items():
        if name == "source":
            if not isinstance(value, str):
                raise ValueError(f"source must be text, got {value!r}")
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if value == 0 and getattr(default, name) > 0:
            raise ValueError(f"{name} must be above 0, got {value!r}")
    return Machine(**stored)
