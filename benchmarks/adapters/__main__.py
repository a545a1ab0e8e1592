"""Command line: ``python -m benchmarks.adapters``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.adapters import finetune, layers, report


def tell(line: str) -> None:
    """Print a line at once, also into a file."""
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one experiment, or renew the page from the stored records."""
    tasks = {task.key: task for task in report.TASKS}
    parser = argparse.ArgumentParser("python -m benchmarks.adapters", description=__doc__)
    parser.add_argument("what", choices=("layers", *tasks, "page"))
    parser.add_argument("--quick", action="store_true", help="a minute of it; to other records")
    parser.add_argument("--only", nargs="*", metavar="ADAPTER", help="some adapters, by their keys")
    parser.add_argument("--out", type=Path, default=None, help="folder of the records")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where page writes")
    given = parser.parse_args(arguments)
    out = given.out or Path("polyadic-adapters" if given.quick else "benchmarks/results")
    torch.set_num_threads(1)
    try:
        if given.what == "page":
            print(report.write(out, given.docs / "adapters.md"))
        elif given.what == "layers":
            chosen = layers.Options.quick() if given.quick else layers.Options()
            print(layers.run(chosen, out, given.only, tell))
        else:
            task = tasks[given.what]
            options = task.options.quick() if given.quick else task.options
            print(finetune.run(task, options, out, given.only, tell))
    except (ImportError, ValueError) as error:
        sys.exit(f"benchmarks.adapters: {error}")


if __name__ == "__main__":
    main()
