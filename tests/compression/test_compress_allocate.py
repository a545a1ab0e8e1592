"""Allocation within a budget, against every choice there is."""

from __future__ import annotations

import itertools
import random

import pytest

from polyadic.compression.allocate import UnreachableError, allocate


def drawn(seed: int, layers: int) -> list[list[tuple[float, float]]]:
    """Layers with options of falling loss, not convex, and some that are no good."""
    draw = random.Random(seed)
    found = []
    for _ in range(layers):
        costs = sorted(draw.sample(range(1, 60), draw.randint(2, 7)))
        losses = sorted((draw.random() for _ in costs), reverse=True)
        options = [*zip(map(float, costs), losses, strict=True)]
        options.append((draw.uniform(1, 60), 1.0))
        draw.shuffle(options)
        found.append(options)
    return found


def best(options: list[list[tuple[float, float]]], budget: float) -> float:
    """The least loss of all choices within the budget."""
    return min(
        (
            sum(loss for _, loss in choice)
            for choice in itertools.product(*options)
            if sum(cost for cost, _ in choice) <= budget
        ),
        default=float("inf"),
    )


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("seed", range(40))
def test_one_and_two_layers_are_optimal(seed: int, layers: int) -> None:
    options = drawn(seed, layers)
    budget = random.Random(seed).uniform(0.3, 0.9) * 60 * layers
    least = sum(min(cost for cost, _ in each) for each in options)
    if least > budget:
        with pytest.raises(UnreachableError) as caught:
            allocate(options, budget)
        assert caught.value.least == pytest.approx(least)
        return
    found = allocate(options, budget)
    assert found.cost <= budget
    assert found.loss == pytest.approx(best(options, budget))


@pytest.mark.parametrize("seed", range(40))
def test_more_layers_are_within_the_bound_and_never_better_than_the_best(seed: int) -> None:
    options = drawn(seed, 4)
    budget = 100.0
    found = allocate(options, budget)
    exact = best(options, budget)
    assert found.cost <= budget
    assert found.bound <= exact + 1e-12
    assert exact <= found.loss + 1e-12
    # The relaxation divides one layer at most, so that rounding loses one segment at most.
    assert found.loss - found.bound <= 1.0
    assert found.cost == sum(each[i][0] for each, i in zip(options, found.chosen, strict=True))
    assert found.loss == sum(each[i][1] for each, i in zip(options, found.chosen, strict=True))


def test_most_are_optimal() -> None:
    exact = 0
    for seed in range(60):
        options = drawn(100 + seed, 4)
        exact += allocate(options, 100.0).loss <= best(options, 100.0) * (1 + 1e-9)
    assert exact >= 50


@pytest.mark.parametrize("seed", range(10))
def test_convex_curves_with_equal_steps_are_optimal(seed: int) -> None:
    """There the relaxation is whole, and its bound is met."""
    draw = random.Random(seed)
    options = []
    for _ in range(4):
        drops = sorted((draw.random() for _ in range(5)), reverse=True)
        losses = [sum(drops[i:]) for i in range(6)]
        options.append([(float(i + 1), loss) for i, loss in enumerate(losses)])
    found = allocate(options, 13.0)
    assert found.loss == pytest.approx(best(options, 13.0))
    assert found.bound == pytest.approx(found.loss)


def test_a_budget_for_everything_loses_nothing() -> None:
    options = [[(10.0, 0.0), (1.0, 0.5)], [(20.0, 0.0), (2.0, 0.1)]]
    assert allocate(options, 30.0).chosen == (0, 0)
    assert allocate(options, 29.0).chosen == (0, 1)
    assert allocate(options, 3.0).chosen == (1, 1)


def test_no_layers() -> None:
    assert allocate([], 1.0).loss == 0
