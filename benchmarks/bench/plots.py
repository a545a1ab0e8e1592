"""The figures, drawn from records: ratio per cell, roofline, and growth with B, R and size."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import pages
from benchmarks.bench.stored import Run, fastest
from benchmarks.bench.summary import exponent, scaling

# Okabe and Ito's colours, told apart by colour-blind readers too.
STYLES = {
    "polyadic": ("#0072B2", "o"),
    "best forced plan": ("#56B4E9", "|"),
    "dense": ("#000000", "s"),
    "tltorch factorized": ("#D55E00", "^"),
    "einsum": ("#CC79A7", "v"),
    "reference": ("#009E73", "D"),
}


def save_figures(run: Run, folder: Path, device: str) -> list[Path]:
    """Draw every figure the records have data for, with the fewest threads measured.

    Args:
        run: the records.
        folder: where the PNG files go; made where it is missing.
        device: part of the files' names.

    Raises:
        ImportError: matplotlib is not installed.
    """
    threads = min(run.machines)
    drawings = {"ratios": _ratios, "roofline": _roofline, "scaling": _scaling}
    named = {f"benchmark-{name}-{device}": partial(d, run, threads) for name, d in drawings.items()}
    return pages.save_figures(named, folder)


def _ratios(run: Run, threads: int) -> Any:
    """Time over ours, a row per cell and a dot per contestant; ours is the line at 1."""
    layers = {layer: run.keys("training", threads, layer=layer) for layer in ("linear", "conv")}
    layers = {layer: keys for layer, keys in layers.items() if keys}
    if not layers:
        return None
    rows = sum(map(len, layers.values()))
    figure = pages.figure(8.6, 1.6 + 0.235 * rows)
    heights = [len(keys) for keys in layers.values()]
    axes = figure.subplots(len(layers), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for ax, (layer, keys) in zip(axes, layers.items(), strict=True):
        for name, (colour, marker) in list(STYLES.items())[1:]:
            points = []
            for i, key in enumerate(keys):
                ours = run.seconds(key, "polyadic")
                best = fastest(run.plans(key))
                theirs = run.seconds(key, name)
                if name == "best forced plan":
                    theirs = best["median"] if best else None
                if ours and theirs:
                    points.append((theirs / ours, i))
            if points:
                size, line = (90, 1.6) if marker == "|" else (26, 0)
                ax.scatter(
                    *zip(*points, strict=True),
                    s=size,
                    c=colour,
                    marker=marker,
                    label=name,
                    linewidths=line,
                    zorder=3,
                )
        ax.axvline(1, color=STYLES["polyadic"][0], linewidth=1.4, zorder=2, label="polyadic")
        ax.set(xscale="log", ylim=(len(keys) - 0.4, -0.6))
        ax.set_yticks(range(len(keys)), [run.cells[key.cell]["title"] for key in keys])
        ax.set_title(layer, loc="left", fontweight="bold")
        ax.grid(axis="both", color="#dddddd", linewidth=0.6, zorder=0)
        ax.tick_params(axis="y", length=0)
        _plain_ratio_ticks(ax)
    axes[-1].set_xlabel("time over polyadic's, forward and backward (right of the line: slower)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.get_layout_engine().set(w_pad=0.12)
    figure.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False)
    return figure


def _plain_ratio_ticks(ax: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _roofline(run: Run, threads: int) -> Any:
    """FLOP/s reached over FLOPs per least byte, under the machine's measured roof."""
    keys = run.keys("training", threads)
    machine = run.machines[threads]
    if not keys:
        return None
    figure = pages.figure(7.2, 4.4)
    ax = figure.subplots()
    peak = machine["flops"] / 1e9
    slow = machine["bandwidth"][-1][1] / 1e9
    fast = max(rate for _, rate in machine["bandwidth"]) / 1e9
    points: dict[str, list[tuple[float, float]]] = {}
    for key in keys:
        work, ours = run.floor(key, "factorized"), run.seconds(key, "polyadic")
        if ours:
            reached = work["flops"] / ours / 1e9
            layer = run.cells[key.cell]["layer"]
            points.setdefault(layer, []).append((work["flops"] / work["bytes"], reached))
    every = [x for cells in points.values() for x, _ in cells]
    low, high = min(every, default=1) / 2, max(*every, 2 * peak / slow) * 1.6
    for rate, text, style in ((slow, "memory", "--"), (fast, "cache", ":")):
        ax.plot(
            [low, peak / rate, high],
            [low * rate, peak, peak],
            style,
            color="#555555",
            linewidth=1.2,
            label=f"roof, copy from {text} {rate:.0f} GB/s",
        )
    for layer, colour, marker in (("linear", "#0072B2", "o"), ("conv", "#D55E00", "^")):
        if layer in points:
            ax.scatter(
                *zip(*points[layer], strict=True),
                s=34,
                c=colour,
                marker=marker,
                zorder=3,
                label=f"polyadic, {layer}",
                edgecolors="white",
                linewidths=0.5,
            )
    ax.annotate(
        f"best GEMM {peak:.0f} GFLOP/s",
        (high, peak),
        (-4, 5),
        ha="right",
        textcoords="offset points",
        color="#555555",
    )
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(None, peak * 2))
    ax.set_xlabel("FLOPs of the cheapest route per least byte moved")
    ax.set_ylabel("GFLOP/s reached, forward and backward")
    ax.grid(color="#e4e4e4", linewidth=0.6, zorder=0)
    ax.legend(frameon=False, loc="lower right")
    return figure


def _scaling(run: Run, threads: int) -> Any:
    """Training time over B, R and M + N, with fitted exponents."""
    sweeps = scaling(run, "training", threads)
    if not all(len(points) >= 3 for points in sweeps.values()):
        return None
    figure = pages.figure(9.6, 3.5)
    axes = figure.subplots(1, 3, sharey=True)
    for ax, (axis, points) in zip(axes, sweeps.items(), strict=True):
        for name in ("polyadic", "dense", "tltorch factorized"):
            pairs = [(size, times[name]) for size, times in points if name in times]
            if len(pairs) < 3:
                continue
            colour, marker = STYLES[name]
            # Added to 0.0, what rounds to zero has no minus sign.
            label = f"{name}, power {round(exponent(pairs), 2) + 0.0:.2f}"
            sizes, times = zip(*pairs, strict=True)
            ax.plot(
                sizes,
                [t * 1e3 for t in times],
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.3,
                label=label,
            )
        ax.set(xscale="log", yscale="log", xlabel=axis)
        ax.set_xticks([size for size, _ in points], [f"{size:g}" for size, _ in points])
        ax.minorticks_off()
        ax.margins(x=0.09)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.grid(color="#e4e4e4", linewidth=0.6)
        ax.legend(frameon=False, fontsize=7.5, loc="upper left")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low, high * 4)
    axes[0].set_ylabel("ms, forward and backward")
    return figure
