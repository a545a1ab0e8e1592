"""``polyadic compress`` on a small random BERT."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from polyadic import Report, register_transformers
from polyadic.nn import CPLinear
from polyadic_cli.folder import complete
from polyadic_cli.main import main

pytest.importorskip("typer")
transformers = pytest.importorskip("transformers")

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "rank",
    "of",
    "a",
    "matrix",
    "is",
    "low",
]
TEXT = "the rank of a matrix\n\na matrix is low\nis the rank low\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        architectures=["BertModel"],
    )
    transformers.BertModel(config).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    (path.parent / "texts.txt").write_text(TEXT)
    return path


def run(*arguments: object, capsys: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(["compress", *map(str, arguments)])
    captured = capsys.readouterr()
    code = exit_.value.code
    return (code if isinstance(code, int) else 1), captured.out, captured.err


@pytest.mark.slow
def test_a_model_is_converted_and_loads_again(folder: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    out, page, data = tmp_path / "small", tmp_path / "r.html", tmp_path / "r.json"
    code, printed, err = run(
        folder,
        "--ratio",
        3,
        "--calibration",
        folder.parent / "texts.txt",
        "--out",
        out,
        "--html",
        page,
        "--json",
        data,
        "--target",
        r"encoder\..*",
        "--orders",
        "1,2",
        capsys=capsys,
    )
    assert code == 0, err
    assert "times fewer" in printed
    report = Report.from_dict(json.loads(data.read_text()))
    assert report.ratio >= 3
    assert report.calibrated
    assert len(report.layers) == 12
    assert page.read_text().startswith("<!DOCTYPE html>")
    register_transformers()
    model = transformers.AutoModel.from_pretrained(out, local_files_only=True).eval()
    for layer in report.converted:
        assert isinstance(model.get_submodule(layer.name), CPLinear)
        assert model.get_submodule(layer.name).rank == layer.rank
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True)
    dense = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    batch = tokenizer([t for t in TEXT.splitlines() if t], padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        y, z = (m(**batch).last_hidden_state * mask for m in (dense, model))
    assert report.output_error == pytest.approx(float((z - y).norm() / y.norm()), rel=1e-3)


@pytest.mark.slow
def test_a_model_is_recovered_and_its_directory_is_complete(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """The other files come along, and the card says what was done and how to load it."""
    monkeypatch.setattr("polyadic.progress.LONG", 0.0)
    monkeypatch.setattr("polyadic.progress.LINE", 0.0)
    monkeypatch.setattr("polyadic.progress.MOVE", 0.0)
    origin, out = tmp_path / "origin", tmp_path / "small"
    shutil.copytree(folder, origin)
    for name in ("1_Pooling/config.json", "onnx/config.json", "onnx/model.onnx", "modules.json"):
        (origin / name).parent.mkdir(exist_ok=True)
        (origin / name).write_text("{}")
    code, printed, err = run(
        origin,
        "--ratio",
        8,
        "--calibration",
        folder.parent / "texts.txt",
        "--out",
        out,
        "--target",
        r"encoder\..*",
        "--orders",
        "1",
        "--recover",
        30,
        capsys=capsys,
    )
    assert code == 0, err
    first = printed.splitlines()[0]
    assert re.match(
        r"The model is .* times smaller.* and after its recovery its outputs chang", first
    )
    change = re.search(r"change by (\S+) % \((\S+) % before it\)", first)
    assert change
    assert float(change[1]) < float(change[2])
    assert "--recover" not in first
    assert "The option speed='never-slower'" in first
    fell = re.search(r"fell from (\S+) to (\S+)", printed)
    assert fell
    assert float(fell[2]) < float(fell[1])
    assert re.search(r"^polyadic: compress, fits, \d+ of \d+, .* so far", err, re.M)
    assert (out / "1_Pooling" / "config.json").is_file()
    assert not (out / "onnx").exists()
    card = (out / "README.md").read_text()
    assert "polyadic.register_transformers()" in card
    assert "BertModel.from_pretrained(folder)" in card
    assert "SentenceTransformer(folder)" in card
    assert fell[0] in card
    assert change[0] in card
    register_transformers()
    assert transformers.BertModel.from_pretrained(out, local_files_only=True)


def test_a_copy_that_fails_leaves_no_half_of_a_file(tmp_path: Path, monkeypatch: Any) -> None:
    """What is there already is not copied again, so that half a file would stay for good."""
    origin, out = tmp_path / "origin", tmp_path / "small"
    origin.mkdir()
    out.mkdir()
    (origin / "tokenizer.json").write_text("whole")

    def fail(source: Path, target: Path) -> None:
        Path(target).write_text("wh")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", fail)
        with pytest.raises(OSError, match=r"tokenizer\.json could not be written"):
            complete(origin, out, [], "BertModel")
    assert not list(out.iterdir())
    complete(origin, out, [], "BertModel")
    assert (out / "tokenizer.json").read_text() == "whole"


@pytest.mark.slow
def test_a_dry_run_saves_nothing(folder: Path, tmp_path: Path, capsys: Any) -> None:
    code, printed, err = run(
        folder,
        "--max-error",
        0.5,
        "--dry-run",
        "--out",
        tmp_path / "none",
        "--orders",
        1,
        capsys=capsys,
    )
    assert code == 0, err
    assert "(plan)" in printed
    assert not (tmp_path / "none").exists()


def test_wrong_arguments_are_said_in_a_line(folder: Path, tmp_path: Path, capsys: Any) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "blank.txt").write_text("\n \n")
    texts, dry = folder.parent / "texts.txt", "--dry-run"
    for arguments, said in (
        ((tmp_path / "nowhere", "--ratio", 2, dry), "no directory"),
        ((empty, "--ratio", 2, dry), "no config.json"),
        ((folder, "--ratio", 2), "give --out"),
        ((folder, "--ratio", 2, "--out", folder), "other than the model's"),
        ((folder, dry), "give a budget"),
        ((folder, "--ratio", 2, "--max-error", 0.1, dry), "one budget"),
        ((folder, "--ratio", 2, "--calibration", tmp_path / "no.txt", dry), "no file"),
        ((folder, "--ratio", 2, "--calibration", tmp_path / "blank.txt", dry), "no line"),
        ((folder, "--ratio", 2, "--orders", "two", dry), "--orders"),
        ((folder, "--ratio", 2, "--target", "nowhere", dry), "nowhere"),
        ((folder, "--ratio", 1e6, "--orders", 1, "--calibration", texts, dry), "cannot be met"),
    ):
        code, _, err = run(*arguments, capsys=capsys)
        assert code == 2, arguments
        # A slow processor tells the time left before it.
        *before, error = err.splitlines()
        assert said in error, err
        assert all("will take about" in line for line in before), err


def test_without_transformers_it_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = run(folder, "--ratio", 2, "--dry-run", capsys=capsys)
    assert code == 1
    assert "pip install 'polyadic[compress]'" in err


def test_places_that_cannot_be_written_are_refused_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    monkeypatch.setattr("polyadic.compress", lambda *_, **__: pytest.fail("time was spent"))
    for option, place, *more in (
        ("--json", tmp_path / "no" / "r.json", "--dry-run"),
        ("--html", tmp_path, "--dry-run"),
        ("--out", file / "small"),
    ):
        code, _, err = run(folder, "--ratio", 2, option, place, *more, capsys=capsys)
        assert code == 2
        assert option in err
        assert len(err.splitlines()) == 1, err


def test_layers_converted_before_are_kept(folder: Path, tmp_path: Path, capsys: Any) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    budget = ("--ratio", 2, "--orders", 1, "--out")
    queries, keys = (rf"encoder\.layer\.\d\.attention\.self\.{part}" for part in ("query", "key"))
    assert run(folder, *budget, first, "--target", queries, capsys=capsys)[0] == 0
    auto = transformers.quantizers.auto
    for mapping in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        mapping.pop("polyadic")  # as in a process of its own
    assert run(first, *budget, second, "--target", keys, capsys=capsys)[0] == 0
    once, twice = (
        transformers.AutoModel.from_pretrained(out, local_files_only=True)
        for out in (first, second)
    )
    for name, parameter in once.state_dict().items():
        if ".self.key.weight" not in name:
            assert torch.equal(twice.state_dict()[name], parameter), name
    assert isinstance(twice.encoder.layer[0].attention.self.key, CPLinear)
