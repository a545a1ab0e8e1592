"""CP linear maps: validate, plan, run; and the explicit pair of forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polyadic import checks
from polyadic.formats import LinearFormat
from polyadic.functional.boundary import Asked, Call, Groups, as_batch, call
from polyadic.functional.saved import Saved, explicit_backward, explicit_forward, gradient_like
from polyadic.kernels.linear import LinearMap
from polyadic.kernels.shared import Half
from polyadic.planner.ask import plan_linear
from polyadic.plans import LinearPlan, Memory


@dataclass(frozen=True, repr=False)
class LinearSaved(Saved):
    """What ``cp_linear_forward`` hands to ``cp_linear_backward``.

    Attributes:
        x: the input (..., M) as it was given.
        kept: the intermediates that the plan keeps: Z (B, R), to which a GPU may add columns of
            zeros, or nothing.
        in_factors: (m_d, R) each.
        out_factors: (n_d, R) each.
        weights: λ (R,) or None.
        plan: the plan the forward followed and the backward will.
    """

    x: Tensor
    kept: tuple[Tensor, ...]
    in_factors: tuple[Tensor, ...]
    out_factors: tuple[Tensor, ...]
    weights: Tensor | None
    plan: LinearPlan


def _checked(
    asked: Asked, rebuild: bool = True
) -> tuple[LinearFormat, LinearPlan, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Check the arguments of a linear map, and choose a plan or check the one that is given."""
    x, weights = asked.x, asked.weights
    plan, memory = asked.options
    ins = checks.check_factor_group(asked.groups[0], "in_factors")
    outs = checks.check_factor_group(asked.groups[1], "out_factors")
    in_shape, out_shape, (rank,) = checks.check_factors(weights, in_factors=ins, out_factors=outs)
    fmt = LinearFormat(in_shape, out_shape, rank)
    checks.check_like_factors(x, ins[0], "x", cast=asked.cast)
    checks.check_last_dimension(x, fmt.in_features, "x")
    memory = checks.check_memory(memory)
    if plan is None:
        plan = plan_linear(fmt, x, memory, rebuild)
    else:
        plan = checks.check_plan(plan, LinearPlan).covering(fmt)
        checks.check_backend(plan, "linear", x)
    return fmt, plan, ins, outs


