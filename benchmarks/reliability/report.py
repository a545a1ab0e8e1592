"""Writes what the stored records say into ``docs/reliability.md``; nothing is run here."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from benchmarks import records
from benchmarks.pages import between, markdown_rows
from benchmarks.records import Record
from polyadic.durable.files import write_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "reliability.md"
MARK = "reliability"


def stored(folder: Path = RESULTS) -> tuple[list[Record], list[Record]]:
    """The environments and all other records that are stored."""
    environments: list[Record] = []
    found: list[Record] = []
    for path in sorted(folder.glob("reliability-*.jsonl")):
        first, *others = records.read(path)
        environments.append(first)
        found += others
    return environments, found


def write() -> None:
    """Bring the page up to date."""
    text = PAGE.read_text(encoding="utf-8")
    write_text(PAGE, between(text, MARK, section(*stored())))


def section(environments: list[Record], found: list[Record]) -> str:
    """All that the page says in figures."""
    found = _by_input(found)
    parts = [_sums(found), _where(environments)]
    for title, kinds, head, align in TABLES:
        rows = [_row(record) for record in found if record["kind"] in kinds]
        if rows:
            parts += [f"### {title}", markdown_rows([head, *rows], align)]
    return "\n\n".join(parts)


TABLES = [
    (
        "Jobs that were killed",
        ("kills", "kills at calls"),
        ("job", "killed", "kills", "runs that ended", "of these equal bit for bit"),
        "llrrr",
    ),
    ("Flipped bits", ("flips",), ("file", "bits flipped, one at a time", "noticed"), "lrr"),
    (
        "A model read while it is replaced",
        ("reads",),
        ("reads", "of the one version", "of the other", "whole"),
        "rrrr",
    ),
    (
        "Hostile input",
        ("hostile",),
        ("input", "calls", "done", "refused with a message", "faults", "MiB grown"),
        "lrrrrr",
    ),
    (
        "The same bits",
        ("determinism",),
        ("configurations run", "compared", "equal bit for bit"),
        "lrr",
    ),
    (
        "What does change bits",
        ("changes",),
        ("setting", "tensors", "that differ", "largest relative difference"),
        "lrrr",
    ),
]


def _by_input(found: list[Record]) -> list[Record]:
    """The records, in which those of one hostile input are one: its calls of several runs."""
    merged: dict[str, Record] = {}
    others = [record for record in found if record["kind"] != "hostile"]
    for record in found:
        if record["kind"] == "hostile":
            none = {**record, **dict.fromkeys(_COUNTS, 0), "faults": {}}
            sofar = merged.setdefault(record["input"], none)
            sofar.update({key: sofar[key] + record[key] for key in _COUNTS})
            sofar["faults"] = dict(Counter(sofar["faults"]) + Counter(record["faults"]))
            sofar["grown"] = max(sofar["grown"], record["grown"])
    return [*others, *merged.values()]


_COUNTS = ("calls", "done", "refused")


def _row(record: Record) -> list[str]:
    kind = record["kind"]
    if kind in ("kills", "kills at calls"):
        when = "at random moments" if kind == "kills" else "before a call to the file system"
        return [record["job"], when, *(_count(record[key]) for key in ("kills", "ends", "equal"))]
    if kind == "flips":
        return [record["file"], _count(record["tried"]), _count(record["noticed"])]
    if kind == "reads":
        return [_count(record["reads"]), *map(_count, record["versions"]), _count(record["whole"])]
    if kind == "hostile":
        counts = [_count(record[key]) for key in ("calls", "done", "refused")]
        faults = sum(record["faults"].values())
        return [record["input"], *counts, _count(faults), f"{record['grown']:.0f}"]
    if kind == "determinism":
        return [record["way"], _count(record["compared"]), _count(record["equal"])]
    counts = [_count(record[key]) for key in ("compared", "differ")]
    return [record["way"], *counts, f"{record['most']:.1e}"]


def _sums(found: list[Record]) -> str:
    def total(kinds: tuple[str, ...], key: str) -> int:
        return sum(record[key] for record in found if record["kind"] in kinds)

    killed = ("kills", "kills at calls")
    lost = total(killed, "ends") - total(killed, "equal")
    faults = sum(sum(r["faults"].values()) for r in found if r["kind"] == "hostile")
    unequal = total(("determinism",), "compared") - total(("determinism",), "equal")
    mended = ", of kinds that are mended since" if faults else ""
    return (
        f"Runs killed: {_count(total(killed, 'kills'))}, results lost or changed: {lost}. Inputs "
        f"tried: {_count(total(('hostile',), 'calls'))}, faults: {faults}{mended}. Configurations "
        f"compared bit for bit: {_count(total(('determinism',), 'compared'))}, unequal: {unequal}."
    )


def _where(environments: list[Record]) -> str:
    lines = {
        f"{one['cpu']}, torch {one['torch']}, {str(one['date'])[:10]}, commit {one['commit']}"
        for one in environments
    }
    return f"Where: {'; '.join(sorted(lines))}."


def _count(number: int) -> str:
    return f"{number:,}"
