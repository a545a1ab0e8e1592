from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from examples.digits import DemoResult, run_demo
from examples.digits.data import Digits, load
from examples.digits.findings import difference, findings
from examples.digits.measure import StepTime, kept_by_training_batch, kept_bytes, time_steps
from examples.digits.models import contestants, parameter_count
from examples.digits.pictures import partial_sum_errors, take_apart
from examples.digits.training import Curve, ModelResult, Settings, adam, train

ROOT = Path(__file__).parents[2]
FILES = {
    "report.html",
    "results.json",
    "curves.png",
    "accuracy-parameters.png",
    "costs.png",
    "factors.png",
    "rank-one-sum.png",
}


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load()


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, str]:
    """One quick run into a folder that holds a foreign and an old file, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "deep" / "er"
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("keep me")
    (out / "report.html").write_text("old")
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    printed = StringIO()
    result = run_demo(out, seed=3, quick=True, console=Console(file=printed, width=80))
    assert torch.equal(state, torch.get_rng_state())
    assert threads == torch.get_num_threads()
    return result, printed.getvalue()


class _Page(HTMLParser):
    """Collects what a page refers to, and checks that its tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_writes_its_files_and_leaves_others_alone(quick: tuple[DemoResult, str]) -> None:
    result, _ = quick
    assert {path.name for path in result.out.iterdir()} == FILES | {"mine.txt"}
    assert (result.out / "mine.txt").read_text() == "keep me"
    for plot in result.plots:
        assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_report_is_self_contained(quick: tuple[DemoResult, str]) -> None:
    text = quick[0].report.read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert len(page.references) == 5
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", text)


def test_report_tells_numbers_and_environment(quick: tuple[DemoResult, str]) -> None:
    result, _ = quick
    text = result.report.read_text(encoding="utf-8")
    for model in result.models:
        assert f"<td>{model.contestant.label}</td><td>{model.parameters:,}</td>" in text
    for value in (torch.__version__, result.environment["CPU"], "Khatri-Rao", "quick run"):
        assert value in text
    assert "{" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)


def test_table_is_printed_uncut(quick: tuple[DemoResult, str]) -> None:
    result, printed = quick
    assert "…" not in printed
    assert str(result.report) in printed
    for model in result.models:
        assert model.contestant.label in printed


def test_json_holds_all_numbers(quick: tuple[DemoResult, str]) -> None:
    result, _ = quick
    record = json.loads(result.data.read_text(), parse_constant=pytest.fail)
    assert record["settings"]["seed"] == 3
    assert [row["key"] for row in record["models"]] == [m.contestant.key for m in result.models]
    for row, model in zip(record["models"], result.models, strict=True):
        assert row["accuracy"] == model.accuracy
        assert row["kept_bytes"] == model.kept_bytes > 0
        assert row["parameters"] == model.parameters
        assert 0 < row["step_seconds"]["low"] <= row["step_seconds"]["median"]


def test_same_seed_gives_the_same_result_bit_for_bit(
    quick: tuple[DemoResult, str], tmp_path: Path
) -> None:
    first = quick[0]
    torch.rand(7)
    second = run_demo(tmp_path, seed=3, quick=True, console=Console(file=StringIO()))
    assert [model.curves for model in first.models] == [model.curves for model in second.models]
    assert [m.kept_bytes for m in first.models] == [m.kept_bytes for m in second.models]
    for name in FILES - {"report.html", "results.json", "costs.png"}:
        assert (first.out / name).read_bytes() == (second.out / name).read_bytes()


def test_seeds_differ(digits: Digits) -> None:
    settings = Settings(0, mlp_epochs=1)
    contestant = next(c for c in contestants() if c.key == "mlp-cp-16")
    curves = [train(contestant, digits, settings, seed)[1] for seed in (0, 0, 1)]
    assert curves[0] == curves[1]
    assert curves[0].loss != curves[2].loss


