"""Write what the stored records of the study say: ``compression.md``, and the tour's summary.

Nothing is measured here; the same records give the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.pages import between, markdown_rows
from benchmarks.records import Record
from benchmarks.study import digits, fits, minilm, rates
from benchmarks.study.store import read
from polyadic.durable.files import write_text

MARK = "compression"
WITHIN = 0.5

_ORDER = [method.key for method in fits.METHODS]
METRICS = (("cosine", "cosine"), ("overlap", "neighbours"), ("spearman", "rank correlation"))


def write_report(results: Path, docs: Path, readme: Path | None = None) -> list[Path]:
    """Bring ``docs/compression.md`` between its markers, and its figures, up to date.

    Args:
        results: folder of the records.
        docs: folder of the page and of ``figures``.
        readme: a page that gets the summary between such markers.

    Returns:
        The files written.

    Raises:
        ValueError: no records are stored, or the page lacks its markers.
        FileNotFoundError: there is no page.
    """
    from benchmarks.study.plots import save_figures

    encoder, classifiers = load(results, minilm.FILE), load(results, digits.FILE)
    by_rate = load(results, rates.FILE)
    figures = save_figures(encoder[1], classifiers[1], docs / "figures")
    names = [f"figures/{path.name}" for path in figures]
    page = docs / "compression.md"
    text = between(
        page.read_text(encoding="utf-8"), MARK, section(encoder, by_rate, classifiers, names)
    )
    write_text(page, text)
    if readme is None:
        return [*figures, page]
    text = between(readme.read_text(encoding="utf-8"), MARK, summary(encoder[1]))
    write_text(readme, text)
    return [*figures, page, readme]


def load(results: Path, file: str) -> tuple[Record, list[Record]]:
    """The environment and the records of an experiment.

    Raises:
        ValueError: it is not stored, or holds nothing yet.
    """
    path = results / file
    if not path.exists():
        raise ValueError(f"{file} is not stored in {results.name}; run the study first")
    environment, records = read(path)
    if not records:
        raise ValueError(f"{file} holds no record yet; run the study first")
    return environment, records


def section(
    encoder: tuple[Record, Sequence[Record]],
    by_rate: tuple[Record, Sequence[Record]],
    classifiers: tuple[Record, Sequence[Record]],
    figures: Sequence[str] = (),
) -> str:
    """All that stands between the markers."""
    parts = ["## Sentence encoder", where(*encoder)]
    for ratio in sorted({record["ratio"] for record in encoder[1]}):
        rows = sorted(
            (record for record in encoder[1] if record["ratio"] == ratio),
            key=lambda record: _ORDER.index(record["method"]),
        )
        parts += [f"### Ratio {ratio:g}", encoder_table(rows)]
    parts += [f"![]({name})" for name in figures if "encoder" in name]
    parts += ["### What it shows", "\n".join(f"- {line}" for line in encoder_findings(encoder[1]))]
    parts += ["### Learning rate of the recovery", where(*by_rate), rates_table(by_rate[1])]
    parts.append("\n".join(f"- {line}" for line in rates_findings(by_rate[1])))
    parts += ["## Digits", where(*classifiers)]
    for family in dict.fromkeys(record["family"] for record in classifiers[1]):
        rows = [record for record in classifiers[1] if record["family"] == family]
        parts += [f"### {family}", digits_table(rows)]
    parts += [f"![]({name})" for name in figures if "digits" in name]
    parts.append("### What it shows there")
    parts.append("\n".join(f"- {line}" for line in digits_findings(classifiers[1])))
    return "\n\n".join(parts)


def where(environment: Record, records: Sequence[Record]) -> str:
    """Machine, versions, settings and commits."""
    versions = ", ".join(f"{n} {v}" for n, v in environment["versions"].items() if v)
    settings = ", ".join(
        f"{name} {_text(value)}"
        for name, value in environment["settings"].items()
        if not isinstance(value, (bool, dict))
    )
    commits = ", ".join(sorted({str(record["commit"]) for record in records}))
    return (
        f"{environment['cpu']}, {environment['threads']} thread, {environment['dtype']}, torch "
        f"{environment['torch']}, Python {environment['python']}; {versions}; commit {commits}; "
        f"{environment['date'][:10]}. Settings: {settings}."
    )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(f"{item:g}" for item in value)
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _metric(record: Record, part: str, key: str) -> float:
    """A metric of an encoder, converted (``before`` recovery) or recovered (``after``)."""
    value: float = record[part][key]
    return value


def encoder_table(records: Sequence[Record]) -> str:
    """A row per method at one ratio; the best of a column is bold."""
    head = ["method", "stored", "orders", "weight error", "output error"]
    head += [f"{title}, {when}" for _, title in METRICS for when in ("converted", "recovered")]
    head += ["fit, s", "recovery, s"]
    columns: list[tuple[Callable[[Record], float], bool, str]] = [
        (lambda r: fmean(r["weight_errors"]), False, ".3f"),
        (lambda r: fmean(r["output_errors"]), False, ".3f"),
    ]
    columns += [
        (partial(_metric, part=part, key=key), True, ".3f")
        for key, _ in METRICS
        for part in ("before", "after")
    ]
    columns += [
        (lambda r: r["fit_seconds"], False, ".0f"),
        (lambda r: r["recovery"]["seconds"], False, ".0f"),
    ]
    rows = [head]
    for record in records:
        row = [record["label"], f"{record['parameters']:,}", "/".join(map(str, record["orders"]))]
        for value, more_is_better, form in columns:
            values = [value(other) for other in records]
            best = max(values) if more_is_better else min(values)
            text = format(value(record), form)
            row.append(f"**{text}**" if value(record) == best and form != ".0f" else text)
        rows.append(row)
    return markdown_rows(rows, "l" + "r" * (len(head) - 1))


def summary(records: Sequence[Record]) -> str:
    """Cosine with the original's embeddings, converted and recovered, by method and ratio."""
    ratios = sorted({record["ratio"] for record in records})
    rows = [["cosine, converted → recovered", *(f"{ratio:g}× fewer" for ratio in ratios)]]
    for method in fits.METHODS:
        found = {r["ratio"]: r for r in records if r["method"] == method.key}
        if not found:
            continue
        row = [next(iter(found.values()))["label"]]
        for ratio in ratios:
            if ratio not in found:
                row.append("-")
                continue
            best = max(r["after"]["cosine"] for r in records if r["ratio"] == ratio)
            before, after = (found[ratio][part]["cosine"] for part in ("before", "after"))
            end = f"**{after:.3f}**" if after == best else f"{after:.3f}"
            row.append(f"{before:.3f} → {end}")
        rows.append(row)
    return markdown_rows(rows, "l" + "r" * len(ratios))


