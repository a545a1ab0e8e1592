"""CP linear maps of one input: several layers that read it once, such as query, key and value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polyadic import checks
from polyadic._torch import is_spread
from polyadic.formats import LinearFormat, Shape
from polyadic.functional.boundary import Call, autocast
from polyadic.functional.spread import Layout, spread_call
from polyadic.kernels.shared import Half
from polyadic.planner.ask import plan_linear

Factors = tuple[Tensor, ...]


def cp_linear_shared(
    x: Tensor,
    in_factors: Sequence[Sequence[Tensor]],
    out_factors: Sequence[Sequence[Tensor]],
    biases: Sequence[Tensor | None] | None = None,
    *,
    weights: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """Linear maps of one input by matrices in CP format, y_l = x W_l + bias_l, reading x once.

    W_l (M, N_l) = (A_l,1 ⊙ … ⊙ A_l,D) diag(λ_l) (C_l,1 ⊙ … ⊙ C_l,E)ᵀ. The in factors of layers
    with the same in modes are put side by side, so that one product with ΣR columns makes every
    Z_l = x KA_l, and one product makes the gradient of x. Layers whose in factors are the very same
    tensors, as those of a joint weight, share their Z. The results are those of separate calls of
    ``cp_linear``, up to rounding.

    Costs: the forward takes 2 B (M ΣR + Σ R_l N_l) FLOPs and the backward twice as many, as
        separate
    layers do, where ΣR counts shared in factors once. x is read once and kept once, and its
    gradient is written once; separate layers read x and write a gradient of its size once for each
    layer, and add these up. Besides x and the factors one (B, ΣR) intermediate is kept for the
    backward. The planner chooses how the modes are contracted; W is never built.

    Differentiable, also twice and in forward mode; works under torch.func, torch.compile,
    torch.export and autocast.

    Args:
        x: (..., M), floating point.
        in_factors: for each layer D_l tensors (m_d, R_l) with Π m_d = M.
        out_factors: for each layer E_l tensors (n_d, R_l) with Π n_d = N_l.
        biases: for each layer (N_l,) or None; None if no layer has a bias.
        weights: for each layer λ (R_l,) or None for ones; None if all layers have ones.

    Returns:
        For each layer (..., N_l), in x's dtype (under autocast in autocast's).

    Raises:
        TypeError: an argument is of the wrong type, or dtypes are not floating or differ.
        ValueError: there are no layers, sequences differ in length, or shapes, ranks or devices do
            not fit together.
    """
    ins, outs = _groups(in_factors, "in_factors"), _groups(out_factors, "out_factors")
    count = len(ins)
    bias, scale = _each(biases, count, "biases"), _each(weights, count, "weights")
    if len(outs) != count:
        raise ValueError(
            f"out_factors must hold one group of factors for each of the {count} groups of "
            f"in_factors, got {len(outs)}"
        )
    if any(map(is_spread, (x, *ins[0]))):
        return spread_call(_spread, x, (*ins, *outs), bias, scale)
    x, _, cast = autocast(x, None)
    formats = []
    for i in range(count):
        in_shape, out_shape, (rank,) = checks.check_factors(
            scale[i], **{f"in_factors[{i}]": ins[i], f"out_factors[{i}]": outs[i]}
        )
        formats.append(LinearFormat(in_shape, out_shape, rank))
        checks.check_like_factors(x, ins[i][0], "x", cast=cast)
        checks.check_last_dimension(x, formats[i].in_features, "x")
        checks.check_bias(bias[i], formats[i].out_features, ins[i][0], cast=cast)
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    projected = _projected(rows, ins, formats)
    results = []
    for i, fmt in enumerate(formats):
        own = bias[i]
        if own is not None and cast:
            own = own.to(x.dtype)
        plan = plan_linear(fmt, rows, "balanced", False)
        forward, backward = plan.forward.out_groups, plan.backward.out_groups
        if scale[i] is not None:
            # λ is one more factor, in front, with a mode of size 1.
            forward, backward = ((first + 1, *rest) for first, *rest in (forward, backward))
        half = Call(Half(True, forward, backward), 0)
        y = half.run(projected[i], (outs[i],), own, scale[i])
        results.append(y if x.dim() == 2 else y.view(*x.shape[:-1], fmt.out_features))
    return tuple(results)


def _spread(found: Layout, x: Tensor, groups: Any, biases: Any, weights: Any) -> tuple[Tensor, ...]:
    """What one process computes of layers whose factors are DTensors."""
    if found.ins or found.outs:
        raise ValueError(
            "layers that are called together cannot have sharded features; call each by itself, or "
            "use polyadic.distributed.RankParallel"
        )
    half = len(groups) // 2
    return cp_linear_shared(x, groups[:half], groups[half:], biases, weights=weights)


def _projected(rows: Tensor, ins: Sequence[Factors], formats: Sequence[LinearFormat]) -> list[Any]:
    """Return Z_l (B, R_l) of each layer, by one product for all layers with the same in modes."""
    found: list[Any] = [None] * len(ins)
    by_modes: dict[Shape, list[int]] = {}
    for i, fmt in enumerate(formats):
        by_modes.setdefault(fmt.in_shape, []).append(i)
    for modes, members in by_modes.items():
        # Factors that are the very same tensors are used once.
        places: list[int] = []
        place_of = {}
        for i in members:
            same = [p for p, j in enumerate(places) if _same(ins[i], ins[j])]
            place_of[i] = same[0] if same else len(places)
            if not same:
                places.append(i)
        groups = [ins[i] for i in places]
        ranks = [formats[i].rank for i in places]
        factors = groups[0]
        if len(groups) > 1:
            factors = tuple([torch.cat(side, 1) for side in zip(*groups, strict=True)])
        fmt = LinearFormat(modes, formats[members[0]].out_shape, sum(ranks))
        plan = plan_linear(fmt, rows, "balanced", False)
        half = Call(Half(False, plan.forward.in_groups, plan.backward.in_groups), 0)
        z = half.run(rows, (factors,), None, None)
        columns = [z] if len(ranks) == 1 else torch.split(z[:, : fmt.rank], ranks, 1)
        for i in members:
            found[i] = columns[place_of[i]]
    return found


def _same(left: Factors, right: Factors) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


def _groups(factors: Any, name: str) -> list[Factors]:
    """Return a tuple of factors for each layer."""
    if isinstance(factors, Tensor) or not isinstance(factors, Sequence):
        raise TypeError(
            f"{name} must be a sequence with a sequence of factors for each layer, got "
            f"{type(factors).__name__}"
        )
    if not factors:
        raise ValueError(f"{name} must hold the factors of at least one layer, got none")
    return [checks.check_factor_group(group, f"{name}[{i}]") for i, group in enumerate(factors)]


def _each(values: Any, count: int, name: str) -> list[Tensor | None]:
    """Return a value or None for each layer."""
    if values is None:
        return [None] * count
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(
            f"{name} must be None or a sequence with a tensor or None for each layer, got "
            f"{type(values).__name__}"
        )
    if len(values) != count:
        raise ValueError(
            f"{name} must have one entry for each of {count} layers, got {len(values)}"
        )
    return list(values)
