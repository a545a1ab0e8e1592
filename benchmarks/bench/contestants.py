"""Who competes: the same layer as others compute it and as we do, from the same numbers.

Every contestant gets the input x and the factors of one CP tensor, or the dense weight they stand
for, and returns a differentiable function of x and its own parameters.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench.cases import Case, ConvCase, LinearCase
from benchmarks.bench.plans import chosen_plan, forced_plans
from benchmarks.bench.problem import (
    Built,
    Contestant,
    Form,
    Layout,
    NotApplicableError,
    Problem,
    dense_weight,
    in_channels_last,
    leaf,
)
from polyadic import functional, reference
from polyadic.interop.tltorch import accelerate_tltorch
from polyadic.kernels.multilinear import khatri_rao
from polyadic.nn import CPConv2d, CPLinear
from polyadic.nn.freezing import freeze
from polyadic.plans import Memory
from polyadic.tensor import CPTensor


def _dense(problem: Problem, last: bool = False) -> Built:
    """Torch's layer; ``last``: x and weight lie in channels_last."""
    case, x = problem.case, leaf(problem.x)
    layer: nn.Module
    if isinstance(case, LinearCase):
        m, n = case.format.in_features, case.format.out_features
        layer = nn.Linear(m, n, bias=False, device="meta")
    else:
        layer = nn.Conv2d(
            case.format.in_channels,
            case.format.out_channels,
            case.kernel,
            case.stride,
            case.padding,
            bias=False,
            device="meta",
        )
    weight = dense_weight(case, "factors", [f.detach() for f in problem.cp.factors])
    if last:
        x, weight = in_channels_last(x), in_channels_last(weight)
    layer.weight = nn.Parameter(weight.detach() if last else weight.contiguous())
    return Built(layer, x, (layer.weight,), "weight")


def _auto(problem: Problem, last: bool = False, memory: Memory = "balanced") -> Built:
    """Our layer, the planner choosing; ``last``: x lies in channels_last."""
    case, x = problem.case, in_channels_last(problem.x) if last else leaf(problem.x)
    where: dict[str, Any] = {"memory": memory, "device": x.device, "dtype": x.dtype}
    layer: CPLinear | CPConv2d
    if isinstance(case, LinearCase):
        f = case.format
        layer = CPLinear(
            f.in_features,
            f.out_features,
            bias=False,
            rank=case.rank,
            in_shape=case.in_shape,
            out_shape=case.out_shape,
            **where,
        )
    else:
        layer = CPConv2d(
            case.format.in_channels,
            case.format.out_channels,
            case.kernel,
            case.stride,
            case.padding,
            bias=False,
            rank=case.rank,
            in_shape=case.in_shape,
            out_shape=case.out_shape,
            **where,
        )
    with torch.no_grad():
        for own, given in zip(layer.cp.factors, problem.cp.factors, strict=True):
            own.copy_(given)
    plan = chosen_plan(case, x.detach(), memory)
    return Built(layer, x, tuple(layer.cp.factors), "factors", plan)


def _frozen(problem: Problem) -> Built:
    built, case = _auto(problem), problem.case
    layer = built.forward
    assert isinstance(layer, nn.Module)
    freeze(layer, batch=case.batch, size=getattr(case, "size", 1))
    return Built(layer, built.x, built.parameters, "factors")


class _Planned(nn.Module):
    """Our layer with a plan forced on it: the same overhead as the layer, but for the choice."""

    def __init__(self, case: Case, cp: CPTensor, plan: Any) -> None:
        super().__init__()
        self.case, self.plan = case, plan
        self.cp = CPTensor.from_factors(cp.tensorized_shape, list(cp.factors))

    def forward(self, x: Tensor) -> Tensor:
        case, groups = self.case, self.cp.factor_groups()
        if isinstance(case, LinearCase):
            ins, outs = groups
            return functional.cp_linear(x, ins, outs, plan=self.plan)
        outs, ins, kernels = groups
        return functional.cp_conv(
            x, outs, ins, kernels, stride=case.stride, padding=case.padding, plan=self.plan
        )


