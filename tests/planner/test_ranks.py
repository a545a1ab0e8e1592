"""Ranks by what they cost: a rank is good enough, and one more is not."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import polyadic
from polyadic import ConvFormat, LinearFormat, explain, rank_for, tensorize
from polyadic.nn import CPConv1d, CPConv2d, CPConvTranspose2d, CPEmbedding, CPLinear, ranks
from polyadic.planner import search

LINEAR = LinearFormat(*tensorize(768, 3072), 1)
CONV = ConvFormat((8, 8), (8, 8), (3, 3), 1)


def at(fmt: Any, rank: int) -> Any:
    return dataclasses.replace(fmt, rank=rank)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("budget", [{"flops": 1.0}, {"flops": 0.3}, {"speedup": 2.0}])
@pytest.mark.parametrize(
    ("fmt", "call"),
    [(LINEAR, {"batch": 32}), (LINEAR, {"batch": 512}), (CONV, {"batch": 8, "size": 28})],
    ids=["rows-32", "rows-512", "conv"],
)
def test_the_rank_is_good_enough_and_the_next_is_not(
    fmt: Any, call: dict[str, Any], budget: dict[str, float], training: bool
) -> None:
    """By what ``explain`` says of the plan that is chosen at that rank."""
    ((name, bound),) = budget.items()

    def is_good(rank: int) -> bool:
        found = explain(at(fmt, rank), **call, training=training)
        if name == "flops":
            return found.chosen.flops <= bound * found.dense.flops
        return found.chosen.seconds * bound <= found.dense.seconds

    rank = rank_for(fmt, **call, **budget, training=training)
    assert is_good(rank)
    assert not is_good(rank + 1)


def test_parameters_are_counted() -> None:
    rank = rank_for((1024, 1024), parameters=0.05)
    assert CPLinear(1024, 1024, rank=rank).cp.factors[0].shape[1] == rank
    modes = tensorize(1024, 1024)
    assert at(LinearFormat(*modes, 1), rank).parameters <= 0.05 * 1024**2
    assert at(LinearFormat(*modes, 1), rank + 1).parameters > 0.05 * 1024**2


def test_a_layer_brings_its_own_options() -> None:
    layer = CPConv2d(64, 64, 3, stride=2, padding=1, rank=5)
    options = {"batch": 8, "size": 28, "speedup": 1.5}
    fmt = dataclasses.replace(layer.format, rank=1)
    assert rank_for(layer, **options) == rank_for(fmt, **options, stride=2, padding=1)


@pytest.mark.parametrize(
    "make",
    [
        lambda rank: CPLinear(1024, 1024, rank=rank),
        lambda rank: CPLinear(768, 3072, rank=rank, dtype=torch.float64),
        lambda rank: CPConv2d(64, 64, 3, padding=1, rank=rank),
        lambda rank: CPConv1d(64, 96, 5, stride=2, rank=rank),
        lambda rank: CPConvTranspose2d(64, 64, 3, padding=1, rank=rank),
    ],
)
def test_words_are_what_they_say(make: Callable[[Any], Any]) -> None:
    """Break-even counts every step of the plan, where a formula counted the products alone."""
    layer = make("break-even")
    batch, size = layer._usual_call()
    found = explain(layer, batch=batch, size=size)
    assert found.chosen.flops <= found.dense.flops
    assert found.break_even_rank == layer.rank
    faster = make("faster")
    found = explain(faster, batch=batch, size=size)
    assert found.dense.seconds >= search.WORD_SPEEDUP * found.chosen.seconds
    assert faster.rank < layer.rank


def test_words_of_a_joint_weight_are_those_of_one_layer() -> None:
    layers = CPLinear.joint(3, 512, 512, rank="faster")
    assert layers[0].rank == CPLinear(512, 512, rank="faster").rank


def test_an_embedding_is_judged_as_an_output_head() -> None:
    table = CPEmbedding(3000, 256, rank="faster")
    head = LinearFormat(table.out_shape, table.in_shape, table.rank)
    assert not explain(head, batch=search.WORD_ROWS).dense_is_faster


def test_no_rank_makes_a_small_layer_faster() -> None:
    with pytest.raises(ValueError, match="keep the dense layer, or give the rank as an int"):
        CPLinear(256, 10, rank="faster")
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 10))
    _, report = polyadic.factorize(model, rank="faster")
    assert isinstance(model[0], CPLinear)
    assert isinstance(model[1], torch.nn.Linear)
    assert "keep the dense layer" in str(report)


@pytest.fixture
def nobody_warned() -> Iterator[None]:
    before = set(ranks._warned)
    ranks._warned.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield
    ranks._warned.clear()
    ranks._warned.update(before)


@pytest.mark.usefixtures("nobody_warned")
def test_a_rank_above_break_even_warns_once_a_place() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for width in (1024, 512):
            CPLinear(width, width, rank=0.1)
    (warning,) = caught
    assert "rank 1456, above its break-even rank 512" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.usefixtures("nobody_warned")
@pytest.mark.parametrize("rank", [64, "break-even", "faster"])
def test_a_rank_that_pays_warns_of_nothing(rank: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CPLinear(1024, 1024, rank=rank)
        CPConv2d(64, 64, 3, rank=rank)
        CPEmbedding(1000, 64, rank=rank)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CPLinear(1024, 1024, rank=10**6), ValueError, "at most 65536, got 1000000"),
        (lambda: CPConv2d(64, 64, 3, rank=10**6), ValueError, "rank must be at most"),
        (lambda: rank_for(LINEAR), ValueError, "one of parameters, flops and speedup, got none"),
        (lambda: rank_for(LINEAR, flops=1, speedup=2), ValueError, "got flops and speedup"),
        (
            lambda: rank_for(LINEAR, speedup=0.0),
            ValueError,
            "speedup must be finite and above 0, got 0.0",
        ),
        (
            lambda: rank_for(LINEAR, speedup=float("nan")),
            ValueError,
            "speedup must be finite and above 0",
        ),
        (lambda: rank_for(LINEAR, parameters=1.5), ValueError, r"in \(0, 1\], got 1.5"),
        (lambda: rank_for(LINEAR, flops="x"), TypeError, "flops must be a number, got 'x'"),
        (lambda: rank_for((3, 4, 5), flops=1), ValueError, "in_features, out_features"),
        (lambda: rank_for("a", flops=1), TypeError, "got str"),
        (lambda: rank_for("a", parameters=0.5), TypeError, "got str"),
        (lambda: rank_for(LINEAR, speedup=1000.0), ValueError, "not even rank 1"),
        (lambda: rank_for((4, 4), parameters=0.1), ValueError, "rank 1 has"),
        (lambda: rank_for(CONV, speedup=2.0, batch=2), ValueError, "size"),
        (lambda: rank_for(CPEmbedding(99, 8, rank=1), flops=1.0), ValueError, "by parameters="),
    ],
)
def test_mistakes_are_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
