"""The short table printed at the end: everything that matters within a few thousand characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.gpu.goals import ATEN, DENSE, OURS, goals
from benchmarks.gpu.records import Run
from benchmarks.records import Record

MOST = 11_500
MOST_FAILURES = 16
PAIR = "low-rank pair"
# Groups of linear cells that have lines of their own.
OTHER = ("decode", "captured", "shared")
STARTED = OTHER[1:]


def short_table(run: Run) -> str:
    """All sections, the later ones cut where they are too long."""
    sections = [
        _head,
        _goals,
        _failures,
        _rates,
        _networks,
        _captured,
        _linear,
        _others,
        _products,
        _decode,
        _profiles,
    ]
    lines: list[str] = []
    room = MOST
    for section in sections:
        for line in section(run):
            if len(line) + 1 > room:
                return "\n".join([*lines, "…"])
            lines.append(line)
            room -= len(line) + 1
    return "\n".join(lines)


def _head(run: Run) -> Iterator[str]:
    e = run.environment
    yield (
        f"== {e.get('gpu', e.get('cpu', '?'))}, torch {e.get('torch')}, "
        f"triton {e.get('versions', {}).get('triton')}, commit {e.get('commit')}"
    )
    words = [
        f"{name} {r['status']}" + (f" {r['seconds']:.0f}s" if r.get("seconds") else "")
        for name, r in run.phases().items()
    ]
    yield "phases: " + ", ".join(words)


def _goals(run: Run) -> Iterator[str]:
    yield "== goals"
    for goal in goals(run):
        count = f" {goal.met}/{goal.of}" if goal.of else ""
        yield f"{goal.verdict}{count} {goal.text}{'; worst ' + goal.worst if goal.worst else ''}"


def _failures(run: Run) -> Iterator[str]:
    """Failed checks and measurements, and notes, each in one line."""
    checks = run.of("check")
    failed = [r for r in checks if r["status"] != "passed"]
    if checks:
        yield f"== checks: {len(checks) - len(failed)} of {len(checks)} passed"
    lines = [f"{r['check']}: {r['subject']} {r['dtype']}: {r['reason']}" for r in failed]
    lines += [
        f"{r['contestant']} {r.get('mode', '')} {r.get('launch', '')} {r['status']} in "
        f"{r['cell']}: {r['reason']}"
        for r in run.of("measurement")
        if r["status"] in ("failed", "refused")
    ]
    lines += [f"note: {r['of']}: {r['text']}" for r in run.of("note")]
    yield from (line[:160] for line in lines[:MOST_FAILURES])
    if len(lines) > MOST_FAILURES:
        yield f"… and {len(lines) - MOST_FAILURES} more in the records"


def _rates(run: Run) -> Iterator[str]:
    rates = run.of("rate")
    if not rates:
        return
    yield "== rates"
    large = [r for r in rates if r["unit"] != "s"]
    yield "; ".join(
        f"{r['name']} {r['value'] / 1e9:.0f} GB/s"
        if r["unit"] == "B/s"
        else f"{r['name']} {r['value'] / 1e12:.1f} TFLOP/s"
        for r in large
    )
    small = {r["name"]: _us(r["value"]) for r in rates if r["unit"] == "s"}
    apart = "overhead: "
    yield "µs: " + "; ".join(f"{k} {v}" for k, v in small.items() if not k.startswith(apart))
    pieces = [f"{k.removeprefix(apart)} {v}" for k, v in small.items() if k.startswith(apart)]
    if pieces:
        yield "eager pieces, µs: " + "; ".join(pieces)


def _products(run: Run) -> Iterator[str]:
    """One line a size: each product's share of copy bandwidth, in per cent."""
    records = run.of("product")
    if not records:
        return
    names = list(dict.fromkeys(r["product"] for r in records))
    yield "== thin products, % of copy bandwidth: " + " | ".join(names)
    rows: dict[tuple[int, int, int], dict[str, float]] = {}
    for r in records:
        rows.setdefault((r["R"], r["d"], r["T"]), {})[r["product"]] = r["of_copy"]
    for (R, d, T), found in sorted(rows.items()):
        shares = [f"{100 * found[name]:.0f}" if name in found else "-" for name in names]
        yield f"R={R} d={d} T={T}: {' '.join(shares)}"


