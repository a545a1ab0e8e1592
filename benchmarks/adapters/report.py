"""The measured part of docs/adapters.md, from stored records; nothing is measured here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.adapters import layers, messages, reviews
from benchmarks.adapters.finetune import Task, best_rate
from benchmarks.pages import between, markdown_rows
from benchmarks.records import Record, rounded
from benchmarks.study import store
from polyadic.durable.files import write_text

MARK = "adapters"
TASKS = (reviews.TASK, messages.TASK)
WINS = "Where a CP adapter wins, and where LoRA does"
NAMES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "vera": "VeRA"}
# In which respect a CP adapter and another are equal, and the other's family.
RIVALS = (
    ("parameters", "lora"),
    ("rank", "lora"),
    ("parameters", "loha"),
    ("parameters", "lokr"),
    ("parameters", "vera"),
)
# Up to this share two costs count as the same.
LEVEL = 0.05


def write(folder: Path, page: Path) -> Path:
    """Renew the page from the records in a folder."""
    write_text(page, between(page.read_text(encoding="utf-8"), MARK, tables(folder)))
    return page


def tables(folder: Path) -> str:
    """All that the page says of the records."""
    parts = ["\n## Cost of one layer, measured\n", _layers(*store.read(folder / layers.FILE))]
    studies = [
        Study(task, *store.read(folder / task.file))
        for task in TASKS
        if (folder / task.file).exists()
    ]
    for study in studies:
        parts += [f"\n## {study.task.title}\n", _study(study)]
    parts += [f"\n## {WINS}\n", _wins(studies)]
    return "\n".join(parts) + "\n"


def _where(environment: Record) -> str:
    peft = environment["versions"].get("peft")
    return (
        f"{environment['cpu']}, 1 thread, torch {environment['torch']}"
        f"{f', PEFT {peft}' if peft else ''}; {environment['date'][:10]}"
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
            rows.append(
                [
                    record["label"],
                    f"{record['parameters']:,}" if key != "base" else "",
                    f"{100 * more:.1f} %" if key != "base" else "",
                    _bytes(record["kept_bytes"]),
                    f"{ratio(record, own['lora-64']):.2f}",
                ]
            )
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


class Study:
    """The records of one fine-tuning.

    Attributes:
        task: what was learnt.
        environment: with the settings.
        records: all.
        costs: of each contestant.
        runs: of each contestant all whose rates and seeds were trained, with its best rate.
    """

    def __init__(self, task: Task, environment: Record, records: Sequence[Record]) -> None:
        self.task, self.environment, self.records = task, environment, records
        self.costs = {r["contestant"]: r for r in records if r["kind"] == "costs"}
        self.runs: dict[str, dict[int, Record]] = {}
        first, *others = environment["settings"]["seeds"]
        for contestant in task.field.contestants:
            runs = task.runs(records, contestant.key)
            if {r["rate"] for r in runs} >= set(rounded(contestant.rates)):
                best = best_rate(runs, first)
                seeds = {r["seed"]: r for r in runs if r["rate"] == best}
                if seeds.keys() >= set(others):
                    self.runs[contestant.key] = seeds

    def less(self, one: str, other: str, field: str) -> list[float] | None:
        """What one contestant has more than another, seed by seed; None where one is unfinished."""
        if not self.runs.keys() >= {one, other}:
            return None
        mine, theirs = self.runs[one], self.runs[other]
        return [mine[seed][field] - theirs[seed][field] for seed in mine]


def _study(study: Study) -> str:
    settings = study.environment["settings"]
    rows = [
        [
            "",
            "parameters",
            "file",
            "rate",
            "test loss",
            "test accuracy",
            "step, of LoRA r=1",
            "peak",
        ]
    ]
    for record in study.records:
        if record["kind"] == "before":
            loss, accuracy = record["test_loss"], 100 * record["test_accuracy"]
            rows.append(["before training", "", "", "", f"{loss:.3f}", f"{accuracy:.1f}", "", ""])
    for key, cost in sorted(study.costs.items(), key=lambda item: int(item[1]["parameters"])):
        rows.append(
            [
                cost["label"],
                f"{cost['parameters']:,}",
                _bytes(cost["file_bytes"]),
                *(_quality(study, key) if key in study.runs else [""] * 3),
                f"{ratio(cost, study.costs['lora-1']):.2f}",
                f"{cost['peak_bytes'] / 2**20:.0f} MiB",
            ]
        )
    noise = 100 * (0.25 * 0.75 / settings["test"]) ** 0.5
    text = (
        f"{markdown_rows(rows, 'lrrrrrrr')}\n\n{study.task.about}; texts of up to "
        f"{settings['longest']} tokens, {settings['train']} to train on, {settings['epochs']} "
        f"epoch, batches of {settings['batch']}, AdamW. All linear layers of the last "
        f"{settings['layers']} {study.task.of} are adapted. Each contestant has the learning rate "
        f"with the least loss on {settings['valid']} other texts with one seed, of four that grow "
        f"by a factor of 2 and of one more where the best is at an end; one that is there "
        f"nevertheless is marked. {settings['test']} texts to test on; means over "
        f"{len(settings['seeds'])} seeds, with the least and the largest. One standard deviation "
        f"of an accuracy is {noise:.1f} points by the number of test texts alone. File sizes are "
        f"those that PEFT writes, a classifier and VeRA's frozen matrices included. Steps are the "
        f"thread's processor time on one batch of a middle length; contestants take turns, and the "
        f"ratio is the median over turns. Peak is the most bytes alive in a step on the longest "
        f"texts. {_where(study.environment)}.\n\n{_pairs(study)}"
    )
    absent = [c.label for c in study.task.field.contestants if c.key not in study.runs]
    if absent:
        text += (
            f"\n\nOf these not all rates and seeds were tried, so that they are left out but for "
            f"their costs: {', '.join(absent)}."
        )
    return text


def _quality(study: Study, key: str) -> list[str]:
    """The learning rate, marked at an end of what was tried; test loss, test accuracy."""
    runs = study.runs[key].values()
    rate = next(iter(runs))["rate"]
    rates = {r["rate"] for r in study.task.runs(study.records, key)}
    edge = " (edge)" if len(rates) > 1 and rate in (min(rates), max(rates)) else ""
    return [
        f"{rate:g}{edge}" if len(rates) > 1 else "",
        _spread([r["test_loss"] for r in runs], ".3f"),
        _spread([100 * r["test_accuracy"] for r in runs], ".1f"),
    ]


def _spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _pairs(study: Study) -> str:
    """What changes from one contestant to another, seed by seed where both are finished."""
    rows = [["equal", "CP adapter", "against", "test loss", "accuracy, points", "step", "peak"]]
    for equal, one, other in study.task.field.pairs:
        mine, theirs = study.costs[one], study.costs[other]
        loss, accuracy = (study.less(one, other, f) for f in ("test_loss", "test_accuracy"))
        rows.append(
            [
                equal,
                mine["label"],
                theirs["label"],
                "" if loss is None else _spread(loss, "+.3f"),
                "" if accuracy is None else _spread([100 * a for a in accuracy], "+.1f"),
                f"{ratio(mine, theirs):.2f}",
                f"{mine['peak_bytes'] / theirs['peak_bytes']:.2f}",
            ]
        )
    return (
        f"{markdown_rows(rows, 'lllrrrr')}\n\nThe CP adapter's loss and accuracy less the other's "
        f"with the same seed, mean, least and largest; its step and peak over the other's."
    )


def _wins(studies: Sequence[Study]) -> str:
    """Who wins in what over all pairs of all studies."""
    rows = [["", "parameters", "file", "step", "peak", "test loss"]]
    for equal, family in RIVALS:
        pairs = [
            (study, one, other)
            for study in studies
            for what, one, other in study.task.field.pairs
            if what == equal and other.split("-")[0] == family
        ]
        name = NAMES[family]
        costs = [(study.costs[one], study.costs[other]) for study, one, other in pairs]
        rows.append(
            [
                f"equal {equal}, {name}",
                *(
                    _who([mine[field] / theirs[field] for mine, theirs in costs], name)
                    for field in ("parameters", "file_bytes")
                ),
                _who([ratio(mine, theirs) for mine, theirs in costs], name),
                _who([mine["peak_bytes"] / theirs["peak_bytes"] for mine, theirs in costs], name),
                _lower([study.less(one, other, "test_loss") for study, one, other in pairs], name),
            ]
        )
    return (
        f"{markdown_rows(rows, 'llllll')}\n\nThe CP adapter's figure over the other's, least and "
        f"largest of all pairs of the fine-tunings above; a winner is named where every pair says "
        f"so by more than {100 * LEVEL:.0f} %. A test loss counts as lower where it is so with "
        f"every seed, which of {len(studies[0].environment['settings']['seeds'])} seeds chance "
        f"alone makes in one of four pairs."
    )


def _who(ratios: Sequence[float], other: str) -> str:
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    winner = (
        "**CP**"
        if max(ratios) < 1 - LEVEL
        else f"**{other}**"
        if min(ratios) > 1 + LEVEL
        else "neither"
    )
    return f"{winner}: {low if low == high else f'{low} to {high}'}"


def _lower(differences: Sequence[list[float] | None], other: str) -> str:
    known = [each for each in differences if each is not None]
    cp, rival = (sum(all(sign * d < 0 for d in each) for each in known) for sign in (1, -1))
    return f"CP lower in {cp}, {other} in {rival} of {len(known)} pairs" if known else "not trained"
