"""``polyadic.tune`` by a clock that lets one plan win: used, reported, stored, forgotten."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import polyadic
from polyadic import LinearPlan, LinearRoute
from polyadic.measure import tuning
from polyadic.nn import CPConv2d, CPEmbedding, CPLinear, CPSharedInput
from polyadic.planner import choice, tuned
from polyadic.planner.request import place_now

SPLIT = LinearRoute((1, 2), (1, 1, 1))
WINNER = LinearPlan(SPLIT, SPLIT, "x and z")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of its own, and nothing tuned before or behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    polyadic.untune()
    monkeypatch.setattr(tuning, "LEAST_SECONDS", 0.0)
    yield tmp_path / "polyadic"
    polyadic.untune()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Have one plan take a second, all others two."""

    def let_win(winner: Any) -> None:
        def seconds(plan: Any, run: Any, device: str) -> float:
            run()
            return 1.0 if plan == winner else 2.0

        monkeypatch.setattr(tuning, "seconds_of", seconds)

    return let_win


def layer() -> CPLinear:
    return CPLinear(24, 30, rank=4, in_shape=(2, 3, 4), out_shape=(5, 3, 2))


def test_the_fastest_is_used_and_reported(clock: Any) -> None:
    clock(WINNER)
    cp = layer()
    model = nn.Sequential(cp, nn.ReLU())
    before = choice.choose(cp.request(7))
    assert before != WINNER
    x = torch.randn(7, 24)
    expected = model(x)
    report = polyadic.tune(model, x)
    assert choice.choose(cp.request(7)) == WINNER
    # For the batches up to the next power of two, and no others.
    assert choice.choose(cp.request(8)) == WINNER
    assert choice.choose(cp.request(9)) != WINNER
    assert polyadic.explain(cp, batch=7).chosen.plan == WINNER
    torch.testing.assert_close(model(x), expected)
    (found,) = report.layers
    assert (found.layer, found.before, found.after) == ("0", before, WINNER)
    assert (found.seconds_before, found.seconds_after) == (2.0, 1.0)
    assert "2.00x as fast" in str(report)
    assert "1 of 1 plans changed" in str(report)
    polyadic.untune()
    assert choice.choose(cp.request(7)) == before


def test_nothing_changes_where_the_choice_is_the_fastest(clock: Any) -> None:
    cp = layer()
    before = choice.choose(cp.request(7))
    clock(before)
    report = polyadic.tune(cp, torch.randn(7, 24))
    assert not report.layers[0].changed
    assert choice.choose(cp.request(7)) == before


