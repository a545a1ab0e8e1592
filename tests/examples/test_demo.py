"""The demo: what it writes and prints, that it repeats, and what it says of wrong arguments."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from examples.demo import language, report
from examples.demo.__main__ import main
from examples.demo.models import FAMILIES, Contestant, contestants, parameters
from examples.demo.training import Curve, Digits, Result, Settings, load, measure, train
from polyadic.nn.ranks import _warned as warned_before
from polyadic.testing import kept_bytes

ROOT = Path(__file__).parents[2]
FILES = {"report.html", "results.json"}


@contextmanager
def as_left() -> Iterator[None]:
    """The demo sets torch's threads and generator, as the program it is."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    yield
    torch.set_rng_state(state)
    torch.set_num_threads(threads)


@contextmanager
def as_a_user_sees() -> Iterator[None]:
    """A demonstration does not do what the library warns of."""
    warned_before.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "this CP")
        yield


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One quick run into a folder that holds a foreign and an old file."""
    out = tmp_path_factory.mktemp("demo") / "deep" / "er"
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("keep me")
    (out / "report.html").write_text("old")
    with as_left(), as_a_user_sees():
        main(["--quick", "--seed", "3", "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load()


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

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "img", "br"):
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.slow
def test_it_writes_its_files_and_leaves_others_alone(quick: Path) -> None:
    assert {path.name for path in quick.iterdir()} == FILES | {"mine.txt"}
    assert (quick / "mine.txt").read_text() == "keep me"


@pytest.mark.slow
def test_report_is_self_contained_and_tells_what_was_found(quick: Path) -> None:
    text = (quick / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    page.close()
    assert page.open == []
    # What a figure refers to is in the page: its own marks and clips, and heat maps.
    assert all(r.startswith(("#", "data:image/png;base64,")) for r in page.references)
    assert page.tags.count("svg") == 2 + 2 * 5 + 1
    names = re.findall(r' id="([^"]+)"', text)
    assert len(names) == len(set(names))
    assert {r[1:] for r in page.references if r[0] == "#"} <= set(names)
    assert len(text.encode()) < 500_000
    # The verdict is what a reader sees first, and both ways to look at the page are there.
    assert text.index('class="verdict"') < text.index("<h2>")
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert "#010203" not in text
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    for member in contestants(quick=True):
        assert f"<td>{member.label}</td><td>{parameters(member.build()):,}</td>" in text
    for value in (torch.__version__, "Khatri-Rao", "quick run"):
        assert value in text
    assert "{" not in re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(
    quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.rand(7)
    with as_left():
        main(["--quick", "--seed", "3", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(member.label in printed for member in contestants(quick=True))
    assert "training CNN dense, 64 channels" in printed
    assert str(tmp_path / "report.html") in printed
    first, second = (
        json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
        for out in (quick, tmp_path)
    )
    assert first["settings"]["seed"] == 3
    assert [row["contestant"] for row in first["models"]] == [
        list(member) for member in contestants(quick=True)
    ]
    for one, two in zip(first["models"], second["models"], strict=True):
        assert 0 < one.pop("step")[0] <= two.pop("step")[2] * 1e3
        assert one == two
        assert one["kept"] > 0


def test_seeds_differ(digits: Digits) -> None:
    build = Contestant("MLP", "cp", 256, 16).build
    curves = [train(build, 1, digits, Settings(0), seed)[1] for seed in (0, 0, 1)]
    assert curves[0] == curves[1]
    assert curves[0].loss != curves[2].loss


def test_split_is_fixed_and_stratified(digits: Digits) -> None:
    assert torch.equal(digits.test_x, load().test_x)
    assert [*map(len, digits)] == [1347, 1347, 450, 450]
    labels = torch.cat((digits.train_y, digits.test_y))
    share = torch.bincount(digits.test_y) / torch.bincount(labels)
    assert ((share - 450 / 1797).abs() < 0.01).all()
    assert abs(digits.train_x.mean()) < 1e-6
    assert abs(digits.train_x.std() - 1) < 1e-3


def test_narrow_models_have_about_the_parameters_of_their_partner() -> None:
    for family in FAMILIES:
        dense, narrow, *cps = (c for c in contestants() if c.family == family)
        partner = next(c for c in cps if c.rank == 16)
        assert 0.9 < parameters(narrow.build()) / parameters(partner.build()) < 1.1
        assert (dense.kind, narrow.kind) == ("dense", "narrow")
    assert parameters(contestants()[0].build()) == 64 * 256 + 256 + 256 * 256 + 256 + 2560 + 10


def test_steps_are_counted_and_timed(digits: Digits) -> None:
    members = [c for c in contestants(quick=True) if c.family == "MLP"]
    curve = Curve([1.0], [90.0])
    found = measure({c: [curve] for c in members}, digits, Settings(0, rounds=3))
    assert [result.contestant for result in found] == members
    dense = found[0]
    assert dense.ratio == 1
    assert dense.converted == 64 * 256 + 256 + 256 * 256 + 256
    x, y = digits.train_x[:64], digits.train_y[:64]
    model = members[0].build()
    there = [*model.parameters(), x, y]
    loss = kept_bytes(lambda: torch.nn.functional.cross_entropy(model(x), y), leave_out=there)
    assert dense.kept == loss >= 2 * 64 * 256 * 4
    assert all(0 < r.step[0] <= r.step[1] <= r.step[2] for r in found)


def _fabricated(milliseconds: float, accuracy: float, *contestant: Any) -> Result:
    curves = [Curve([1.0], [accuracy - 0.5]), Curve([1.0], [accuracy + 0.5])]
    step = [milliseconds / 1e3] * 3
    return Result(Contestant(*contestant), 85_000, 82_000, 19.4, curves, 2**21, step)


FABRICATED = [
    _fabricated(1.0, 99.0, "MLP", "dense", 256),
    _fabricated(0.5, 99.0, "MLP", "narrow", 40),
    _fabricated(2.0, 80.0, "MLP", "cp", 256, 16),
    _fabricated(0.8, 98.5, "MLP", "cp", 256, 48),
]


def test_findings_say_where_dense_is_better() -> None:
    text = "\n".join(report.findings(FABRICATED, 450))
    assert "CP, rank 16: 19.4 times fewer parameters in converted layers" in text
    assert "accuracy 80.0 % (−19.0 ± 3.8 points: worse)" in text
    assert "a step takes 2.00 × dense (dense is faster)" in text
    assert "accuracy 98.5 % (−0.5 ± 1.5 points: not told apart)" in text
    assert "a step takes 0.80 × dense (CP is faster)" in text
    assert "time 0.25 × CP's" in text


def test_no_model_has_a_rank_above_break_even() -> None:
    with as_a_user_sees():
        for contestant in contestants():
            contestant.build()


def test_the_table_is_printed_uncut_however_slow_the_machine() -> None:
    slow = [result._replace(step=[12.3456] * 3) for result in FABRICATED]
    printed = StringIO()
    Console(file=printed, width=80).print(report.table({"MLP": slow}))
    assert "…" not in printed.getvalue()
    assert "12,346" in printed.getvalue()


class TestRefusals:
    @pytest.mark.parametrize("below", [False, True])
    def test_out_is_a_file(
        self, tmp_path: Path, below: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "file"
        file.write_text("mine")
        with pytest.raises(SystemExit) as exit_:
            main(["--quick", "--out", str(file / "folder" if below else file)])
        assert exit_.value.code == 2
        assert str(file) in capsys.readouterr().err
        assert file.read_text() == "mine"

    def test_a_folder_stands_in_the_way(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "report.html").mkdir()
        with pytest.raises(SystemExit) as exit_:
            main(["--quick", "--out", str(tmp_path)])
        assert exit_.value.code == 2
        said = capsys.readouterr()
        assert "report.html is a directory" in said.err
        assert said.out == "", "a model was trained before the folder was refused"

    @pytest.mark.parametrize("module", ["sklearn.datasets", "rich.console"])
    def test_a_package_is_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(SystemExit, match=rf"{module}.*pip install -e '\.\[examples\]'"):
            main(["--quick", "--out", str(tmp_path)])

    @pytest.mark.parametrize("given", [["--seed", "-1"], ["--threads", "0"], ["--seed", "1.5"]])
    def test_wrong_arguments(
        self, tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as exit_:
            main([*given, "--out", str(tmp_path / "out")])
        assert exit_.value.code == 2
        assert "--seed" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_pyplot_stays_out() -> None:
    program = """
