"""Train CP and dense networks on real digits, print a table and write a report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.digits.run import run_demo


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 after a wrong argument, with 1 if a package is missing."""
    parser = argparse.ArgumentParser("python -m examples.digits", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("polyadic-demo"), help="folder of the report and the plots"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same result")
    parser.add_argument("--quick", action="store_true", help="a few steps of each model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 by default")
    given = parser.parse_args(arguments)
    try:
        run_demo(given.out, given.seed, given.quick, given.threads)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
