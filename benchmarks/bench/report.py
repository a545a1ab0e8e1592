"""Write what the stored records say: Markdown tables, their summary, and the figures.

Nothing is measured here; the same records give the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.bench.cases import MODES
from benchmarks.bench.plans import short_name
from benchmarks.bench.stored import Key, Run, fastest, geometric_mean
from benchmarks.bench.summary import Criterion, criteria
from benchmarks.pages import between, markdown_rows, three_digits
from benchmarks.records import Record
from polyadic.durable.files import write_text

MARK = "benchmark"
COLUMNS = {
    "dense": "dense",
    "tltorch factorized": "tltorch",
    "einsum": "einsum",
    "reference": "reference",
}
README_CELLS = (
    "linear_8x8x16_8x8x16_R128_B256",
    "linear_16x16x16_16x16x16_R256_B256",
    "resnet18_stage1_4x16_4x16_k3_R89_B4_S56",
)


def stored_runs(folder: Path) -> dict[str, Run]:
    """The newest whole run of each device in a folder of records.

    Raises:
        ValueError: there is none.
    """
    newest: dict[str, Path] = {}
    for path in sorted(folder.glob("*.jsonl")):
        *_, device = path.stem.split("-")
        if device in ("cpu", "cuda"):
            newest[device] = path
    if not newest:
        raise ValueError(
            f"no whole run is stored in {folder.name}; run python -m benchmarks.bench without "
            f"--quick and --only, and --out to this folder"
        )
    return {device: Run.load(path) for device, path in newest.items()}


def write_report(results: Path, docs: Path, readme: Path | None = None) -> list[Path]:
    """Bring ``docs/benchmarks.md``, the figures and the README's table up to date.

    Only what stands between the markers is replaced. A missing page is begun; a README without
    markers is left alone.

    Args:
        results: folder of the records.
        docs: folder of the page and of ``figures``.
        readme: a file with the markers of the short table.

    Returns:
        The files written.

    Raises:
        ValueError: no whole run is stored, or the page lacks its markers.
    """
    from benchmarks.bench.plots import save_figures

    runs = stored_runs(results)
    page, written = docs / "benchmarks.md", []
    text = page.read_text(encoding="utf-8") if page.exists() else _empty_page()
    sections = []
    for device, run in runs.items():
        figures = save_figures(run, docs / "figures", device)
        sections.append(section(run, [f"figures/{path.name}" for path in figures]))
        written += figures
    docs.mkdir(parents=True, exist_ok=True)
    write_text(page, between(text, MARK, "\n\n".join(sections)))
    written.append(page)
    if readme is not None and readme.exists():
        text = readme.read_text(encoding="utf-8")
        if f"<!-- {MARK}:begin -->" in text:
            short = short_table(runs.get("cpu") or next(iter(runs.values())))
            write_text(readme, between(text, MARK, short))
            written.append(readme)
    return written


def _empty_page() -> str:
    return f"# Benchmarks\n\n<!-- {MARK}:begin -->\n<!-- {MARK}:end -->\n"


def section(run: Run, figures: Sequence[str] = ()) -> str:
    """All a page says of one run."""
    parts = [f"## {_device_name(run)}", _environment(run)]
    for threads in run.machines:
        suffix = f", {threads} thread{'s' if threads > 1 else ''}" if _on_cpu(run) else ""
        parts += [f"### Criteria{suffix}", _criteria(criteria(run, threads))]
        parts += [f"### Means{suffix}", _means(run, threads)]
        for mode, title in (
            ("training", "Forward and backward"),
            ("forward", "Forward without autograd"),
        ):
            for layer in ("linear", "conv"):
                keys = run.keys(mode, threads, layer=layer)
                if keys:
                    parts += [f"### {title}, {layer}{suffix}", _table(run, keys)]
    parts += [f"![]({figure})" for figure in figures]
    if run.untimed:
        parts += ["### Not timed", f"<details>\n\n{_untimed(run)}\n\n</details>"]
    return "\n\n".join(parts)


def _on_cpu(run: Run) -> bool:
    return bool(run.environment["device"] == "cpu")


def _device_name(run: Run) -> str:
    return str(run.environment["cpu"] if _on_cpu(run) else run.environment.get("gpu", "GPU"))


def _environment(run: Run) -> str:
    e = run.environment
    versions = ", ".join(f"{name} {v}" for name, v in e["versions"].items() if v)
    lines = [
        f"{e['dtype']}, torch {e['torch']}, Python {e['python']}, {e['system']} on {e['machine']}, "
        f"{e['cores']} cores; {versions}; commit {e['commit'] or 'unknown'}; {e['date'][:10]}.",
    ]
    for threads, machine in run.machines.items():
        copies = ", ".join(
            f"{rate / 1e9:.0f} GB/s at {_bytes(size)}" for size, rate in machine["bandwidth"]
        )
        lines.append(
            f"With {threads} thread{'s' if threads > 1 else ''}: best square GEMM "
            f"{machine['flops'] / 1e9:.0f} GFLOP/s; copy {copies} read and written; the cost "
            f"model's rates are {machine['cost_model']}."
        )
    return "\n".join(lines)


def _criteria(judged: Sequence[Criterion]) -> str:
    rows = [["criterion", "met", "figure", "verdict"]]
    rows += [[c.text, f"{c.met} of {c.of}" if c.of else "-", c.value, c.verdict] for c in judged]
    text = markdown_rows(rows, "lrll")
    for c in judged:
        if c.misses:
            misses = "\n".join(f"- {miss}" for miss in c.misses)
            count = f"{len(c.misses)} {'miss' if len(c.misses) == 1 else 'misses'}"
            text += f"\n\n<details><summary>{c.text}: {count}</summary>\n\n{misses}\n\n</details>"
    return text


def _means(run: Run, threads: int) -> str:
    """Geometric means of each contestant's time over ours."""
    rows = [
        [
            "geometric mean of the time over ours",
            "linear, training",
            "linear, forward",
            "conv, training",
            "conv, forward",
        ]
    ]
    names = dict.fromkeys(
        r["contestant"]
        for timed in run.timed.values()
        for r in timed.values()
        if r["family"] not in ("ours", "plan") and r["layout"] == "given" and not r["compiled"]
    )
    columns = [(layer, mode) for layer in ("linear", "conv") for mode in reversed(MODES)]
    cells = [run.keys(mode, threads, layer=layer) for layer, mode in columns]
    rows += [[name, *(_mean(run, keys, name) for keys in cells)] for name in names]
    theirs, ours = "tltorch factorized", "tltorch factorized, accelerated"
    if ours in names:
        means = [_mean(run, keys, theirs, ours) for keys in cells]
        rows.append([f"{theirs}, over the same accelerated", *means])
    return markdown_rows(rows, "lrrrr")