import sys
from examples.demo import models, plots
from polyadic.compression.html import svg
layer = models.Contestant("MLP", "cp", 256, 4).build()[1]
assert svg("layer", 9, 6, plots.factorization, layer).startswith("<svg")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=120)


def test_examples_take_the_training_study_alone_from_the_benchmarks() -> None:
    """Its model and its trainer, so that there is one of each; other examples stand alone."""
    for path in (ROOT / "examples").rglob("*.py"):
        taken = re.findall(r"(?:from|import) benchmarks[.\w]*", path.read_text(encoding="utf-8"))
        own = path.name == "language.py"
        assert all(own and one.startswith("from benchmarks.training.") for one in taken), path


SIZES = {"dense": 396_544, "cp": 24_064, "narrow": 25_408, "low": 23_808}


def _language(parameters: Mapping[str, int] = SIZES, **losses: float) -> list[language.Trained]:
    members = dict(zip(parameters, language.CONTESTANTS, strict=True))
    return [
        language.Trained(members[n], parameters[n], loss, [[500, loss]], 0.04)
        for n, loss in losses.items()
    ]


def test_the_verdict_says_whether_cp_wins() -> None:
    said = language.verdict(_language(dense=2.08, cp=2.13, narrow=2.27, low=2.42))
    assert said.startswith("On text CP wins against a narrow and a low-rank language model: with")
    assert "24,064 parameters in the blocks it ends at 2.13 nats a byte, dense, narrow" in said
    assert "dense, narrow (about as many) at 2.27 and low rank, rank 5 (about as many)" in said
    assert "The full dense model (16 times as many) ends at 2.08, 0.05 nats ahead of CP" in said
    lost = language.verdict(_language(dense=2.2, cp=2.13, narrow=2.1, low=2.42))
    assert lost.startswith("On text CP does not win against")
    assert "0.07 nats behind CP" in lost
    # The models of a quick run differ in size, which is said and not hidden.
    sizes = {"dense": 25_000, "cp": 17_000, "narrow": 1_900, "low": 6_000}
    quick = language.verdict(_language(sizes, dense=5.2, cp=5.1, narrow=5.3, low=5.3))
    assert "narrow (0.11 times as many) at 5.30 and low rank, rank 5 (0.35 times as" in quick
    assert "equal" not in quick
    small = report.digits_verdict({"MLP": FABRICATED})
    assert "1 of 2 CP models take longer a step than the dense one" in small


@pytest.mark.slow
@pytest.mark.parametrize(("family", "rank"), [("MLP", 16), ("MLP", 48), ("CNN", 16), ("CNN", 48)])
def test_the_default_schedule_learns(digits: Digits, family: str, rank: int) -> None:
    contestant = next(c for c in contestants() if (c.family, c.rank) == (family, rank))
    settings = Settings(0)
    _, curve = train(contestant.build, settings.epochs(family), digits, settings, 0)
    assert curve.accuracy[-1] > 90
    assert curve.loss[-1] < 0.2