def _linear(run: Run) -> Iterator[str]:
    who = (OURS, ATEN, PAIR, DENSE)
    cells = [c for c in run.cells.values() if c["layer"] == "linear" and c["group"] not in OTHER]
    if not cells:
        return
    yield (
        "== linear, µs (ours, no kernels, pair, dense): step in a graph | × dense, × byte floor | "
        "eager step | forward in a graph | eager"
    )
    for cell in cells:
        name = cell["cell"]
        graph = _times(run, name, "training", "graph", who)
        ours, dense = (run.seconds(name, "training", "graph", w) for w in (OURS, DENSE))
        ratios = ""
        if ours:
            floor = run.floor(name, "training")["byte_seconds"]
            ratios = f"{f'{dense / ours:.1f}' if dense else '-'} {ours / floor:.2f}"
        extra = "" if cell["group"] == "linear" else f" [{cell['group']}{_plans(run, name)}]"
        yield (
            f"{cell['title']}: {graph} | {ratios} | {_times(run, name, 'training', 'eager', who)}"
            f" | {_times(run, name, 'forward', 'graph', who)}"
            f" | {_times(run, name, 'forward', 'eager', who)}{extra}"
        )


def _plans(run: Run, cell: str) -> str:
    timed = run.timed(cell, "training", "graph")
    return "".join(
        f"; {name.removeprefix('plan ')} {_us(r['median'])}"
        for name, r in timed.items()
        if r["family"] == "plan" or "bias" in name
    )


def _decode(run: Run) -> Iterator[str]:
    who = (OURS, "polyadic, frozen", ATEN, PAIR, DENSE)
    cells = [c for c in run.cells.values() if c["group"] == "decode"]
    if cells:
        yield "== few rows, µs (ours, frozen, no kernels, pair, dense): in a graph | eager"
    for cell in cells:
        graph, eager = (
            _times(run, cell["cell"], "forward", how, who) for how in ("graph", "eager")
        )
        yield f"{cell['title']}: {graph} | {eager}"


def _captured(run: Run) -> Iterator[str]:
    for cell in run.cells.values():
        if cell["group"] not in STARTED:
            continue
        timed = run.timed(cell["cell"], "training", "eager")
        words = [f"{who} {_us(r['median'])}" for who, r in timed.items()]
        yield f"== {cell['title']}, step called eagerly, µs: {'; '.join(words)}"


def _others(run: Run) -> Iterator[str]:
    who = (OURS, ATEN, DENSE)
    for layer in ("embedding", "conv"):
        cells = [c for c in run.cells.values() if c["layer"] == layer]
        if cells:
            yield (
                f"== {layer}, µs (ours, no kernels, dense): forward in a graph | eager | step in a "
                f"graph | eager | ours over byte floor: forward, step"
            )
        for cell in cells:
            name = cell["cell"]
            parts = [
                _times(run, name, mode, launch, who)
                for mode in ("forward", "training")
                for launch in ("graph", "eager")
            ]
            floors = []
            for mode in ("forward", "training"):
                ours = run.seconds(name, mode, "graph", OURS)
                floor = run.floor(name, mode)["byte_seconds"]
                floors.append(f"{ours / floor:.1f}" if ours else "-")
            yield f"{cell['title']}: {' | '.join(parts)} | {' '.join(floors)}{_plans(run, name)}"


def _networks(run: Run) -> Iterator[str]:
    for cell in run.cells.values():
        if cell["layer"] != "network":
            continue
        words = []
        for launch in ("eager", "graph", "compiled"):
            for who, r in run.timed(cell["cell"], "training", launch).items():
                words.append(f"{who} {launch} {1e3 * r['median']:.1f} ms{_gigabytes(r)}")
        if words:
            yield f"== {cell['title']}: {'; '.join(words)}"


def _profiles(run: Run) -> Iterator[str]:
    """How many kernels a call starts, and the three that take longest."""
    records = run.of("profile")
    if records:
        yield "== kernels a call: how many, µs of all; the longest"
    for r in records:
        longest = "; ".join(f"{name[:40]} {n:g}× {t:.1f}" for name, n, t in r["kernels"][:3])
        yield f"{r['of']}: {r['launches']:g}, {r['microseconds']:.1f}; {longest}"


def _gigabytes(record: Record) -> str:
    peak = record.get("peak_bytes")
    return f" {peak / 2**30:.1f} GiB" if peak else ""


def _times(run: Run, cell: str, mode: str, launch: str, who: Sequence[str]) -> str:
    values = [run.seconds(cell, mode, launch, name) for name in who]
    return " ".join("-" if v is None else _us(v) for v in values)


def _us(seconds: float) -> str:
    value = 1e6 * seconds
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}"
