"""The figures of the study, drawn from its records."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import pages
from benchmarks.training.layers import parsed
from benchmarks.training.results import KINDS, Contestant
from benchmarks.training.tasks import COSTS, Task

# Okabe and Ito's colours, told apart by colour-blind readers too. A family is a kind of layer, and
# for CP an order, in a model of the usual size; what differs in size is a family besides.
STYLES = {
    "dense": ("#000000", "s"),
    "low rank": ("#E69F00", "D"),
    "CP, order 1": ("#999999", "o"),
    "CP, order 2": ("#56B4E9", "o"),
    "CP, order 3": ("#0072B2", "o"),
    "CP, order 3, another size": ("#0072B2", "*"),
    "paired modes": ("#882255", "P"),
    "Monarch": ("#009E73", "<"),
    "CP, tltorch": ("#CC79A7", "^"),
    "Tucker, tltorch": ("#D55E00", "v"),
    "block TT, tltorch": ("#F0E442", "X"),
}
AXES = {
    "block parameters": ("parameters of the blocks", 1.0),
    "step time": ("training step, ms", 1e3),
    "FLOPs": ("MFLOP a training step", 1e-6),
    "state": ("MB of weights, gradients and optimizer state", 1e-6),
}
README_FAMILIES = (
    "dense",
    "low rank",
    "CP, order 1",
    "CP, order 2",
    "CP, order 3",
    "CP, order 3, another size",
)


def save_figures(tasks: Sequence[Task], folder: Path) -> list[Path]:
    """Draw a figure for each task, and the README's of the first one."""
    drawings: dict[str, Any] = {
        f"training-{task.name}": partial(_losses, task, tuple(AXES), tuple(STYLES))
        for task in tasks
    }
    drawings["training-readme"] = partial(
        _losses, tasks[0], ("block parameters", "step time"), README_FAMILIES
    )
    return pages.save_figures(drawings, folder, "svg")


def _family(task: Task, contestant: Contestant) -> str:
    kind, options = parsed(contestant.layer)
    if kind != "cp":
        return KINDS[kind]
    usual = (contestant.width, contestant.blocks) == (task.dense.width, task.dense.blocks)
    return f"CP, order {options['o']}" + ("" if usual else ", another size")


def _losses(task: Task, costs: Sequence[str], families: Sequence[str]) -> Any:
    """Held-out loss over each cost, a panel each, with its deviation over the seeds."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    columns = 2
    rows = -(-len(costs) // columns)
    # Short enough to stand side by side: 500k, 1M, 2M; but 0.2 of a megabyte is 0.2.
    short = EngFormatter(sep="")
    ticks = FuncFormatter(lambda value, _: short(value) if value >= 1 else f"{value:g}")
    figure = pages.figure(9.6, 3.3 * rows + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for ax, cost in zip(panels, costs, strict=True):
        label, scale = AXES[cost]
        for family in families:
            colour, marker = STYLES[family]
            points = sorted(
                (its * scale, c.best.mean, c.best.spread)
                for c in task.contestants
                if _family(task, c) == family and (its := COSTS[cost](c)) is not None
            )
            if points:
                x, y, spread = zip(*points, strict=True)
                joined = "none" if "another" in family else "-"
                ax.errorbar(
                    x,
                    y,
                    yerr=spread,
                    color=colour,
                    marker=marker,
                    linestyle=joined,
                    label=family,
                    markersize=9 if marker == "*" else 5,
                    linewidth=1,
                    capsize=2,
                )
        ax.axhline(task.dense.best.mean, color="#000000", linewidth=0.6, linestyle=":")
        ax.set(xscale="log", xlabel=label)
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.xaxis.set_major_formatter(ticks)
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(color="#e4e4e4", linewidth=0.6)
    for ax in panels[::columns]:
        ax.set_ylabel("held-out loss, nats")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=4, loc="outside lower center")
    return figure
