"""A linear and a convolutional layer of ordinary size, by the specification and by the fast pairs.

Both are written as the user of plain functions writes them: a weight in CP format, its dense
product with an input by torch, and the factorized forward and backward beside it. Output and every
gradient agree with autograd through the dense weight, to ``torch.allclose``'s own tolerances.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polyadic import CPTensor, functional, reference

LINEAR = ((4, 4, 16), (4, 4, 8)), 100
CONV = ((4, 8), (4, 4), (3, 3)), 100
Results = tuple[Tensor, list[Tensor], Tensor]  # output, gradients of the factors and of the input


def own(shape: Any, rank: int) -> Any:
    return CPTensor(shape, rank, dtype=torch.float64)


def of_tltorch(shape: Any, rank: int) -> Any:
    tltorch = pytest.importorskip("tltorch")
    tensor = tltorch.TensorizedTensor.new(shape, rank, factorization="CP", dtype=torch.float64)
    tltorch.tensor_init(tensor)
    return tensor


def linear_by_reference(cp: Any, x: Tensor, dy: Tensor) -> Results:
    y, saved = reference.cp_times_matrix_fwd(cp, x)
    grads, dx = reference.cp_times_matrix_bwd(cp, dy, saved)
    return y, list(grads), dx


def linear_by_pair(cp: Any, x: Tensor, dy: Tensor) -> Results:
    ins, outs = list(cp.factors)[:3], list(cp.factors)[3:]
    y, saved = functional.cp_linear_forward(x, ins, outs)
    dx, in_grads, out_grads = functional.cp_linear_backward(dy, saved)
    return y, [*in_grads, *out_grads], dx


def conv_by_reference(cp: Any, x: Tensor, dy: Tensor) -> Results:
    y, saved = reference.cp_conv_fwd(cp, x, 2)
    grads, dx = reference.cp_conv_bwd(cp, dy, saved)
    return y, list(grads), dx


def conv_by_pair(cp: Any, x: Tensor, dy: Tensor) -> Results:
    outs, ins, kernel = (list(cp.factors)[i : i + 2] for i in (0, 2, 4))
    y, saved = functional.cp_conv_forward(x, outs, ins, kernel, padding="same")
    dx, *grads = functional.cp_conv_backward(dy, saved)
    return y, [grad for group in grads for grad in group], dx


def check(
    cp: Any, x: Tensor, dense: Callable[[Tensor], Tensor], by: Callable[..., Results]
) -> None:
    """Compare with autograd through the dense weight; ``dense`` maps x to the output."""
    x.requires_grad_()
    wanted = dense(x)
    dy = torch.randn_like(wanted)
    wanted.backward(dy)
    with torch.no_grad():
        y, factor_grads, dx = by(cp, x, dy)
    assert torch.allclose(wanted, y)
    assert len(factor_grads) == len(cp.factors) == 6
    for factor, grad in zip(cp.factors, factor_grads, strict=True):
        assert torch.allclose(factor.grad, grad)
    assert torch.allclose(x.grad, dx)


def parameters(cp: Any) -> int:
    return sum(factor.numel() for factor in cp.factors)


@pytest.mark.parametrize("make", [own, of_tltorch])
@pytest.mark.parametrize("by", [linear_by_reference, linear_by_pair])
def test_a_linear_layer(by: Any, make: Any) -> None:
    """256 features to 128, in batches of 32: 4,000 numbers in place of 32,768."""
    cp = make(*LINEAR)
    weight = cp.to_matrix()
    assert (parameters(cp), weight.numel()) == (4000, 32768)
    check(cp, torch.randn(32, 256, dtype=torch.float64), lambda x: x @ weight, by)


@pytest.mark.parametrize("make", [own, of_tltorch])
@pytest.mark.parametrize("by", [conv_by_reference, conv_by_pair])
def test_a_convolution(by: Any, make: Any) -> None:
    """16 channels to 32, 3 × 3, on an image of 32 × 32: 2,600 numbers in place of 4,608."""
    cp = make(*CONV)
    kernel = cp.to_matrix().reshape(32, 16, 3, 3)
    assert (parameters(cp), kernel.numel()) == (2600, 4608)
    x = torch.randn(1, 16, 32, 32, dtype=torch.float64)
    check(cp, x, lambda x: F.conv2d(x, kernel, padding="same"), by)
