"""calibrate(): rates measured, stored and found again; a bad store is ignored with a warning."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

import polyadic
from polyadic import _machines, _planner
from polyadic._cost import built_in

calibration = sys.modules["polyadic.calibrate"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _machines._machine.cache_clear()
    yield tmp_path / "polyadic"
    _machines._machine.cache_clear()


def _default():
    return built_in("cpu", torch.float32, torch.get_num_threads())


def test_rates_are_measured_stored_and_found_again(cache: Path) -> None:
    assert _machines.machine_for("cpu", torch.float32) == _default()
    state = torch.get_rng_state()
    machine = polyadic.calibrate()
    assert torch.equal(torch.get_rng_state(), state)
    assert machine.source == "calibrated"
    for field in dataclasses.fields(machine):
        if field.name != "source":
            assert getattr(machine, field.name) > 0, field.name
    assert len(list(cache.iterdir())) == 1
    assert _machines.machine_for("cpu", torch.float32) == machine
    assert _machines.machine_for("cpu", torch.float64).source == "built-in"
    found = polyadic.explain(polyadic.nn.CPLinear(8, 8, rank=2), batch=4)
    assert "calibrated machine numbers" in str(found)


def test_plans_follow_a_new_calibration(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice made before is made anew by the numbers just measured."""
    fmt = polyadic.LinearFormat((16, 16, 16), (16, 16, 16), 256)
    place = (fmt, 1, torch.float32, "cpu", "balanced")
    before = _planner.choose_linear(*place)
    assert len(before.forward.in_groups) > 1
    slow = {"launch": 1.0, "call": 1.0, "dense_call": 1.0}
    monkeypatch.setattr(calibration, "_calls", lambda *given: slow)
    polyadic.calibrate()
    try:
        assert _planner.choose_linear(*place) != before
    finally:
        _planner.forget()


def _store(change) -> None:
    path = _machines.store(_default(), "cpu", torch.float32, torch.get_num_threads())
    content = json.loads(path.read_text())
    path.write_text(change(content))
    _machines._machine.cache_clear()


@pytest.mark.parametrize(
    "change",
    [
        lambda content: json.dumps(content)[:40],
        lambda content: "",
        lambda content: "[1, 2]",
        lambda content: json.dumps({**content, "format_version": 99}),
        lambda content: json.dumps({**content, "fingerprint": {"processor": "another"}}),
        lambda content: json.dumps({**content, "machine": {"gemm": 1.0}}),
        lambda content: json.dumps({**content, "machine": {**content["machine"], "gemm": "fast"}}),
        lambda content: json.dumps({**content, "machine": {**content["machine"], "gemm": 0}}),
        lambda content: json.dumps(
            {**content, "machine": {**content["machine"], "launch": float("nan")}}
        ),
    ],
    ids=[
        "truncated", "empty", "list", "version", "foreign", "fields", "text", "zero", "nan",
    ],
)  # fmt: skip
def test_a_bad_store_is_ignored_with_a_warning(cache: Path, change) -> None:
    _store(change)
    with pytest.warns(RuntimeWarning, match=r"ignoring the calibration.*polyadic\.calibrate"):
        assert _machines.machine_for("cpu", torch.float32) == _default()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _machines.machine_for("cpu", torch.float32)


def test_a_good_store_is_taken_without_a_warning(cache: Path) -> None:
    _store(json.dumps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _machines.machine_for("cpu", torch.float32) == _default()


def test_an_integer_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match="floating point"):
        polyadic.calibrate(dtype=torch.int32)