def _forced(problem: Problem, plan: Any) -> Built:
    layer = _Planned(problem.case, problem.cp, plan)
    return Built(layer, leaf(problem.x), tuple(layer.cp.factors), "factors", plan)


def _tltorch(problem: Problem, how: str, path: bool = True) -> Built:
    """Their layer as their constructor makes it, holding our numbers.

    Their convolution has one factor per channel dimension, so it gets the Khatri-Rao products.
    λ stays ones and is given no gradient, which spares them work that no other contestant does.
    """
    import tltorch

    case, x = problem.case, leaf(problem.x)
    where: dict[str, Any] = {"device": x.device, "dtype": x.dtype}
    form: Form
    if isinstance(case, LinearCase):
        layer = tltorch.FactorizedLinear(
            case.in_shape,
            case.out_shape,
            bias=False,
            factorization="cp",
            rank=case.rank,
            implementation=how,
            **where,
        )
        ins, outs = problem.groups()
        factors, form = [*outs, *ins], "out_in"
    else:
        layer = tltorch.FactorizedConv(
            case.format.in_channels,
            case.format.out_channels,
            (case.kernel, case.kernel),
            stride=case.stride,
            padding=case.padding,
            factorization="cp",
            rank=case.rank,
            implementation=how,
            **where,
        )
        outs, ins, kernels = problem.groups()
        factors, form = [khatri_rao(outs), khatri_rao(ins), *kernels], "flat"
    with torch.no_grad():
        layer.weight.weights.fill_(1).requires_grad_(False)
        for own, given in zip(layer.weight.factors, factors, strict=True):
            own.copy_(given)
    return Built(_with_path(layer, path), x, tuple(layer.weight.factors), form)


def _accelerated(problem: Problem, how: str) -> Built:
    """The same layer of theirs inside ``accelerate_tltorch``, entered at each call."""
    built = _tltorch(problem, how)

    def forward(x: Tensor) -> Tensor:
        with accelerate_tltorch():
            return built.forward(x)

    return Built(forward, built.x, built.parameters, built.form)


def _with_path(forward: Callable[[Tensor], Tensor], path: bool) -> Callable[[Tensor], Tensor]:
    """Run with torch's contraction order by opt_einsum, or from left to right as without it."""
    backend: Any = torch.backends.opt_einsum
    if path and not backend.is_available():
        raise NotApplicableError("opt_einsum is not installed")
    if path:
        return forward

    def left_to_right(x: Tensor) -> Tensor:
        before, backend.enabled = backend.enabled, False
        try:
            return forward(x)
        finally:
            backend.enabled = before

    return left_to_right


def _einsum(problem: Problem) -> Built:
    """One einsum over x and all factors under plain autograd, in opt_einsum's order.

    A convolution reads its input through a strided view of the windows.
    """
    case, x, factors = problem.case, leaf(problem.x), problem.factors()
    letters = iter(string.ascii_letters.replace("b", "").replace("r", ""))
    groups = ["".join(next(letters) for _ in group) for group in case.tensorized_shape]
    operands = ",".join(f"{mode}r" for group in groups for mode in group)
    if isinstance(case, LinearCase):
        ins, outs = groups
        equation = f"b{ins},{operands}->b{outs}"

        def linear(x: Tensor) -> Tensor:
            y = torch.einsum(equation, x.view(-1, *case.in_shape), *factors)
            return y.reshape(case.y_shape)

        return Built(_with_path(linear, True), x, tuple(factors), "factors")
    outs, ins, kernels = groups
    h, w = next(letters), next(letters)
    equation = f"b{ins}{h}{w}{kernels},{operands}->b{outs}{h}{w}"
    k, s, p = case.kernel, case.stride, case.padding

    def conv(x: Tensor) -> Tensor:
        windows = F.pad(x, (p, p, p, p)).unfold(2, k, s).unfold(3, k, s)
        windows = windows.view(-1, *case.in_shape, *windows.shape[2:])
        return torch.einsum(equation, windows, *factors).reshape(case.y_shape)

    return Built(_with_path(conv, True), x, tuple(factors), "factors")


