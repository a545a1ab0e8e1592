"""``decompose``: exact where the rank suffices, recovers what was planted, refuses bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from polyadic import CPTensor, decompose

SHAPES = [
    ((4, 5), (3, 6)),
    ((2, 3, 4), (5, 2)),
    ((7,), (2, 3), (3, 3)),
    ((1, 6), (5, 1), (2,)),
    ((3, 1, 4), (2, 1)),
]


def dense(cp: CPTensor) -> Tensor:
    """The weight by one einsum, not by the library's own products."""
    letters = "abcdefgh"[: cp.order]
    spec = ",".join(f"{letter}r" for letter in letters) + f"->{letters}"
    return torch.einsum(spec, *(f.detach().double() for f in cp.factors)).reshape(cp.shape)


def relative(found: Tensor, weight: Tensor) -> float:
    return float((found - weight.double()).norm() / weight.double().norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_where_the_rank_suffices(shape: Any) -> None:
    """Any tensor has an exact CP with the product of all modes but the largest components."""
    modes = [mode for group in shape for mode in group]
    weight = torch.randn(modes, dtype=torch.float64)
    found = decompose(weight, shape, math.prod(modes) // max(modes))
    assert relative(dense(found.cp), weight.reshape(found.cp.shape)) < 1e-10
    assert found.converged
    assert found.error < 1e-10
