"""Time layers side by side; ``README.md`` of the folder above says how."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.spectral.layers import run


def main() -> None:
    """Read the command line, and run what it names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spectral", description=__doc__)
    parser.add_argument("what", choices=["layers"])
    parser.add_argument("--out", type=Path, default=Path("polyadic-bench"))
    parser.add_argument("--only", default="*", help="cells by name; * and ? are wildcards")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each contestant of a cell")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    run(given.out, given.only, given.seconds)


if __name__ == "__main__":
    main()
