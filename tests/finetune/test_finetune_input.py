"""What recovery is given and cannot use is refused before it changes the student."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from polyadic.finetune import distill, match_layers
from polyadic.nn import CPLinear


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """Student and teacher."""
    teacher = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 5))
    student = copy.deepcopy(teacher)
    student[0] = CPLinear(12, 10, rank=3)
    return student, teacher


def test_names_may_be_a_generator() -> None:
    student, teacher = pair()
    names = (name for name in ["0"])
    assert list(match_layers(student, teacher, [torch.randn(8, 12)], names=names, steps=1)) == ["0"]
    with pytest.raises(TypeError, match=r"names must be a sequence .* int 0"):
        match_layers(student, teacher, [torch.randn(8, 12)], names=0, steps=1)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"callback": 3}, TypeError, "callback must be a function or None, got 3"),
        ({"forward": 3}, TypeError, "forward must be a function or None, got 3"),
        ({"forward": lambda m, b: (m(b),)}, TypeError, "forward must return .* got tuple"),
        ({"forward": lambda m, b: None}, TypeError, "forward must return .* got NoneType"),
        ({"loss": ["mse"]}, ValueError, r"loss must be one of .* got \['mse'\]"),
        ({"schedule": ["cosine"]}, ValueError, r"schedule must be one of .* got \['cosine'\]"),
    ],
)
def test_what_is_no_function(given: dict[str, Any], error: type[Exception], message: str) -> None:
    student, teacher = pair()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(error, match=message):
        distill(student, teacher, [torch.randn(8, 12)], steps=2, **given)
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name])


def test_match_layers_refuses_a_callback_that_is_no_function() -> None:
    student, teacher = pair()
    with pytest.raises(TypeError, match="callback must be a function or None"):
        match_layers(student, teacher, [torch.randn(8, 12)], steps=2, callback=3)


def test_what_a_failed_training_says_of_the_model() -> None:
    student, teacher = pair()
    bad = [torch.full((8, 12), float("nan"))]
    with pytest.raises(FloatingPointError, match="is left as it was before this step"):
        distill(student, teacher, bad, steps=1, validation=False)
    with pytest.raises(FloatingPointError, match="batches that judge it is nan before the first"):
        distill(student, teacher, bad, steps=1)
    good = [torch.randn(8, 12)]
    with pytest.raises(FloatingPointError, match="is left at its best so far"):
        distill(student, teacher, bad, steps=1, validation=good)
