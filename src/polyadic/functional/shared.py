"""CP linear maps of one input: several layers that read it once, such as query, key and value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyadic import checks
from polyadic._torch import is_spread
from polyadic.formats import LinearFormat, Shape
from polyadic.functional.boundary import Asked, Call, Groups, autocast, settled
from polyadic.functional.linear import cp_linear
from polyadic.functional.spread import Layout, spread_call
from polyadic.kernels import cpu
from polyadic.kernels.shared import Half
from polyadic.planner.ask import plan_linear
from polyadic.plans import LinearPlan, Memory

Factors = tuple[Tensor, ...]


@dataclass(frozen=True)
class _InHalf:
    """The in half of layers with the same in modes.

    Args:
        call: of factors that stand side by side.
        groups: which groups of in factors these are, each once.
        ranks: of each group.
        members: for each layer its index, and the place of its group among ``groups``.
    """

    call: Call
    groups: tuple[int, ...]
    ranks: tuple[int, ...]
    members: tuple[tuple[int, int], ...]

    def run(self, rows: Tensor, ins: Sequence[Factors]) -> Sequence[Tensor]:
        """Return Z (B, R) of each group, by one product."""
        if len(self.groups) == 1:
            return (self.call.run(rows, (ins[self.groups[0]],), None, None),)
        sides = zip(*[ins[i] for i in self.groups], strict=True)
        factors = tuple([torch.cat(side, 1) for side in sides])
        z = self.call.run(rows, (factors,), None, None)
        return torch.split(z[:, : sum(self.ranks)], list(self.ranks), 1)


@dataclass(frozen=True)
class _Settled(Call):
    """A call that has been checked.

    Args:
        in_halves: one for each kind of in modes.
        out_halves: one for each layer.
        lead: leading dimensions of x, None if there is one.
        apart: whether each layer is called by itself, because that is faster.
    """

    in_halves: tuple[_InHalf, ...] = ()
    out_halves: tuple[Call, ...] = ()
    lead: Shape | None = None
    apart: bool = False


def cp_linear_shared(
    x: Tensor,
    in_factors: Sequence[Sequence[Tensor]],
    out_factors: Sequence[Sequence[Tensor]],
    biases: Sequence[Tensor | None] | None = None,
    *,
    weights: Sequence[Tensor | None] | None = None,
    plan: LinearPlan | None = None,
    memory: Memory = "balanced",
) -> tuple[Tensor, ...]:
    """Linear maps of one input by matrices in CP format, y_l = x W_l + bias_l, reading x once.

    W_l (M, N_l) = (A_l,1 ⊙ … ⊙ A_l,D) diag(λ_l) (C_l,1 ⊙ … ⊙ C_l,E)ᵀ. The in factors of layers
    with the same in modes are put side by side, so that one product with ΣR columns makes every
    Z_l = x KA_l, and one product makes the gradient of x. Layers whose in factors are the very same
    tensors, as those of a joint weight, share their Z. The results are those of separate calls of
    ``cp_linear``, up to rounding. Separate calls are made where they are faster: for one layer, and
    on a CPU for a small x or without gradients, if no in factors are shared.

    The forward takes 2 B (M ΣR + Σ R_l N_l) FLOPs and the backward twice as many, as separate
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
        plan: None, as a plan is of one layer's format and the planner chooses for all together.
        memory: ``"balanced"`` or ``"fast"``, which keep the same here; ``"least"`` is refused.

    Returns:
        For each layer (..., N_l), in x's dtype (under autocast in autocast's).

    Raises:
        TypeError: an argument is of the wrong type, or dtypes are not floating or differ.
        ValueError: there are no layers, sequences differ in length, shapes, ranks or devices do not
            fit together, or an option is not supported.
    """
    if plan is not None:
        raise ValueError(
            "plan= is not supported by cp_linear_shared, whose planner chooses for all layers "
            "together; call cp_linear for each layer to give it a plan"
        )
    if checks.check_memory(memory) == "least":
        raise ValueError(
            'memory="least" is not supported by cp_linear_shared, which keeps the (B, ΣR) '
            'intermediate of all layers; call cp_linear with memory="least" for each layer'
        )
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
    beside = [tuple([t for t in tensors if t is not None]) for tensors in (bias, scale)]
    which = [tuple([t is not None for t in tensors]) for tensors in (bias, scale)]
    firsts = tuple([next(j for j in range(count) if _same(ins[i], ins[j])) for i in range(count)])
    found, _ = settled(_settle, x, (*ins, *outs, *beside), None, None, (firsts, *which), cast)
    if found.apart:
        return tuple(
            [cp_linear(x, ins[i], outs[i], bias[i], weights=scale[i]) for i in range(count)]
        )
    rows = x if found.lead is None else x.reshape(math.prod(found.lead), x.shape[-1])
    projected: list[Any] = [None] * count
    for half in found.in_halves:
        z = half.run(rows, ins)
        for i, place in half.members:
            projected[i] = z[place]
    results = []
    for i, out_half in enumerate(found.out_halves):
        own = bias[i]
        if own is not None and cast:
            own = own.to(x.dtype)
        y = out_half.run(projected[i], (outs[i],), own, scale[i])
        results.append(y if found.lead is None else y.view(*found.lead, y.shape[1]))
    return tuple(results)


def better_apart(x: Tensor) -> bool:
    """Whether layers of x with factors of their own are faster when each is called by itself."""
    return x.is_cpu and not torch.compiler.is_compiling() and cpu.better_apart(x.numel())


def _settle(asked: Asked) -> tuple[_Settled, Groups]:
    """Check and plan a call.

    Its groups are the in factors of each layer, the out factors of each, and all biases and all λ
    there are. Its options say for each layer which is the first one with the very same in factors,
    whether it has a bias, and whether it has a λ.
    """
    x, groups, cast = asked.x, asked.groups, asked.cast
    firsts, biased, scaled = asked.options
    count = len(firsts)
    ins, outs = groups[:count], groups[count : 2 * count]
    biases, scales = map(iter, groups[2 * count :])
    formats, out_halves = [], []
    for i in range(count):
        scale = next(scales) if scaled[i] else None
        in_shape, out_shape, (rank,) = checks.check_factors(
            scale, **{f"in_factors[{i}]": ins[i], f"out_factors[{i}]": outs[i]}
        )
        fmt = LinearFormat(in_shape, out_shape, rank)
        formats.append(fmt)
        checks.check_like_factors(x, ins[i][0], "x", cast=cast)
        checks.check_last_dimension(x, fmt.in_features, "x")
        own = next(biases) if biased[i] else None
        checks.check_bias(own, fmt.out_features, ins[i][0], cast=cast)
    lead = None if x.dim() == 2 else tuple(x.shape[:-1])
    rows = x if lead is None else x.reshape(math.prod(lead), x.shape[-1])
    for i, fmt in enumerate(formats):
        plan = plan_linear(fmt, rows, "balanced", False)
        forward, backward = plan.forward.out_groups, plan.backward.out_groups
        if scaled[i]:
            # λ is one more factor, in front, with a mode of size 1.
            forward, backward = ((first + 1, *rest) for first, *rest in (forward, backward))
        out_halves.append(Call(Half(True, forward, backward), 0))
    in_halves = tuple(_in_halves(rows, formats, firsts))
    apart = count == 1 or (len(set(firsts)) == count and better_apart(x))
    calls = in_halves, tuple(out_halves)
    return _Settled(out_halves[0].map, 0, None, None, *calls, lead, apart), groups


def _in_halves(
    rows: Tensor, formats: Sequence[LinearFormat], firsts: Sequence[int]
) -> Iterator[_InHalf]:
    """Put the layers with the same in modes together; factors that several have are used once."""
    by_modes: dict[Shape, list[int]] = {}
    for i, fmt in enumerate(formats):
        by_modes.setdefault(fmt.in_shape, []).append(i)
    for modes, members in by_modes.items():
        groups = list(dict.fromkeys([firsts[i] for i in members]))
        ranks = [formats[i].rank for i in groups]
        fmt = LinearFormat(modes, formats[members[0]].out_shape, sum(ranks))
        plan = plan_linear(fmt, rows, "balanced", False)
        call = Call(Half(False, plan.forward.in_groups, plan.backward.in_groups), 0)
        places = tuple([(i, groups.index(firsts[i])) for i in members])
        yield _InHalf(call, tuple(groups), tuple(ranks), places)


def _spread(found: Layout, x: Tensor, groups: Any, biases: Any, weights: Any) -> tuple[Tensor, ...]:
    """What one process computes of layers whose factors are DTensors."""
    if found.ins or found.outs:
        raise ValueError(
            "layers that are called together cannot have sharded features; call each by itself, or "
            "use polyadic.distributed.RankParallel"
        )
    half = len(groups) // 2
    return cp_linear_shared(x, groups[:half], groups[half:], biases, weights=weights)


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
