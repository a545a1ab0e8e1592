"""Long jobs: killed anywhere, stopped by Ctrl-C, out of disk, or given what is not theirs."""

from __future__ import annotations

import functools
import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import polyadic
from benchmarks.reliability import jobs, kills
from benchmarks.reliability.kills import child, ended
from polyadic.durable import interrupts
from polyadic.durable.identity import of_module
from polyadic.finetune import distill, match_layers
from polyadic.nn import CPLinear


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: waiting for a disk shows nothing here."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as found:
        yield Path(found)


OFTEN = ("distill", "decompose")
# A run of the demo's language models takes many seconds.
EACH = [
    pytest.param(name, marks=pytest.mark.long if name.endswith("language") else ())
    for name in jobs.JOBS
]
OTHERS = [param for param in EACH if param.values[0] not in OFTEN]


@pytest.mark.parametrize("name", OFTEN)
def test_twenty_kills_at_random_moments(folder: Path, name: str) -> None:
    found = kills.at_random_moments(name, folder, kills=20, seed=0)
    assert found["kills"] == 20
    assert found["equal"] == found["ends"] > 0


@pytest.mark.parametrize("name", OTHERS)
def test_a_kill_at_calls_to_the_file_system(folder: Path, name: str) -> None:
    found = kills.at_file_operations(name, folder, most=4)
    assert found["equal"] == found["kills"] >= 4


@pytest.mark.long
@pytest.mark.parametrize("name", jobs.JOBS)
def test_many_kills(folder: Path, name: str) -> None:
    found = kills.at_random_moments(name, folder, kills=100, seed=1)
    assert found["equal"] == found["ends"] > 0
    # Each of the calls, but where a run takes seconds.
    found = kills.at_file_operations(name, folder, 60 if name.endswith("language") else None)
    assert found["equal"] == found["kills"] > 50


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("how", ["ctrl-c", "full disk"])
def test_a_stopped_job_says_why_and_goes_on(folder: Path, name: str, how: str) -> None:
    job = jobs.JOBS[name]
    wanted, _ = kills.expected(job, folder / "peace")
    state, message = folder / "state", folder / "message"
    state.mkdir()
    told = 0

    def stop() -> None:
        nonlocal told
        told += 1
        if told == 4:
            if how == "ctrl-c":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                limit = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (300, limit[1]))

    def run() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            job(state, stop)
        except (KeyboardInterrupt, OSError) as error:
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit[1], limit[1]))
            message.write_text(f"{type(error).__name__} {error}")

    assert ended(child(run)) == 0
    said = message.read_text()
    assert ("Interrupt" if how == "ctrl-c" else "could not be written") in said
    if how == "ctrl-c":
        assert any(state.rglob("*")), "nothing was saved"
    assert job(state, lambda: None) == wanted


def trained(folder: Path, **change: Any) -> Any:
    teacher = jobs.teacher()
    arguments: dict[str, Any] = {
        "student": jobs.converted(teacher),
        "teacher": teacher,
        "steps": 3,
        "batches": list(jobs.rows().split(8)),
        "checkpoint": folder / "state",
        "resume": True,
    }
    function = change.pop("function", distill)
    return function(**(arguments | change))


def other_teacher() -> nn.Sequential:
    model = jobs.teacher()
    with torch.no_grad():
        model[5].weight[0, 0] += 1
    return model


def other_rest() -> nn.Sequential:
    student = jobs.converted(jobs.teacher())
    with torch.no_grad():
        student[5].bias[0] += 1
    return student


OTHER = [
    ({"teacher": other_teacher()}, "teacher="),
    ({"student": other_rest()}, "the student's other tensors="),
    ({"batches": [x + 1 for x in jobs.rows().split(8)]}, "of other batches"),
    ({"optimizer": torch.optim.SGD}, "optimizer='Adam'"),
    ({"optimizer": functools.partial(torch.optim.Adam, eps=1e-3)}, "optimizer"),
    ({"lr": 0.5}, ", this one has 0.5"),
    ({"seed": 5}, "seed=0, this one has 5"),
]


