"""Writes what stored GPU records say into two pages; nothing is measured here.

    python -m benchmarks.gpu.report [RESULTS [DOCS]]

reads each ``gpu-*.jsonl`` in a folder, ``benchmarks/results`` by default, and replaces what stands
between markers in ``benchmarks.md`` and ``how/gpu.md`` of another, ``docs``. Of each GPU it takes a
phase from the newest run that went through it, as a run may have time for some alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.goals import ATEN, DENSE, OURS, Goal, goals
from benchmarks.gpu.records import Run
from benchmarks.gpu.table import PAIR
from benchmarks.pages import between, markdown_rows
from benchmarks.records import Record
from polyadic.durable.files import write_text

MARK, HOW = "gpu", "gpu-how"
NOTHING = (
    "No run on a GPU is stored yet. `benchmarks/gpu.sh --out benchmarks/results` makes one, and "
    "`python -m benchmarks.gpu.report` writes it here."
)
WHO = {OURS: "polyadic", ATEN: "no kernels", PAIR: "low-rank pair", DENSE: "dense"}
ROOT = Path(__file__).resolve().parents[2]


def stored_runs(folder: Path) -> list[Run]:
    """What is known of each GPU, dry runs left out; their order is that of the GPUs' names."""
    runs = [Run.load(path) for path in folder.glob("gpu-*.jsonl")]
    whole = [run for run in runs if run.environment and not run.environment.get("dry")]
    of_gpu: dict[str, list[Run]] = {}
    for run in sorted(whole, key=lambda run: str(run.environment["date"])):
        of_gpu.setdefault(str(run.environment.get("gpu", "GPU")), []).append(run)
    return [Run.joined(of_gpu[name]) for name in sorted(of_gpu)]


def pages(runs: Sequence[Run]) -> str:
    """All that the page says of GPUs."""
    return "\n\n".join(map(section, runs)) if runs else NOTHING


def write_report(results: Path, docs: Path) -> None:
    """Bring the pages up to date.

    Raises:
        ValueError: one lacks the markers.
    """
    runs = stored_runs(results)
    for page, mark, made in (
        (docs / "benchmarks.md", MARK, pages(runs)),
        (docs / "how" / "gpu.md", HOW, gains(runs)),
    ):
        text = page.read_text(encoding="utf-8")
        write_text(page, between(text, mark, made))


def gains(runs: Sequence[Run]) -> str:
    """The dense layer's time over ours, for every stored cell but those of other ranks."""
    rows = [["layer", "GPU", "forward, graph", "step, graph", "step, eager"]]
    for run in runs:
        for group in ("linear", "embedding", "conv", "decode"):
            for cell in _cells(run, group):
                # One rank of each linear layer is enough to see when it wins.
                if group in ("linear", "decode") and cell["rank"] != 64:
                    continue
                if group == "decode" and cell["x_shape"][0] > 1:
                    continue
                ratios = [
                    _ratio(timed.get(DENSE), timed.get(OURS))
                    for mode, launch in (
                        ("forward", "graph"),
                        ("training", "graph"),
                        ("training", "eager"),
                    )
                    for timed in [run.timed(cell["cell"], mode, launch)]
                ]
                gpu = str(run.environment.get("gpu", "GPU"))
                kind = "" if group in ("linear", "decode") else f"{group} "
                if any(ratio != "-" for ratio in ratios):
                    rows.append([f"{kind}{cell['title']}", gpu, *ratios])
    if len(rows) == 1:
        return NOTHING
    costs = [
        f"An eager operation took the processor beside the {run.environment.get('gpu', 'GPU')} "
        f"{1e6 * cost:.1f} µs, on which the last column depends."
        for run in runs
        for cost in [run.rate("multiplication, eager")]
        if cost is not None
    ]
    return "\n\n".join([markdown_rows(rows, "llrrr"), *costs])


def section(run: Run) -> str:
    """One run: its machine, the goals, and a table for each kind of cell."""
    parts = [
        f"## {run.environment.get('gpu', 'GPU')}",
        _environment(run),
        "### Goals",
        _goals(goals(run)),
    ]
    for title, text in (
        ("Thin products", _products(run)),
        ("Linear layers, one training step", _steps(run, "linear")),
        ("Linear layers, forward", _forwards(run)),
        ("Linear layers in float32, one training step", _steps(run, "linear_float32")),
        ("Few rows, forward", _decode(run)),
        ("One layer's step, started in other ways", _started(run, "captured")),
        ("Layers that share an input, one training step", _started(run, "shared")),
        ("Embedding", _both(run, "embedding")),
        ("Convolution, bfloat16 in channels_last", _both(run, "conv")),
        ("A whole training step of a GPT", _networks(run)),
        ("Not timed, and checks that failed", _failures(run)),
    ):
        if text:
            parts += [f"### {title}", text]
    return "\n\n".join(parts)


