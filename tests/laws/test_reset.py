"""reset_parameters: draws what making a layer draws, in any order, and leaves flags alone."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import FEW, few_cases, params
from cases.protocol import Case
from polyadic.nn import CPTiedLinear


def reset(layer: Any) -> None:
    """Reset a layer; a head has its bias alone, the table is reset where it is owned."""
    layer.reset_parameters()
    if isinstance(layer, CPTiedLinear):
        layer.cp.reset_parameters()


def parameters(layer: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in layer.parameters()]


def drawn(layer: Any) -> list[Tensor]:
    """The parameters that a reset draws; a head's bias is zero."""
    return [p for p in parameters(layer) if p.numel() > 1 and p.any()]


@few_cases
def test_a_reset_is_reproducible(case: Case) -> None:
    layer = case.build()
    torch.manual_seed(3)
    reset(layer)
    first = drawn(layer)
    reset(layer)
    assert not any(torch.equal(a, b) for a, b in zip(first, drawn(layer), strict=True))
    torch.manual_seed(3)
    reset(layer)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(layer), strict=True))


# A head is made of a table, and one of several layers of a joint tensor, that are drawn before.
ALONE = [
    case
    for case in FEW
    if case.kind.from_dense is not None and len(case.leaves().factors) == len(case.modes)
]


@pytest.mark.parametrize("case", params(ALONE))
def test_making_draws_what_a_reset_draws(case: Case) -> None:
    torch.manual_seed(3)
    layer = case.build()
    made = parameters(layer)
    torch.manual_seed(3)
    reset(layer)
    assert all(torch.equal(a, b) for a, b in zip(made, parameters(layer), strict=True))


@few_cases
def test_a_reset_leaves_flags_alone(case: Case) -> None:
    layer = case.make()
    named = case.parameters(layer)
    named["factor 0"].requires_grad_(False)
    reset(layer)
    named = case.parameters(layer)
    assert not named["factor 0"].requires_grad
    assert named["factor 1"].requires_grad
    assert all(p.grad_fn is None for p in layer.parameters())


def mean_squares(layer: Any) -> list[float]:
    owner = getattr(layer.cp, "joint", layer.cp)
    return [float(factor.detach().double().square().mean()) for factor in owner.factors]


@pytest.mark.parametrize("case", params(FEW))
def test_after_to_empty_modules_may_be_reset_in_any_order(case: Case) -> None:
    """Both contracts: every module that has the method, and every module that owns parameters."""
    want = mean_squares(case.build(dtype=torch.float64))
    count = len([m for m in case.build().modules() if hasattr(m, "reset_parameters")])
    for order in itertools.permutations(range(count)):
        layer = case.build(dtype=torch.float64, device="meta")
        layer.to_empty(device="cpu")
        for parameter in layer.parameters():
            nn.init.constant_(parameter, math.nan)
        own = [m for m in layer.modules() if hasattr(m, "reset_parameters")]
        for i in order:
            own[i].reset_parameters()
        assert all(p.isfinite().all() for p in layer.parameters())
        # Whatever is drawn, the mean square of a factor is the same.
        assert mean_squares(layer) == pytest.approx(want, rel=1e-6)
        assert layer(case.leaves().x).isfinite().all()
