"""What the explicit pairs of forward and backward share: what one hands to the other."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polyadic import checks
from polyadic.functional.boundary import Call, Groups, gradients, joined
from polyadic.plans import ConvPlan, LinearPlan


@dataclass(frozen=True, repr=False)
class Saved:
    """Base of the dataclasses that an explicit forward hands to its backward."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held: input, intermediates and factors."""
        held: list[Any] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            held += value if isinstance(value, tuple) else (value,)
        return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))

    def __repr__(self) -> str:
        """Say the shapes of the tensors, and the plan."""
        parts = [
            f"{field.name}={_short(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
        ]
        return f"{type(self).__name__}({', '.join(parts)}, nbytes={self.nbytes})"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return "x".join(map(str, value.shape)) or "scalar"
    if isinstance(value, tuple) and all(isinstance(t, Tensor) for t in value):
        return f"[{', '.join(map(_short, value))}]"
    return f"<{value}>" if isinstance(value, (LinearPlan, ConvPlan)) else repr(value)


def explicit_forward(
    call: Call, x: Tensor, groups: Groups, weights: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the output of a settled call without a bias, and what its plan keeps."""
    factors = joined(groups, weights, call.weights_at)
    y, kept = call.map.forward(call.batched(x), None, factors)
    return call.unbatched(y), kept


def explicit_backward(
    call: Call,
    grad_y: Tensor,
    x: Tensor,
    kept: tuple[Tensor, ...],
    groups: Groups,
    weights: Tensor | None,
) -> tuple[Any, ...]:
    """Return the gradients of x, of the factors as a list for each group and, if given, of λ."""
    factors = joined(groups, weights, call.weights_at)
    rows = call.batched(x)
    if call.batch is not None:
        grad_y = grad_y.reshape(rows.shape[0], *grad_y.shape[len(call.batch[0]) :])
    needs = (True,) * (1 + len(factors))
    grad_x, grads = gradients(call.map, grad_y, rows, kept, factors, needs)
    assert grad_x is not None
    scale = [] if weights is None else [grads.pop(call.weights_at)]
    ends = [0, *itertools.accumulate(map(len, groups))]
    return (
        call.unbatched(grad_x),
        *(grads[start:end] for start, end in itertools.pairwise(ends)),
        *(g.squeeze(0) for g in scale if g is not None),
    )


def gradient_like(grad_y: Any, x: Tensor, shape: tuple[int, ...]) -> None:
    """Check that a gradient has the output's shape, and x's dtype and device."""
    checks.check_like_factors(grad_y, x, "grad_y")
    if grad_y.shape != shape:
        raise ValueError(f"grad_y must have the output's shape {shape}, got {tuple(grad_y.shape)}")
