"""Command line of the study: ``python -m benchmarks.training``."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from benchmarks.study.store import Store
from benchmarks.training import jobs, texts
from benchmarks.training.run import run_all

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main() -> None:
    """Make the runs; stop at any time and start again to go on."""
    parser = argparse.ArgumentParser(
        description="Train dense, low-rank and CP models side by side."
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--seconds", type=float, help="start no run after so long")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="bytes of a sequence")
    parser.add_argument("--sequences", type=int, default=16, help="sequences of a step")
    parser.add_argument("--task", choices=("language", "digits"), default="language")
    parser.add_argument("--contestants", type=int, help="so many of them, the most telling first")
    given = parser.parse_args()
    settings = {
        "task": given.task,
        "steps": given.steps,
        "length": given.length,
        "sequences": given.sequences,
        "device": given.device,
        "gpu": torch.cuda.get_device_name() if given.device == "cuda" else None,
        "texts": texts.standard_library().digest if given.task == "language" else None,
    }
    entries = (
        jobs.language_entries(given.width, given.blocks)
        if given.task == "language"
        else jobs.digits_entries(64)
    )
    first = entries[0]
    common = jobs.Job(
        given.task, first.layer, first.width, first.blocks, first.rates[0], first.groups,
        jobs.SEEDS[0], given.steps, given.length, given.sequences,
    )  # fmt: skip
    store = Store(given.out / f"training-{given.device}-{given.task}.jsonl", settings)
    checkpoints = given.out / "training-checkpoints" if given.device == "cpu" else None
    if checkpoints is not None:
        checkpoints.mkdir(parents=True, exist_ok=True)
    run_all(
        partial(jobs.due, entries[: given.contestants], common),
        store,
        device=given.device,
        workers=given.workers,
        seconds=given.seconds,
        checkpoints=checkpoints,
        tell=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    main()
