"""calibrate(): rates measured, stored and found again; a bad store is ignored with a warning."""

from __future__ import annotations

import dataclasses
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import polyadic
from polyadic.measure import calibration
from polyadic.planner import calibrated, choice
from polyadic.planner.calibrated import machine_at
from polyadic.planner.machine import built_in
from polyadic.planner.request import place_now, request

HERE = place_now("cpu", torch.float32)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine_at.cache_clear()
    yield tmp_path / "polyadic"
    machine_at.cache_clear()


def _default():
    return built_in(*HERE)


def test_rates_are_measured_stored_and_found_again(cache: Path) -> None:
    assert machine_at(HERE) == _default()
    state = torch.get_rng_state()
    machine = polyadic.calibrate()
    assert torch.equal(torch.get_rng_state(), state)
    assert machine.source == "calibrated"
    for field in dataclasses.fields(machine):
        # A processor has no kernels beside its operations and no queue, and a call's time is the
        # mean of forward and backward.
        means = ("backward_call", "dense_backward_call")
        if field.name not in ("source", "kernel", "queued", *means):
            assert getattr(machine, field.name) > 0, field.name
    assert len(list(cache.iterdir())) == 1
    assert machine_at(HERE) == machine
    assert machine_at(HERE._replace(dtype=torch.float64)).source == "built-in"
    found = polyadic.explain(polyadic.nn.CPLinear(8, 8, rank=2), batch=4)
    assert "calibrated machine numbers" in str(found)


def test_plans_follow_a_new_calibration(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice made before is made anew by the numbers just measured."""
    fmt = polyadic.LinearFormat((16, 16, 16), (16, 16, 16), 256)
    asked = request(fmt, 1)
    before = choice.choose(asked)
    assert len(before.forward.in_groups) > 1
    slow = {"launch": 1.0, "view": 1.0, "call": 1.0, "dense_call": 1.0}
    monkeypatch.setattr(calibration, "calls_of_layers", lambda *given: slow)
    polyadic.calibrate()
    try:
        assert choice.choose(asked) != before
    finally:
        choice.forget()


def _store(change) -> None:
    path = calibrated.store(_default(), HERE)
    content = json.loads(path.read_text())
    path.write_text(change(content))
    machine_at.cache_clear()


@pytest.mark.parametrize(
    "change",
    [
        lambda content: json.dumps(content)[:40],
        lambda content: "",
        lambda content: "[1, 2]",
        lambda content: json.dumps({**content, "format_version": 99}),
        lambda content: json.dumps({**content, "made_on": {"processor": "another"}}),
        lambda content: json.dumps({**content, "machine": {"gemm": 1.0}}),
        lambda content: json.dumps({**content, "machine": {**content["machine"], "gemm": "fast"}}),
        lambda content: json.dumps({**content, "machine": {**content["machine"], "gemm": 0}}),
        lambda content: json.dumps(
            {**content, "machine": {**content["machine"], "launch": float("nan")}}
        ),
    ],
    ids=[
        "truncated",
        "empty",
        "list",
        "version",
        "foreign",
        "fields",
        "text",
        "zero",
        "nan",
    ],
)
def test_a_bad_store_is_ignored_with_a_warning(cache: Path, change) -> None:
    _store(change)
    with pytest.warns(RuntimeWarning, match=r"ignoring the calibration.*polyadic\.calibrate"):
        assert machine_at(HERE) == _default()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        machine_at(HERE)


def test_a_good_store_is_taken_without_a_warning(cache: Path) -> None:
    _store(json.dumps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert machine_at(HERE) == _default()


def test_an_integer_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match="floating point"):
        polyadic.calibrate(dtype=torch.int32)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"\xff\xfe\x00",
        lambda content: b"[" * 100_000,
        lambda content: json.dumps(
            {**content, "machine": {**content["machine"], "gemm": 10**400}}
        ).encode(),
        lambda content: json.dumps(
            {**content, "machine": {**content["machine"], "source": ["calibrated"]}}
        ).encode(),
    ],
    ids=["not text", "deep", "huge", "source"],
)
def test_garbage_is_ignored_with_a_warning_too(cache: Path, change) -> None:
    path = calibrated.store(_default(), HERE)
    path.write_bytes(change(json.loads(path.read_text())))
    machine_at.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"ignoring the calibration.*polyadic\.calibrate"):
        assert machine_at(HERE) == _default()


def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes the time."""
    for name in ("gemm", "stream"):
        monkeypatch.setattr(calibration.Rates, name, lambda self: {})
    monkeypatch.setattr(calibration.Rates, "convolutions", lambda self, machine: {})
    monkeypatch.setattr(calibration, "calls_of_layers", lambda *given: {"launch": 1e-6})


def test_a_calibration_that_cannot_be_stored_holds_for_the_process(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _quick(monkeypatch)
    cache.write_text("no folder")
    with pytest.warns(RuntimeWarning, match="holds for this process alone"):
        machine = polyadic.calibrate()
    assert machine_at(HERE) == machine
    cache.unlink()
    polyadic.calibrate()
    assert [path.suffix for path in cache.iterdir()] == [".json"]
    next(cache.iterdir()).unlink()
    machine_at.cache_clear()
    assert machine_at(HERE) == _default()


def test_no_home_folder_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    _quick(monkeypatch)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    machine_at.cache_clear()
    try:
        assert machine_at(HERE) == _default()
        with pytest.warns(RuntimeWarning, match="Set XDG_CACHE_HOME"):
            machine = polyadic.calibrate()
        assert machine_at(HERE) == machine
    finally:
        calibrated._unwritten.clear()
        machine_at.cache_clear()


def test_a_relative_cache_folder_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    assert calibrated.calibration_file(HERE).parent == (tmp_path / ".cache" / "polyadic")


def test_calibrations_at_once_are_each_written_whole(cache: Path) -> None:
    machines = [dataclasses.replace(_default(), launch=float(i + 1)) for i in range(4)]

    def store(machine) -> None:
        for _ in range(30):
            assert calibrated.store(machine, HERE) is not None

    with ThreadPoolExecutor(len(machines)) as pool:
        list(pool.map(store, machines))
    (path,) = cache.iterdir()
    assert json.loads(path.read_text())["machine"]["launch"] in (1.0, 2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "float32"}, TypeError, "floating point of two bytes or more"),
        ({"dtype": torch.complex64}, TypeError, "measure in torch.float32"),
        ({"dtype": torch.float8_e4m3fn}, TypeError, "got torch.float8_e4m3fn"),
        ({"device": "tpu"}, ValueError, "device must be one torch knows"),
        ({"device": None}, TypeError, "device must be text"),
        ({"device": "meta"}, ValueError, "'meta' computes nothing"),
    ],
)
def test_wrong_options_are_refused(options, error, message) -> None:
    with pytest.raises(error, match=message):
        polyadic.calibrate(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device 'cuda' is not there"):
        polyadic.calibrate("cuda")


def test_the_tests_rest_on_the_built_in_numbers() -> None:
    """Whoever runs them may have calibrated the machine."""
    usual = Path.home() / ".cache" / "polyadic"
    assert usual not in calibrated.calibration_file(HERE).parents
    assert machine_at(HERE).source == "built-in"