def _environment(run: Run) -> str:
    e = run.environment
    versions = ", ".join(f"{name} {v}" for name, v in e["versions"].items() if v)
    rates = [
        f"{name} {value / scale:.0f} {unit}"
        for name, key, scale, unit in (
            ("copy", "copy", 1e9, "GB/s"),
            ("product in bfloat16", "gemm bfloat16", 1e12, "TFLOP/s"),
            ("in float32", "gemm float32", 1e12, "TFLOP/s"),
        )
        if (value := run.rate(key))
    ]
    costs = [
        f"{name} {1e6 * value:.1f} µs"
        for name, key in (
            ("a tiny kernel in a graph", "multiplication, in a graph"),
            ("an eager operation", "multiplication, eager"),
            ("a view", "view, eager"),
        )
        if (value := run.rate(key))
    ]
    costs += [
        f"{r['name']} {1e6 * r['value']:.1f} µs"
        for r in run.of("rate")
        if r["name"].startswith("Triton") and r["name"].endswith("eager")
    ]
    return (
        f"{e['dtype']}, torch {e['torch']} with CUDA {e.get('cuda')}, Python {e['python']}; "
        f"{versions}; {_sources(run)}.\n"
        f"Measured beside them: {', '.join(rates) or 'no rates'}; {', '.join(costs)}."
    )


def _sources(run: Run) -> str:
    """Commit and day of each phase, the newest first."""
    phases: dict[str, list[str]] = {}
    sources = run.sources or dict.fromkeys(run.by_phase(), run.environment)
    for phase, e in reversed(sources.items()):
        place = f"commit {e['commit'] or 'unknown'} of {e['date'][:10]}"
        if phase not in ("", "environment"):
            phases.setdefault(place, []).append(phase)
    return "; ".join(f"{place} ({', '.join(names)})" for place, names in phases.items())


def _goals(judged: Sequence[Goal]) -> str:
    rows = [["goal", "met", "furthest from it", "verdict"]]
    rows += [[g.text, f"{g.met} of {g.of}" if g.of else "-", g.worst, g.verdict] for g in judged]
    text = markdown_rows(rows, "lrll")
    for goal in judged:
        if goal.misses:
            count = f"{len(goal.misses)} {'miss' if len(goal.misses) == 1 else 'misses'}"
            lines = "\n".join(f"- {miss}" for miss in goal.misses)
            summary = f"<details><summary>{goal.text}: {count}</summary>"
            text += f"\n\n{summary}\n\n{lines}\n\n</details>"
    text += "".join(
        f"\n\n*Next, for: {'; '.join(texts)}.* {first}" for first, texts in _first(judged).items()
    )
    return text


def _first(judged: Sequence[Goal]) -> dict[str, list[str]]:
    """What the next run is to begin with, and the missed goals that it is for."""
    found: dict[str, list[str]] = {}
    for goal in judged:
        if goal.misses and goal.first:
            found.setdefault(goal.first, []).append(goal.text)
    return found


def _products(run: Run) -> str:
    records = run.of("product")
    if not records:
        return ""
    names = list(dict.fromkeys(r["product"] for r in records))
    rows: dict[tuple[int, int, int], dict[str, float]] = {}
    for r in records:
        rows.setdefault((r["d"], r["R"], r["T"]), {})[r["product"]] = r["of_copy"]
    table = [["bytes moved over copy bandwidth", *names]]
    for (d, R, T), found in sorted(rows.items()):
        shares = [f"{100 * found[name]:.0f} %" if name in found else "-" for name in names]
        table.append([f"d={d} R={R} T={T}", *shares])
    return markdown_rows(table, "l" + "r" * len(names))


def _cells(run: Run, group: str) -> list[Record]:
    return [cell for cell in run.cells.values() if cell["group"] == group]


def _steps(run: Run, group: str) -> str:
    """Training steps: times in a graph and eagerly, ratios, peak memory."""
    cells = _cells(run, group)
    graph = [f"{name}, graph" for name in WHO.values()]
    rows = [
        [
            "cell, µs",
            *graph,
            "dense over ours",
            "ours over byte floor",
            "ours, eager",
            "dense, eager",
            "peak MiB (dense)",
        ]
    ]
    for cell in cells:
        name = cell["cell"]
        timed = run.timed(name, "training", "graph")
        eager = run.timed(name, "training", "eager")
        floor = float(run.floor(name, "training")["byte_seconds"])
        rows.append(
            [
                cell["title"],
                *(_time(timed.get(who)) for who in WHO),
                _ratio(timed.get(DENSE), timed.get(OURS)),
                _over(timed.get(OURS), floor),
                _time(eager.get(OURS)),
                _time(eager.get(DENSE)),
                f"{_mebibytes(eager.get(OURS))} ({_mebibytes(eager.get(DENSE))})",
            ]
        )
    return markdown_rows(rows, "l" + "r" * 9) if cells else ""


def _forwards(run: Run) -> str:
    return _forward_and_step_rows(run, _cells(run, "linear"), WHO)


