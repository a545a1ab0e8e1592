"""Command line of the study: ``python -m benchmarks.study``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.study import digits, minilm, rates, report


def tell(line: str) -> None:
    """Print a line at once, also into a file."""
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one experiment, or renew the page from the stored records."""
    parser = argparse.ArgumentParser("python -m benchmarks.study", description=__doc__)
    parser.add_argument("what", choices=("minilm", "rates", "digits", "report"))
    parser.add_argument("--quick", action="store_true", help="a minute of it; to other records")
    parser.add_argument("--only", nargs="*", metavar="METHOD", help="some methods, by their keys")
    parser.add_argument("--out", type=Path, default=None, help="folder of the records")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where report writes")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    out = given.out or Path("polyadic-study" if given.quick else "benchmarks/results")
    torch.set_num_threads(given.threads)
    try:
        if given.what == "report":
            for path in report.write_report(out, given.docs, given.docs / "guide.md"):
                print(path)
        elif given.what == "minilm":
            options = minilm.Options.quick() if given.quick else minilm.Options()
            print(minilm.run(options, out, given.only, tell))
        elif given.what == "rates":
            by_rate = rates.Options.quick() if given.quick else rates.Options()
            print(rates.run(by_rate, out, given.only, tell))
        else:
            print(
                digits.run(digits.Options.short() if given.quick else digits.Options(), out, tell)
            )
    except ModuleNotFoundError as error:
        sys.exit(f"benchmarks.study: {error}; pip install -e '.[benchmarks]'")
    except (ImportError, ValueError) as error:
        sys.exit(f"benchmarks.study: {error}")


if __name__ == "__main__":
    main()