def test_noise_is_outlasted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that is 4 % faster wins, though every round is slower or faster as a whole."""
    cp = layer()
    before = choice.choose(cp.request(7))
    calls: dict[Any, int] = {}

    def seconds(plan: Any, run: Any, device: str) -> float:
        turn = calls[plan] = calls.get(plan, 0) + 1
        if plan not in (WINNER, before):
            return 2.0
        disturbed = 1 + 0.2 * (turn % 3)
        # Once the slower one is lucky, and its least time is the least of all.
        lucky = 0.8 if plan == before and turn == 5 else 1.0
        return disturbed * lucky * (1.0 if plan == WINNER else 1.04)

    monkeypatch.setattr(tuning, "seconds_of", seconds)
    polyadic.tune(cp, torch.randn(7, 24))
    assert choice.choose(cp.request(7)) == WINNER
    assert calls[WINNER] == calls[before] == tuning.MOST_ROUNDS
    assert max(n for plan, n in calls.items() if plan not in (WINNER, before)) <= 2


def test_a_plan_that_is_hardly_faster_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cp = layer()
    before = choice.choose(cp.request(7))
    times = {before: 1.005, WINNER: 1.0}
    monkeypatch.setattr(tuning, "seconds_of", lambda plan, run, device: times.get(plan, 2.0))
    assert not polyadic.tune(cp, torch.randn(7, 24)).layers[0].changed


def test_stored_plans_hold_in_another_session(clock: Any, cache: Path) -> None:
    clock(WINNER)
    cp = layer()
    polyadic.tune(cp, torch.randn(7, 24), store=True)
    tuned._held.clear()
    tuned._stored.cache_clear()
    choice.forget()
    assert choice.choose(cp.request(7)) == WINNER
    (path,) = cache.glob("tuned-*.json")
    polyadic.untune(stored=False)
    assert choice.choose(cp.request(7)) == WINNER
    polyadic.untune()
    assert not path.exists()
    assert choice.choose(cp.request(7)) != WINNER


@pytest.mark.parametrize("broken", ["processor", "json", "plan"])
def test_stored_plans_of_elsewhere_are_left_alone(clock: Any, cache: Path, broken: str) -> None:
    clock(WINNER)
    cp = layer()
    polyadic.tune(cp, torch.randn(7, 24), store=True)
    path = tuned.tuned_file(place_now("cpu", torch.float32))
    content = json.loads(path.read_text())
    if broken == "processor":
        content["made_on"]["processor"] = "another"
    elif broken == "plan":
        next(iter(content["plans"].values()))["keep"] = 9
    path.write_text("{" if broken == "json" else json.dumps(content))
    polyadic.untune(stored=False)
    with pytest.warns(RuntimeWarning, match="ignoring the tuned plans"):
        assert choice.choose(cp.request(7)) != WINNER


def test_a_folder_that_cannot_be_written(clock: Any, cache: Path) -> None:
    clock(WINNER)
    cache.write_text("no folder")
    cp = layer()
    with pytest.warns(RuntimeWarning, match="hold for this process alone"):
        polyadic.tune(cp, torch.randn(7, 24), store=True)
    assert choice.choose(cp.request(7)) == WINNER


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (CPConv2d(4, 6, 3, padding=1, rank=3), torch.randn(2, 4, 5, 5)),
        (CPEmbedding(30, 12, rank=3), torch.randint(30, (2, 5))),
        (CPSharedInput([CPLinear(24, 8, rank=2), CPLinear(24, 9, rank=3)]), torch.randn(4, 24)),
    ],
)
def test_every_kind_of_layer(
    model: nn.Module, x: Any, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    monkeypatch.setattr(tuning, "SAMPLE", 0.0)
    state = {name: p.clone() for name, p in model.named_parameters()}
    report = polyadic.tune(model, x, training=training)
    assert report.layers
    assert report.training == training
    for name, p in model.named_parameters():
        assert p.grad is None
        assert torch.equal(p, state[name])
    for found in report.layers:
        assert found.seconds_after <= found.seconds_before


def test_a_failing_timer_leaves_no_plan_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    cp = layer()
    before = choice.choose(cp.request(7))

    def fails(plan: Any, run: Any, device: str) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "seconds_of", fails)
    with pytest.raises(KeyboardInterrupt):
        polyadic.tune(cp, torch.randn(7, 24))
    assert choice.choose(cp.request(7)) == before


def test_where_nothing_can_be_tuned() -> None:
    with pytest.raises(ValueError, match="reaches no CP layer"):
        polyadic.tune(nn.Linear(4, 3), torch.randn(2, 4))
    with pytest.raises(TypeError, match="must be a torch"):
        polyadic.tune(torch.relu, torch.randn(2, 4))


def test_plans_that_another_process_has_stored_stay() -> None:
    place = place_now("cpu", torch.float32)
    route = LinearRoute((1,), (1,))
    tuned.store(place, {"first": LinearPlan(route, route)})
    assert "first" in tuned._stored(place)
    file = tuned.tuned_file(place)
    content = json.loads(file.read_text(encoding="utf-8"))
    content["plans"]["of another"] = content["plans"]["first"]
    file.write_text(json.dumps(content), encoding="utf-8")
    tuned.store(place, {"second": LinearPlan(route, route)})
    assert tuned._stored(place).keys() == {"first", "of another", "second"}
