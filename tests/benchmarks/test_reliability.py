"""Hostile input, equal bits, and the page of what was tried; each check can fail."""

from __future__ import annotations

import ast
import random
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.pages import between
from benchmarks.reliability import damage, determinism, hostile, report
from benchmarks.reliability.__main__ import CALLS
from polyadic.nn import CPConv2d, CPLinear

HOSTILE = pytest.mark.parametrize("kind", [*hostile.KINDS, "files"])


@HOSTILE
def test_any_input_is_taken_or_refused_with_a_message(kind: str, tmp_path: Path) -> None:
    """An input that fails is made small by hypothesis."""
    make = hostile.Files(tmp_path).load if kind == "files" else hostile.KINDS[kind]

    @settings(
        max_examples=25 if kind in ("files", "command lines") else 150,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(draw=st.randoms(use_true_random=False))
    def check(draw: random.Random) -> None:
        end = hostile.attempt(make(draw))
        assert end in ("done", "refused"), end

    check()


@HOSTILE
def test_inputs_are_hostile_and_some_are_not(kind: str) -> None:
    found = hostile.run(kind, 10 if kind == "command lines" else 150, seed=3)
    assert found["faults"] == {}
    assert found["done"] > 0
    assert found["refused"] > 0 or kind == "command lines"


@pytest.mark.parametrize("error", [RuntimeError("raw"), AttributeError("x"), ValueError("")])
def test_a_fault_would_be_seen(error: Exception) -> None:
    def fail() -> None:
        raise error

    assert hostile.attempt(fail) not in ("done", "refused")


@pytest.mark.long
@pytest.mark.parametrize("kind", CALLS)
def test_many_hostile_calls(kind: str) -> None:
    """No fault, no hang, no growth."""
    found = hostile.run(kind, CALLS[kind] // 2, seed=1)
    assert found["faults"] == {}
    assert found["grown"] < 64


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: CPLinear(4, 4, rank=2, bias="no"), "bias must be True or False"),
        (lambda: CPConv2d(4, 4, 3, rank=2, bias=torch.ones(2)), "bias must be True or False"),
        (lambda: CPLinear(4, 4, rank=2, dtype="float32"), "dtype must be floating point"),
        (lambda: CPLinear(4, 4, rank=2, dtype=0), "dtype must be floating point"),
        (lambda: CPLinear(torch.ones(2), 4, rank=2), "must be a positive int"),
        (lambda: CPLinear(4, 4, rank=2, order=2**31), "order must be a positive int of at most 64"),
        (lambda: CPLinear(2**61 - 1, 4, rank=2), "in_features must be a positive int of at most"),
        (lambda: CPLinear(4, 4, rank=2**62, order=1), "is too large|at most"),
        (lambda: CPLinear(4, 4, rank=2)(torch.eye(4).to_sparse()), "must be a dense tensor"),
        (
            lambda: CPConv2d(4, 4, 3, rank=2, padding=2)(torch.ones(1, 4, 0, 8)),
            "must not be empty in a spatial dimension",
        ),
    ],
)
def test_what_hostile_input_found_is_refused_by_name(call: Any, text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        call()


def test_no_pickle_is_on_a_load_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the package unpickles, except for the restricted loader of old checkpoints."""
    root = Path(sys.modules["polyadic"].__file__ or "").parent
    loads = []
    for path in [*root.rglob("*.py"), *(root.parent / "polyadic_cli").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "dill", "shelve", "marshal", "joblib"} & set(names), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), path
                loads.append(path.name)
    assert loads == ["checkpoint.py"]

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("a pickle was opened")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    monkeypatch.setattr("torch.load", refuse)
    files = hostile.Files(tmp_path)
    draw = random.Random(0)
    ends = [hostile.attempt(files.load(draw)) for _ in range(40)]
    assert set(ends) == {"done", "refused"}


@pytest.mark.parametrize(
    "way", [way for way in determinism.WAYS if "new process" not in way and "8" not in way]
)
def test_the_same_bits(way: str) -> None:
    found = determinism.compare(way, determinism.everything())
    assert found["equal"] == found["compared"] == 39


@pytest.mark.slow
@pytest.mark.parametrize("way", ["in 8 threads at once", "in a new process"])
def test_the_same_bits_in_many_threads_and_new_processes(way: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = determinism.compare(way, determinism.everything())
    finally:
        torch.set_num_threads(threads)
    assert found["equal"] == found["compared"] == 39


def test_other_bits_would_be_seen() -> None:
    wanted = determinism.everything()
    wanted["linear 1 torch.float32"] = "another"
    assert determinism.compare("a second time", wanted)["equal"] == 38


def test_a_shared_layer_in_eight_threads_at_once() -> None:
    """One layer, many threads, forward and backward to their own inputs."""
    layers = [CPLinear(24, 12, rank=4), CPConv2d(4, 6, 3, rank=4)]
    inputs = [torch.randn(5, 24), torch.randn(2, 4, 7, 7)]
    layers[0].requires_grad_(False)
    layers[1].requires_grad_(False)

    def results() -> list[torch.Tensor]:
        found = []
        for layer, x in zip(layers, inputs, strict=True):
            own = x.clone().requires_grad_()
            y = layer(own)
            found += [y.detach(), *torch.autograd.grad(y.square().sum(), own)]
        return found

    wanted = results()
    wrong: list[int] = []

    def work() -> None:
        for _ in range(20):
            wrong.extend(not torch.equal(a, b) for a, b in zip(results(), wanted, strict=True))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 8 * 20 * 4
    assert not any(wrong)


def test_flips_and_readers_are_counted() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for found in (
            damage.flipped_model(Path(folder) / "model", 301),
            damage.flipped_checkpoint(Path(folder) / "state", 301),
        ):
            assert found["noticed"] == found["tried"] > 3


def test_the_page_is_that_of_the_records() -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    assert page == between(page, report.MARK, report.section(*report.stored()))
    for record in report.stored()[1]:
        assert record.get("equal", 0) == record.get("ends", record.get("compared", 0)) or (
            record["kind"] not in ("kills", "kills at calls", "determinism")
        )
