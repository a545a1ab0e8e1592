"""CP linear maps: validate, plan, run; and the explicit pair of forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyadic import checks
from polyadic.autograd import run
from polyadic.formats import LinearFormat
from polyadic.functional.boundary import (
    autocast,
    call_signature,
    gradient_like,
    known_calls,
    nbytes,
)
from polyadic.kernels.linear import LinearMap
from polyadic.planner.ask import plan_linear
from polyadic.plans import LinearPlan, Memory


@dataclass(frozen=True)
class LinearSaved:
    """What ``cp_linear_forward`` hands to ``cp_linear_backward``.

    Attributes:
        x: the input (..., M) as it was given.
        kept: intermediates the plan keeps: Z (B, R) or nothing; on a GPU Z may have columns of
            zeros added.
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

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held: input, intermediates and factors."""
        return nbytes([self.x, *self.kept, *self.in_factors, *self.out_factors, self.weights])


def _linear(
    x: Tensor,
    in_factors: Sequence[Tensor],
    out_factors: Sequence[Tensor],
    weights: Tensor | None,
    plan: LinearPlan | None,
    memory: Memory,
    cast: bool,
    rebuild: bool = True,
) -> tuple[LinearFormat, LinearPlan, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Validate the arguments of a linear map and settle its plan."""
    ins = checks.check_factor_group(in_factors, "in_factors")
    outs = checks.check_factor_group(out_factors, "out_factors")
    in_shape, out_shape, (rank,) = checks.check_factors(weights, in_factors=ins, out_factors=outs)
    fmt = LinearFormat(in_shape, out_shape, rank)
    checks.check_like_factors(x, ins[0], "x", cast=cast)
    checks.check_last_dimension(x, fmt.in_features, "x")
    memory = checks.check_memory(memory)
    if plan is None:
        plan = plan_linear(fmt, x, memory, rebuild)
    else:
        plan = checks.check_plan(plan, LinearPlan).covering(fmt)
        checks.check_backend(plan, "linear", x)
    return fmt, plan, ins, outs


def _linear_map(
    plan: LinearPlan,
    in_factors: Sequence[Tensor],
    out_factors: Sequence[Tensor],
    weights: Tensor | None,
) -> tuple[LinearMap, list[Tensor]]:
    """The map a plan stands for and its factors, λ in front as one more in factor."""
    if weights is None:
        return LinearMap(plan, len(in_factors)), [*in_factors, *out_factors]
    # Called on the class, as torch.compile traces no method of a plan that is a constant to it.
    scaled = LinearMap(LinearPlan.with_weights(plan), len(in_factors) + 1)
    return scaled, [weights.unsqueeze(0), *in_factors, *out_factors]


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
            may keep the Khatri-Rao products too, which small layers gain most from. A given plan
            says itself what is kept.

    Returns:
        (..., N), in x's dtype (under autocast in autocast's).

    Raises:
        TypeError: an argument is of the wrong type, or dtypes are not floating or differ.
        ValueError: shapes, ranks or devices do not fit together, or the plan is for other modes.
    """
    key = found = None
    if not torch.compiler.is_compiling():
        try:
            key = call_signature(x, (in_factors, out_factors), bias, weights, plan, memory)
            found = known_calls.get(key)
        except (AttributeError, TypeError):
            # Not tensors, or of symbolic sizes, which have no hash.
            key = None
    if found is None:
        return _cp_linear(x, in_factors, out_factors, bias, weights, plan, memory, key)
    layer_map, rows, shape = found
    scale = () if weights is None else (weights.unsqueeze(0),)
    factors = (*scale, *in_factors, *out_factors)
    if rows is None:
        return run(layer_map, x, bias, factors)
    return run(layer_map, x.reshape(rows), bias, factors).view(shape)


def _cp_linear(
    x: Tensor,
    in_factors: Sequence[Tensor],
    out_factors: Sequence[Tensor],
    bias: Tensor | None,
    weights: Tensor | None,
    plan: LinearPlan | None,
    memory: Memory,
    key: Any,
) -> Tensor:
    """``cp_linear`` of arguments not seen before: check, settle, remember and run."""
    x, cast = autocast(x)
    fmt, plan, ins, outs = _linear(
        x, in_factors, out_factors, weights, plan, memory, cast is not None
    )
    checks.check_bias(bias, fmt.out_features, ins[0], cast=cast is not None)
    if cast is not None and bias is not None:
        bias = bias.to(cast)
    layer_map, factors = _linear_map(plan, ins, outs, weights)
    rows = None if x.dim() == 2 else (math.prod(x.shape[:-1]), fmt.in_features)
    shape = (*x.shape[:-1], fmt.out_features)
    if key is not None:
        known_calls[key] = layer_map, rows, shape
    if rows is None:
        return run(layer_map, x, bias, factors)
    return run(layer_map, x.reshape(rows), bias, factors).view(shape)


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
    fmt, plan, ins, outs = _linear(
        x, in_factors, out_factors, weights, plan, "balanced", cast=False, rebuild=False
    )
    layer_map, factors = _linear_map(plan, ins, outs, weights)
    y, kept = layer_map.forward(x.reshape(math.prod(x.shape[:-1]), fmt.in_features), None, factors)
    saved = LinearSaved(x, kept, ins, outs, weights, plan)
    return y.view(*x.shape[:-1], fmt.out_features), saved


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
    batch = math.prod(saved.x.shape[:-1])
    x, rows = saved.x.reshape(batch, saved.x.shape[-1]), grad_y.reshape(batch, out_features)
    layer_map, factors = _linear_map(saved.plan, saved.in_factors, saved.out_factors, saved.weights)
    needs = (True,) * (1 + len(factors))
    grad_x, grads = layer_map.backward(rows, x, saved.kept, factors, needs)
    assert grad_x is not None
    n_out = len(saved.out_factors)
    grad_in, grad_out = grads[:-n_out], grads[-n_out:]
    scale = [] if saved.weights is None else [grad_in.pop(0)]
    return (
        grad_x.view(saved.x.shape),
        grad_in,
        grad_out,
        *(g.squeeze(0) for g in scale if g is not None),
    )
