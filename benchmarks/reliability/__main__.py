"""Command line: ``python -m benchmarks.reliability``, and ``--pages`` for the page alone."""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.reliability import damage, determinism, hostile, kills, report
from benchmarks.reliability.jobs import JOBS

# Kills of each job at random moments, and reads beside a writer.
KILLS, READS = 100, 2000
# Calls of each kind of hostile input; a million in all.
CALLS = {
    "constructors": 250_000,
    "CP tensors": 350_000,
    "forwards": 100_000,
    "functions": 200_000,
    "formats, plans, ranks": 60_000,
    "conversions": 10_000,
    "initial values, problems": 10_000,
    "tuning, accelerations, saving": 3_000,
    "adapters as LoRA": 2_000,
    "whole models": 4_000,
    "rates, ranks, fits, recovery": 6_000,
    "adapters": 5_000,
    "several processes": 5_000,
    "files": 20_000,
    "command lines": 10_000,
}
PARTS = ("kills", "files", "determinism", "hostile")


def works(
    part: str, share: float, seed: int, folder: Path, chosen: Sequence[str]
) -> Iterator[Callable[[], Any]]:
    """What is done in a part, each as a function that makes its record."""
    if part == "kills":
        few = max(2, round(KILLS * share))
        for name in chosen or JOBS:
            yield functools.partial(kills.at_random_moments, name, folder, few, seed)
            most = None if share >= 1 else few
            yield functools.partial(kills.at_file_operations, name, folder, most)
    elif part == "files":
        step = max(1, round(1 / share))
        yield functools.partial(damage.flipped_model, folder / "model", step)
        yield functools.partial(damage.flipped_checkpoint, folder / "state", step)
        yield functools.partial(damage.read_beside_a_writer, folder / "read", round(READS * share))
    elif part == "determinism":
        wanted = determinism.everything()
        for way in determinism.WAYS:
            yield functools.partial(determinism.compare, way, wanted)
        yield determinism.two_threads
        yield determinism.calibrated
    else:
        for kind in chosen or CALLS:
            yield functools.partial(hostile.run, kind, round(CALLS[kind] * share), seed)


def main() -> None:
    """Do it all, one record after the other, and write the page."""
    parser = argparse.ArgumentParser("python -m benchmarks.reliability", description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of all kills, calls and reads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=PARTS, action="append", help="of the work; all of it")
    parser.add_argument("--input", choices=CALLS, action="append", help="hostile; all of it")
    parser.add_argument("--job", choices=JOBS, action="append", help="killed; all of them")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the records")
    parser.add_argument("--pages", action="store_true", help="write the page from the records")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for part in () if given.pages else given.part or PARTS:
        file = given.out / f"reliability-{part}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        environment = records.environment(torch.device("cpu"), torch.float32)
        records.append(file, {**environment, "share": given.share, "seed": given.seed})
        with tempfile.TemporaryDirectory() as folder:
            chosen = given.job if part == "kills" else given.input
            for work in works(part, given.share, given.seed, Path(folder) / "work", chosen or ()):
                began = time.perf_counter()
                record = {**work(), "seconds": time.perf_counter() - began}
                records.append(file, record)
                print(record, flush=True)
    if given.out == report.RESULTS:
        report.write()


if __name__ == "__main__":
    main()