def test_split_is_fixed_and_stratified(digits: Digits) -> None:
    again = load()
    assert torch.equal(digits.test_x, again.test_x)
    assert len(digits.train_y) == 1347
    assert len(digits.test_y) == 450
    share = torch.bincount(digits.test_y) / torch.bincount(
        torch.cat((digits.train_y, digits.test_y))
    )
    assert ((share - 450 / 1797).abs() < 0.01).all()
    assert abs(digits.train_x.mean()) < 1e-6
    assert abs(digits.train_x.std() - 1) < 1e-3


def test_narrow_models_have_about_the_parameters_of_their_partner() -> None:
    count = {c.key: parameter_count(c.build()) for c in contestants()}
    for family in ("mlp", "cnn"):
        assert 0.9 < count[f"{family}-narrow"] / count[f"{family}-cp-16"] < 1.1
    assert count["mlp-dense"] == 64 * 256 + 256 + 256 * 256 + 256 + 2560 + 10


class TestKeptBytes:
    def test_linear_keeps_its_input_alone(self) -> None:
        layer, x = nn.Linear(4, 3), torch.rand(2, 4)
        assert kept_bytes(lambda: layer(x), layer.parameters()) == 2 * 4 * 4
        assert kept_bytes(lambda: layer(x), [*layer.parameters(), x]) == 0

    def test_small_classifier(self) -> None:
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        x, y = torch.rand(2, 4), torch.tensor([0, 2])
        relu, log_softmax, total_weight = 2 * 8 * 4, 2 * 3 * 4, 4
        assert kept_by_training_batch(model, x, y) == relu + log_softmax + total_weight

    def test_a_storage_counts_once_and_whole(self) -> None:
        x = torch.rand(6, requires_grad=True)
        assert kept_bytes(lambda: (x[:2] * x[4:]).sum()) == 6 * 4

    def test_a_copy_of_what_is_left_out_counts(self) -> None:
        x = torch.rand(6, requires_grad=True)
        assert kept_bytes(lambda: x.clone().exp().sum(), [x]) == 6 * 4
        assert kept_bytes(lambda: x.clone().square().sum(), [x]) == 6 * 4

    def test_without_gradients_nothing_is_kept(self) -> None:
        x = torch.rand(6)
        assert kept_bytes(lambda: x.exp()) == 0


def test_timing_takes_turns_and_makes_as_many_steps_of_each() -> None:
    calls: list[int] = []
    rounds: list[None] = []

    class Named(nn.Linear):
        def __init__(self, name: int) -> None:
            super().__init__(4, 3)
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(self.name)
            return super().forward(x)

    models = [Named(name) for name in range(3)]
    times = time_steps(
        models,
        [adam(model, 1e-3) for model in models],
        torch.rand(2, 4),
        torch.tensor([0, 1]),
        6,
        lambda: rounds.append(None),
    )
    assert len(times) == 3
    assert len(rounds) == 6
    for start in range(0, len(calls), 3):
        assert sorted(calls[start : start + 3]) == [0, 1, 2]
    assert len({calls[start] for start in range(0, len(calls), 3)}) == 3
    assert all(0 < time.low <= time.median <= time.high for time in times)


def _fabricated(milliseconds: float, wrong: tuple[int, ...], key: str) -> ModelResult:
    contestant = next(c for c in contestants() if c.key == key)
    curve = Curve(0, (1.0,), (1 - len(wrong) / 100,), wrong)
    seconds = milliseconds / 1e3
    time = StepTime(seconds, seconds, seconds, seconds)
    return ModelResult(contestant, 1000, 500, 2000, (curve, curve), 4096, time)


def test_difference_is_paired_image_by_image() -> None:
    first = _fabricated(1, (0, 1), "mlp-cp-16")
    second = _fabricated(1, (0, 5, 6, 7), "mlp-dense")
    mean, half = difference(first, second, 100)
    errors = torch.zeros(100, dtype=torch.float64)
    errors[1], errors[5:8] = -1, 1
    assert mean == pytest.approx(0.02)
    assert half == pytest.approx(1.96 * errors.std().item() / 10)
    assert difference(first, first, 100) == (0, 0)


