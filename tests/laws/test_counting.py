"""Counted, not timed: bytes kept for the backward, tensors allocated, FLOPs, launches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import polyadic
from cases import COUNTED, FEW, few_cases, over, params
from cases import conv as conv_cases
from cases import linear as linear_cases
from cases.conv import conv
from cases.protocol import Case, Forced
from polyadic import ConvPlan, ConvRoute, LinearPlan, LinearRoute
from polyadic.nn import CPLinear
from polyadic.testing import Flops, LiveBytes, allocations, kept_bytes, launches

LINEAR, LINEAR_LAMBDA = linear_cases.COUNTED
CONV = conv_cases.COUNTED[0]
GROUPINGS = [(3,), (1, 2), (2, 1), (1, 1, 1)]
CONV_ROUTES = [
    ConvRoute(layout, depthwise)
    for layout in ("channels_last", "channels_first")
    for depthwise in ("merged", "separable")
]
linears = pytest.mark.parametrize("case", params([LINEAR, LINEAR_LAMBDA]))
counted = pytest.mark.parametrize("case", params(COUNTED))


def factorized(case: Case) -> list[Forced]:
    """The plans that rebuild no weight."""
    plans = [(forced, forced.get("plan")) for forced in case.plans()]
    return [
        forced
        for forced, plan in plans
        if plan is None or plan.forward.kind == plan.backward.kind == "factorized"
    ]


def kept(case: Case, dtype: torch.dtype = torch.float32, **kwargs: Any) -> int:
    """Bytes of the storages autograd keeps between forward and backward, factors among them."""
    leaves = case.leaves(dtype).map(Tensor.requires_grad_)
    return kept_bytes(lambda: case.cp(leaves, **kwargs))


def item(case: Case) -> int:
    """Bytes of a number of single precision."""
    return case.of_its_numbers(torch.float32).itemsize


def input_bytes(case: Case, itemsize: int | None = None) -> int:
    return (itemsize or item(case)) * math.prod(case.x_shape)


def factor_bytes(case: Case) -> int:
    """Of every factor and λ; in a joint tensor also of the layer's row, alone and times λ."""
    leaves = case.leaves(torch.float32)
    own = sum(t.nbytes for name, t in leaves.named().items() if name not in ("x", "bias"))
    joint = len(leaves.factors) > len(case.modes)
    return own + 2 * item(case) * case.rank * joint


def padded(case: Case) -> bool:
    """Whether the layer reads a padded copy of x."""
    return case.options.get("padding_mode", "zeros") != "zeros"


@over(lambda case: case.strides in ("contiguous", "channels_last") and not padded(case))
def test_bytes_kept_for_the_backward(case: Case) -> None:
    factors, one = factor_bytes(case), item(case) * case.rows * case.rank
    # Of indices both the distinct ones and where each stands among them may be kept.
    x = input_bytes(case) if case.differentiable else 2 * input_bytes(case, 8)
    assert kept(case, memory="balanced") <= x + one + factors
    assert kept(case, memory="least") <= x + factors
    if case.size:
        # The second map has the positions of the output, which padding can make more.
        groups = case.options.get("groups", 1)
        two = item(case) * case.rank * groups * case.grad_y().numel() // case.out_features
        assert kept(case, memory="fast") <= x + one + two + factors


@over(padded)
def test_bytes_kept_of_a_padded_input(case: Case) -> None:
    """Beside x, as torch's padding keeps it, its padded copy and maps of the copy's positions."""
    channels, *size = case.x_shape[len(case.lead) :]
    padding = case.make().padding
    if isinstance(padding, str):
        dilation = conv_cases.spread(case.options.get("dilation", 1), len(size))
        reach = zip(dilation, case.kernel, strict=True)
        padding = [d * (k - 1) * (padding == "same") for d, k in reach]
    most = math.prod(n + 2 * p for n, p in zip(size, padding, strict=True))
    positions = math.prod(case.lead) * most
    one = 4 * positions * case.rank * case.options.get("groups", 1)
    least = input_bytes(case) + 4 * positions * channels + factor_bytes(case)
    assert kept(case, memory="least") <= least
    assert kept(case, memory="balanced") <= least + one
    assert kept(case, memory="fast") <= least + 2 * one


@linears
def test_bytes_kept_by_linear_exactly(case: Case) -> None:
    x, factors, z = input_bytes(case), factor_bytes(case), 4 * case.rows * case.rank
    route = LinearRoute((3,), (3,))
    assert kept(case, plan=LinearPlan(route, route, keep="x and z")) == x + z + factors
    assert kept(case, plan=LinearPlan(route, route, keep="x")) == x + factors


def test_bytes_kept_by_conv_exactly() -> None:
    x, factors, z = input_bytes(CONV), factor_bytes(CONV), 4 * CONV.rows * CONV.rank
    for keep in (0, 1, 2):
        for route in CONV_ROUTES:
            plan = ConvPlan(route, route, keep)
            # Padding 1 keeps the size, so that both maps are equally large.
            assert kept(CONV, plan=plan) == x + keep * z + factors, plan