def encoder_findings(records: Sequence[Record]) -> list[str]:
    """Sentences about who is better where, misses included."""
    found = []
    for ratio in sorted({record["ratio"] for record in records}):
        rows = {r["method"]: r for r in records if r["ratio"] == ratio}
        for part, when in (("before", "As converted"), ("after", "After recovery")):
            ranked = sorted(rows.values(), key=lambda r: -r[part]["cosine"])
            found.append(
                f"Ratio {ratio:g}. {when}, by cosine: "
                + "; ".join(f"{r['label']} {r[part]['cosine']:.3f}" for r in ranked)
                + "."
            )
        first = next(iter(rows.values()))
        own, dense = first["model_parameters"] / 1e6, first["dense_model_parameters"] / 1e6
        found.append(
            f"Ratio {ratio:g}. The whole model, word embeddings included, has {own:.1f} million "
            f"parameters of {dense:.1f}."
        )
        absent = [m.label for m in fits.METHODS if m.key not in rows]
        if absent:
            found.append(f"Ratio {ratio:g}. Not measured: {'; '.join(absent)}.")
    found += _layers(
        records,
        "cp-data",
        "cp",
        "output_errors",
        "Data-aware CP has a smaller output error on held-out sentences than CP in the Frobenius "
        "norm",
    )
    found += _layers(
        records,
        "cp",
        "tltorch",
        "weight_errors",
        "After the same number of sweeps polyadic's CP has a smaller weight error than tltorch's",
    )
    found += _layers(
        records,
        "cp-data",
        "svd-data",
        "output_errors",
        "Data-aware CP has a smaller output error than data-aware plain low rank",
    )
    found += _layers(
        records,
        "cp",
        "svd",
        "weight_errors",
        "CP has a smaller weight error than plain low rank, both in the Frobenius norm",
    )
    return found


def _layers(records: Sequence[Record], one: str, other: str, errors: str, text: str) -> list[str]:
    """Of how many layers a statement is true, by ratio."""
    counts = []
    for ratio in sorted({record["ratio"] for record in records}):
        rows = {r["method"]: r for r in records if r["ratio"] == ratio}
        if one in rows and other in rows:
            pairs = list(zip(rows[one][errors], rows[other][errors], strict=True))
            less = sum(a < b for a, b in pairs)
            counts.append(f"{less} of {len(pairs)} layers at ratio {ratio:g}")
    return [f"{text}: {', '.join(counts)}."] if counts else []


def rates_table(records: Sequence[Record]) -> str:
    """Cosine after recovery, a row per method and a column per learning rate.

    Bold is what the validation sentences choose, which need not be the best on the held-out ones.
    """
    columns = sorted({record["lr"] for record in records})
    rows = [
        [
            "cosine, recovered",
            "root mean squares of factors",
            "converted",
            *(f"lr {lr:g}" for lr in columns),
        ]
    ]
    for label, members in _grouped(records, "label").items():
        chosen, first = rates.best(members), members[0]
        row = [
            label,
            f"{first['smallest_rms']:.2g} to {first['largest_rms']:.2g}",
            f"{first['before']['cosine']:.3f}",
        ]
        for lr in columns:
            found = [r for r in members if r["lr"] == lr]
            text = f"{found[0]['after']['cosine']:.3f}" if found else "-"
            row.append(f"**{text}**" if found and found[0] is chosen else text)
        rows.append(row)
    return markdown_rows(rows, "l" + "r" * (len(rows[0]) - 1))


