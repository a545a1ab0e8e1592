"""Every warning on the command line is one plain sentence, whoever warns."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from polyadic.planner import calibrated
from polyadic_cli.main import main
from polyadic_cli.warned import in_plain_words

pytest.importorskip("typer")
SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calibrations that cannot be read, of which every command warns that plans anything."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "polyadic").mkdir(parents=True)
    for dtype in ("float32", "float64"):
        file = f"machine-cpu-{dtype}-{torch.get_num_threads()}.json"
        (tmp_path / "cache" / "polyadic" / file).write_text("{}")
    calibrated.machine_at.cache_clear()
    yield
    calibrated.machine_at.cache_clear()


@pytest.fixture
def small_bert(tmp_path: Path) -> Path:
    """A BERT whose files hold a tensor too many and lack one, and whose padding row is not zero."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        architectures=["BertModel"],
    )
    model = transformers.BertModel(config)
    torch.nn.init.normal_(model.embeddings.word_embeddings.weight)
    state = model.state_dict()
    del state["pooler.dense.bias"]
    state["cls.extra"] = torch.zeros(1)
    model.save_pretrained(tmp_path / "bert", state_dict=state)
    return tmp_path / "bert"


def lines_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()  # what transformers said when the model was made
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code in (0, None)
    return capsys.readouterr().err.splitlines()


@pytest.mark.usefixtures("damaged")
@pytest.mark.parametrize("command", ["plan", "verify", "compress"])
def test_a_command_warns_in_a_line(
    command: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: Any
) -> None:
    arguments = {
        "plan": ["--in", "8", "--out", "8", "--rank", "2"],
        "verify": ["--in", "8", "--out", "8", "--rank", "2"],
        "compress": [
            "--max-error",
            "0.9",
            "--orders",
            "1",
            "--target",
            "embeddings.word_embeddings",
            "--out",
            str(tmp_path / "small"),
        ],
    }[command]
    if command == "compress":
        arguments.insert(0, str(request.getfixturevalue("small_bert")))
    lines = lines_of([command, *arguments], capsys)
    told = [line.removeprefix("polyadic: warning: ") for line in lines]
    assert any(line.startswith("ignoring the calibration in ") for line in told)
    assert all(line.startswith("polyadic: ") for line in lines), lines
    assert not any("Warning:" in line or ".py" in line for line in lines), lines
    if command == "compress":
        assert any("tensors that" in t and "random now: pooler.dense.bias" in t for t in told)
        assert any("has no place for: cls.extra" in line for line in told)
        assert any("padding_idx, is not zero" in line for line in told)
        assert "LOAD REPORT" not in "".join(lines)


def test_others_warn_in_a_line_too(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """torch names its own source, and transformers colours and breaks what it logs."""
    before = warnings.showwarning
    # Another test may have made transformers quiet.
    with in_plain_words(), caplog.at_level(logging.WARNING, logger="transformers.models"):
        warnings.warn(
            "beta.\n  Use it (Triggered internally at /a/b.cpp:3.)", UserWarning, stacklevel=1
        )
        logging.getLogger("transformers.models").warning("\x1b[1mtwo\n\nlines\x1b[0m of %s", "it")
    assert capsys.readouterr().err == (
        "polyadic: warning: beta. Use it\npolyadic: warning: two lines of it\n"
    )
    assert warnings.showwarning is before


def test_pythons_own_form_can_be_asked_for() -> None:
    """Nothing is lost: file and line are shown to whoever asks Python for warnings."""
    code = (
        "import warnings; from polyadic_cli.warned import in_plain_words\n"
        "with in_plain_words(): warnings.warn('so it is')"
    )
    for asked, said in (("", "polyadic: warning: so it is\n"), ("default", "UserWarning: so it")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONWARNINGS": asked},
        )
        assert said in done.stderr
