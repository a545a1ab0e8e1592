"""The lines that ``polyadic compress`` does not calibrate on, and what it says of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("typer")

from polyadic_cli.held_out import MOST, HeldOut, divide


@pytest.mark.parametrize(
    ("lines", "samples", "calibrated", "held"),
    [
        (400, 256, 256, MOST),
        (300, 256, 256, 44),
        (96, 256, 84, 12),
        (15, 256, 15, 0),
        (15, 4, 4, 0),
    ],
)
def test_lines_are_divided(lines: int, samples: int, calibrated: int, held: int) -> None:
    text = [str(i) for i in range(lines)]
    first, others = divide(text, samples)
    assert [*first, *others] == text[: calibrated + held]
    assert len(first) == calibrated
    assert len(others) == held


def test_the_cosine_is_that_of_the_lines_outputs() -> None:
    """Tokens of a line are added up, so that padding, which is zero, counts for nothing."""
    model = nn.Linear(6, 4)
    batches = [torch.randn(3, 5, 6), torch.randn(2, 7, 6)]

    def output(model: nn.Module, batch: Tensor) -> Any:
        return model(batch)

    held = HeldOut(model, batches, output)
    assert "on 5 lines that were held out" in held.sentence(model)
    assert "is 1.000 on average and 1.000 at least" in held.sentence(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.weight.neg_()
        assert other.bias is not None
        other.bias.neg_()
    assert "is -1.000 on average and -1.000 at least" in held.sentence(other)