def _decode(run: Run) -> str:
    who = {OURS: "polyadic", "polyadic, frozen": "frozen", **WHO}
    return _forward_and_step_rows(run, _cells(run, "decode"), who)


def _forward_and_step_rows(run: Run, cells: Sequence[Record], who: dict[str, str]) -> str:
    rows = [
        [
            "cell, µs",
            *(f"{name}, graph" for name in who.values()),
            "dense over ours",
            "ours, eager",
            "dense, eager",
        ]
    ]
    for cell in cells:
        timed = run.timed(cell["cell"], "forward", "graph")
        eager = run.timed(cell["cell"], "forward", "eager")
        rows.append(
            [
                cell["title"],
                *(_time(timed.get(name)) for name in who),
                _ratio(timed.get(DENSE), timed.get(OURS)),
                _time(eager.get(OURS)),
                _time(eager.get(DENSE)),
            ]
        )
    return markdown_rows(rows, "l" + "r" * (len(who) + 3)) if cells else ""


def _both(run: Run, group: str) -> str:
    """Forward and training step of every cell of a group."""
    cells = _cells(run, group)
    rows = [
        [
            "cell, µs",
            "pass",
            "polyadic, graph",
            "no kernels, graph",
            "dense, graph",
            "dense over ours",
            "ours over byte floor",
            "ours, eager",
            "dense, eager",
        ]
    ]
    for cell in cells:
        for mode in ("forward", "training"):
            timed = run.timed(cell["cell"], mode, "graph")
            eager = run.timed(cell["cell"], mode, "eager")
            floor = float(run.floor(cell["cell"], mode)["byte_seconds"])
            rows.append(
                [
                    cell["title"],
                    "forward" if mode == "forward" else "step",
                    *(_time(timed.get(who)) for who in (OURS, ATEN, DENSE)),
                    _ratio(timed.get(DENSE), timed.get(OURS)),
                    _over(timed.get(OURS), floor),
                    _time(eager.get(OURS)),
                    _time(eager.get(DENSE)),
                ]
            )
    return markdown_rows(rows, "ll" + "r" * 7) if cells else ""


def _started(run: Run, group: str) -> str:
    """Training steps of everybody in a graph and as a loop calls them."""
    rows = [["cell", "contestant", "called eagerly, µs", "in a graph, µs"]]
    for cell in _cells(run, group):
        eager, graph = (
            run.timed(cell["cell"], "training", launch) for launch in ("eager", "graph")
        )
        rows += [[cell["title"], who, _time(eager[who]), _time(graph.get(who))] for who in eager]
    return markdown_rows(rows, "llrr") if len(rows) > 1 else ""


def _networks(run: Run) -> str:
    rows = [["model", "how", "contestant", "ms", "tokens per second", "peak MiB"]]
    for cell in run.cells.values():
        if cell["layer"] != "network":
            continue
        for launch in ("eager", "graph", "compiled"):
            for name, r in run.timed(cell["cell"], "training", launch).items():
                rows.append(
                    [
                        cell["title"],
                        launch,
                        name,
                        f"{1e3 * r['median']:.1f}",
                        f"{r['tokens_per_second']:.0f}",
                        _mebibytes(r),
                    ]
                )
    return markdown_rows(rows, "lllrrr") if len(rows) > 1 else ""


def _failures(run: Run) -> str:
    """Who was not timed and why, the cells of one reason together; failed checks; broken phases."""
    groups: dict[str, list[str]] = {}
    for r in run.of("measurement"):
        if r["status"] != "timed":
            key = f"{r['contestant']}, {r['status']}: {r['reason']}"
            groups.setdefault(key, []).append(run.cells[r["cell"]]["title"])
    for r in run.of("check"):
        if r["status"] != "passed":
            key = f"{r['check']}, failed: {r['reason']}"
            groups.setdefault(key, []).append(f"{r['subject']} {r['dtype']}")
    for name, r in run.phases().items():
        if r["status"] != "done":
            groups.setdefault(f"phase {name}, {r['status']}: {r.get('reason', '')}", [])
    lines = [
        f"- {key}{' (' + '; '.join(dict.fromkeys(where)) + ')' if where else ''}"
        for key, where in groups.items()
    ]
    return "<details>\n\n" + "\n".join(lines) + "\n\n</details>" if lines else ""


def _time(record: Record | None) -> str:
    if record is None:
        return "-"
    value = 1e6 * float(record["median"])
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}"


def _ratio(theirs: Record | None, ours: Record | None) -> str:
    if theirs is None or ours is None:
        return "-"
    return f"{theirs['median'] / ours['median']:.2f}×"


def _over(record: Record | None, floor: float) -> str:
    return "-" if record is None else f"{record['median'] / floor:.2f}×"


def _mebibytes(record: Record | None) -> str:
    peak = None if record is None else record.get("peak_bytes")
    return "-" if peak is None else f"{peak / 2**20:.0f}"


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:3]]
    defaults = [ROOT / "benchmarks" / "results", ROOT / "docs"]
    write_report(*[*given, *defaults[len(given) :]])
