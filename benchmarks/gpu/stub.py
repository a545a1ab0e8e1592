"""``python -m benchmarks.gpu.stub --out FILE``: what a processor spends on a warm step, no GPU.

Each tree (``--tree NAME=DIR``, this one by default) is measured in a process of its own, and all in
turns, so that a slow minute of the machine disturbs all alike. ``stubbed`` says what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.stubbed import CASES
from benchmarks.records import ROOT, append, environment, spread

CALLS = 30


def measure(
    case: str, trees: dict[str, Path], rounds: int, calls: int = CALLS
) -> list[dict[str, Any]]:
    """Return a record of each tree and pass of a case; a tree that cannot do it has none."""
    samples: dict[str, list[dict[str, float]]] = {}
    starts = {}
    with ExitStack() as stack:
        running = {}
        for name, tree in trees.items():
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.stubbed", case],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": f"{tree / 'src'}", "OMP_NUM_THREADS": "1"},
                )
            )
            line = _answer(process)
            if not line:
                continue
            ready = json.loads(line)
            if not Path(ready["from"]).is_relative_to(tree):
                raise RuntimeError(f"{tree} was to be measured, and {ready['from']} is imported")
            running[name], starts[name], samples[name] = process, ready["starts"], []
        for _ in range(rounds):
            for name, process in running.items():
                samples[name].append(json.loads(_answer(process, f"{calls}\n")))
        for process in running.values():
            process.communicate()
    return [
        {
            "kind": "stub",
            "case": case,
            "tree": name,
            "pass": what,
            "starts_of_a_step": starts[name],
            **spread([sample[what] for sample in taken]),
        }
        for name, taken in samples.items()
        for what in taken[0]
    ]


def _answer(process: subprocess.Popen[str], question: str = "") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    if question:
        process.stdin.write(question)
        process.stdin.flush()
    return process.stdout.readline()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every case and append the records to a file."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.stub", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file of the records")
    parser.add_argument("--tree", action="append", default=[], help="NAME=DIR of a checkout")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args(argv)
    named = [tree.partition("=") for tree in options.tree or [f"this={ROOT}"]]
    trees = {name: Path(folder).resolve() for name, _, folder in named}
    append(options.out, environment(torch.device("cpu"), torch.float32))
    for case in CASES:
        for record in measure(case, trees, options.rounds):
            append(options.out, record)
            print(
                f"{case}, {record['pass']}, {record['tree']}: {1e6 * record['median']:.0f} µs "
                f"(least {1e6 * record['min']:.0f})"
            )


if __name__ == "__main__":
    main()
