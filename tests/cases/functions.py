"""A case as a function of tensors, for whatever differentiates functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cases.protocol import Case, Leaves, y_shape

Function = Callable[..., Tensor]
Compute = Callable[[Leaves], Tensor]


def as_function(case: Case, compute: Compute) -> tuple[Function, list[Tensor]]:
    """A function of the tensors a case depends on, and these tensors."""
    leaves = case.leaves()
    named = leaves.named()
    # Torch's layer draws its weights when it is made, at first use, which no transform may see.
    y_shape(case)

    def function(*tensors: Tensor) -> Tensor:
        return compute(leaves.of(dict(zip(named, tensors, strict=True))))

    return function, list(named.values())


def both(case: Case) -> tuple[Function, Function, list[Tensor]]:
    """The layer and its dense counterpart as functions of the same tensors."""
    cp, tensors = as_function(case, case.cp)
    dense, _ = as_function(case, case.dense)
    return cp, dense, tensors


def keeping(case: Case) -> Compute:
    """The case by a plan that keeps an intermediate, as the planner's for a small one need not."""
    forced = next(case.plans())
    return lambda leaves: case.cp(leaves, **forced)


def second_derivatives(case: Case, compute: Compute) -> list[Tensor]:
    """Gradients of Σ |gradient of every leaf|², with respect to every leaf and the output's."""
    leaves = case.leaves().map(Tensor.requires_grad_)
    tensors, grad_y = list(leaves.named().values()), case.grad_y().requires_grad_()
    first = torch.autograd.grad(compute(leaves), tensors, grad_y, create_graph=True)
    # The layer is linear in the bias: its gradient does not depend on the leaves, hence zeros.
    return list(
        torch.autograd.grad(
            sum(power(g) for g in first), [*tensors, grad_y], materialize_grads=True
        )
    )


def power(values: Tensor) -> Tensor:
    """Sum of the squares of all entries, of complex ones of those of both parts."""
    return (
        (torch.view_as_real(values.resolve_conj()) if values.is_complex() else values)
        .square()
        .sum()
    )
