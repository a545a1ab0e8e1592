"""Command line of the study: ``python -m benchmarks.training``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.store import Store
from benchmarks.training import costs, jobs, report, tasks, texts
from benchmarks.training.results import title
from benchmarks.training.run import run_all

ROOT = Path(__file__).resolve().parents[2]
STEPS = {"language": 2000, "digits": 300, "mnist": 300}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, time the steps, or renew the page from the stored records."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.training",
        description="Train dense, low-rank and CP models side by side. A run may be stopped at any "
        "time; started again, it goes on.",
    )
    parser.add_argument("what", nargs="?", choices=("train", "time", "report"), default="train")
    parser.add_argument("--out", type=Path, help="folder of the records")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where report writes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--seconds", type=float, help="start no run after so long")
    parser.add_argument("--steps", type=int, help="of each run")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--length", type=int, default=64, help="bytes of a sequence")
    parser.add_argument("--sequences", type=int, default=8, help="sequences of a step")
    parser.add_argument("--task", choices=tuple(STEPS), default="language")
    parser.add_argument("--contestants", type=int, help="so many of them, the most telling first")
    given = parser.parse_args(arguments)
    out = given.out or ROOT / "benchmarks" / "results"
    if given.what == "report":
        for path in report.write_report(out, given.docs, given.docs.parent / "README.md"):
            print(path)
        return
    entries = (
        jobs.language_entries(given.width, given.blocks)
        if given.task == "language"
        else jobs.images_entries(64)
    )[: given.contestants]
    common = jobs.common(
        given.task, given.steps or STEPS[given.task], given.length, given.sequences
    )
    settings = {
        "task": common.task,
        "steps": common.steps,
        "length": common.length,
        "sequences": common.sequences,
        "device": given.device,
        "gpu": torch.cuda.get_device_name() if given.device == "cuda" else None,
        "texts": texts.standard_library().digest if given.task == "language" else None,
    }
    if given.what == "time":
        _time(entries, common, out, settings)
    else:
        _train(entries, common, out, settings, given)


def _train(
    entries: list[jobs.Entry], common: jobs.Job, out: Path, settings: dict[str, Any], given: Any
) -> None:
    store = Store(out / tasks.runs_file(given.device, common.task), settings)
    checkpoints = out / "training-checkpoints" if given.device == "cpu" else None
    if checkpoints is not None:
        checkpoints.mkdir(parents=True, exist_ok=True)
    run_all(
        partial(jobs.due, entries, common),
        store,
        device=given.device,
        workers=given.workers,
        seconds=given.seconds,
        checkpoints=checkpoints,
        tell=lambda line: print(line, flush=True),
    )


def _time(entries: list[jobs.Entry], common: jobs.Job, out: Path, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    path = out / tasks.steps_file(common.task)
    path.unlink(missing_ok=True)
    store = Store(path, settings)
    for record in costs.measure(entries, common):
        store.add(record)
        name = title(
            record["layer"],
            record["width"],
            record["blocks"],
            (entries[0].width, entries[0].blocks),
        )
        print(f"{name}: {record['seconds'] * 1e3:.1f} ms, {record['flops'] / 1e6:.0f} MFLOP")


if __name__ == "__main__":
    main()