class _ReferenceStep(torch.autograd.Function):
    """The reference's forward and its own backward behind autograd."""

    @staticmethod
    def forward(ctx: Any, case: Case, x: Tensor, *factors: Tensor) -> Tensor:
        cp = SimpleNamespace(tensorized_shape=case.tensorized_shape, factors=factors)
        if isinstance(case, LinearCase):
            y, saved = reference.cp_times_matrix_fwd(cp, x)
        else:
            y, saved = reference.cp_conv_fwd(cp, x, len(case.out_shape))
        ctx.case, ctx.count = case, len(factors)
        ctx.save_for_backward(*factors, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        factors, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        cp = SimpleNamespace(tensorized_shape=ctx.case.tensorized_shape, factors=factors)
        linear = isinstance(ctx.case, LinearCase)
        backward = reference.cp_times_matrix_bwd if linear else reference.cp_conv_bwd
        factor_grads, d_x = backward(cp, grads[0], saved)
        return None, d_x, *factor_grads


def _reference(problem: Problem) -> Built:
    case, x, factors = problem.case, leaf(problem.x), problem.factors()
    if isinstance(case, ConvCase) and case.stride != 1:
        raise NotApplicableError("the reference has stride 1 only")

    def forward(x: Tensor) -> Tensor:
        y: Tensor = _ReferenceStep.apply(case, x, *factors)
        return y

    return Built(forward, x, tuple(factors), "factors")


def _compiled(build: Callable[[Problem], Built]) -> Callable[[Problem], Built]:
    def build_compiled(problem: Problem) -> Built:
        built = build(problem)
        return Built(
            torch.compile(built.forward), built.x, built.parameters, built.form, built.plan
        )

    return build_compiled


def contestants(case: Case, *, compiled: bool = False) -> list[Contestant]:
    """All who compete in a cell; in a scaling cell those whose growth is of interest.

    Args:
        case: the cell.
        compiled: also dense and our choice under torch.compile, which takes long.
    """
    entries = [
        Contestant("polyadic", "ours", _auto),
        Contestant("dense", "dense", _dense),
        Contestant("tltorch factorized", "tltorch", partial(_tltorch, how="factorized")),
    ]
    if case.group == "scaling":
        return entries
    least = partial(_auto, memory="least")
    entries += [
        Contestant("polyadic, least memory", "ours", least),
        Contestant("polyadic, frozen", "ours", _frozen, inference=True),
    ]
    accelerated = partial(_accelerated, how="factorized")
    entries.append(Contestant("tltorch factorized, accelerated", "accelerated", accelerated))
    if isinstance(case, LinearCase):
        left_to_right = partial(_tltorch, how="factorized", path=False)
        name = "tltorch factorized, no opt_einsum"
        entries.append(Contestant(name, "tltorch", left_to_right, memory=2**30))
    else:
        last: Layout = "channels_last"
        ours, dense = partial(_auto, last=True), partial(_dense, last=True)
        entries += [
            Contestant("tltorch mobilenet", "tltorch", partial(_tltorch, how="mobilenet")),
            Contestant("polyadic, channels_last x", "ours", ours, last),
            Contestant("dense, channels_last x", "dense", dense, last),
        ]
    rebuilt = partial(_tltorch, how="reconstructed")
    entries += [
        Contestant("tltorch reconstructed", "tltorch", rebuilt, memory=2**30),
        Contestant("einsum", "einsum", _einsum, memory=2**32),
        Contestant("reference", "reference", _reference, memory=2**32),
    ]
    if compiled:
        entries += [
            Contestant("polyadic, compiled", "ours", _compiled(_auto), compiled=True),
            Contestant("dense, compiled", "dense", _compiled(_dense), compiled=True),
        ]
    return entries + [
        Contestant(name, "plan", partial(_forced, plan=plan), plan=plan)
        for name, plan in forced_plans(case).items()
    ]
