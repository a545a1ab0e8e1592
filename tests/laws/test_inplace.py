"""An operation in place behind a layer: allowed, and differentiated, as behind torch's layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import BY_ID, CASES, params
from cases.changes import CHANGES, OF_REAL_NUMBERS
from cases.protocol import Case, Leaves, gradients
from compare import assert_all_close, assert_close

CHANGED = [
    pytest.param(case, name, id=f"{name}-{case.id}")
    for name in CHANGES
    for case in CASES
    if not (case.exact.is_complex and name in OF_REAL_NUMBERS)
]
POINTWISE = ("linear-order2", "conv-1x1", "conv-transpose-2d-1x1", "embedding-order2")


def parts(y: Tensor, leaves: Leaves, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The changed output and every gradient through the change."""
    changed = CHANGES[name](y)
    generator = torch.Generator().manual_seed(3)
    grad_y = torch.randn(changed.shape, generator=generator, dtype=changed.dtype)
    return changed.detach().clone(), gradients(changed, leaves, grad_y)


def laid_out(want: Tensor, like: Tensor) -> Tensor:
    """Entries in memory as another output has them, in which order dropout draws."""
    return torch.empty_like(like.detach()).copy_(want)


def check(case: Case, name: str, **forced: Any) -> None:
    leaves = case.leaves().map(Tensor.requires_grad_)
    y = case.cp(leaves, **forced)
    want, want_grads = parts(laid_out(case.dense(leaves), y), leaves, name)
    got, grads = parts(y, leaves, name)
    assert_close(got, want, f"y by {forced}")
    assert_all_close(grads, want_grads)


@pytest.mark.parametrize(("case", "name"), CHANGED)
def test_a_change_of_the_output(case: Case, name: str) -> None:
    """By the function with whatever it keeps, and by the layer without gradients."""
    for memory in ("fast", "balanced", "least"):
        check(case, name, memory=memory)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            y = case.make()(case.leaves().x)
            want = CHANGES[name](laid_out(case.dense(case.leaves()), y.clone()))
            assert_close(CHANGES[name](y), want, "y without gradients")


@pytest.mark.parametrize("name", ["relu", "y[...] = 0"])
@pytest.mark.parametrize("case", params([BY_ID[i] for i in POINTWISE]))
def test_a_change_by_every_plan(case: Case, name: str) -> None:
    """What a plan keeps is never the output itself."""
    for forced in case.plans():
        check(case, name, **forced)
