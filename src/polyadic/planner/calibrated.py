"""Find the machine description that holds for a request: a calibrated one, else the built-in one.

A calibration is a small JSON file in the user's cache folder. A file that cannot be read, or that
was made on another processor or with another version of torch, is ignored with a warning.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

from polyadic.durable.files import check_regular, write_text
from polyadic.planner.machine import Machine, built_in
from polyadic.planner.request import Place, Request

FORMAT_VERSION = 4
# Calibrations that could not be written to a file; they hold until this process ends.
_unwritten: dict[Place, Machine] = {}


def machine_for(request: Request) -> Machine:
    """Return the description of the machine that a request is for."""
    return machine_at(request.place)


@functools.lru_cache(maxsize=64)
def machine_at(place: Place) -> Machine:
    """Return the description of the machine that computes at a place."""
    if place in _unwritten:
        return _unwritten[place]
    try:
        path = calibration_file(place)
        check_regular(path)
        text = path.read_bytes().decode("utf-8")
    except OSError:
        return built_in(*place)
    except ValueError as error:  # not UTF-8, or no regular file
        return _ignored(path, error, place)
    try:
        found: Any = json.loads(text)
        if found["format_version"] != FORMAT_VERSION or found["made_on"] != fingerprint(
            place.device
        ):
            raise ValueError("it is of another processor, torch or version of the format")
        if set(found["machine"]) != {field.name for field in dataclasses.fields(Machine)}:
            raise ValueError("its fields are not those of a machine description")
        return Machine(**found["machine"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        return _ignored(path, error, place)


def _ignored(path: Path, error: Exception, place: Place) -> Machine:
    warnings.warn(
        f"ignoring the calibration in {path}: {error}; run polyadic.calibrate() to renew it",
        RuntimeWarning,
        stacklevel=3,
    )
    return built_in(*place)


def calibration_file(place: Place) -> Path:
    """Return the path of a calibration in the user's cache folder, whether it exists or not.

    Raises:
        OSError: the user has no home folder, and no other is named.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore a relative path.
    if not root.is_absolute():
        try:
            root = Path.home() / ".cache"
        except RuntimeError as error:
            raise OSError(f"{error} Set XDG_CACHE_HOME") from error
    device, dtype, threads, tf32 = place
    name = f"{device}-{str(dtype).removeprefix('torch.')}{'-tf32' if tf32 else ''}-{threads}"
    return root / "polyadic" / f"machine-{name}.json"


@functools.cache
def fingerprint(device_type: str) -> dict[str, str]:
    """Return what a calibration is bound to: the processor and torch's version."""
    processor = torch.cuda.get_device_name() if device_type == "cuda" else _cpu_name()
    return {"processor": processor, "torch": torch.__version__}


def _cpu_name() -> str:
    """Return name, family, model and stepping of the processor, as far as the system tells them."""
    wanted = ("model name", "cpu family", "model", "stepping")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        lines = [f"model name: {platform.processor()}"]
    parts = [line.partition(":") for line in lines]
    told = {name.strip(): value.strip() for name, _, value in parts}
    return " ".join([platform.machine(), *(told[name] for name in wanted if name in told)])


def store(machine: Machine, place: Place) -> Path | None:
    """Write a calibration, whole or not at all, and let it hold from now on.

    Returns:
        The file; None, after a warning, where none could be written.
    """
    content = {"format_version": FORMAT_VERSION, "made_on": fingerprint(place.device)}
    content["machine"] = dataclasses.asdict(machine)
    _unwritten.pop(place, None)
    machine_at.cache_clear()
    try:
        path = calibration_file(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=2))
    except (OSError, ValueError) as error:
        _unwritten[place] = machine
        warnings.warn(
            f"the calibration holds for this process alone, as it could not be written: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    return path