def test_bytes_kept_in_bf16_are_half() -> None:
    route = LinearRoute((3,), (3,))
    for case in (LINEAR, LINEAR_LAMBDA):
        full, half = (
            kept(case, dtype, plan=LinearPlan(route, route))
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert full == 2 * half


def test_kept_bytes_can_fail() -> None:
    """What autograd keeps of the same map written as two products is more."""
    leaves = LINEAR.leaves(torch.float32).map(Tensor.requires_grad_)
    limit = input_bytes(LINEAR) + 4 * LINEAR.rows * LINEAR.rank + factor_bytes(LINEAR)
    assert kept_bytes(lambda: LINEAR.dense(leaves)) > limit


@over(lambda case: case.explicit)
def test_nbytes_of_saved(case: Case) -> None:
    leaves = case.leaves()
    y, saved = case.cp_forward(leaves)
    parts = [saved.x, *saved.kept, *leaves.factors, leaves.weights]
    assert saved.nbytes == sum(case.exact.itemsize * t.numel() for t in parts if t is not None)
    assert all(t is not y for t in saved.kept)


def largest_allocation(case: Case, **kwargs: Any) -> int:
    """Entries of the largest tensor allocated in a forward and backward."""
    leaves = case.leaves(torch.float32).map(Tensor.requires_grad_)
    named, grad_y = leaves.named(), case.grad_y(torch.float32)
    made = allocations(
        lambda: torch.autograd.grad(case.cp(leaves, **kwargs), list(named.values()), grad_y)
    )
    assert len(made) > 4
    return max(allocation.elements for allocation in made)


def dense_size(case: Case) -> int:
    return math.prod(math.prod(group) for group in case.tensorized_shape)


@counted
def test_the_weight_is_never_built(case: Case) -> None:
    for forced in factorized(case):
        assert largest_allocation(case, **forced) < dense_size(case), forced
    for memory in ("fast", "balanced", "least"):
        assert largest_allocation(case, memory=memory) < dense_size(case)


@linears
def test_the_largest_tensor_of_the_khatri_rao_form(case: Case) -> None:
    """A Khatri-Rao product (M, R), or X or Y."""
    largest_ok = max(case.rows, case.rank) * max(case.in_features, case.out_features)
    assert largest_ok < dense_size(case)
    route = LinearRoute((3,), (3,))
    for keep in ("x and z", "x"):
        assert largest_allocation(case, plan=LinearPlan(route, route, keep)) <= largest_ok


@pytest.mark.parametrize("case", params([LINEAR, LINEAR_LAMBDA, CONV]))
def test_explicit_pairs_never_build_the_weight(case: Any) -> None:
    leaves, grad_y = case.leaves(torch.float32), case.grad_y(torch.float32)
    made = allocations(lambda: case.cp_backward(grad_y, case.cp_forward(leaves)[1]))
    assert 0 < max(allocation.elements for allocation in made) < dense_size(case)


def test_allocations_can_fail() -> None:
    """The same mode sees the weight where a plan, or dense torch, builds it."""
    linear, conv = LinearRoute((3,), (3,), "dense"), ConvRoute(kind="dense")
    for case, plan in (
        (LINEAR, LinearPlan(linear, linear)),
        (LINEAR, LinearPlan(LinearRoute((3,), (3,)), linear)),
        (CONV, ConvPlan(conv, conv)),
        (CONV, ConvPlan(ConvRoute(), conv)),
    ):
        assert largest_allocation(case, plan=plan) >= dense_size(case)
    made = allocations(lambda: LINEAR.dense(LINEAR.leaves(torch.float32)))
    assert max(allocation.elements for allocation in made) >= dense_size(LINEAR)


MAPS = conv("maps", (4, 4), (4, 4), (3, 3), 16, (4,), (16, 16), padding=1)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("route", CONV_ROUTES, ids=str)
def test_most_maps_live_at_once_in_training(route: ConvRoute, keep: int) -> None:
    """x, y, its gradient, Z1 and two more, dZ2 and dZ1 or dZ1 and dX; between stages one more."""
    leaves, plan = (
        MAPS.leaves(torch.float32).map(Tensor.requires_grad_),
        ConvPlan(route, route, keep),
    )
    named, grad_y = list(leaves.named().values()), MAPS.grad_y(torch.float32)
    with LiveBytes([grad_y, *named]) as live:
        y = MAPS.cp(leaves, plan=plan)
        torch.autograd.grad(y, named, grad_y)
    most, one = 6 + (route.depthwise == "separable"), leaves.x.nbytes
    assert most * one <= live.peak < (most + 0.5) * one


@pytest.mark.parametrize("memory", ["fast", "balanced", "least"])
def test_most_maps_live_at_once_in_inference(memory: str) -> None:
    """Beside x two: the map that is read and the map that is written."""
    leaves = MAPS.leaves(torch.float32)
    with torch.no_grad(), LiveBytes(leaves.named().values()) as live:
        y = MAPS.cp(leaves, memory=memory)
    assert y.nbytes == leaves.x.nbytes
    assert 3 * y.nbytes <= live.peak < 3.5 * y.nbytes


def flops(case: Case, plan: Any) -> tuple[int, int]:
    """FLOPs of a forward and backward, through autograd and through the explicit pair."""
    leaves, grad_y = case.leaves(torch.float32), case.grad_y(torch.float32)
    with Flops() as explicit:
        case.cp_backward(grad_y, case.cp_forward(leaves, plan=plan)[1])
    leaves = leaves.map(Tensor.requires_grad_)
    with Flops() as autograd:
        case.cp(leaves, plan=plan).backward(grad_y)
    return explicit.total, autograd.total


@linears
def test_flops_of_linear(case: Case) -> None:
    """2·B·R·(M+N) forward, twice that backward; once more 2·B·R·M where Z is recomputed."""
    m, n, r, b = case.in_features, case.out_features, case.rank, case.rows
    for inner in GROUPINGS:
        for outer in GROUPINGS:
            route = LinearRoute(inner, outer)
            explicit, autograd = flops(case, LinearPlan(route, route, "x and z"))
            # Of several in groups the partial sums enter the factors' gradients: one GEMM more.
            again = 2 * b * r * m * (len(inner) > 1)
            assert explicit == autograd == 6 * b * r * (m + n) + again
            less, _ = flops(case, LinearPlan(route, route, "x"))
            assert less == explicit + 2 * b * r * m


@linears
def test_flops_of_the_explicit_khatri_rao_form_exactly(case: Case) -> None:
    m, n, r, b = case.in_features, case.out_features, case.rank, case.rows
    route = LinearRoute((3,), (3,))
    assert flops(case, LinearPlan(route, route)) == (6 * b * r * (m + n),) * 2


def test_flops_of_dense_torch_are_more() -> None:
    """The counter counts: dense torch needs 3·2·B·M·N besides building W."""
    leaves = LINEAR.leaves(torch.float32).map(Tensor.requires_grad_)
    weight = LINEAR.weight(leaves).detach().requires_grad_()
    with Flops() as counter:
        LINEAR.apply(leaves.x, weight, leaves.bias).sum().backward()
    b, m, n = LINEAR.rows, LINEAR.in_features, LINEAR.out_features
    assert counter.total == 6 * b * m * n


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_flops_of_conv(layout: str) -> None:
    """Projections like a linear map's on all positions; the depthwise convolution besides."""
    b, r, taps = CONV.rows, CONV.rank, 9
    channels = CONV.in_features + CONV.out_features
    route, grad_y = ConvRoute(layout, "merged"), CONV.grad_y(torch.float32)
    with Flops() as counter:
        _, saved = CONV.cp_forward(CONV.leaves(torch.float32), plan=ConvPlan(route, route, 2))
    assert counter.total == 2 * b * r * (channels + taps)
    with Flops() as counter:
        CONV.cp_backward(grad_y, saved)
    assert counter.total == 4 * b * r * (channels + taps)


def test_only_the_gradients_asked_for_are_computed() -> None:
    """A frozen layer's backward to x costs 2·B·R·(M+N), nothing for the factors."""
    m, n, r, b = LINEAR.in_features, LINEAR.out_features, LINEAR.rank, LINEAR.rows
    leaves = LINEAR.leaves(torch.float32)
    route = LinearRoute((3,), (3,))
    leaves.x.requires_grad_()
    y = LINEAR.cp(leaves, plan=LinearPlan(route, route))
    with Flops() as counter:
        y.sum().backward()
    assert counter.total == 2 * b * r * (m + n)


@few_cases
def test_no_gradient_keeps_nothing(case: Case) -> None:
    leaves = case.leaves(torch.float32)
    assert kept_bytes(lambda: case.cp(leaves)) == 0
    leaves.map(Tensor.requires_grad_)

    def without_gradients() -> Tensor:
        with torch.no_grad():
            return case.cp(leaves)

    assert kept_bytes(without_gradients) == 0
    assert not without_gradients().requires_grad


@pytest.mark.parametrize("case", params([c for c in FEW if c.lead and c.differentiable]))
def test_launches_do_not_grow_with_the_batch(case: Case) -> None:
    """Nothing is done sample by sample."""
    forced = next(case.plans())

    def launched(batch: int) -> int:
        leaves = case.resized(batch).leaves().map(Tensor.requires_grad_)
        return launches(lambda: case.cp(leaves, **forced).sum().backward())

    assert 0 < launched(3) == launched(12)


def test_fast_memory_may_keep_the_khatri_rao_products() -> None:
    """What explain says is kept is what autograd keeps, to the byte."""
    layer = CPLinear(256, 128, rank=16, memory="fast")
    found = polyadic.explain(layer, batch=32)
    assert found.chosen.plan.keep == "autograd"
    x = torch.randn(32, 256, requires_grad=True)
    assert kept_bytes(lambda: layer(x), layer.parameters()) == found.chosen.kept_bytes
