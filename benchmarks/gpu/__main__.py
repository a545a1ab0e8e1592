"""``python -m benchmarks.gpu --out DIR --seconds N``: run the phases, then print the short table.

A worker process runs the phases one after the other. Where it dies, loses the GPU or hangs, another
goes on: once more with the phase at hand, leaving out the cells that were begun, and after a second
failure with the next phase.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.gpu.phases import PHASES
from benchmarks.gpu.records import Run, Writer
from benchmarks.gpu.table import short_table

ATTEMPTS = 2
# Seconds a phase may overrun its limit, and seconds kept for the table and the end.
GRACE, LAST_GRACE, RESERVE = 40.0, 10.0, 4.0


def main(arguments: list[str] | None = None) -> int:
    """Run and report."""
    options = _options(arguments)
    start = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    name = options.name or f"{datetime.now(timezone.utc):%Y-%m-%d}{'-dry' if options.dry else ''}"
    path = options.out / f"gpu-{name}.jsonl"
    if not options.again:
        path.unlink(missing_ok=True)
    writer = Writer(path)
    waiting, attempts = list(options.phases), dict.fromkeys(options.phases, 0)
    while waiting:
        left = options.seconds - RESERVE - (time.monotonic() - start)
        if left < 1:
            for name in waiting:
                writer.write("phase", phase=name, status="skipped", reason="no time was left")
            break
        known = len(Run.load(path).of("phase"))
        _work(path, waiting, left, options)
        if len(Run.load(path).of("phase")) == known:
            print("the worker ended before its first phase; its message stands above")
            return 1
        waiting = _remaining(path, writer, waiting, attempts)
    writer.write("note", phase="", of="run", text=f"{time.monotonic() - start:.0f} s in all")
    print(short_table(Run.load(path)), flush=True)
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--seconds", type=float, default=400, help="for everything")
    parser.add_argument(
        "--phases", type=_phases, default=list(PHASES), help=f"some of {','.join(PHASES)}"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--name", help="records go to gpu-NAME.jsonl; the day by default")
    parser.add_argument("--again", action="store_true", help="add to the records that are there")
    return parser.parse_args(arguments)


def _phases(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in PHASES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no phase {', '.join(unknown)}; {', '.join(PHASES)}")
    return names


def _work(path: Path, phases: list[str], seconds: float, options: argparse.Namespace) -> None:
    """One worker, killed where a phase goes far beyond its limit."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.worker",
        str(path),
        ",".join(phases),
        f"{seconds:.1f}",
    ]
    command += ["--dtype", options.dtype] + ["--dry"] * options.dry
    # Without a GPU kernels are interpreted, which Triton must know when it is imported.
    interpreted = {"TRITON_INTERPRET": "1"} if options.dry else {}
    worker = subprocess.Popen(command, env={**os.environ, **interpreted})
    end = time.monotonic() + seconds
    while worker.poll() is None:
        time.sleep(0.2)
        if time.monotonic() > min(end + LAST_GRACE, _limit(path, phases) + GRACE):
            worker.kill()
            worker.wait()


_seen: dict[str, float] = {}


def _limit(path: Path, phases: list[str]) -> float:
    """When the phase at hand should end, by the clock of this process."""
    now = time.monotonic()
    last = {r["phase"]: r for r in Run.load(path).of("phase")}
    for name in phases:
        record = last.get(name)
        if record is not None and record["status"] == "begun":
            return _seen.setdefault(f"{name} {record['limit']}", now) + record["limit"]
    return now + GRACE


def _remaining(
    path: Path, writer: Writer, waiting: list[str], attempts: dict[str, int]
) -> list[str]:
    """Phases still to be run after a worker has ended."""
    last = Run.load(path).phases()
    unsettled = (None, "begun", "crashed")
    open_phases = [name for name in waiting if last.get(name, {}).get("status") in unsettled]
    if not open_phases:
        return []
    first = open_phases[0]
    attempts[first] += 1
    if first not in last or last[first]["status"] == "begun":
        writer.write("phase", phase=first, status="crashed", reason="its process ended or hung")
    return open_phases[1:] if attempts[first] >= ATTEMPTS else open_phases


if __name__ == "__main__":
    sys.exit(main())
