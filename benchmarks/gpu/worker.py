"""Runs phases in one process, so that torch and the GPU are started once; see ``__main__``."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.bench import Bench, LostDeviceError, said
from benchmarks.gpu.phases import PHASES, Phase
from benchmarks.gpu.records import Writer

# What this process returns where another must go on, and where none can.
LOST, RENEWED, NO_DEVICE = 17, 18, 19


def main(arguments: list[str]) -> int:
    """Run the phases named; returns LOST or RENEWED where another process must go on.

    Without a GPU it returns NO_DEVICE.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.worker")
    parser.add_argument("records", type=Path)
    parser.add_argument("phases")
    parser.add_argument("seconds", type=float, help="until everything must have ended")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    device = torch.device("cpu" if options.dry else "cuda")
    if not options.dry and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device; --dry tries the script without one")
        return NO_DEVICE
    if options.dry:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    bench = Bench(device, getattr(torch, options.dtype), Writer(options.records), options.dry)
    # What was imported is no garbage, and is not to be searched at every collection.
    gc.collect()
    gc.freeze()
    waiting = [PHASES[name] for name in options.phases.split(",")]
    while waiting:
        phase = waiting.pop(0)
        share = phase.seconds / sum(p.seconds for p in [phase, *waiting])
        limit = max(min(phase.seconds, end - time.monotonic()), share * (end - time.monotonic()))
        if not run(bench, phase, limit, end):
            return LOST
        if phase.renews and waiting and not bench.dry:
            return RENEWED
    return 0


def run(bench: Bench, phase: Phase, limit: float, end: float) -> bool:
    """One phase within its limit, its outcome recorded; False where the GPU is lost."""
    start = time.monotonic()
    left = end - start
    if left < 1:
        bench.writer.write("phase", phase=phase.name, status="skipped", reason="no time was left")
        return True
    bench.phase, bench.deadline = phase.name, start + min(limit, left)
    bench.writer.write("phase", phase=phase.name, status="begun", limit=bench.deadline - start)
    status, reason, lost = "done", "", False
    try:
        phase.load()(bench)
        bench.timer.synchronize()
    except TimeoutError as error:
        status, reason = "out of time", str(error)
    except LostDeviceError as error:
        status, reason, lost = "crashed", said(error), True
    except Exception as error:
        status, reason = "failed", said(error)
    if status == "failed":
        try:
            bench.recover()
        except LostDeviceError as error:
            status, reason, lost = "crashed", f"{reason}; then {said(error)}", True
    seconds = time.monotonic() - start
    bench.writer.write("phase", phase=phase.name, status=status, seconds=seconds, reason=reason)
    print(f"{phase.name}: {status}, {seconds:.1f} s {reason}", flush=True)
    return not lost


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    # A lost context, or graphs that outlive it, must not turn the end of the process into a crash.
    os._exit(code)
