"""Show a run on the terminal: who wins where, and how the criteria stand."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from benchmarks.bench.cases import MODES
from benchmarks.bench.plans import short_name
from benchmarks.bench.stored import Run, fastest
from benchmarks.bench.summary import criteria
from benchmarks.pages import three_digits

SHOWN = ("polyadic", "dense", "tltorch factorized", "reference")
COLOURS = {"met": "green", "missed": "red", "not measured": "dim"}


def show(run: Run, console: Console) -> None:
    """Print a table of times for each mode and thread count, then the criteria with misses."""
    for threads in run.machines:
        for mode in MODES:
            keys = run.keys(mode, threads)
            if not keys:
                continue
            table = Table(title=f"{mode}, {threads} thread(s), ms", title_justify="left")
            table.add_column("cell")
            for name in SHOWN:
                table.add_column(name, justify="right")
            table.add_column("best plan")
            for key in keys:
                best = fastest(run.plans(key))
                plan = "-"
                if best is not None:
                    plan = f"{three_digits(best['median'] * 1e3)} {short_name(best['contestant'])}"
                times = [run.seconds(key, name) for name in SHOWN]
                cells = ["-" if t is None else three_digits(t * 1e3) for t in times]
                table.add_row(run.cells[key.cell]["title"], *cells, plan)
            console.print(table)
        for criterion in criteria(run, threads):
            colour = COLOURS[criterion.verdict]
            count = f" {criterion.met} of {criterion.of}" if criterion.of > 1 else ""
            figure = f" {criterion.value}" if criterion.value else ""
            console.print(
                f"[{colour}]{criterion.verdict}[/]{count}{figure}: {criterion.text}",
                soft_wrap=True,
                highlight=False,
            )
            for miss in criterion.misses:
                console.print(f"    {miss}", soft_wrap=True, highlight=False, markup=False)
    refused = [r for r in run.untimed if r["status"] in ("refused", "failed")]
    for record in refused:
        console.print(
            f"{record['contestant']} {record['status']} in {record['cell']}: {record['reason']}",
            soft_wrap=True,
            highlight=False,
            markup=False,
            style="red",
        )
