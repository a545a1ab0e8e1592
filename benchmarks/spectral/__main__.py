"""Run ``layers``, ``burgers`` or ``report``; ``README.md`` of the folder above says how."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.records import ROOT


def main() -> None:
    """Read the command line, and run what it names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spectral", description=__doc__)
    parser.add_argument("what", choices=["layers", "burgers", "report"])
    parser.add_argument("--out", type=Path, default=Path("polyadic-bench"))
    parser.add_argument("--only", default="*", help="cells by name; * and ? are wildcards")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each contestant of a cell")
    parser.add_argument("--threads", type=int, default=1, help="of the layers")
    parser.add_argument("--steps", type=int, default=600, help="of training in the solve")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.what == "layers":
        from benchmarks.spectral.layers import run

        run(given.out, given.only, given.seconds, given.threads)
    elif given.what == "burgers":
        from benchmarks.spectral.burgers import run as solve

        solve(given.out, given.steps, given.seeds)
    else:
        from benchmarks.spectral.report import write

        write(given.out, ROOT / "docs" / "neuralop.md")


if __name__ == "__main__":
    main()
