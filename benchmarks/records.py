"""Records of measurements: JSON lines, an environment first, whose fields every benchmark shares.

The kinds ``environment``, ``machine``, ``cell`` and ``measurement`` are those of layers timed side
by side; an experiment adds kinds of its own. A record is on the disk as soon as it is known, so
that a run may be stopped at any time.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from polyadic.testing import environment as here

Record = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "polyadic", "triton", "tensorly-torch", "tensorly", "opt_einsum", "numpy", "peft"
)  # fmt: skip
# What every record of a kind must have; a timed measurement has the fields of both lists.
FIELDS = {
    "environment": ("date", "torch", "cpu", "device", "dtype", "commit", "versions", "tolerance"),
    "machine": ("threads", "flops", "bandwidth", "cost_model"),
    "cell": ("cell", "title", "layer", "group", "x_shape", "y_shape", "r_elements", "floors"),
    "measurement": ("cell", "contestant", "family", "layout", "compiled", "threads", "status"),
}
TIMED_FIELDS = (
    "mode", "median", "min", "q1", "q3", "repeats", "calls_per_repeat", "stopped_early", "error",
    "predicted", "plan", "parameter_bytes",
)  # fmt: skip
STATUSES = ("timed", "skipped", "refused", "failed")
# Relative L2 error against float64 that rounding can explain, for the longest sums of the grid.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


def check(record: Record) -> None:
    """Refuse a record that lacks what its kind must have.

    Raises:
        ValueError: it is no record, the kind or status is unknown, or a field is missing.
    """
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind not in FIELDS:
        raise ValueError(f"kind must be one of {', '.join(FIELDS)}, got {kind!r}")
    wanted = FIELDS[kind]
    if kind == "measurement":
        if record.get("status") not in STATUSES:
            raise ValueError(f"status must be one of {STATUSES}, got {record.get('status')!r}")
        wanted += TIMED_FIELDS if record["status"] == "timed" else ("reason",)
    missing = [name for name in wanted if name not in record]
    if missing:
        raise ValueError(f"a record of kind {kind!r} needs {', '.join(missing)}, got {record}")


def environment(device: torch.device, dtype: torch.dtype) -> Record:
    """The environment record: machine, versions, time and commit."""
    record: Record = {
        "kind": "environment",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **here(PACKAGES),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "commit": commit(),
    }
    if device.type == "cuda":
        record |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return record


def commit() -> str | None:
    """The commit of this checkout, with + where the code differs from it; None without one.

    A copy of the tree without its history can name its commit in ``POLYADIC_COMMIT``.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", "--", str(Path(__file__).resolve())):
            return os.environ.get("POLYADIC_COMMIT")
        code = ("src", "benchmarks", "examples")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("POLYADIC_COMMIT")


def rounded(value: Any) -> Any:
    """The same plain data with five digits of every float, as more are noise.

    NaN and infinity, which JSON does not have, become None.
    """
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def spread(samples: Sequence[float]) -> Record:
    """The fields of a timed measurement that tell of its samples, at least one."""
    ordered = sorted(samples)
    q1, median, q3 = (
        statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    )
    return {"median": median, "min": ordered[0], "q1": q1, "q3": q3, "repeats": len(ordered)}


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record to a file as one line, rounded; it is on the disk when this returns.

    What a process that was killed left of a line is removed.
    """
    line = (json.dumps(rounded(record), ensure_ascii=False) + "\n").encode()
    with open(path, "ab+") as file:
        size = file.tell()
        file.seek(max(0, size - 1))
        if size and file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, *, growing: bool = False) -> list[Any]:
    """Read a file of JSON lines.

    Args:
        path: the file.
        growing: it may still be written to, so that a last line without its end is left out.

    Raises:
        ValueError: a line is no JSON.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    if growing and lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    return [
        _parsed(line, f"line {number} of {len(lines)} of {path.name}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}); run the benchmark again") from error