def _mean(run: Run, keys: Sequence[Key], name: str, over: str = "polyadic") -> str:
    ratios = []
    for key in keys:
        ours, theirs = run.seconds(key, over), run.seconds(key, name)
        if ours is not None and theirs is not None:
            ratios.append(theirs / ours)
    return f"{geometric_mean(ratios):.2f}× ({len(ratios)})" if ratios else "-"


def _table(run: Run, keys: Sequence[Key]) -> str:
    """A row per cell: times in ms, the least bold; in training also memory."""
    training = keys[0].mode == "training"
    head = ["cell, ms", "polyadic", "best forced plan", *COLUMNS.values(), "of floor"]
    memory = ["kept (dense)", "peak (dense)"]
    rows = [head + (memory if training else [])]
    for key in keys:
        timed = run.timed[key]
        ours, best = timed.get("polyadic"), fastest(run.plans(key))
        shown = [ours, best, *(timed.get(name) for name in COLUMNS)]
        least = min((r["median"] for r in shown if r), default=0.0)
        row = [run.cells[key.cell]["title"]]
        row += [_milliseconds(record, least) for record in shown]
        if best is not None:
            same = ours is not None and best["plan"] == ours["plan"]
            row[2] += " (ours)" if same else f" {short_name(best['contestant'])}"
        row.append("-" if ours is None else _share(run, key, ours))
        if training:
            row += [_pair(timed, "kept_bytes"), _pair(timed, "peak_bytes")]
        rows.append(row)
    return markdown_rows(rows, "lrl" + "r" * (len(rows[0]) - 3))


def _share(run: Run, key: Key, ours: Record) -> str:
    return f"{100 * run.floor(key, 'factorized')['seconds'] / ours['median']:.0f} %"


def _milliseconds(record: Record | None, least: float) -> str:
    if record is None:
        return "-"
    text = three_digits(record["median"] * 1e3)
    return f"**{text}**" if record["median"] <= least else text


def _pair(timed: dict[str, Record], name: str) -> str:
    ours, dense = (
        _bytes(timed[contestant][name]) if contestant in timed else "-"
        for contestant in ("polyadic", "dense")
    )
    return f"{ours} ({dense})"


def _bytes(count: float) -> str:
    if count < 1024:
        return f"{count:.0f} B"
    unit = "KiB" if count < 2**20 else "MiB"
    count /= 2**10 if count < 2**20 else 2**20
    return f"{count:.0f} {unit}" if count >= 10 else f"{count:.1f} {unit}"


def _untimed(run: Run) -> str:
    """Who was not timed and why, the cells of one reason together."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for record in run.untimed:
        reason = record["reason"]
        if reason.startswith("would need"):
            reason = "would need more memory in one training step than it may: "
            groups.setdefault((record["contestant"], record["status"], reason), []).append(
                f"{run.cells[record['cell']]['title']} {record['reason'].split()[2]} GiB"
            )
        else:
            key = (record["contestant"], record["status"], f"{reason}: ")
            groups.setdefault(key, []).append(run.cells[record["cell"]]["title"])
    return "\n".join(
        f"- {contestant}, {status}: {reason}{'; '.join(dict.fromkeys(cells))}."
        for (contestant, status, reason), cells in groups.items()
    )


def short_table(run: Run) -> str:
    """The README's table: a few cells, forward and backward with one thread."""
    threads = min(run.machines)
    rows = [["forward and backward, ms", "polyadic", "dense", "tltorch", "reference"]]
    for cell in README_CELLS:
        timed = run.timed.get(Key(cell, "training", threads))
        if timed is None:
            continue
        shown = [timed.get(n) for n in ("polyadic", "dense", "tltorch factorized", "reference")]
        least = min((r["median"] for r in shown if r), default=0.0)
        rows.append([run.cells[cell]["title"], *(_milliseconds(r, least) for r in shown)])
    e = run.environment
    thread = f", {threads} thread{'s' if threads > 1 else ''}" if _on_cpu(run) else ""
    return (
        f"{markdown_rows(rows, 'lrrrr')}\n\n{_device_name(run)}{thread}, {e['dtype']}, torch "
        f"{e['torch']}; medians of stored records ({e['date'][:10]}). All cells, memory and who "
        f"wins where: [docs/benchmarks.md](docs/benchmarks.md)."
    )
