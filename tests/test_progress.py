"""What long work says about how far it is, by a clock that the test moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyadic
from polyadic import progress
from polyadic.compression.curves import LARGEST_SWEEP, ranks_to_fit, work_of_sweep
from polyadic.compression.fits import FIT_SWEEPS, LEAST_FIT_SWEEPS, MOST_WORK, sweeps_of
from polyadic.compression.targets import find_targets
from polyadic.fitting.work import sweep_work
from polyadic.planner.calibrated import machine_at
from polyadic.planner.request import place_now
from polyadic.progress import Meter, clock
from polyadic.surgery import find


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless its only entry is changed."""
    at = [0.0]
    monkeypatch.setattr(progress, "now", lambda: at[0])
    return at


def test_time_left_is_that_of_the_stage_at_the_pace_so_far(seconds: list[float]) -> None:
    said: list[str] = []
    meter = Meter("work", said.append)
    meter.plan("first", [100.0, 300.0])
    meter.tell("first", 0, 2)
    seconds[0] = 200.0  # twice as long as planned, in a quarter of the work
    meter.tell("first", 1, 2, "a")
    left = 300 * (200 + 40) / (100 + 40)
    assert said.pop() == f"work, first, 1 of 2, a, 3:20 so far, about {clock(left)} left for first"
    seconds[0] = 800.0
    meter.tell("first", 2, 2)
    assert said.pop() == "work, first, 2 of 2, 13:20 so far"
    meter.plan("second", [50.0, 50.0])  # goes on at the pace of the first stage
    meter.tell("second", 0, 2)
    seconds[0] = 900.0
    meter.tell("second", 1, 2)
    left = 50 * (900 + 50) / (450 + 50)
    assert said == [f"work, second, 1 of 2, 15:00 so far, about {clock(left)} left for second"]


def test_small_first_pieces_do_not_tell_the_time_of_large_ones(seconds: list[float]) -> None:
    """A hundredth of the work that takes ten times as long moves the time left by little."""
    said: list[str] = []
    meter = Meter("work", said.append)
    meter.plan("layers", [1.0, 199.0])
    meter.tell("layers", 0, 2)
    seconds[0] = 11.0
    meter.tell("layers", 1, 2, "small")
    words = f"about {clock(199 * 31 / 21)} left for layers"
    assert said == [f"work, layers, 1 of 2, small, 0:11 so far, {words}"]


@pytest.mark.parametrize("plan", [None, [0.0, 0.0]], ids=["none", "of no time"])
def test_a_part_of_which_no_plan_tells_says_no_time_left(
    plan: list[float] | None, seconds: list[float]
) -> None:
    """Of two pieces, one may take a second and the other a minute."""
    said: list[str] = []
    meter = Meter("work", said.append)
    if plan is not None:
        meter.plan("reading", plan)
    meter.tell("reading", 0, 2)
    seconds[0] = 11.0
    meter.tell("reading", 1, 2)
    assert said == ["work, reading, 1 of 2, 0:11 so far"]


def test_without_a_plan_pieces_count_alike(seconds: list[float]) -> None:
    said: list[str] = []
    meter = Meter("work", said.append)
    meter.tell("", 0, 4)
    seconds[0] = 30.0
    meter.tell("", 1, 4)
    assert said == ["work, 1 of 4, 0:30 so far, about 1:30 left"]


def test_a_compression_says_how_long_before_its_first_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("polyadic.compression.estimate.LONG", 0.0)
    monkeypatch.setattr("polyadic.compression.estimate.SHARE_OF_GEMM", 1e-7)
    asked: list[str] = []
    fitted = polyadic.compression.curves.fitted

    def noted(*args: object, **options: object) -> object:
        asked.extend(record.message for record in caplog.records)
        return fitted(*args, **options)

    monkeypatch.setattr("polyadic.compression.curves.fitted", noted)
    torch.manual_seed(0)
    with caplog.at_level("INFO", "polyadic"):
        polyadic.compress(nn.Sequential(nn.Linear(24, 36)), ratio=2, orders=(1, 2), dry_run=True)
    rate = 1e-7 * machine_at(place_now("cpu", torch.float32)).gemm / 2
    targets, _ = find_targets(find(nn.Sequential(nn.Linear(24, 36))), (1, 2), {})
    candidate = targets[0].candidates[1]
    ranks = ranks_to_fit(targets[0], candidate, None, 1 / 2, None)
    assert len(ranks) == 2
    expected = 8 * sum(work_of_sweep(candidate, None, rank) for rank in ranks) / rate
    words = f"compress, the error curves will take about {progress.clock(expected)}"
    assert asked[0] == words


def test_fits_that_take_no_time_are_not_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("polyadic.compression.estimate.LONG", 0.0)
    with caplog.at_level("INFO", "polyadic"):
        polyadic.compress(nn.Sequential(nn.Linear(24, 36)), ratio=2, orders=(1,))
    assert caplog.messages[0] == "compress, the error curves will take about 0:00"


def test_the_work_of_a_sweep_is_that_of_its_products() -> None:
    """Where the rank is small, the weight times two Khatri-Rao matrices is nearly all of it."""
    assert sweep_work(((40, 50), (30, 20)), 1, None, (0,)) == pytest.approx(2.4e6, rel=0.01)
    # A diagonal metric adds a system for each row of a factor, a full one products with Σ.
    plain, diagonal, full = (
        sweep_work(((200, 150), (16, 24)), 300, dims, (0,)) for dims in (None, 1, 2)
    )
    assert diagonal > plain + 350 * 300**3 / 3
    assert full > plain + 8 * 30000**2 * 300


def test_sweeps_of_large_fits_are_bounded() -> None:
    """An embedding of many rows is weighed at no rank whose sweep would take too long."""
    table = nn.Embedding(30522, 384, _weight=torch.zeros(30522, 384))
    targets, _ = find_targets(find(nn.Sequential(table)), (1, 2), {})
    target, candidate = targets[0], targets[0].candidates[1]
    counts = torch.ones(30522)
    (rank,) = ranks_to_fit(target, candidate, counts, 1 / 4, None)
    assert work_of_sweep(candidate, counts, rank) <= LARGEST_SWEEP
    assert work_of_sweep(candidate, counts, rank + 1) > LARGEST_SWEEP
    sweeps = sweeps_of(candidate, counts, rank)
    assert LEAST_FIT_SWEEPS <= sweeps < FIT_SWEEPS
    assert (sweeps + 1) * work_of_sweep(candidate, counts, rank) > MOST_WORK
    assert sweeps_of(candidate, counts, 4) == FIT_SWEEPS