def test_other_validation_batches_are_refused(tmp_path: Path) -> None:
    class EnoughError(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.step == 2:
            raise EnoughError

    own = {"validation": [jobs.rows()[:9]]}
    with pytest.raises(EnoughError):
        trained(tmp_path, checkpoint_every=1, callback=stop, **own)
    for other in ([jobs.rows()[:8]], False, lambda student: 1.0):
        with pytest.raises(ValueError, match="validation="):
            trained(tmp_path, validation=other)
    trained(tmp_path, **own)


@pytest.mark.parametrize("function", [distill, match_layers])
@pytest.mark.parametrize(("change", "text"), OTHER, ids=[text for _, text in OTHER])
def test_what_is_not_the_job_s_own_is_refused_by_name(
    tmp_path: Path, function: Any, change: dict[str, Any], text: str
) -> None:
    class EnoughError(Exception):
        pass

    def stop(*told: Any) -> None:
        if told[-1].step == 2:
            raise EnoughError

    with pytest.raises(EnoughError):
        trained(tmp_path, function=function, checkpoint_every=1, callback=stop)
    with pytest.raises(ValueError, match=text):
        trained(tmp_path, function=function, **change)
    trained(tmp_path, function=function)


def squeezed(folder: Path, **change: Any) -> Any:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "model": nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10)),
        "ratio": 2.0,
        "calibration": list(jobs.rows().split(20)),
        "iterations": 4,
        "checkpoint": folder / "c",
        "resume": True,
    }
    return polyadic.compress(**(arguments | change))


def test_a_compression_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    torch.manual_seed(7)
    other = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10))
    expected = jobs.digest(squeezed(tmp_path)[0])
    for change, text in (
        ({"model": other}, "model="),
        ({"calibration": list((jobs.rows() + 1).split(20))}, "calibration="),
        ({"ratio": 3.0}, "budget="),
        ({"seed": 1}, "seed=0, this one has 1"),
        ({"iterations": 5}, "options of the fits="),
        ({"resume": False}, "pass resume=True"),
        ({"checkpoint": None}, "resume=True needs checkpoint="),
    ):
        with pytest.raises(ValueError, match=text):
            squeezed(tmp_path, **change)
    assert jobs.digest(squeezed(tmp_path)[0]) == expected
    piece = next((tmp_path / "c").glob("fit-*"))
    piece.write_bytes(piece.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match="making it again"):
        assert jobs.digest(squeezed(tmp_path)[0]) == expected


def test_ctrl_c_leaves_a_compressed_model_as_it_was_or_whole() -> None:
    """At each of the places where it can come, by a signal in the middle of the exchange too."""
    batches = list(jobs.rows().split(20))

    def interrupted(at: int) -> tuple[list[str], str, bool]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU())
        runs = 0

        def forward(module: nn.Module, batch: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs == at:
                os.kill(os.getpid(), signal.SIGINT)
            return module(batch)

        try:
            polyadic.compress(
                model, ratio=2.0, calibration=batches, forward=forward, iterations=2, inplace=True
            )
        except KeyboardInterrupt:
            return [type(layer).__name__ for layer in model], jobs.digest(model), True
        return [type(layer).__name__ for layer in model], jobs.digest(model), False

    torch.manual_seed(0)
    own = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU())
    before = jobs.digest(own)
    whole = interrupted(0)
    stopped = 0
    for at in range(1, 24):
        names, found, was_stopped = interrupted(at)
        assert (names, found) == whole[:2] or found == before
        assert was_stopped or (names, found) == whole[:2]
        stopped += was_stopped
    assert 5 < stopped < 23


def test_interrupts_are_put_off_and_come_after() -> None:
    done = 0

    def interrupted(times: int, most: int | None) -> None:
        nonlocal done
        with interrupts.deferred(most):
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
                done += 1

    with pytest.raises(KeyboardInterrupt):
        interrupted(3, None)
    assert done == 3
    with pytest.raises(KeyboardInterrupt):
        interrupted(3, 1)
    assert done == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    told: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: told.append(number))
    try:
        with interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
            assert not told
        assert told == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_unhashable_layer_of_a_job_is_no_excuse() -> None:
    """A model on the meta device, or with tensors of other libraries, has an identity too."""
    with torch.device("meta"):
        layer = CPLinear(4, 4, rank=2)
    assert of_module(layer) != of_module(nn.Linear(4, 4))
