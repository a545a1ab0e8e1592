"""Time our layers against dense, other libraries and every plan; check all gradients first."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.bench import Options, run_bench
from benchmarks.bench.report import write_report
from benchmarks.bench.show import show
from benchmarks.bench.stored import Run

PROGRAM = "python -m benchmarks.bench"


def parser() -> argparse.ArgumentParser:
    """The arguments; one that is not given is left out of what is parsed."""
    made = argparse.ArgumentParser(
        PROGRAM, description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    run = made.add_argument_group("a run")
    run.add_argument("--quick", action="store_true", help="nine cells, about a minute")
    run.add_argument("--only", metavar="PATTERN", help="cells by name, or by a part of it")
    run.add_argument("--device", help="cpu (default) or cuda")
    run.add_argument("--threads", type=_counts, help="thread counts, as in 1,2; 1 by default")
    run.add_argument("--dtype", type=_dtype, help="of all tensors; float32 by default")
    run.add_argument(
        "--mode", dest="modes", type=_words, help="forward, training, or both (default)"
    )
    run.add_argument(
        "--compiled", action="store_true", help="also under torch.compile; takes far longer"
    )
    made.add_argument("--out", type=Path, help="folder of the records; polyadic-bench by default")
    pages = made.add_argument_group("the pages")
    pages.add_argument(
        "--report", action="store_true", help="measure nothing; renew the pages from the records"
    )
    pages.add_argument("--docs", type=Path, help="folder that --report writes to; docs by default")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 after a wrong argument, with 1 if a package is missing."""
    given = vars(parser().parse_args(arguments))
    out = given.pop("out", Path("polyadic-bench"))
    docs = given.pop("docs", None)
    try:
        if given.pop("report", False):
            if given:
                names = ", ".join(f"--{'mode' if name == 'modes' else name}" for name in given)
                raise ValueError(f"{names}: of a run, but --report measures nothing")
            docs = docs or Path("docs")
            for written in write_report(out, docs, docs.parent / "README.md"):
                print(written)
            return
        if docs is not None:
            raise ValueError("--docs is where --report writes to, which is not asked for")
        path = _measured(Options(**given), out)
    except (OSError, ValueError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        sys.exit(f"{PROGRAM}: {error}")
    show(Run.load(path), Console())
    print(f"records: {path}")


def _measured(options: Options, out: Path) -> Path:
    # Refreshed between cells only: a thread that draws would disturb the timings.
    with Progress(console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task("measuring the machine", total=None)

        def tell(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name, refresh=True)

        return run_bench(options, out, tell)


def _words(text: str) -> tuple[str, ...]:
    return tuple(map(str.strip, text.split(",")))


def _counts(text: str) -> tuple[int, ...]:
    if not all(word.isdecimal() for word in _words(text)):
        raise argparse.ArgumentTypeError(
            f"must be counts separated by commas, as in 1,2, got {text!r}"
        )
    return tuple(map(int, _words(text)))


def _dtype(text: str) -> torch.dtype:
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype):
        raise argparse.ArgumentTypeError(f"must be a torch dtype such as float32, got {text!r}")
    return found


if __name__ == "__main__":
    main()