def test_findings_say_where_dense_is_better() -> None:
    dense = _fabricated(1.0, (), "mlp-dense")
    narrow = _fabricated(0.5, (), "mlp-narrow")
    slow = _fabricated(2.0, tuple(range(20)), "mlp-cp-16")
    fast = _fabricated(0.8, (4,), "mlp-cp-64")
    text = "\n".join(findings([dense, narrow, slow, fast], 100)["MLP"].values())
    assert "dense is faster against rank 16 (2.00 × dense)" in text
    assert "CP is faster at rank 64 (0.80 × dense)" in text
    assert "80.0 % at rank 16 (−20.0 ± 7.9 points: worse)" in text
    assert "99.0 % at rank 64 (−1.0 ± 2.0 points: not told apart)" in text
    assert "time 0.25 × CP's" in text


def test_picture_shows_the_layers_own_weight() -> None:
    model = next(c for c in contestants() if c.key == "mlp-cp-16").build()
    layer = model.get_submodule("hidden1")
    parts = take_apart(layer)
    weight = layer.weight.detach().double().T
    torch.testing.assert_close(parts.weight, weight, rtol=1e-5, atol=1e-7)
    total = sum(parts.part(r) for r in range(16))
    torch.testing.assert_close(total, parts.weight)
    assert (parts.norms.diff() <= 0).all()
    assert parts.norms[0].item() == pytest.approx(parts.part(0).norm().item())
    errors = partial_sum_errors(parts)
    assert len(errors) == 17
    assert errors[0] == pytest.approx(1)
    assert errors[-1] == pytest.approx(0, abs=1e-12)


class TestRefusals:
    @pytest.mark.parametrize("below", [False, True])
    def test_out_is_a_file(self, tmp_path: Path, below: bool) -> None:
        file = tmp_path / "file"
        file.write_text("mine")
        with pytest.raises(NotADirectoryError, match=r"out must be a folder, but .*name another"):
            run_demo(file / "folder" if below else file, quick=True)
        assert file.read_text() == "mine"

    def test_a_folder_stands_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "report.html").mkdir()
        with pytest.raises(PermissionError, match=r"report\.html' is in the way"):
            run_demo(tmp_path, quick=True)

    def test_out_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(**_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
        with pytest.raises(PermissionError, match=r"can be written to.*Permission denied"):
            run_demo(tmp_path, quick=True)

    @pytest.mark.parametrize("module", ["sklearn", "matplotlib", "rich"])
    def test_the_extra_is_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=r'pip install -e "\.\[examples\]"'):
            run_demo(tmp_path / "out", quick=True)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"seed": -1}, ValueError, "seed must be from 0"),
            ({"seed": 2**63}, ValueError, "seed must be from 0"),
            ({"seed": 1.0}, TypeError, "seed must be an int, got 1.0"),
            ({"seed": True}, TypeError, "seed must be an int, got True"),
            ({"threads": 0}, ValueError, "threads must be from 1"),
            ({"threads": "2"}, TypeError, "threads must be an int, got '2'"),
        ],
    )
    def test_wrong_arguments(
        self, tmp_path: Path, arguments: dict[str, int], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            run_demo(tmp_path / "out", quick=True, **arguments)
        assert not (tmp_path / "out").exists()


def test_import_is_light_and_pyplot_stays_out() -> None:
    program = """
import sys, examples.digits
heavy = [name for name in ("sklearn", "matplotlib", "rich") if name in sys.modules]
assert not heavy, heavy
from examples.digits import models, pictures, plots
layer = next(c for c in models.contestants() if c.key == "mlp-cp-4").build().hidden1
assert pictures.factors(pictures.take_apart(layer)).startswith(b"\\x89PNG")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["mlp-dense", "mlp-cp-16", "mlp-cp-64", "cnn-cp-16", "cnn-cp-64"])
def test_the_default_schedule_learns(digits: Digits, key: str) -> None:
    contestant = next(c for c in contestants() if c.key == key)
    _, curve = train(contestant, digits, Settings(0), 0)
    assert curve.accuracy[-1] > 0.9
    assert curve.loss[-1] < 0.2