@dataclass(frozen=True)
class _LinearCall(Call):
    """A call of a linear map."""

    map: LinearMap

    def run_in_halves(
        self,
        x: Tensor,
        groups: Groups,
        bias: Tensor | None,
        weights: Tensor | None,
        between: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Apply the map with something done to Z (B, R) between its two halves."""
        forward, backward = self.map.plan.forward, self.map.plan.backward
        in_half = Call(Half(False, forward.in_groups, backward.in_groups), self.weights_at)
        z = between(in_half.run(self.batched(x), groups[:1], None, weights))
        out_half = Call(Half(True, forward.out_groups, backward.out_groups), 0)
        y = out_half.run(z, groups[1:], bias, None)
        return y if self.batch is None else self.unbatched(y)


def _call(x: Tensor, plan: LinearPlan, n_in: int, weights: Tensor | None) -> Call:
    """Return the call of the map that a plan stands for; λ becomes one more in factor, in front."""
    if weights is not None:
        # Called on the class, as torch.compile traces no method of a plan that is a constant to it.
        plan, n_in = LinearPlan.with_weights(plan), n_in + 1
    return _LinearCall(LinearMap(plan, n_in), 0, as_batch(x, 1))


def _settle(asked: Asked) -> tuple[Call, Groups]:
    """Check and plan a call of ``cp_linear``."""
    fmt, plan, ins, outs = _checked(asked)
    checks.check_bias(asked.bias, fmt.out_features, ins[0], cast=asked.cast)
    return _call(asked.x, plan, len(ins), asked.weights), (ins, outs)


def cp_linear(
    x: Tensor,
    in_factors: Sequence[Tensor],
    out_factors: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    plan: LinearPlan | None = None,
    memory: Memory = "balanced",
) -> Tensor:
    """Linear map by a matrix in CP format, y = x W + bias, without building W.

    W (M, N) = (A_1 ⊙ … ⊙ A_D) diag(λ) (C_1 ⊙ … ⊙ C_E)ᵀ. Differentiable, also twice and in forward
    mode; works under torch.func, torch.compile, torch.export and autocast.

    Args:
        x: (..., M), floating point.
        in_factors: D tensors A_d (m_d, R) with Π m_d = M.
        out_factors: E tensors C_d (n_d, R) with Π n_d = N.
        bias: (N,) or None.
        weights: λ (R,) or None for ones.
        plan: a LinearPlan to obey; None lets the planner choose.
        memory: ``"balanced"`` keeps x and one (B, R) intermediate, ``"least"`` x alone; ``"fast"``
            may keep the Khatri-Rao products too, from which small layers gain most. With a plan,
            the plan says what is kept.

    Returns:
        (..., N), in x's dtype (under autocast in autocast's).

    Raises:
        TypeError: an argument is of the wrong type, or dtypes are not floating or differ.
        ValueError: shapes, ranks or devices do not fit together, or the plan is for other modes.
    """
    return call(_settle, x, (in_factors, out_factors), bias, weights, (plan, memory))


def cp_linear_forward(
    x: Tensor,
    in_factors: Sequence[Tensor],
    out_factors: Sequence[Tensor],
    *,
    weights: Tensor | None = None,
    plan: LinearPlan | None = None,
) -> tuple[Tensor, LinearSaved]:
    """Forward of ``cp_linear`` and what its backward needs, without autograd.

    Args:
        x: (..., M).
        in_factors: D tensors (m_d, R).
        out_factors: E tensors (n_d, R).
        weights: λ (R,) or None.
        plan: a LinearPlan to obey; None lets the planner choose one that does not build W.

    Returns:
        y (..., N) and the saved structure.

    Raises:
        TypeError: see ``cp_linear``.
        ValueError: see ``cp_linear``.
    """
    asked = Asked(x, (in_factors, out_factors), None, weights, (plan, "balanced"))
    _, plan, ins, outs = _checked(asked, rebuild=False)
    found = _call(x, plan, len(ins), weights)
    y, kept = explicit_forward(found, x, (ins, outs), weights)
    return y, LinearSaved(x, kept, ins, outs, weights, plan)


def cp_linear_backward(grad_y: Tensor, saved: LinearSaved) -> tuple[Any, ...]:
    """Closed-form backward of ``cp_linear_forward``.

    With Z = X KA and G = dY KC: dX = G diag(λ) KAᵀ, dKA = Xᵀ G diag(λ), dKC = dYᵀ Z diag(λ),
    dλ = Σ_b Z ∘ G; each factor's gradient is an MTTKRP of dKA or dKC.

    Args:
        grad_y: (..., N), the gradient of the output.
        saved: what the forward returned.

    Returns:
        ``(grad_x, grad_in_factors, grad_out_factors)``, the latter two lists of tensors shaped
        as the factors; with weights also ``grad_weights`` (R,).

    Raises:
        TypeError: ``saved`` is not a LinearSaved, or the dtype differs from x's.
        ValueError: ``grad_y`` has another shape than the output.
    """
    if not isinstance(saved, LinearSaved):
        raise TypeError(f"saved must come from cp_linear_forward, got {type(saved).__name__}")
    out_features = math.prod([f.shape[0] for f in saved.out_factors])
    gradient_like(grad_y, saved.x, (*saved.x.shape[:-1], out_features))
    groups = saved.in_factors, saved.out_factors
    found = _call(saved.x, saved.plan, len(saved.in_factors), saved.weights)
    return explicit_backward(found, grad_y, saved.x, saved.kept, groups, saved.weights)
