"""A fit that goes on from its checkpoint ends as if it had never stopped, bit for bit."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import polyadic
from polyadic import CPTensor, DecomposeInterrupted, Decomposition

SHAPE = ((4, 6), (5, 6))


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(24, 30, generator=torch.Generator().manual_seed(0), dtype=dtype)


def metric() -> Tensor:
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    return x.t() @ x


def given(rank: int) -> CPTensor:
    """Factors that lie in memory column by column."""
    draw = torch.Generator().manual_seed(2)
    factors = [torch.randn(rank, mode, generator=draw).t() for mode in (4, 6, 5, 6)]
    return CPTensor.from_factors(SHAPE, factors)


CASES: dict[str, dict[str, Any]] = {
    "race and further fits": {},
    "one start": {"start": "random", "tolerance": 0.0},
    "given factors": {"start": given(7)},
    "given factors to fill up": {"start": [given(3), "orthogonal"]},
    "metric": {"metric": metric()},
    "diagonal metric": {"metric": metric().diagonal()},
    "bound on the growth": {"max_growth": 1.2, "tolerance": 1e-2},
    "float64": {"weight": weight(torch.float64)},
    "complex": {"weight": weight(torch.complex64)},
    "huge": {"weight": weight() * 1e30},
}


def fitted(folder: Path | None = None, **change: Any) -> Decomposition:
    arguments: dict[str, Any] = {
        "weight": weight(),
        "tensorized_shape": SHAPE,
        "rank": 7,
        "iterations": 14,
        **change,
    }
    if folder is not None:
        arguments = {"checkpoint": folder / "state", "resume": True, **arguments}
    return polyadic.decompose(**arguments)


def same(one: Decomposition, other: Decomposition) -> None:
    for field in dataclasses.fields(Decomposition):
        if field.name not in ("cp", "seconds"):
            assert getattr(one, field.name) == getattr(other, field.name), field.name
    for a, b in zip(one.cp.factors, other.cp.factors, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_stopped_after_every_few_sweeps_it_ends_equal(case: str, tmp_path: Path) -> None:
    """The callback ends the fit again and again; in the end nothing tells."""
    options, stops = CASES[case], 0
    wanted = fitted(**options)
    while True:
        calls = 0

        def stop(iteration: int, error: float) -> bool:
            nonlocal calls
            calls += 1
            return calls == 5

        found = fitted(tmp_path, **options, callback=stop)
        if found.reason != "stopped by the callback":
            break
        stops += 1
    assert stops > 1
    same(found, wanted)
    # What has come to its end is not done again.
    same(fitted(tmp_path, **options, callback=lambda *_: pytest.fail("swept again")), wanted)


def test_ctrl_c_saves_the_sweep(tmp_path: Path) -> None:
    def interrupt(iteration: int, error: float) -> None:
        if iteration == 7:
            os.kill(os.getpid(), signal.SIGINT)

    # A shell that starts a command in the background has it ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(DecomposeInterrupted) as caught:
            fitted(tmp_path, start="random", callback=interrupt, checkpoint_every=100)
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught.value.decomposition.iterations == 7
    seen: list[int] = []
    found = fitted(tmp_path, start="random", callback=lambda i, _: seen.append(i))
    assert seen[0] == 8
    same(found, fitted(start="random"))


OTHER: list[tuple[dict[str, Any], str]] = [
    ({"weight": weight() + 1}, "weight="),
    ({"metric": metric()}, "metric='None'"),
    ({"tensorized_shape": ((6, 4), (5, 6))}, "tensorized_shape="),
    ({"rank": 6}, "rank=7, this one has 6"),
    ({"damping": 0.1}, "damping="),
    ({"start": "random"}, "start="),
    ({"start": given(7)}, "start="),
    ({"iterations": 15}, "iterations=14, this one has 15"),
    ({"tolerance": 0.0}, "tolerance="),
    ({"regularization": 0.1}, "regularization="),
    ({"max_growth": 3.0}, "max_growth=None, this one has 3.0"),
    ({"seed": 1}, "seed=0, this one has 1"),
    ({"resume": False}, "pass resume=True"),
    ({"checkpoint": None}, "resume=True needs checkpoint="),
    ({"checkpoint": 3}, "checkpoint must be a path"),
    ({"checkpoint_every": 0}, "checkpoint_every must be a positive int"),
    ({"checkpoint": "nowhere/state"}, "does not exist"),
]


@pytest.mark.parametrize(("change", "text"), OTHER, ids=[text for _, text in OTHER])
def test_what_is_not_the_fit_s_own_is_refused(
    change: dict[str, Any], text: str, tmp_path: Path
) -> None:
    fitted(tmp_path, callback=lambda i, _: i == 3)
    before = (tmp_path / "state").read_bytes()
    with pytest.raises((TypeError, ValueError), match=text):
        fitted(tmp_path, **change)
    assert (tmp_path / "state").read_bytes() == before


def test_a_closed_form_writes_nothing(tmp_path: Path) -> None:
    fitted(tmp_path, tensorized_shape=((24,), (30,)))
    assert not os.listdir(tmp_path)