def rates_findings(records: Sequence[Record]) -> list[str]:
    """Who is where with the rate that validation chooses, and what scaling alone does."""
    chosen = [rates.best(members) for members in _grouped(records, "label").values()]
    ranked = sorted(chosen, key=lambda r: -r["after"]["cosine"])
    listed = "; ".join(f"{r['label']} {r['after']['cosine']:.3f} (lr {r['lr']:g})" for r in ranked)
    found = [
        f"Ratio {chosen[0]['ratio']:g}, each with the rate of the least validation loss: {listed}."
    ]
    fitted = {(r["method"], r["lr"]): r for r in records if r["scaling"] == rates.AS_FITTED}
    moved = [
        f"{fitted[r['method'], r['lr']]['after']['cosine']:.3f} and {r['after']['cosine']:.3f} "
        f"at lr {r['lr']:g}"
        for r in records
        if r["scaling"] == rates.BALANCED and (r["method"], r["lr"]) in fitted
    ]
    if moved:
        found.append(
            f"The same CP of tltorch with its factors as fitted and balanced: {', '.join(moved)}."
        )
    absent = [m.label for m in fits.METHODS if m.key not in {r["method"] for r in records}]
    if absent:
        found.append(f"Not measured: {'; '.join(absent)}.")
    return found


def _grouped(records: Iterable[Record], key: str) -> dict[str, list[Record]]:
    """The records by one of their fields, in the order in which its values come."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record[key], []).append(record)
    return found


def digits_table(records: Sequence[Record]) -> str:
    """A row per way of one family: means over seeds."""
    dense = _accuracies(records, "dense", "accuracy")
    rows = [
        [
            "way",
            "weights",
            "as converted, %",
            "after one epoch, %",
            "at the end, %",
            "less than dense, points",
            "diverged",
            "growth",
        ]
    ]
    for way, members in _ways(records).items():
        end = _accuracies(members, way, "accuracy")
        growth = [m["growth"] for m in members if m["growth"] is not None]
        converted = "accuracy_converted" in members[0]
        ratio = members[0]["dense_parameters"] / members[0]["parameters"]
        rows.append(
            [
                title(way, members[0]["label"]),
                f"{members[0]['parameters']:,} ({ratio:.1f}×)",
                _spread(_accuracies(members, way, "accuracy_converted")) if converted else "-",
                _spread(_accuracies(members, way, "accuracy_one_epoch")) if converted else "-",
                _spread(end),
                "-" if way == "dense" else f"{fmean(dense) - fmean(end):.2f}",
                f"{sum(m['diverged'] for m in members)} of {len(members)}",
                f"{max(growth):.2f}" if growth else "-",
            ]
        )
    return markdown_rows(rows, "l" + "r" * (len(rows[0]) - 1))


def title(way: str, label: str) -> str:
    """Name of a way in tables."""
    kind = {"scratch": "from scratch: ", "convert": "converted: "}
    return kind.get(way.split()[0], "") + label


def _ways(records: Iterable[Record]) -> dict[str, list[Record]]:
    found = _grouped(records, "way")
    order = {"dense": 0, "scratch": 1, "convert": 2}
    return dict(sorted(found.items(), key=lambda item: order[item[0].split()[0]]))


def _accuracies(records: Iterable[Record], way: str, key: str) -> list[float]:
    """In percent, one per seed."""
    return [100 * record[key] for record in records if record["way"] == way]


def _spread(values: Sequence[float]) -> str:
    text = f"{fmean(values):.1f}"
    return f"{text} ± {stdev(values):.1f}" if len(values) > 1 else text


def digits_findings(records: Sequence[Record]) -> list[str]:
    """Which ways come within half a point of dense, and whether any training diverged."""
    found = []
    for family in dict.fromkeys(record["family"] for record in records):
        rows = [record for record in records if record["family"] == family]
        dense = fmean(_accuracies(rows, "dense", "accuracy"))
        near: list[str] = []
        far: list[str] = []
        for way, members in _ways(rows).items():
            if way == "dense":
                continue
            less = dense - fmean(_accuracies(members, way, "accuracy"))
            name = f"{title(way, members[0]['label'])} ({less:+.2f})"
            (near if less <= WITHIN else far).append(name)
        found.append(
            f"{family}, points less than dense in the mean. Within {WITHIN:g}: "
            f"{'; '.join(near) or 'none'}. Not: {'; '.join(far) or 'none'}."
        )
    diverged = [record for record in records if record["diverged"]]
    found.append(f"{len(diverged)} of {len(records)} trainings diverged.")
    return found
