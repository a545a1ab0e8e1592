"""Train CP and dense networks on text and on digits, print tables and write a report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 if files cannot be written, 1 if a package is missing."""
    parser = argparse.ArgumentParser("python -m examples.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("polyadic-demo"), help="where files go")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same result")
    parser.add_argument("--quick", action="store_true", help="a few steps of each model")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; 1 by default")
    given = parser.parse_args(arguments)
    if given.seed < 0 or given.threads < 1:
        parser.error("--seed must be at least 0 and --threads at least 1")
    try:
        run(given.out, given.seed, given.quick, given.threads)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        sys.exit(f"{parser.prog}: {error}; pip install -e '.[examples]'")


def run(out: Path, seed: int = 0, quick: bool = False, threads: int = 1) -> None:
    """Compare the models, print the tables, and write report.html and results.json.

    Trainings are kept in ``out/unfinished`` until all is written: a run that was stopped goes on.
    """
    from rich.console import Console
    from rich.progress import Progress

    from examples.demo import language, models, report, training
    from polyadic.durable.files import check_regular, drafts, write_text
    from polyadic.durable.pieces import Pieces
    from polyadic.testing import environment

    out.mkdir(parents=True, exist_ok=True)
    for file in (out / "report.html", out / "results.json"):
        # What cannot be written fails now rather than when the work is done.
        if file.exists():
            check_regular(file)
        with drafts(file):
            pass
    start, console = time.perf_counter(), Console()
    torch.set_num_threads(threads)
    settings = training.Settings.quick(seed) if quick else training.Settings(seed)
    digits, contestants = training.load(), models.contestants(quick=quick)
    asked = {**vars(settings), "threads": threads, "torch": torch.__version__}
    pieces = Pieces(out / "unfinished", "polyadic.demo", asked, resume=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        trainings = len(language.CONTESTANTS) + settings.runs * len(contestants)
        task = bar.add_task("", total=trainings, completed=-1)

        def tell(what: str) -> None:
            bar.update(task, description=f"{what:<32}", advance=1)
            if not console.is_terminal:
                console.print(what)

        texts = language.compare(seed, quick, tell, pieces)
        grouped, trained = training.compare(contestants, digits, settings, tell, pieces)
        bar.update(task, advance=1)

    layer = trained[models.Contestant("MLP", "cp", 256, 16)].get_submodule("1")
    drawn = report.figures(texts, grouped, layer)
    where, images = environment(("polyadic", "scikit-learn")), [*map(len, digits[1::2])]
    where |= where.pop("versions")
    page = report.html(texts, grouped, settings, images, where, drawn)
    write_text(out / "report.html", page)
    results = [r._asdict() for members in grouped.values() for r in members]
    record = {
        "settings": vars(settings),
        "environment": where,
        "models": results,
        "language": [dataclasses.asdict(one) for one in texts],
    }
    write_text(out / "results.json", json.dumps(record, indent=1) + "\n")
    shutil.rmtree(out / "unfinished")
    console.print(language.verdict(texts), report.digits_verdict(grouped), sep="\n\n")
    console.print(report.language_table(texts))
    console.print(report.table(grouped))
    if quick:
        console.print("A quick run: too short for the accuracies to mean much.")
    seconds = time.perf_counter() - start
    said = f"{seconds:.0f} s, {threads} thread(s). Report: {out / 'report.html'}"
    console.print(said, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
